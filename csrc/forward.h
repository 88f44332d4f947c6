// The forward pass of a whole call, matched to x and ready for the kernels: what forward.cpp's operators are made of.
#pragma once

#include <cmath>
#include <optional>
#include <string>
#include <vector>

#include "operators.h"

namespace batchnorm {

using Maybe = std::optional<Tensor>;

constexpr auto kNothing = [](auto&&...) {};

inline bool needs_sign(Activation activation, const Maybe& residual) {
  return residual.has_value() && (activation == Activation::relu || activation == Activation::leaky_relu);
}

inline Tensor new_sign(const Dense& x, bool wanted) {
  const int64_t runs = x.at.rows ? x.at.n * x.at.positions : x.at.n * x.at.channels;
  return fresh_vector(wanted ? runs * x.at.run_bytes() : 0, ScalarType::Byte);
}

// The channel's first real value, for the sums to be taken about: deviations from it have no large part in common.
inline double origin_of(const Dense& x, const Mask& mask, int64_t channel) {
  const int64_t n = mask.first / x.at.positions, p = mask.first % x.at.positions;
  const int64_t index = x.at.rows ? mask.first * x.at.channels + channel
                                  : (n * x.at.channels + channel) * x.at.positions + p;
  const double value = value_at(x.data(), x.dtype, index);
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
        activation(activation_named(name)),
        weight(doubles(weight_, x.at.channels, "weight")),
        bias(doubles(bias_, x.at.channels, "bias")),
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

}  // namespace batchnorm
