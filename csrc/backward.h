// The backward pass of a whole call, matched to x and ready for the kernels: what backward.cpp's operators are made of.
#pragma once

#include <string>
#include <utility>
#include <vector>

#include "forward.h"

namespace batchnorm {

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
        activation(activation_named(name)),
        mean(std::move(mean_)),
        invstd(std::move(invstd_)),
        weight(doubles(weight_, x.at.channels, "weight")),
        coefficients(x.at.channels, x.dtype),
        a(x.at.channels, x.dtype),
        b(x.at.channels, x.dtype),
        c(x.at.channels, x.dtype),
        grad(x.match(grad_, "grad")) {
    const auto biases = doubles(bias_, x.at.channels, "bias");
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

}  // namespace batchnorm
