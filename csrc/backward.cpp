// The operators of the backward pass on CPU tensors (src/batchnorm/ops/schema.py).

#include "backward.h"

#include <torch/csrc/stable/library.h>

#include <tuple>

namespace batchnorm {
namespace {

Tensor nothing_like(const Tensor& x) { return fresh_vector(0, x.scalar_type()); }

std::tuple<Tensor, Tensor> grad_sums(Tensor grad, Tensor input, Tensor mean, Tensor invstd, Maybe weight, Maybe bias,
                                     Maybe residual, Maybe sign, Maybe mask, std::string activation) {
  const int64_t channels = input.size(1);
  const Gradient g(grad, input, doubles(mean, channels, "mean"), doubles(invstd, channels, "invstd"),
                   weight, bias, residual, sign, mask, activation);
  const auto& kernels = batchnorm::kernels(g.x.dtype);
  std::vector<double> sum_dz(g.x.at.channels + kPadding), sum_dz_xhat(g.x.at.channels + kPadding);
  g.plan().run([&](const Range& range, double* s, double* q) { kernels.grad_sums(g.problem, range, s, q); },
               [&](int64_t c0, int64_t c1, const double* s, const double* q) {
                 for (int64_t c = c0; c < c1; ++c) {
                   sum_dz[c] = s[c];
                   sum_dz_xhat[c] = g.normalized(c, s[c], q[c]);
                 }
               },
               kNothing);
  return {statistics(sum_dz), statistics(sum_dz_xhat)};
}

std::tuple<Tensor, Tensor> grad_input(Tensor grad, Tensor input, Tensor mean, Tensor invstd, Maybe weight, Maybe bias,
                                      Maybe residual, Maybe sign, Maybe mask, std::string activation, Tensor count,
                                      Tensor sum_dz, Tensor sum_dz_xhat, bool want_residual) {
  const int64_t channels = input.size(1);
  Gradient g(grad, input, doubles(mean, channels, "mean"), doubles(invstd, channels, "invstd"),
             weight, bias, residual, sign, mask, activation);
  const auto sums = doubles(sum_dz, channels, "sum_dz");
  const auto products = doubles(sum_dz_xhat, channels, "sum_dz_xhat");
  const double n = std::max(1.0, scalar(count, "count"));
  for (int64_t c = 0; c < g.x.at.channels; ++c) g.set(c, n, sums[c], products[c]);
  Tensor dx = g.x.output(), dresidual = want_residual ? g.x.output() : nothing_like(input);
  g.problem.dx = dx.mutable_data_ptr();
  g.problem.dresidual = want_residual ? dresidual.mutable_data_ptr() : nullptr;
  const auto& kernels = batchnorm::kernels(g.x.dtype);
  g.plan().apply_only([&](const Range& range) { kernels.grad_input(g.problem, range); });
  return {g.x.finished(dx), want_residual ? g.x.finished(dresidual) : dresidual};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> whole_backward(Gradient& g, const Tensor& input, const Maybe& weight,
                                                          const Maybe& bias, double count, bool want_residual) {
  const double n = std::max(1.0, count);
  Tensor dx = g.x.output(), dresidual = want_residual ? g.x.output() : nothing_like(input);
  g.problem.dx = dx.mutable_data_ptr();
  g.problem.dresidual = want_residual ? dresidual.mutable_data_ptr() : nullptr;
  const auto& kernels = batchnorm::kernels(g.x.dtype);
  std::vector<double> dweight(g.x.at.channels + kPadding), dbias(g.x.at.channels + kPadding);
  g.plan().run([&](const Range& range, double* s, double* q) { kernels.grad_sums(g.problem, range, s, q); },
               [&](int64_t c0, int64_t c1, const double* s, const double* q) {
                 for (int64_t c = c0; c < c1; ++c) {
                   dbias[c] = s[c];
                   dweight[c] = g.normalized(c, s[c], q[c]);
                   g.set(c, n, dbias[c], dweight[c]);
                 }
               },
               [&](const Range& range) { kernels.grad_input(g.problem, range); });
  return {g.x.finished(dx), parameter_gradient(weight, dweight),
          parameter_gradient(bias, dbias),
          want_residual ? g.x.finished(dresidual) : dresidual};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> train_backward(Tensor grad, Tensor input, Tensor mean, Tensor invstd,
                                                          Maybe weight, Maybe bias, Maybe residual, Maybe sign,
                                                          Maybe mask, std::string activation, Tensor count,
                                                          bool want_residual) {
  const int64_t channels = input.size(1);
  Gradient g(grad, input, doubles(mean, channels, "mean"), doubles(invstd, channels, "invstd"),
             weight, bias, residual, sign, mask, activation);
  return whole_backward(g, input, weight, bias, scalar(count, "count"), want_residual);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> train_step_backward(Tensor grad, Tensor input, Tensor saved, Maybe weight,
                                                               Maybe bias, Maybe residual, Maybe sign, Maybe mask,
                                                               std::string activation, bool want_residual) {
  const int64_t channels = input.size(1);
  const auto values = doubles(saved, 2 * channels + 1, "saved");
  std::vector<double> mean(channels + kPadding), invstd(channels + kPadding);
  std::copy_n(values.begin(), channels, mean.begin());
  std::copy_n(values.begin() + channels, channels, invstd.begin());
  Gradient g(grad, input, mean, invstd, weight, bias, residual, sign, mask, activation);
  return whole_backward(g, input, weight, bias, values[2 * channels], want_residual);
}

}  // namespace
}  // namespace batchnorm

STABLE_TORCH_LIBRARY_IMPL(batchnorm, CPU, m) {
  m.impl("grad_sums", TORCH_BOX(&batchnorm::grad_sums));
  m.impl("grad_input", TORCH_BOX(&batchnorm::grad_input));
  m.impl("train_backward", TORCH_BOX(&batchnorm::train_backward));
  m.impl("train_step_backward", TORCH_BOX(&batchnorm::train_step_backward));
}
