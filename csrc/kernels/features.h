// What the kernels for preprocessing are given: a matrix of samples and what is known of its columns. No tensor type here.
#pragma once

#include <cstdint>

#include "problem.h"

namespace batchnorm {

// (rows, columns); the values of a row lie side by side, rows `stride` values apart.
struct Matrix {
  const void* x;
  int64_t rows;
  int64_t columns;
  int64_t stride;
};

// Of each column: how many values (or the sum of their weights), their mean in two parts, the sum of squared deviations from
// it, the extremes. See src/batchnorm/moments.
struct MomentsState {
  double *count, *mean, *mean_low, *m2, *low, *high;

  MomentsState at(int64_t column) const {
    return {count + column, mean + column, mean_low + column, m2 + column, low + column, high + column};
  }
};

// Forward: y = ((x - mean) - mean_low) / scale + offset, held in [low, high]; inverse: x = ((y - offset) * scale + mean_low) + mean.
// One mean, mean_low and scale a column, or (`uniform`) the same for all.
struct AffineMap {
  const double *mean, *mean_low, *scale;
  double offset, low, high;
  bool inverse, uniform;
};

// The kernels of one type of data, compiled for one instruction set.
struct FeatureKernels {
  // Adds the rows to the state. `weights`: one a row, or null; a row without weight does not count, whatever it holds.
  // `skip_nan` leaves NaN out, otherwise it spoils the moments of its column; the extremes never see it.
  void (*moments)(const Matrix&, const double* weights, bool skip_nan, const MomentsState&);
  // Writes y, of x's type and with rows `y_stride` apart; it may be x itself. Whether x holds an infinite value.
  bool (*affine)(const Matrix&, const AffineMap&, void* y, int64_t y_stride);
};

namespace {  // a copy for each instruction set: none of them may be linked into another

// V is double, or a vector of doubles.

// a + b rounded, and in `rest` what the rounding left out, exactly (D. E. Knuth, TAOCP vol. 2, 4.2.2).
template <class V>
inline V two_sum(V a, V b, V& rest) {
  const V total = a + b, part = total - a;
  rest = (a - (total - part)) + (b - part);
  return total;
}

template <class V>
struct Moments {
  V count, mean, mean_low, m2;
};

// Chan's formulas, with means of two parts.
template <class V>
inline Moments<V> merge_moments(const Moments<V>& a, const Moments<V>& b) {
  V rest, low, mean_low;
  const V none = V{}, count = a.count + b.count, share = b.count / (count > none ? count : none + 1);
  V delta = two_sum<V>(b.mean, -a.mean, rest);
  delta += rest + (b.mean_low - a.mean_low);
  const V high = two_sum<V>(a.mean, delta * share, low);
  const V mean = two_sum<V>(high, low + a.mean_low, mean_low);
  const V m2 = a.m2 + (b.m2 + delta * delta * (a.count * share));
  // From nothing, delta is the other's whole mean in one part: take that as it is.
  const auto only_a = b.count == none, only_b = a.count == none;
  return {count, only_a ? a.mean : only_b ? b.mean : mean, only_a ? a.mean_low : only_b ? b.mean_low : mean_low,
          only_a ? a.m2 : only_b ? b.m2 : m2};
}

}  // namespace
}  // namespace batchnorm
