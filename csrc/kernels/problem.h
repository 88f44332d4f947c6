// What a kernel is given. No tensor type here: the kernels outlive any one version of torch.
#pragma once

#include <cstdint>

namespace batchnorm {

enum class Activation : int { none, relu, leaky_relu, silu, gelu, hardswish };
enum class DType : int { float32, float64, bfloat16, float16 };

// Data are dense, in one of two orders:
//   planes: (n, channels, positions), a channel's values of one sample side by side ("contiguous"),
//   rows:   (n, positions, channels), the channels of one position side by side ((N, C) and channels-last).
struct Layout {
  int64_t n;
  int64_t channels;
  int64_t positions;
  bool rows;

  // Values side by side in memory that belong together: what a kernel walks in one go, and what the sign bits are padded to.
  int64_t run() const { return rows ? channels : positions; }
  int64_t run_bytes() const { return (run() + 7) / 8; }
  // A unit is the piece of work that a range is made of: a row, or a segment of every plane of a sample.
  int64_t segments() const { return rows ? 1 : (positions + kSegment - 1) / kSegment; }
  int64_t units() const { return rows ? n * positions : n * segments(); }
  static constexpr int64_t kSegment = 16384;
};

// A part of the work: channels [c0, c1) of units [u0, u1). Kernels for rows always take all channels.
struct Range {
  int64_t c0, c1, u0, u1;
};

// z = (x - center) * scale + shift + residual; y = activation(z). center, scale and shift are float (double for float64
// data), one a channel. `sign` and `mask` as in src/batchnorm/ops/schema.py; all of residual, sign, mask may be null.
struct Forward {
  Layout at;
  Activation activation;
  const void* x;
  const void* residual;
  const uint8_t* mask;
  const void* center;
  const void* scale;
  const void* shift;
  void* y;
  uint8_t* sign;
  bool past_cache;  // whether the output is so large that the cache is better kept for what is read
};

// dz = grad * activation'(z); dx = dz * a - b - (x - center) * c. dresidual may be null.
struct Backward {
  Forward forward;
  const void* grad;
  const void* a;
  const void* b;
  const void* c;
  void* dx;
  void* dresidual;
};

// The kernels of one type of data, compiled for one instruction set.
struct Kernels {
  // Adds sum (x - origin) and sum (x - origin)^2 of each channel to s and q, over real positions.
  void (*sums)(const Forward&, const Range&, const double* origin, double* s, double* q);
  void (*normalize)(const Forward&, const Range&);
  // Adds sum dz and sum dz * (x - center) of each channel to s and q.
  void (*grad_sums)(const Backward&, const Range&, double* s, double* q);
  void (*grad_input)(const Backward&, const Range&);
};

struct FeatureKernels;  // features.h

// Tables of kernels by DType, for each instruction set that this binary has; `name` is what people call it.
struct InstructionSet {
  const char* name;
  const Kernels* by_dtype;
  const FeatureKernels* features_by_dtype;
};

// Double and coefficient arrays that rows kernels use are readable and writable up to this multiple of channels.
constexpr int64_t kPadding = 16;

}  // namespace batchnorm
