// Registers the kernels as the CPU implementation of operators that Python has defined (src/batchnorm/ops/schema.py).
//
// LibTorch's stable ABI only (TORCH_TARGET_VERSION 2.10): one binary serves several versions of torch and Python.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <optional>
#include <tuple>

#include "kernels/stats.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// The layout of a tensor whose spatial dimensions can be walked as one, or nothing.
std::optional<batchnorm::Layout> collapsed(const Tensor& x) {
  const int64_t dims = x.dim();
  batchnorm::Layout at{x.size(0), x.size(1), 1, x.stride(0), x.stride(1), 1};
  if (dims > 2) at.stride_position = x.stride(dims - 1);
  for (int64_t d = dims - 1; d >= 2; --d) {
    if (x.size(d) != 1 && x.stride(d) != at.stride_position * at.positions) return std::nullopt;
    at.positions *= x.size(d);
  }
  return at;
}

std::tuple<Tensor, Tensor, Tensor> stats(Tensor x, std::optional<Tensor> mask) {
  STD_TORCH_CHECK(x.dim() >= 2, "expected x of shape (N, C) or (N, C, *spatial), got ", x.dim(), " dimensions");
  auto at = collapsed(x);
  if (!at) {
    x = torch::stable::contiguous(x);
    at = collapsed(x);
  }
  const bool* real = nullptr;
  int64_t count = at->n * at->positions;
  if (mask) {
    *mask = torch::stable::contiguous(*mask);
    STD_TORCH_CHECK(mask->scalar_type() == ScalarType::Bool && mask->numel() == count,
                    "expected a boolean mask of shape (N, *spatial)");
    real = static_cast<const bool*>(mask->const_data_ptr());
    count = std::count(real, real + count, true);
  }

  Tensor counts = torch::stable::new_empty(x, {}, ScalarType::Double);
  Tensor mean = torch::stable::new_empty(x, {at->channels}, ScalarType::Double);
  Tensor m2 = torch::stable::new_empty(x, {at->channels}, ScalarType::Double);
  *static_cast<double*>(counts.mutable_data_ptr()) = static_cast<double>(count);
  double* mean_data = static_cast<double*>(mean.mutable_data_ptr());
  double* m2_data = static_cast<double*>(m2.mutable_data_ptr());

  const auto run = [&](auto* typed) {
    // Threads take whole channels: no merging, and the same result whatever their number.
    const int64_t grain = std::max<int64_t>(1, 32768 / std::max<int64_t>(1, at->n * at->positions));
    torch::stable::parallel_for(0, at->channels, grain, [&](int64_t first, int64_t last) {
      batchnorm::stats(typed, real, *at, count, first, last, mean_data, m2_data);
    });
  };
  const void* data = x.const_data_ptr();
  switch (x.scalar_type()) {
    case ScalarType::Float:
      run(static_cast<const float*>(data));
      break;
    case ScalarType::Double:
      run(static_cast<const double*>(data));
      break;
    case ScalarType::BFloat16:
      run(static_cast<const c10::BFloat16*>(data));
      break;
    case ScalarType::Half:
      run(static_cast<const c10::Half*>(data));
      break;
    default:
      STD_TORCH_CHECK(false, "expected a floating point tensor (float32, float64, bfloat16 or float16)");
  }
  return {counts, mean, m2};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(batchnorm, CPU, m) {
  m.impl("stats", TORCH_BOX(&stats));
}
