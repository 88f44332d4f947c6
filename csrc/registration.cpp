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
  return batchnorm::fresh_vector(wanted ? runs * x.at.run_bytes() : 0, ScalarType::Byte);
}

Tensor nothing_like(const Tensor& x) { return batchnorm::fresh_vector(0, x.scalar_type()); }

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
  const Forward forward{x.at, Activation::none, x.data(), nullptr, mask.data, nullptr, nullptr, nullptr, nullptr, nullptr, false};
  const Plan plan(x.at, x.x.element_size());
  with_statistics(plan, x, mask, forward, batch, kNothing, kNothing);
  return {batchnorm::statistic(static_cast<double>(mask.count)), batchnorm::statistics(batch.mean),
          batchnorm::statistics(batch.m2)};
}

// The forward pass of a whole call: its inputs matched to x, its outputs made, its coefficients to be set.
struct Normalization {
  Dense x;
  Mask mask;
  Activation activation;
  std::vector<double> weight, bias;
  ForwardCoefficients coefficients;
  Maybe residual;
  Tensor y, sign;
  Forward problem;

  Normalization(const Tensor& input, const Maybe& weight_, const Maybe& bias_, const Maybe& residual_, const Maybe& real,
                const std::string& name, bool for_backward = true)
      : x(input),
        mask(real, x),
        activation(batchnorm::activation_named(name)),
        weight(batchnorm::doubles(weight_, x.at.channels, "weight")),
        bias(batchnorm::doubles(bias_, x.at.channels, "bias")),
        coefficients(x.at.channels, x.dtype),
        y(x.output()),
        sign(new_sign(x, for_backward && needs_sign(activation, residual_))) {
    if (residual_) residual = x.match(*residual_, "residual");
    problem = Forward{x.at,
                      activation,
                      x.data(),
                      residual ? residual->const_data_ptr() : nullptr,
                      mask.data,
                      coefficients.center.data(),
                      coefficients.scale.data(),
                      coefficients.shift.data(),
                      y.mutable_data_ptr(),
                      sign.numel() > 0 ? static_cast<uint8_t*>(sign.mutable_data_ptr()) : nullptr,
                      x.past_cache()};
  }
  void set(int64_t c, double mean, double invstd) { coefficients.set(c, mean, invstd, weight, bias); }
  Plan plan() const { return Plan(x.at, (residual ? 2 : 1) * x.x.element_size()); }
  Tensor result() const { return x.finished(y); }
};

std::tuple<Tensor, Tensor> normalize(Tensor input, Tensor mean, Tensor invstd, Maybe weight, Maybe bias, Maybe residual,
                                     Maybe real, std::string activation) {
  Normalization all(input, weight, bias, residual, real, activation);
  const int64_t channels = all.x.at.channels;
  const auto means = batchnorm::doubles(mean, channels, "mean"), invstds = batchnorm::doubles(invstd, channels, "invstd");
  for (int64_t c = 0; c < channels; ++c) all.set(c, means[c], invstds[c]);
  const auto& kernels = batchnorm::kernels(all.x.dtype);
  all.plan().apply_only([&](const Range& range) { kernels.normalize(all.problem, range); });
  return {all.result(), all.sign};
}

Tensor infer(Tensor input, Tensor running_mean, Tensor running_var, Maybe weight, Maybe bias, Maybe residual, Maybe real,
             double eps, std::string activation) {
  Normalization all(input, weight, bias, residual, real, activation, false);
  const int64_t channels = all.x.at.channels;
  const auto mean = batchnorm::doubles(running_mean, channels, "running_mean");
  const auto var = batchnorm::doubles(running_var, channels, "running_var");
  for (int64_t c = 0; c < channels; ++c) all.set(c, mean[c], 1 / std::sqrt(var[c] + eps));
  const auto& kernels = batchnorm::kernels(all.x.dtype);
  all.plan().apply_only([&](const Range& range) { kernels.normalize(all.problem, range); });
  return all.result();
}

