// Registers the kernels as the CPU implementation of operators that Python has defined (src/batchnorm/ops/schema.py).
//
// LibTorch's stable ABI only (TORCH_TARGET_VERSION 2.10): one binary serves several versions of torch and Python.

#include <torch/csrc/stable/library.h>

#include <tuple>

#include "operators.h"

namespace {

using batchnorm::Activation;
using batchnorm::Backward;
using batchnorm::Coefficients;
using batchnorm::Dense;
using batchnorm::Forward;
using batchnorm::ForwardCoefficients;
using batchnorm::kPadding;
using batchnorm::Mask;
using batchnorm::Plan;
using batchnorm::Range;
using batchnorm::ScalarType;
using batchnorm::Tensor;
using Maybe = std::optional<Tensor>;

constexpr auto kNothing = [](auto&&...) {};

bool needs_sign(Activation activation, const Maybe& residual) {
  return residual.has_value() && (activation == Activation::relu || activation == Activation::leaky_relu);
}

Tensor new_sign(const Dense& x, bool wanted) {
  const int64_t runs = x.at.rows ? x.at.n * x.at.positions : x.at.n * x.at.channels;
  return torch::stable::new_empty(x.x, {wanted ? runs * x.at.run_bytes() : 0}, ScalarType::Byte);
}

Tensor nothing_like(const Tensor& x) { return torch::stable::new_empty(x, {0}); }

// The channel's first real value, for the sums to be taken about: deviations from it have no large part in common.
double origin_of(const Dense& x, const Mask& mask, int64_t channel) {
  const int64_t n = mask.first / x.at.positions, p = mask.first % x.at.positions;
  const int64_t index = x.at.rows ? mask.first * x.at.channels + channel
                                  : (n * x.at.channels + channel) * x.at.positions + p;
  const double value = batchnorm::value_at(x.data(), x.dtype, index);
  return std::isfinite(value) ? value : 0.0;
}

struct BatchStatistics {
  std::vector<double> origin, mean, m2;

