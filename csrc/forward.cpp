// The operators of the forward pass on CPU tensors (src/batchnorm/ops/schema.py), registered with torch's dispatcher.
//
// LibTorch's stable ABI only (TORCH_TARGET_VERSION 2.10): one binary serves several versions of torch and Python.

#include "forward.h"

#include <torch/csrc/stable/library.h>

#include <tuple>

#include "running.h"

namespace batchnorm {
namespace {

std::tuple<Tensor, Tensor, Tensor> stats(Tensor input, Maybe real) {
  const Dense x(input);
  const Mask mask(real, x);
  BatchStatistics batch(x.at.channels);
  const Forward forward{x.at, Activation::none, x.data(), nullptr, mask.data, nullptr, nullptr, nullptr, nullptr, nullptr, false};
  const Plan plan(x.at, x.x.element_size());
  with_statistics(plan, x, mask, forward, batch, kNothing, kNothing);
  return {statistic(static_cast<double>(mask.count)), statistics(batch.mean),
          statistics(batch.m2)};
}

std::tuple<Tensor, Tensor> normalize(Tensor input, Tensor mean, Tensor invstd, Maybe weight, Maybe bias, Maybe residual,
                                     Maybe real, std::string activation) {
  Normalization all(input, weight, bias, residual, real, activation);
  const int64_t channels = all.x.at.channels;
  const auto means = doubles(mean, channels, "mean"), invstds = doubles(invstd, channels, "invstd");
  for (int64_t c = 0; c < channels; ++c) all.set(c, means[c], invstds[c]);
  const auto& kernels = batchnorm::kernels(all.x.dtype);
  all.plan().apply_only([&](const Range& range) { kernels.normalize(all.problem, range); });
  return {all.result(), all.sign};
}

Tensor infer(Tensor input, Tensor running_mean, Tensor running_var, Maybe weight, Maybe bias, Maybe residual, Maybe real,
             double eps, std::string activation) {
  Normalization all(input, weight, bias, residual, real, activation, false);
  const int64_t channels = all.x.at.channels;
  const auto mean = doubles(running_mean, channels, "running_mean");
  const auto var = doubles(running_var, channels, "running_var");
  for (int64_t c = 0; c < channels; ++c) all.set(c, mean[c], 1 / std::sqrt(var[c] + eps));
  const auto& kernels = batchnorm::kernels(all.x.dtype);
  all.plan().apply_only([&](const Range& range) { kernels.normalize(all.problem, range); });
  return all.result();
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> train_forward(Tensor input, Maybe weight, Maybe bias,
                                                                         Maybe residual, Maybe real, double eps,
                                                                         std::string activation) {
  const TrainForward done(input, weight, bias, residual, real, eps, activation);
  return {done.all.result(),
          statistic(done.count()),
          statistics(done.batch.mean),
          statistics(done.var),
          statistics(done.invstd),
          done.all.sign};
}

// train_forward and update_running in one call, with what the backward needs in one tensor: mean, invstd, count. For small
// tensors the calls and the tensors are what a step costs.
std::tuple<Tensor, Tensor, Tensor> train_step(Tensor input, Maybe weight, Maybe bias, Maybe residual, Maybe real,
                                              Maybe running_mean, Maybe running_var, double eps,
                                              std::optional<double> momentum, Maybe num_batches, int64_t ddof,
                                              std::string activation) {
  const TrainForward done(input, weight, bias, residual, real, eps, activation);
  if (running_mean && running_var) {
    move_running(*running_mean, *running_var, done.batch.mean, done.var, done.count(), momentum, num_batches, ddof);
  }
  const int64_t channels = done.all.x.at.channels;
  Tensor saved = fresh_vector(2 * channels + 1, ScalarType::Double);
  auto* values = static_cast<double*>(saved.mutable_data_ptr());
  std::copy_n(done.batch.mean.begin(), channels, values);
  std::copy_n(done.invstd.begin(), channels, values + channels);
  values[2 * channels] = done.count();
  return {done.all.result(), saved, done.all.sign};
}

}  // namespace
}  // namespace batchnorm

STABLE_TORCH_LIBRARY_IMPL(batchnorm, CPU, m) {
  m.impl("stats", TORCH_BOX(&batchnorm::stats));
  m.impl("normalize", TORCH_BOX(&batchnorm::normalize));
  m.impl("infer", TORCH_BOX(&batchnorm::infer));
  m.impl("train_forward", TORCH_BOX(&batchnorm::train_forward));
  m.impl("train_step", TORCH_BOX(&batchnorm::train_step));
}
