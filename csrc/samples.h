// Samples of a tensor, and blocks of them as the kernels for products take them: see scatter.cpp.
#pragma once

#include <algorithm>
#include <cmath>
#include <memory>
#include <new>
#include <vector>

#include "dispatch.h"
#include "tensors.h"

namespace batchnorm {

// Samples in a block: three panels of AVX-512 and one, which one tile of registers takes, lie in the first-level cache together.
constexpr int64_t kDepth = 128;

inline int64_t padded(int64_t channels) { return (channels + kPanelPadding - 1) / kPanelPadding * kPanelPadding; }

// x (N, C) or (N, C, P) as runs of samples that lie at equal distances, either channel by channel or sample by sample.
struct Runs {
  Tensor x;
  int64_t channels, runs, length, run_stride, sample_stride, channel_stride;

  explicit Runs(const Tensor& given) : x(given) {
    STD_TORCH_CHECK(x.dim() == 2 || x.dim() == 3, "expected x of shape (N, C) or (N, C, P), got ", x.dim(), " dimensions");
    if (!read()) {
      x = torch::stable::contiguous(x);
      read();
    }
  }
  int64_t samples() const { return runs * length; }
  bool across() const { return channel_stride == 1 && !(channels == 1 && sample_stride == 1); }

  // Calls visit(samples, where the first of them is among [first, last)).
  template <class Visit>
  void for_each(int64_t first, int64_t last, Visit visit) const {
    const auto bytes = static_cast<int64_t>(x.element_size());
    for (int64_t at = first; at < last;) {
      const int64_t run = at / length, within = at % length, count = std::min(length - within, last - at);
      const char* begin = static_cast<const char*>(x.const_data_ptr()) + (run * run_stride + within * sample_stride) * bytes;
      visit(Samples{begin, count, channels, sample_stride, channel_stride}, at - first);
      at += count;
    }
  }
  // The memory of [first, last), where hardly anything else lies between and a second-level cache can hold it besides.
  Ahead ahead(int64_t first, int64_t last) const {
    constexpr int64_t kMost = 1 << 20;
    if (first >= last || runs > 1 || !across() || sample_stride > 2 * channels) return {};
    const int64_t row = sample_stride * static_cast<int64_t>(x.element_size());
    if ((last - first) * row > kMost) return {};
    return {static_cast<const char*>(x.const_data_ptr()) + first * row, (last - first) * row};
  }

 private:
  bool read() {
    channels = x.size(1);
    runs = x.size(0);
    length = x.dim() == 3 ? x.size(2) : 1;
    run_stride = x.stride(0);
    sample_stride = x.dim() == 3 ? x.stride(2) : 1;
    channel_stride = channels == 1 ? 1 : x.stride(1);
    if (length == 1 || (runs > 1 && run_stride == length * sample_stride)) {
      if (length == 1) sample_stride = run_stride;
      length *= runs;
      runs = 1;
    }
    if (length == 1) sample_stride = 1;
    return channel_stride == 1 || sample_stride == 1;
  }
};

struct Input {
  Runs runs;
  const double* weights;
  bool skip_nan;
  const FeatureKernels& kernels;
};

// Up to kDepth samples as panels, with the sums of their deviations and of the squares of these.
class Block {
 public:
  std::vector<double> s, q;
  double weight = 0;  // of the samples
  int64_t rows = 0;

  explicit Block(const Input& input)
      : s(padded(input.runs.channels)), q(s), input_(&input), panels_(new(std::align_val_t(64)) double[kDepth * s.size()]()) {
    all_alike();
  }

  // Which samples count, and for how much.
  void choose(int64_t first, int64_t last) {
    first_ = first;
    rows = last - first;
    weight = static_cast<double>(rows);
    if (input_->weights != nullptr) {
      weight = 0;
      for (int64_t k = 0; k < rows; ++k) {
        weights_[k] = input_->weights[first + k];
        roots_[k] = std::sqrt(weights_[k]);
        weight += weights_[k];
      }
    } else if (weighted_) {
      all_alike();
    }
    weighted_ = input_->weights != nullptr;
    if (missing_) leave_out_incomplete();
  }
  void pack(const std::vector<double>& origin) {
    pack_once(origin);
    if (!input_->skip_nan || missing_) return;
    // A sum says whether to look closer: it is NaN wherever a value is.
    if (std::none_of(s.begin(), s.end(), [](double sum) { return std::isnan(sum); })) return;
    leave_out_incomplete();
    pack_once(origin);
  }
  void leave_out_incomplete() {
    input_->runs.for_each(first_, first_ + rows, [&](const Samples& samples, int64_t at) {
      input_->kernels.leave_out_incomplete(samples, roots_ + at);
    });
    double left = 0;
    bool any = false;
    for (int64_t k = 0; k < rows; ++k) {
      any |= roots_[k] == 0 && weights_[k] > 0;
      left += roots_[k] > 0 ? weights_[k] : 0;
    }
    missing_ = any;  // then the next block is likely to have some, too
    if (!any) return;
    weighted_ = true;
    weight = left;
  }
  // The first sample that counts, as doubles.
  void first_sample(std::vector<double>& values) const {
    const int64_t k = std::find_if(roots_, roots_ + rows, [](double root) { return root > 0; }) - roots_;
    input_->runs.for_each(first_ + k, first_ + k + 1, [&](const Samples& sample, int64_t) {
      for (int64_t c = 0; c < sample.channels; ++c) {
        values[c] = value_at(sample.x, dtype_of(input_->runs.x), c * sample.channel_stride);
      }
    });
  }
  void multiply(const Tile& tile, double* products, Ahead next) const {
    const Panels panels{panels_.get(), kDepth, 0, nullptr, nullptr};
    input_->kernels.multiply(panels, rows, tile, products, input_->runs.channels, next);
  }

 private:
  void all_alike() {
    std::fill_n(weights_, kDepth, 1);
    std::fill_n(roots_, kDepth, 1);
  }
  void pack_once(const std::vector<double>& origin) {
    std::fill(s.begin(), s.end(), 0);
    std::fill(q.begin(), q.end(), 0);
    input_->runs.for_each(first_, first_ + rows, [&](const Samples& samples, int64_t at) {
      const Panels to{panels_.get(), kDepth, at, s.data(), q.data()};
      input_->kernels.pack(samples, weighted_, roots_ + at, origin.data(), to);
    });
  }

  struct Free {
    void operator()(double* memory) const { ::operator delete[](memory, std::align_val_t(64)); }
  };
  const Input* input_;
  std::unique_ptr<double[], Free> panels_;
  int64_t first_ = 0;
  bool weighted_ = false, missing_ = false;
  double weights_[kDepth], roots_[kDepth];
};

}  // namespace batchnorm
