#include "tensors.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#if defined(__linux__)
#include <unistd.h>
#endif

#include "memory.h"

namespace batchnorm {

DType dtype_of(const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Float: return DType::float32;
    case ScalarType::Double: return DType::float64;
    case ScalarType::BFloat16: return DType::bfloat16;
    case ScalarType::Half: return DType::float16;
    default: STD_TORCH_CHECK(false, "expected a floating point tensor (float32, float64, bfloat16 or float16)");
  }
}

namespace {

// Whether the dimensions in this order, the last innermost, lie in memory without gaps.
bool dense_in_order(const Tensor& x, const std::vector<int64_t>& order) {
  int64_t expected = 1;
  for (auto d = order.rbegin(); d != order.rend(); ++d) {
    if (x.size(*d) != 1 && x.stride(*d) != expected) return false;
    expected *= x.size(*d);
  }
  return true;
}

bool same_strides(const Tensor& a, const Tensor& b) {
  for (int64_t d = 0; d < a.dim(); ++d) {
    if (a.size(d) != 1 && a.stride(d) != b.stride(d)) return false;
  }
  return true;
}

bool same_shape(const Tensor& a, const Tensor& b) {
  if (a.dim() != b.dim()) return false;
  for (int64_t d = 0; d < a.dim(); ++d) {
    if (a.size(d) != b.size(d)) return false;
  }
  return true;
}

// Outputs larger than this are written past the cache: half of the last level, of which no more than 32 MB are counted, since
// what a processor of many cores has beyond that is not ours alone.
int64_t past_cache_limit() {
  if (const char* chosen = std::getenv("BATCHNORM_PAST_CACHE")) return std::atoll(chosen);
  constexpr int64_t kMost = int64_t{32} << 20;
  int64_t last_level = 0;
#if defined(_SC_LEVEL3_CACHE_SIZE)
  last_level = sysconf(_SC_LEVEL3_CACHE_SIZE);
#endif
  return (last_level > 0 ? std::min(last_level, kMost) : kMost) / 2;
}

template <class T>
void copy_out(const void* from, int64_t n, double* to) {
  const T* values = static_cast<const T*>(from);
  for (int64_t i = 0; i < n; ++i) to[i] = static_cast<double>(static_cast<std::conditional_t<sizeof(T) == 2, float, T>>(values[i]));
}

template <class T>
void copy_in(const double* from, int64_t n, void* to) {
  T* values = static_cast<T*>(to);
  for (int64_t i = 0; i < n; ++i) {
    if constexpr (sizeof(T) == 2) {
      values[i] = T(static_cast<float>(from[i]));
    } else {
      values[i] = static_cast<T>(from[i]);
    }
  }
}

void read(const void* from, DType dtype, int64_t n, double* to) {
  switch (dtype) {
    case DType::float32: return copy_out<float>(from, n, to);
    case DType::float64: return copy_out<double>(from, n, to);
    case DType::bfloat16: return copy_out<c10::BFloat16>(from, n, to);
    case DType::float16: return copy_out<c10::Half>(from, n, to);
  }
}

}  // namespace

Dense::Dense(const Tensor& given) : x(given), like(given), at{}, dtype(dtype_of(given)) {
  const int64_t dims = x.dim();
  STD_TORCH_CHECK(dims >= 2, "expected x of shape (N, C) or (N, C, *spatial), got ", dims, " dimensions");
  at.n = x.size(0);
  at.channels = x.size(1);
  at.positions = 1;
  std::vector<int64_t> inner{0}, outer{0, 1};
  for (int64_t d = 2; d < dims; ++d) {
    at.positions *= x.size(d);
    inner.push_back(d);
    outer.push_back(d);
  }
  inner.push_back(1);
  // Where both orders hold (one position, one channel) the longer run is taken.
  const bool planes = dense_in_order(x, outer), rows = dense_in_order(x, inner);
  if (!planes && !rows) x = torch::stable::contiguous(x);
  at.rows = rows && (!planes || at.channels > at.positions);
  if (!planes && !rows) at.rows = at.positions == 1;
}

Tensor Dense::match(const Tensor& other, const char* name) const {
  STD_TORCH_CHECK(same_shape(other, x) && other.scalar_type() == x.scalar_type() && other.is_cpu(), "expected ", name,
                  " of x's shape, dtype and device");
  if (same_strides(other, x)) return other;
  Tensor copy = torch::stable::empty_like(x);
  return torch::stable::copy_(copy, other);
}