// A batch's own statistics and the normalization with them: Algorithm 1.
struct TrainForward {
  Normalization all;
  BatchStatistics batch;
  std::vector<double> var, invstd;

  TrainForward(const Tensor& input, const Maybe& weight, const Maybe& bias, const Maybe& residual, const Maybe& real,
               double eps, const std::string& activation)
      : all(input, weight, bias, residual, real, activation),
        batch(all.x.at.channels),
        var(all.x.at.channels + kPadding),
        invstd(all.x.at.channels + kPadding) {
    const auto& kernels = batchnorm::kernels(all.x.dtype);
    const double n = std::max<double>(1, count());
    with_statistics(
        all.plan(), all.x, all.mask, all.problem, batch,
        [&](int64_t c) {
          var[c] = batch.m2[c] / n;
          invstd[c] = 1 / std::sqrt(var[c] + eps);
          all.set(c, batch.mean[c], invstd[c]);
        },
        [&](const Range& range) { kernels.normalize(all.problem, range); });
  }
  double count() const { return static_cast<double>(all.mask.count); }
};

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> train_forward(Tensor input, Maybe weight, Maybe bias,
                                                                         Maybe residual, Maybe real, double eps,
                                                                         std::string activation) {
  const TrainForward done(input, weight, bias, residual, real, eps, activation);
  return {done.all.result(),
          batchnorm::statistic(done.count()),
          batchnorm::statistics(done.batch.mean),
          batchnorm::statistics(done.var),
          batchnorm::statistics(done.invstd),
          done.all.sign};
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

  Gradient(const Tensor& grad_, const Tensor& input, std::vector<double> mean_, std::vector<double> invstd_,
           const Maybe& weight_, const Maybe& bias_, const Maybe& residual_, const Maybe& sign_, const Maybe& real,
           const std::string& name)
      : x(input),
        mask(real, x),
        activation(batchnorm::activation_named(name)),
        mean(std::move(mean_)),
        invstd(std::move(invstd_)),
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
                              sign ? static_cast<uint8_t*>(const_cast<void*>(sign->const_data_ptr())) : nullptr,
                              x.past_cache()};
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
  const int64_t channels = input.size(1);
  const Gradient g(grad, input, batchnorm::doubles(mean, channels, "mean"), batchnorm::doubles(invstd, channels, "invstd"),
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
  return {batchnorm::statistics(sum_dz), batchnorm::statistics(sum_dz_xhat)};
}

