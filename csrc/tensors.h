// Between tensors and kernels: layouts, types, outputs. The only place that asks a tensor for its strides.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/Half.h>

#include <optional>
#include <string>
#include <vector>

#include "kernels/problem.h"

namespace batchnorm {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// The type of floating-point data; an error for any other.
DType dtype_of(const Tensor& x);

// x as the kernels take it: dense, in one of the two layouts. A tensor with other strides is copied, and results go back into
// a tensor of x's own strides: that costs a pass each way, and every layout that torch's own layers produce is spared it.
struct Dense {
  Tensor x;     // dense
  Tensor like;  // as it came: outputs take their strides from it
  Layout at;
  DType dtype;

  explicit Dense(const Tensor& x);
  // Whether an output of this size is better written past the cache.
  bool past_cache() const;
  int64_t count() const { return at.n * at.positions; }
  const void* data() const { return x.const_data_ptr(); }
  // `other`, of x's shape and dtype, in x's layout.
  Tensor match(const Tensor& other, const char* name) const;
  // A fresh output in x's layout; `finished` hands it out with the strides that were promised.
  Tensor output() const;
  Tensor finished(Tensor output) const;
};

// The real positions, (n, positions) bytes, or null; and how many there are.
struct Mask {
  std::optional<Tensor> tensor;
  const uint8_t* data = nullptr;
  int64_t count;
  int64_t first = 0;  // the first real position

  Mask(const std::optional<Tensor>& mask, const Dense& x);
};

Activation activation_named(const std::string& name);

// A small vector (a parameter, a statistic) in double, whatever its type; empty for nothing.
std::vector<double> doubles(const std::optional<Tensor>& tensor, int64_t size, const char* name);
double scalar(const Tensor& tensor, const char* name);

// One value of dense data.
double value_at(const void* data, DType dtype, int64_t index);

Tensor fresh_vector(int64_t size, ScalarType dtype);
Tensor fresh_matrix(int64_t rows, int64_t columns, ScalarType dtype);
Tensor statistics(const std::vector<double>& values);
Tensor statistic(double value);
// A vector of the parameter's type, or of doubles where there is no parameter.
Tensor parameter_gradient(const std::optional<Tensor>& parameter, const std::vector<double>& values);
// Writes doubles into a vector of any floating type.
void assign(const Tensor& to, const std::vector<double>& values);

}  // namespace batchnorm
