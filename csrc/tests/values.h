// What the driver computes with: types of two bytes spelt out, buffers of exactly the size they need, plain activations.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>

#include "../kernels/problem.h"

namespace {

using batchnorm::Activation;
using batchnorm::DType;

inline int64_t bytes_of(DType dtype) { return dtype == DType::float64 ? 8 : dtype == DType::float32 ? 4 : 2; }

// What an operation at size 1 may lose.
inline double rounding(DType dtype) {
  switch (dtype) {
    case DType::float32: return 2e-6;
    case DType::float64: return 1e-14;
    case DType::bfloat16: return 0x1p-8;
    default: return 0x1p-11 + 2e-6;
  }
}

inline double decode(const void* at, DType dtype) {
  if (dtype == DType::float64) {
    double value;
    std::memcpy(&value, at, 8);
    return value;
  }
  uint32_t bits = 0;
  std::memcpy(&bits, at, dtype == DType::float32 ? 4 : 2);
  if (dtype == DType::float16) {
    const int exponent = bits >> 10 & 31;
    const double fraction = bits & 0x3ff;
    const double size = exponent == 0    ? std::ldexp(fraction, -24)
                        : exponent == 31 ? (fraction != 0 ? NAN : INFINITY)
                                         : std::ldexp(fraction + 1024, exponent - 25);
    return bits >> 15 ? -size : size;
  }
  if (dtype == DType::bfloat16) bits <<= 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

// A value near `value` that the type has: truncated to it, which is as good as any other.
inline void encode(double value, DType dtype, void* at) {
  const auto narrow = static_cast<float>(value);
  uint32_t bits;
  std::memcpy(&bits, &narrow, 4);
  switch (dtype) {
    case DType::float64: std::memcpy(at, &value, 8); return;
    case DType::float32: std::memcpy(at, &bits, 4); return;
    case DType::bfloat16: bits >>= 16; break;
    case DType::float16: {
      const int exponent = static_cast<int>(bits >> 23 & 255) - 112;
      const uint32_t finite = exponent <= 0 ? 0 : static_cast<uint32_t>(exponent) << 10 | (bits >> 13 & 0x3ff);
      const uint32_t rest = std::isnan(value) ? 0x7e00 : exponent > 30 ? 0x7c00 : finite;
      bits = (bits >> 16 & 0x8000) | rest;
    }
  }
  std::memcpy(at, &bits, 2);
}

// The value of a type of two bytes that is nearest, of two the even one.
inline double nearest(double value, DType dtype) {
  const bool brain = dtype == DType::bfloat16;
  if (!std::isfinite(value) || value == 0) return value;
  const int exponent = std::max(std::ilogb(value), brain ? -126 : -14);
  const double step = std::ldexp(1, exponent - (brain ? 7 : 10)), rounded = std::nearbyint(value / step) * step;
  return std::abs(rounded) > (brain ? 0x1.fep127 : 65504) ? std::copysign(INFINITY, value) : rounded;
}

// Exactly the bytes that so many values need, so that one read or written beyond is seen. The first lies `skipped` bytes
// away from where memory is aligned.
struct Data {
  DType dtype;
  int64_t skipped;
  std::unique_ptr<char[]> bytes;

  Data(int64_t count, DType type, int64_t skip = 0)
      : dtype(type), skipped(skip), bytes(new char[count * bytes_of(type) + skip]()) {}
  char* get(int64_t i = 0) const { return bytes.get() + skipped + i * bytes_of(dtype); }
  double operator[](int64_t i) const { return decode(get(i), dtype); }
  void set(int64_t i, double value) const { encode(value, dtype, get(i)); }
};

struct Random {
  uint64_t state;

  double next() {  // uniform in [0, 1)
    state = state * 6364136223846793005u + 1442695040888963407u;
    return static_cast<double>(state >> 11) * 0x1p-53;
  }
  Data values(int64_t count, DType dtype, double spread, double offset, int64_t skip = 0) {
    Data data(count, dtype, skip);
    for (int64_t i = 0; i < count; ++i) data.set(i, offset + spread * (2 * next() - 1));
    return data;
  }
};

// Coefficients of the type that the kernels compute in, one a channel, and the padding that they may read.
class Channels {
 public:
  Channels(int64_t count, DType dtype, Random& random, double offset)
      : data_(count + batchnorm::kPadding, dtype == DType::float64 ? DType::float64 : DType::float32) {
    for (int64_t i = 0; i < count; ++i) set(i, offset + 0.4 * (2 * random.next() - 1));
  }
  const void* data() const { return data_.get(); }
  void set(int64_t i, double value) const { data_.set(i, value); }
  double operator[](int64_t i) const { return data_[i]; }

 private:
  Data data_;
};

inline double activate(Activation activation, double z) {
  switch (activation) {
    case Activation::relu: return z > 0 ? z : 0;
    case Activation::leaky_relu: return z > 0 ? z : 0.01 * z;
    case Activation::silu: return z / (1 + std::exp(-z));
    case Activation::gelu: return 0.5 * z * (1 + std::erf(z / std::sqrt(2.0)));
    case Activation::hardswish: return z * std::fmin(std::fmax(z + 3, 0), 6) / 6;
    default: return z;
  }
}

inline double slope(Activation activation, double z) {
  switch (activation) {
    case Activation::relu: return z > 0 ? 1 : 0;
    case Activation::leaky_relu: return z > 0 ? 1 : 0.01;
    case Activation::silu: {
      const double s = 1 / (1 + std::exp(-z));
      return s * (1 + z * (1 - s));
    }
    case Activation::gelu:
      return 0.5 * (1 + std::erf(z / std::sqrt(2.0))) + z * std::exp(-z * z / 2) / std::sqrt(2 * 3.14159265358979323846);
    case Activation::hardswish: return z <= -3 ? 0 : z < 3 ? z / 3 + 0.5 : 1;
    default: return 1;
  }
}

}  // namespace
