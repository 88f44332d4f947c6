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

// `count` samples of `channels` values. One of the strides is 1: the values of a sample lie side by side, or those of a channel.
struct Samples {
  const void* x;
  int64_t count, channels, sample_stride, channel_stride;
};

// Deviations laid out for `multiply`: `depth` samples of every channel, in an order that each instruction set chooses for
// itself. The panels of channels from c on, c a multiple of kPanelPadding, begin at c * depth; there are channels up to the next
// such multiple, and so are there of s and q.
struct Panels {
  double* panels;
  int64_t depth;
  int64_t begin;  // where the next samples go
  double *s, *q;  // sums of the weighted deviations and of their squares
};
constexpr int64_t kPanelPadding = 8;

// Memory that will be read next, to be asked for in the meantime. It need not exist.
struct Ahead {
  const char* at = nullptr;
  int64_t bytes = 0;
};

// Rows [i0, i1) and columns [j0, j1) of a matrix, where they lie on its diagonal or below; i0 and j0 multiples of kPanelPadding.
struct Tile {
  int64_t i0, i1, j0, j1;
};

// The kernels of one type of data, compiled for one instruction set.
struct FeatureKernels {
  // Adds the rows to the state. `weights`: one a row, or null; a row without weight does not count, whatever it holds.
  // `skip_nan` leaves NaN out, otherwise it spoils the moments of its column; the extremes never see it.
  void (*moments)(const Matrix&, const double* weights, bool skip_nan, const MomentsState&);
  // Writes y, of x's type and with rows `y_stride` apart; it may be x itself. Whether x holds an infinite value.
  bool (*affine)(const Matrix&, const AffineMap&, void* y, int64_t y_stride);
  // Lays the samples' deviations from `origin` out, each times its `root`, and adds to s and q. `roots`: of the weights; all
  // 1 where not `weighted`. A sample without weight is 0, whatever it holds. Origins are readable up to kPanelPadding.
  void (*pack)(const Samples&, bool weighted, const double* roots, const double* origin, const Panels&);
  // Sets the root of every sample that holds a NaN to 0.
  void (*leave_out_incomplete)(const Samples&, double* roots);
  // Adds sum_k d_ki d_kj over the first `rows` samples to the (channels, channels) matrix `out`, within the tile. Above the
  // diagonal, within kPanelPadding of it, it may add something or nothing.
  void (*multiply)(const Panels&, int64_t rows, const Tile&, double* out, int64_t channels, Ahead);
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