Tensor Dense::output() const {
  const int64_t dims = x.dim();
  std::vector<int64_t> sizes(dims), strides(dims);
  for (int64_t d = 0; d < dims; ++d) {
    sizes[d] = x.size(d);
    strides[d] = x.stride(d);
  }
  return fresh_tensor(sizes, strides, x.scalar_type());
}

bool Dense::past_cache() const {
  static const int64_t limit = past_cache_limit();
  return x.numel() * static_cast<int64_t>(x.element_size()) > limit;
}

Tensor Dense::finished(Tensor output) const {
  if (like.get() == x.get()) return output;
  Tensor promised = torch::stable::empty_like(like);
  if (same_strides(promised, output)) return output;
  return torch::stable::copy_(promised, output);
}

Mask::Mask(const std::optional<Tensor>& mask, const Dense& x) : count(x.count()) {
  if (!mask) return;
  tensor = torch::stable::contiguous(*mask);
  STD_TORCH_CHECK(tensor->scalar_type() == ScalarType::Bool && tensor->numel() == count && tensor->is_cpu(),
                  "expected a boolean mask of shape (N, *spatial)");
  data = static_cast<const uint8_t*>(tensor->const_data_ptr());
  first = std::find(data, data + count, 1) - data;
  count = std::count(data, data + count, 1);
}

Activation activation_named(const std::string& name) {
  constexpr const char* names[] = {"none", "relu", "leaky_relu", "silu", "gelu", "hardswish"};
  for (int i = 0; i < 6; ++i) {
    if (name == names[i]) return static_cast<Activation>(i);
  }
  STD_TORCH_CHECK(false, "unknown activation ", name);
}

std::vector<double> doubles(const std::optional<Tensor>& tensor, int64_t size, const char* name) {
  if (!tensor) return {};
  STD_TORCH_CHECK(tensor->numel() == size && tensor->is_cpu(), "expected ", name, " to have ", size, " elements, got ",
                  tensor->numel());
  const Tensor dense = tensor->is_contiguous() ? *tensor : torch::stable::contiguous(*tensor);
  std::vector<double> values(size + kPadding);
  read(dense.const_data_ptr(), dtype_of(dense), size, values.data());
  return values;
}

double scalar(const Tensor& tensor, const char* name) {
  STD_TORCH_CHECK(tensor.numel() == 1 && tensor.is_cpu(), "expected ", name, " to be one value");
  if (tensor.scalar_type() == ScalarType::Long) {
    return static_cast<double>(*static_cast<const int64_t*>(tensor.const_data_ptr()));
  }
  return value_at(tensor.const_data_ptr(), dtype_of(tensor), 0);
}

double value_at(const void* data, DType dtype, int64_t index) {
  const int64_t size = dtype == DType::float64 ? 8 : dtype == DType::float32 ? 4 : 2;
  double value = 0;
  read(static_cast<const char*>(data) + index * size, dtype, 1, &value);
  return value;
}

Tensor fresh_vector(int64_t size, ScalarType dtype) { return fresh_tensor({size}, {1}, dtype); }
Tensor fresh_matrix(int64_t rows, int64_t columns, ScalarType dtype) {
  return fresh_tensor({rows, columns}, {columns, 1}, dtype);
}

Tensor statistics(const std::vector<double>& values) {
  const auto size = static_cast<int64_t>(values.size()) - kPadding;
  Tensor fresh = fresh_vector(size, ScalarType::Double);
  std::memcpy(fresh.mutable_data_ptr(), values.data(), size * sizeof(double));
  return fresh;
}

Tensor statistic(double value) {
  Tensor fresh = fresh_tensor({}, {}, ScalarType::Double);
  *static_cast<double*>(fresh.mutable_data_ptr()) = value;
  return fresh;
}

Tensor parameter_gradient(const std::optional<Tensor>& parameter, const std::vector<double>& values) {
  if (!parameter) return statistics(values);
  Tensor fresh = fresh_vector(static_cast<int64_t>(values.size()) - kPadding, parameter->scalar_type());
  assign(fresh, values);
  return fresh;
}

void assign(const Tensor& to, const std::vector<double>& values) {
  const auto size = static_cast<int64_t>(values.size()) - kPadding;
  void* data = to.mutable_data_ptr();
  switch (dtype_of(to)) {
    case DType::float32: return copy_in<float>(values.data(), size, data);
    case DType::float64: return copy_in<double>(values.data(), size, data);
    case DType::bfloat16: return copy_in<c10::BFloat16>(values.data(), size, data);
    case DType::float16: return copy_in<c10::Half>(values.data(), size, data);
  }
}

}  // namespace batchnorm
