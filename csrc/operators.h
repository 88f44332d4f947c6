// The operators of src/batchnorm/ops/schema.py on CPU tensors: which kernels run on which part of the data, in which order.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "dispatch.h"
#include "tensors.h"

namespace batchnorm {

// How the work is cut. Planes: by channels, a few at a time that fit in the cache, so that the second pass over them reads no
// memory. Rows (and planes of too few channels): by units, in as many pieces as there are threads, in two phases.
struct Plan {
  Layout at;
  bool by_channel;
  int64_t tile = 1;    // channels at a time
  int64_t pieces = 1;  // of the units

  // `bytes` that one value costs in cache between the two passes.
  Plan(const Layout& layout, int64_t bytes) : at(layout) {
    const int64_t threads = torch::stable::get_num_threads();
    const int64_t values = at.n * at.channels * at.positions;
    constexpr int64_t kWorthAThread = 32768;
    const int64_t useful = std::clamp<int64_t>(values / kWorthAThread, 1, threads);
    by_channel = !at.rows && at.channels >= 2 * useful;
    if (by_channel) {
      constexpr int64_t kCache = 1 << 20;  // half of a common second-level cache
      const int64_t plane = std::max<int64_t>(1, at.n * at.positions * bytes);
      tile = std::clamp<int64_t>(kCache / plane, 1, 64);
      // Every thread gets tiles, and the last ones to finish wait for little.
      tile = std::max<int64_t>(1, std::min(tile, at.channels / (useful == 1 ? 1 : 4 * useful)));
    } else {
      pieces = std::clamp<int64_t>(useful, 1, std::max<int64_t>(1, at.units()));
    }
  }

  template <class Visit>
  void for_each_tile(Visit visit) const {
    const int64_t tiles = (at.channels + tile - 1) / tile;
    const int64_t values = std::max<int64_t>(1, at.n * at.positions * tile);
    const int64_t grain = std::max<int64_t>(1, 32768 / values);
    torch::stable::parallel_for(0, tiles, grain, [&](int64_t first, int64_t last) {
      for (int64_t t = first; t < last; ++t) {
        visit(Range{t * tile, std::min((t + 1) * tile, at.channels), 0, at.units()});
      }
    });
  }

  template <class Visit>
  void for_each_piece(Visit visit) const {
    const auto range = [&](int64_t p) {
      return Range{0, at.channels, at.units() * p / pieces, at.units() * (p + 1) / pieces};
    };
    if (pieces == 1) return visit(range(0), 0);
    torch::stable::parallel_for(0, pieces, 1, [&](int64_t first, int64_t last) {
      for (int64_t p = first; p < last; ++p) visit(range(p), p);
    });
  }

  // sum(range, s, q) adds to two sums a channel; finish(c0, c1, s, q) makes coefficients of them; apply(range) uses these.
  template <class Sum, class Finish, class Apply>
  void run(Sum sum, Finish finish, Apply apply) const {
    const int64_t padded = at.channels + kPadding;
    if (by_channel) {
      std::vector<double> s(padded), q(padded);
      for_each_tile([&](const Range& range) {
        sum(range, s.data(), q.data());
        finish(range.c0, range.c1, s.data(), q.data());
        apply(range);
      });
      return;
    }
    std::vector<double> all(2 * padded * pieces);
    for_each_piece([&](const Range& range, int64_t p) {
      double* s = all.data() + 2 * padded * p;
      sum(range, s, s + padded);
    });
    for (int64_t p = 1; p < pieces; ++p) {  // always in this order: the same result for the same number of threads
      for (int64_t i = 0; i < 2 * padded; ++i) all[i] += all[2 * padded * p + i];
    }
    finish(0, at.channels, all.data(), all.data() + padded);
    for_each_piece([&](const Range& range, int64_t) { apply(range); });
  }

  template <class Apply>
  void apply_only(Apply apply) const {
    if (by_channel) {
      for_each_tile(apply);
    } else {
      for_each_piece([&](const Range& range, int64_t) { apply(range); });
    }
  }
};

// Coefficients of the type that the data are computed in, one a channel.
class Coefficients {
 public:
  Coefficients(int64_t channels, DType dtype)
      : wide_(dtype == DType::float64), values_((channels + kPadding) * (wide_ ? 2 : 1)) {}

  const void* data() const { return values_.data(); }
  void set(int64_t c, double value) {
    if (wide_) {
      reinterpret_cast<double*>(values_.data())[c] = value;
    } else {
      values_[c] = static_cast<float>(value);
    }
  }
  double get(int64_t c) const { return wide_ ? reinterpret_cast<const double*>(values_.data())[c] : values_[c]; }

 private:
  bool wide_;
  std::vector<float> values_;
};

// center, scale and shift of the forward pass. The mean is split: x - center is exact near the mean, where a mean rounded to
// float would cost digits, and the rest of the mean goes into shift.
struct ForwardCoefficients {
  Coefficients center, scale, shift;

  ForwardCoefficients(int64_t channels, DType dtype)
      : center(channels, dtype), scale(channels, dtype), shift(channels, dtype) {}
  void set(int64_t c, double mean, double invstd, const std::vector<double>& weight, const std::vector<double>& bias) {
    center.set(c, mean);
    const double slope = weight.empty() ? invstd : invstd * weight[c];
    scale.set(c, slope);
    shift.set(c, (bias.empty() ? 0.0 : bias[c]) - (mean - center.get(c)) * slope);
  }
};

}  // namespace batchnorm
