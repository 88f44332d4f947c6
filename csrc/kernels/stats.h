// Mean and sum of squared deviations of each channel, in two passes with double accumulators.
#pragma once

#include <algorithm>
#include <cstdint>

#include "layout.h"

namespace batchnorm {

// Calls visit(value, channel) for every real value of the channels [first, last), in the order that memory likes.
// mask: (n, positions), or null where every position is real.
template <typename T, typename Visit>
void for_each_real(const T* x, const bool* mask, const Layout& at, int64_t first, int64_t last, Visit visit) {
  if (at.channels_are_inner()) {
    for (int64_t i = 0; i < at.n; ++i) {
      for (int64_t p = 0; p < at.positions; ++p) {
        if (mask != nullptr && !mask[i * at.positions + p]) continue;
        const T* row = x + i * at.stride_n + p * at.stride_position;
        for (int64_t c = first; c < last; ++c) visit(static_cast<double>(row[c]), c);
      }
    }
    return;
  }
  for (int64_t c = first; c < last; ++c) {
    for (int64_t i = 0; i < at.n; ++i) {
      const T* run = x + i * at.stride_n + c * at.stride_channel;
      for (int64_t p = 0; p < at.positions; ++p) {
        if (mask != nullptr && !mask[i * at.positions + p]) continue;
        visit(static_cast<double>(run[p * at.stride_position]), c);
      }
    }
  }
}

// Writes mean and m2 of the channels [first, last); count is the number of real positions, 0 gives 0 and 0.
template <typename T>
void stats(const T* x, const bool* mask, const Layout& at, int64_t count, int64_t first, int64_t last, double* mean,
           double* m2) {
  std::fill(mean + first, mean + last, 0.0);
  std::fill(m2 + first, m2 + last, 0.0);
  if (count == 0) return;
  for_each_real(x, mask, at, first, last, [&](double value, int64_t c) { mean[c] += value; });
  for (int64_t c = first; c < last; ++c) mean[c] /= static_cast<double>(count);
  // A second pass and not E[x^2] - E[x]^2: that loses every digit where the mean is large.
  for_each_real(x, mask, at, first, last, [&](double value, int64_t c) {
    const double centred = value - mean[c];
    m2[c] += centred * centred;
  });
}

}  // namespace batchnorm