std::tuple<Tensor, Tensor> grad_input(Tensor grad, Tensor input, Tensor mean, Tensor invstd, Maybe weight, Maybe bias,
                                      Maybe residual, Maybe sign, Maybe mask, std::string activation, Tensor count,
                                      Tensor sum_dz, Tensor sum_dz_xhat, bool want_residual) {
  const int64_t channels = input.size(1);
  Gradient g(grad, input, batchnorm::doubles(mean, channels, "mean"), batchnorm::doubles(invstd, channels, "invstd"),
             weight, bias, residual, sign, mask, activation);
  const auto sums = batchnorm::doubles(sum_dz, channels, "sum_dz");
  const auto products = batchnorm::doubles(sum_dz_xhat, channels, "sum_dz_xhat");
  const double n = std::max(1.0, batchnorm::scalar(count, "count"));
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
  return {g.x.finished(dx), batchnorm::parameter_gradient(weight, dweight),
          batchnorm::parameter_gradient(bias, dbias),
          want_residual ? g.x.finished(dresidual) : dresidual};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> train_backward(Tensor grad, Tensor input, Tensor mean, Tensor invstd,
                                                          Maybe weight, Maybe bias, Maybe residual, Maybe sign,
                                                          Maybe mask, std::string activation, Tensor count,
                                                          bool want_residual) {
  const int64_t channels = input.size(1);
  Gradient g(grad, input, batchnorm::doubles(mean, channels, "mean"), batchnorm::doubles(invstd, channels, "invstd"),
             weight, bias, residual, sign, mask, activation);
  return whole_backward(g, input, weight, bias, batchnorm::scalar(count, "count"), want_residual);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> train_step_backward(Tensor grad, Tensor input, Tensor saved, Maybe weight,
                                                               Maybe bias, Maybe residual, Maybe sign, Maybe mask,
                                                               std::string activation, bool want_residual) {
  const int64_t channels = input.size(1);
  const auto values = batchnorm::doubles(saved, 2 * channels + 1, "saved");
  std::vector<double> mean(channels + kPadding), invstd(channels + kPadding);
  std::copy_n(values.begin(), channels, mean.begin());
  std::copy_n(values.begin() + channels, channels, invstd.begin());
  Gradient g(grad, input, mean, invstd, weight, bias, residual, sign, mask, activation);
  return whole_backward(g, input, weight, bias, values[2 * channels], want_residual);
}

// running = (1 - step) * running + step * batch * correction, in place.
void move_running(const Tensor& running, const std::vector<double>& batch, double step, double correction) {
  auto values = batchnorm::doubles(running, running.numel(), "a running statistic");
  for (int64_t c = 0; c < running.numel(); ++c) values[c] = (1 - step) * values[c] + step * batch[c] * correction;
  if (running.is_contiguous()) return batchnorm::assign(running, values);
  Tensor dense = torch::stable::contiguous(running), target = running;
  batchnorm::assign(dense, values);
  torch::stable::copy_(target, dense);
}

void move_both(const Tensor& running_mean, const Tensor& running_var, const std::vector<double>& mean,
               const std::vector<double>& var, double count, std::optional<double> momentum, const Maybe& num_batches,
               int64_t ddof) {
  STD_TORCH_CHECK(momentum || num_batches, "expected a momentum or num_batches, got neither");
  const double step = momentum ? *momentum : 1 / batchnorm::scalar(*num_batches, "num_batches");
  if (!(step > 0)) return;
  // As the reference: no real value says nothing; too few for an unbiased variance, nothing about that.
  const auto freedom = count - static_cast<double>(ddof);
  if (count > 0) move_running(running_mean, mean, step, 1);
  if (freedom > 0) move_running(running_var, var, step, count / freedom);
}

void update_running(Tensor running_mean, Tensor running_var, Tensor mean, Tensor var, Tensor count,
                    std::optional<double> momentum, Maybe num_batches, int64_t ddof) {
  const int64_t channels = running_mean.numel();
  move_both(running_mean, running_var, batchnorm::doubles(mean, channels, "mean"),
            batchnorm::doubles(var, channels, "var"), batchnorm::scalar(count, "count"), momentum, num_batches, ddof);
}

// train_forward and update_running in one call, with what the backward needs in one tensor: mean, invstd, count. For small
// tensors the calls and the tensors are what a step costs.
std::tuple<Tensor, Tensor, Tensor> train_step(Tensor input, Maybe weight, Maybe bias, Maybe residual, Maybe real,
                                              Maybe running_mean, Maybe running_var, double eps,
                                              std::optional<double> momentum, Maybe num_batches, int64_t ddof,
                                              std::string activation) {
  const TrainForward done(input, weight, bias, residual, real, eps, activation);
  if (running_mean && running_var) {
    move_both(*running_mean, *running_var, done.batch.mean, done.var, done.count(), momentum, num_batches, ddof);
  }
  const int64_t channels = done.all.x.at.channels;
  Tensor saved = batchnorm::fresh_vector(2 * channels + 1, ScalarType::Double);
  auto* values = static_cast<double*>(saved.mutable_data_ptr());
  std::copy_n(done.batch.mean.begin(), channels, values);
  std::copy_n(done.invstd.begin(), channels, values + channels);
  values[2 * channels] = done.count();
  return {done.all.result(), saved, done.all.sign};
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
  m.impl("infer", TORCH_BOX(&infer));
  m.impl("train_step", TORCH_BOX(&train_step));
  m.impl("train_step_backward", TORCH_BOX(&train_step_backward));
}