  explicit BatchStatistics(int64_t channels)
      : origin(channels + kPadding), mean(channels + kPadding), m2(channels + kPadding) {}
  void finish(int64_t c, double count, double s, double q) {
    if (count == 0) return;
    mean[c] = origin[c] + s / count;
    m2[c] = q - s / count * s;
    if (m2[c] < 0) m2[c] = 0;  // by rounding, never by more
  }
};

// Runs the sums of a batch, then done(channel) for each, then apply(range).
template <class Done, class Apply>
void with_statistics(const Plan& plan, const Dense& x, const Mask& mask, const Forward& forward, BatchStatistics& batch,
                     Done done, Apply apply) {
  const auto& kernels = batchnorm::kernels(x.dtype);
  const auto count = static_cast<double>(mask.count);
  const auto place_origins = [&](int64_t c0, int64_t c1) {
    if (mask.count == 0) return;
    for (int64_t c = c0; c < c1; ++c) batch.origin[c] = origin_of(x, mask, c);
  };
  if (!plan.by_channel) place_origins(0, x.at.channels);
  plan.run(
      [&](const Range& range, double* s, double* q) {
        if (plan.by_channel) place_origins(range.c0, range.c1);
        if (mask.count > 0) kernels.sums(forward, range, batch.origin.data(), s, q);
      },
      [&](int64_t c0, int64_t c1, const double* s, const double* q) {
        for (int64_t c = c0; c < c1; ++c) {
          batch.finish(c, count, s[c], q[c]);
          done(c);
        }
      },
      apply);
}

std::tuple<Tensor, Tensor, Tensor> stats(Tensor input, Maybe real) {
  const Dense x(input);
  const Mask mask(real, x);
  BatchStatistics batch(x.at.channels);
  const Forward forward{x.at, Activation::none, x.data(), nullptr, mask.data, nullptr, nullptr, nullptr, nullptr, nullptr};
  const Plan plan(x.at, x.x.element_size());
  with_statistics(plan, x, mask, forward, batch, kNothing, kNothing);
  return {batchnorm::statistic(input, static_cast<double>(mask.count)), batchnorm::statistics(input, batch.mean),
          batchnorm::statistics(input, batch.m2)};
}

std::tuple<Tensor, Tensor> normalize(Tensor input, Tensor mean, Tensor invstd, Maybe weight, Maybe bias, Maybe residual,
                                     Maybe real, std::string activation) {
  const Dense x(input);
  const int64_t channels = x.at.channels;
  const Mask mask(real, x);
  const Activation act = batchnorm::activation_named(activation);
  if (residual) residual = x.match(*residual, "residual");
  const auto means = batchnorm::doubles(mean, channels, "mean"), invstds = batchnorm::doubles(invstd, channels, "invstd");
  const auto weights = batchnorm::doubles(weight, channels, "weight"), biases = batchnorm::doubles(bias, channels, "bias");
  ForwardCoefficients coefficients(channels, x.dtype);
  for (int64_t c = 0; c < channels; ++c) coefficients.set(c, means[c], invstds[c], weights, biases);

  Tensor y = x.output();
  const bool with_sign = needs_sign(act, residual);
  Tensor sign = new_sign(x, with_sign);
  const Forward forward{x.at,
                        act,
                        x.data(),
                        residual ? residual->const_data_ptr() : nullptr,
                        mask.data,
                        coefficients.center.data(),
                        coefficients.scale.data(),
                        coefficients.shift.data(),
                        y.mutable_data_ptr(),
                        with_sign ? static_cast<uint8_t*>(sign.mutable_data_ptr()) : nullptr};
  const auto& kernels = batchnorm::kernels(x.dtype);
  Plan(x.at, x.x.element_size()).apply_only([&](const Range& range) { kernels.normalize(forward, range); });
  return {x.finished(y), sign};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> train_forward(Tensor input, Maybe weight, Maybe bias,
                                                                         Maybe residual, Maybe real, double eps,
                                                                         std::string activation) {
  const Dense x(input);
  const int64_t channels = x.at.channels;
  const Mask mask(real, x);
  const Activation act = batchnorm::activation_named(activation);
  if (residual) residual = x.match(*residual, "residual");
  const auto weights = batchnorm::doubles(weight, channels, "weight"), biases = batchnorm::doubles(bias, channels, "bias");
  BatchStatistics batch(channels);
  std::vector<double> var(channels + kPadding), invstd(channels + kPadding);
  ForwardCoefficients coefficients(channels, x.dtype);

  Tensor y = x.output();
  const bool with_sign = needs_sign(act, residual);
  Tensor sign = new_sign(x, with_sign);
  const Forward forward{x.at,
                        act,
                        x.data(),
                        residual ? residual->const_data_ptr() : nullptr,
                        mask.data,
                        coefficients.center.data(),
                        coefficients.scale.data(),
                        coefficients.shift.data(),
                        y.mutable_data_ptr(),
                        with_sign ? static_cast<uint8_t*>(sign.mutable_data_ptr()) : nullptr};
  const double count = std::max<double>(1, static_cast<double>(mask.count));
  const auto& kernels = batchnorm::kernels(x.dtype);
  const Plan plan(x.at, (residual ? 2 : 1) * x.x.element_size());
  with_statistics(
      plan, x, mask, forward, batch,
      [&](int64_t c) {
        var[c] = batch.m2[c] / count;
        invstd[c] = 1 / std::sqrt(var[c] + eps);
        coefficients.set(c, batch.mean[c], invstd[c], weights, biases);
      },
      [&](const Range& range) { kernels.normalize(forward, range); });
  return {x.finished(y),
          batchnorm::statistic(input, static_cast<double>(mask.count)),
          batchnorm::statistics(input, batch.mean),
          batchnorm::statistics(input, var),
          batchnorm::statistics(input, invstd),
          sign};
}

// What all three backward operators are given, matched to x and ready for the kernels.
struct Gradient {
  Dense x;
  Mask mask;
  Activation activation;
  std::vector<double> mean, invstd, weight;
  ForwardCoefficients coefficients;
  Coefficients a, b, c;
  Tensor grad;
  Maybe residual, sign;
  Backward problem{};

  Gradient(const Tensor& grad_, const Tensor& input, const Tensor& mean_, const Tensor& invstd_, const Maybe& weight_,
           const Maybe& bias_, const Maybe& residual_, const Maybe& sign_, const Maybe& real, const std::string& name)
      : x(input),
        mask(real, x),
        activation(batchnorm::activation_named(name)),
        mean(batchnorm::doubles(mean_, x.at.channels, "mean")),
        invstd(batchnorm::doubles(invstd_, x.at.channels, "invstd")),
        weight(batchnorm::doubles(weight_, x.at.channels, "weight")),
        coefficients(x.at.channels, x.dtype),
        a(x.at.channels, x.dtype),
        b(x.at.channels, x.dtype),
        c(x.at.channels, x.dtype),
        grad(x.match(grad_, "grad")) {
    const auto biases = batchnorm::doubles(bias_, x.at.channels, "bias");
    for (int64_t i = 0; i < x.at.channels; ++i) coefficients.set(i, mean[i], invstd[i], weight, biases);
    if (sign_ && sign_->numel() > 0) {
      sign = torch::stable::contiguous(*sign_);
      STD_TORCH_CHECK(sign->numel() == new_sign(x, true).numel(), "expected the signs of this x, got ", sign->numel(), " bytes");
    }
    if (residual_ && !sign) residual = x.match(*residual_, "residual");
    problem.forward = Forward{x.at,
                              activation,
                              x.data(),
                              residual ? residual->const_data_ptr() : nullptr,
                              mask.data,
                              coefficients.center.data(),
                              coefficients.scale.data(),
                              coefficients.shift.data(),
                              nullptr,
                              sign ? static_cast<uint8_t*>(const_cast<void*>(sign->const_data_ptr())) : nullptr};
    problem.grad = grad.const_data_ptr();
    problem.a = a.data();
    problem.b = b.data();
    problem.c = c.data();
  }

  // sum dz * x_hat, from the kernel's sum dz * (x - center).
  double normalized(int64_t i, double sum_dz, double sum_dz_centred) const {
    return (sum_dz_centred - (mean[i] - coefficients.center.get(i)) * sum_dz) * invstd[i];
  }
  // dx = weight * invstd * (dz - sum_dz / n - x_hat * sum_dz_xhat / n), as dz * a - b - (x - center) * c.
  void set(int64_t i, double count, double sum_dz, double sum_dz_xhat) {
    const double scale = weight.empty() ? invstd[i] : invstd[i] * weight[i];
    const double slope = scale * invstd[i] * sum_dz_xhat / count;
    a.set(i, scale);
    b.set(i, scale * sum_dz / count - (mean[i] - coefficients.center.get(i)) * slope);
    c.set(i, slope);
  }
  Plan plan() const { return Plan(x.at, (residual ? 3 : 2) * x.x.element_size()); }
};

std::tuple<Tensor, Tensor> grad_sums(Tensor grad, Tensor input, Tensor mean, Tensor invstd, Maybe weight, Maybe bias,
                                     Maybe residual, Maybe sign, Maybe mask, std::string activation) {
  const Gradient g(grad, input, mean, invstd, weight, bias, residual, sign, mask, activation);
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
  return {batchnorm::statistics(input, sum_dz), batchnorm::statistics(input, sum_dz_xhat)};
}

std::tuple<Tensor, Tensor> grad_input(Tensor grad, Tensor input, Tensor mean, Tensor invstd, Maybe weight, Maybe bias,
                                      Maybe residual, Maybe sign, Maybe mask, std::string activation, Tensor count,
                                      Tensor sum_dz, Tensor sum_dz_xhat, bool want_residual) {
  Gradient g(grad, input, mean, invstd, weight, bias, residual, sign, mask, activation);
  const auto sums = batchnorm::doubles(sum_dz, g.x.at.channels, "sum_dz");
  const auto products = batchnorm::doubles(sum_dz_xhat, g.x.at.channels, "sum_dz_xhat");
  const double n = std::max(1.0, batchnorm::scalar(count, "count"));
  for (int64_t c = 0; c < g.x.at.channels; ++c) g.set(c, n, sums[c], products[c]);
  Tensor dx = g.x.output(), dresidual = want_residual ? g.x.output() : nothing_like(input);
  g.problem.dx = dx.mutable_data_ptr();
  g.problem.dresidual = want_residual ? dresidual.mutable_data_ptr() : nullptr;
  const auto& kernels = batchnorm::kernels(g.x.dtype);
  g.plan().apply_only([&](const Range& range) { kernels.grad_input(g.problem, range); });
  return {g.x.finished(dx), want_residual ? g.x.finished(dresidual) : dresidual};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> train_backward(Tensor grad, Tensor input, Tensor mean, Tensor invstd,
                                                          Maybe weight, Maybe bias, Maybe residual, Maybe sign,
                                                          Maybe mask, std::string activation, Tensor count,
                                                          bool want_residual) {
  Gradient g(grad, input, mean, invstd, weight, bias, residual, sign, mask, activation);
  const double n = std::max(1.0, batchnorm::scalar(count, "count"));
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
  return {g.x.finished(dx), batchnorm::parameter_gradient(input, weight, dweight),
          batchnorm::parameter_gradient(input, bias, dbias),
          want_residual ? g.x.finished(dresidual) : dresidual};
}

void update_running(Tensor running_mean, Tensor running_var, Tensor mean, Tensor var, Tensor count,
                    std::optional<double> momentum, Maybe num_batches, int64_t ddof) {
  STD_TORCH_CHECK(momentum || num_batches, "expected a momentum or num_batches, got neither");
  const double step = momentum ? *momentum : 1 / batchnorm::scalar(*num_batches, "num_batches");
  const double n = batchnorm::scalar(count, "count");
  const int64_t channels = running_mean.numel();
  // As the reference: no real value says nothing; too few for an unbiased variance, nothing about that.
  const auto move = [&](Tensor& running, const Tensor& batch, double correction) {
    auto values = batchnorm::doubles(running, channels, "a running statistic");
    const auto target = batchnorm::doubles(batch, channels, "a batch statistic");
    for (int64_t c = 0; c < channels; ++c) values[c] = (1 - step) * values[c] + step * target[c] * correction;
    if (running.is_contiguous()) return batchnorm::assign(running, values);
    Tensor dense = torch::stable::contiguous(running);
    batchnorm::assign(dense, values);
    torch::stable::copy_(running, dense);
  };
  if (!(step > 0)) return;
  if (n > 0) move(running_mean, mean, 1);
  if (n > static_cast<double>(ddof)) move(running_var, var, n / (n - static_cast<double>(ddof)));
}

// The instruction set in use, after choosing `name` where one is given; the sets that this processor has. For tests.
std::string instruction_set(std::string name) {
  STD_TORCH_CHECK(name.empty() || batchnorm::choose_instruction_set(name), "this processor has no ", name);
  return batchnorm::chosen_instruction_set();
}
std::string instruction_sets() {
  std::string names;
  for (const auto& name : batchnorm::instruction_sets()) names += (names.empty() ? "" : " ") + name;
  return names;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(batchnorm, m) {
  m.def("_instruction_set(str name) -> str");
  m.def("_instruction_sets() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(batchnorm, CompositeExplicitAutograd, m) {
  m.impl("_instruction_set", TORCH_BOX(&instruction_set));
  m.impl("_instruction_sets", TORCH_BOX(&instruction_sets));
}

STABLE_TORCH_LIBRARY_IMPL(batchnorm, CPU, m) {
  m.impl("stats", TORCH_BOX(&stats));
  m.impl("normalize", TORCH_BOX(&normalize));
  m.impl("train_forward", TORCH_BOX(&train_forward));
  m.impl("grad_sums", TORCH_BOX(&grad_sums));
  m.impl("grad_input", TORCH_BOX(&grad_input));
  m.impl("train_backward", TORCH_BOX(&train_backward));
  m.impl("update_running", TORCH_BOX(&update_running));
}
