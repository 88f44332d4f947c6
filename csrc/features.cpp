// The operators of preprocessing on CPU tensors: batchnorm::moments (src/batchnorm/moments/operator.py), batchnorm::affine and
// batchnorm::result_like (src/batchnorm/preprocessing/affine.py). Which matrices a tensor is made of, and how threads share them.

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <atomic>
#include <limits>
#include <numeric>
#include <tuple>

#include "dispatch.h"
#include "memory.h"
#include "tensors.h"

namespace {

using batchnorm::AffineMap;
using batchnorm::DType;
using batchnorm::kPadding;
using batchnorm::Matrix;
using batchnorm::MomentsState;
using batchnorm::dtype_of;
using batchnorm::ScalarType;
using batchnorm::Tensor;
using Maybe = std::optional<Tensor>;

constexpr int64_t kWorthAThread = 32768;  // values
constexpr int64_t kLanes = 64;            // columns that a long run of one channel is folded to

// x (N, C) or (N, C, P) as it lies in memory:
//   rows:   one matrix of N P samples, the channels of a sample side by side,
//   wide:   one matrix of N samples, the P values of each channel side by side,
//   planes: for each n and channel a run of P values.
struct Memory {
  enum Kind { rows, wide, planes, other } kind = other;
  int64_t n, channels, positions, n_stride, channel_stride;

  // `by_sample`: for weights, which belong to samples.
  explicit Memory(const Tensor& x, bool by_sample = false) {
    STD_TORCH_CHECK(x.dim() == 2 || x.dim() == 3, "expected x of shape (N, C) or (N, C, P), got ", x.dim(), " dimensions");
    n = x.size(0);
    channels = x.size(1);
    positions = x.dim() == 3 ? x.size(2) : 1;
    n_stride = x.stride(0);
    channel_stride = x.stride(1);
    int64_t position_stride = x.dim() == 3 ? x.stride(2) : 1;
    if (!by_sample && positions == 1 && n_stride == 1 && n > 1) {
      // column by column, as data frames have it: each channel is one run
      positions = n;
      n = 1;
      position_stride = 1;
    }
    if (positions == 1 && (channel_stride == 1 || channels == 1)) {
      kind = rows;
    } else if (positions > 1 && channel_stride == 1 && (n == 1 || n_stride == positions * position_stride)) {
      kind = rows;
      n *= positions;
      n_stride = position_stride;
      positions = 1;
    } else if (position_stride == 1 || positions == 1) {
      // Short runs would leave each call of a kernel little to do; samples of very many values, too much to remember.
      const bool dense = channels == 1 || channel_stride == positions;
      kind = dense && n > 1 && positions < (n < 64 ? 512 : 4096) ? wide : planes;
    }
  }
};

template <class Visit>
void for_each(int64_t count, int64_t values_each, Visit visit) {
  const int64_t grain = std::max<int64_t>(1, kWorthAThread / std::max<int64_t>(1, values_each));
  if (count == 1) return visit(0);
  torch::stable::parallel_for(0, count, grain, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) visit(i);
  });
}

const void* at(const Tensor& x, int64_t value) {
  return static_cast<const char*>(x.const_data_ptr()) + value * static_cast<int64_t>(x.element_size());
}

// States of several columns.
struct Columns {
  int64_t width;
  std::vector<double> values;

  explicit Columns(int64_t columns) : width(columns + kPadding), values(6 * width) {
    constexpr double infinity = std::numeric_limits<double>::infinity();
    std::fill_n(values.begin() + 4 * width, width, infinity);
    std::fill_n(values.begin() + 5 * width, width, -infinity);
  }
  MomentsState state() {
    double* all = values.data();
    return {all, all + width, all + 2 * width, all + 3 * width, all + 4 * width, all + 5 * width};
  }
};

void merge(const MomentsState& to, const MomentsState& from) {
  const auto get = [](const MomentsState& s) { return batchnorm::Moments<double>{*s.count, *s.mean, *s.mean_low, *s.m2}; };
  const auto both = batchnorm::merge_moments(get(to), get(from));
  *to.count = both.count;
  *to.mean = both.mean;
  *to.mean_low = both.mean_low;
  *to.m2 = both.m2;
  *to.low = std::min(*to.low, *from.low);
  *to.high = std::max(*to.high, *from.high);
}

class Accumulation {
 public:
  Accumulation(const Tensor& x, const double* weights, bool skip_nan)
      : x_(x), memory_(x, weights != nullptr), weights_(weights), skip_nan_(skip_nan), total_(memory_.channels) {
    kernel_ = batchnorm::feature_kernels(dtype_of(x)).moments;
    if (x.numel() == 0) return;
    memory_.kind == Memory::planes ? by_planes() : by_rows();
  }
  MomentsState total() { return total_.state(); }

 private:
  using Kernel = decltype(batchnorm::FeatureKernels::moments);

  void by_rows() {
    const Memory& m = memory_;
    const int64_t columns = m.channels * m.positions;
    const int64_t useful = std::clamp<int64_t>(m.n * columns / kWorthAThread, 1, torch::stable::get_num_threads());
    // Too few rows for all threads: each takes some of the columns. Otherwise each takes some of the rows.
    constexpr int64_t kFewRows = 512, kSomeColumns = 512;
    if (m.n < useful * kFewRows && columns >= 2 * kSomeColumns) {
      Columns all(columns);
      const int64_t parts = (columns + kSomeColumns - 1) / kSomeColumns;
      for_each(parts, m.n * kSomeColumns, [&](int64_t p) {
        const int64_t c = p * kSomeColumns;
        kernel_({at(x_, c), m.n, std::min(kSomeColumns, columns - c), m.n_stride}, weights_, skip_nan_, all.state().at(c));
      });
      gather(all, columns);
      return;
    }
    // Several rows without gaps between them count as one wide row, so that vectors are full whatever the width.
    const bool gapless = weights_ == nullptr && m.n_stride == columns;
    int64_t fold = 1;
    if (gapless && columns < 1024) {
      fold = kPadding / std::gcd(columns, kPadding);
      fold *= std::max<int64_t>(1, kLanes / (columns * fold));
    }
    std::vector<Columns> pieces(useful, Columns(fold * columns));
    for_each(useful, m.n / useful * columns, [&](int64_t p) {
      const int64_t first = m.n * p / useful, last = m.n * (p + 1) / useful, folded = (last - first) / fold * fold;
      const double* weights = weights_ == nullptr ? nullptr : weights_ + first;
      const MomentsState state = pieces[p].state();
      kernel_({at(x_, first * m.n_stride), folded / fold, fold * columns, fold * m.n_stride}, weights, skip_nan_, state);
      if (fold == 1) return;
      const int64_t rest = first + folded;
      kernel_({at(x_, rest * m.n_stride), last - rest, columns, m.n_stride}, nullptr, skip_nan_, state);
    });
    for (Columns& piece : pieces) gather(piece, fold * columns);  // in this order, whichever was ready first
  }

  void by_planes() {
    const Memory& m = memory_;
    const int64_t threads = torch::stable::get_num_threads();
    const int64_t useful = std::clamp<int64_t>(x_.numel() / kWorthAThread, 1, threads);
    const int64_t parts = m.channels >= 4 * useful ? 1 : std::min((4 * useful + m.channels - 1) / m.channels, m.positions);
    std::vector<Columns> states(m.channels * parts, Columns(1));
    for_each(m.channels * parts, m.n * m.positions / parts, [&](int64_t i) {
      const int64_t channel = i / parts, part = i % parts;
      const int64_t first = m.positions * part / parts, count = m.positions * (part + 1) / parts - first;
      Columns lanes(kLanes);
      const MomentsState state = lanes.state();
      for (int64_t n = 0; n < m.n; ++n) {
        const int64_t begin = n * m.n_stride + channel * m.channel_stride + first, whole = count / kLanes * kLanes;
        kernel_({at(x_, begin), count / kLanes, kLanes, kLanes}, nullptr, skip_nan_, state);
        kernel_({at(x_, begin + whole), whole < count, count - whole, kLanes}, nullptr, skip_nan_, state);
      }
      for (int64_t lane = 0; lane < kLanes; ++lane) merge(states[i].state(), state.at(lane));
    });
    for (size_t i = 0; i < states.size(); ++i) merge(total_.state().at(i / parts), states[i].state());
  }

  void gather(Columns& from, int64_t columns) {
    const int64_t width = memory_.channels * memory_.positions;
    for (int64_t c = 0; c < columns; ++c) {
      merge(total_.state().at(c % width / memory_.positions), from.state().at(c));
    }
  }

  const Tensor& x_;
  Memory memory_;
  const double* weights_;
  bool skip_nan_;
  Columns total_;
  Kernel kernel_;
};

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> moments(Tensor given, Maybe weights, bool skip_nan) {
  const bool weighted = weights.has_value();
  const auto kind = Memory(given, weighted).kind;
  const bool readable = kind == Memory::rows || (!weighted && kind != Memory::other);
  const Tensor x = readable ? given : torch::stable::contiguous(given);
  const double* row_weights = nullptr;
  if (weights) {
    weights = torch::stable::contiguous(*weights);
    STD_TORCH_CHECK(weights->scalar_type() == ScalarType::Double && weights->is_cpu() && weights->dim() == 1 &&
                        weights->size(0) == x.size(0) && x.dim() == 2,
                    "expected weights of shape (N,), float64, for x of shape (N, C)");
    row_weights = static_cast<const double*>(weights->const_data_ptr());
  }
  Accumulation all(x, row_weights, skip_nan);
  const MomentsState total = all.total();
  const int64_t channels = x.size(1);
  const auto tensor = [&](const double* from) {
    Tensor fresh = torch::stable::new_empty(x, {channels}, ScalarType::Double);
    std::copy_n(from, channels, static_cast<double*>(fresh.mutable_data_ptr()));
    return fresh;
  };
  return {tensor(total.count), tensor(total.mean), tensor(total.mean_low),
          tensor(total.m2), tensor(total.low), tensor(total.high)};
}

// Writes into `out`, of x's shape and dtype (or x itself); whether x holds an infinite value.
bool affine(Tensor x, Tensor mean, Tensor mean_low, Tensor scale, double offset, double low, double high, bool inverse,
            Tensor out) {
  STD_TORCH_CHECK(out.scalar_type() == x.scalar_type() && out.numel() == x.numel() && out.dim() == x.dim() &&
                      out.size(1) == x.size(1),
                  "expected an output of x's shape and dtype");
  Memory m(x), to(out);
  if (m.kind != to.kind) m = Memory(x, true), to = Memory(out, true);
  if (m.kind == Memory::other || m.kind != to.kind || m.n != to.n) {
    const Tensor dense = torch::stable::contiguous(x);
    Tensor result = torch::stable::empty_like(dense);
    const bool found = affine(dense, mean, mean_low, scale, offset, low, high, inverse, result);
    torch::stable::copy_(out, result);
    return found;
  }
  const auto kernel = batchnorm::feature_kernels(dtype_of(x)).affine;
  const auto means = batchnorm::doubles(mean, m.channels, "mean"), lows = batchnorm::doubles(mean_low, m.channels, "mean_low"),
             scales = batchnorm::doubles(scale, m.channels, "scale");
  std::atomic<bool> infinite{false};
  const auto run = [&](int64_t begin, int64_t out_begin, Matrix matrix, int64_t y_stride, int64_t channel, bool uniform) {
    matrix.x = at(x, begin);
    const AffineMap map{means.data() + channel, lows.data() + channel, scales.data() + channel,
                        offset, low, high, inverse, uniform};
    void* y = const_cast<void*>(at(out, out_begin));
    if (kernel(matrix, map, y, y_stride)) infinite.store(true, std::memory_order_relaxed);
  };
  if (x.numel() == 0) return false;
  if (out.const_data_ptr() != x.const_data_ptr()) batchnorm::ask_for_huge_pages(out);
  if (m.kind == Memory::rows) {
    const int64_t piece = std::max<int64_t>(1, kWorthAThread / m.channels);
    const int64_t pieces = (m.n + piece - 1) / piece;
    for_each(pieces, piece * m.channels, [&](int64_t p) {
      const int64_t first = p * piece, rows = std::min(piece, m.n - first);
      run(first * m.n_stride, first * to.n_stride, {nullptr, rows, m.channels, m.n_stride}, to.n_stride, 0, false);
    });
  } else {
    constexpr int64_t kPart = kWorthAThread;
    const int64_t parts = (m.positions + kPart - 1) / kPart;
    for_each(m.n * m.channels * parts, std::min(m.positions, kPart), [&](int64_t i) {
      const int64_t plane = i / parts, n = plane / m.channels, channel = plane % m.channels, first = i % parts * kPart;
      run(n * m.n_stride + channel * m.channel_stride + first, n * to.n_stride + channel * to.channel_stride + first,
          {nullptr, 1, std::min(kPart, m.positions - first), 0}, 0, channel, true);
    });
  }
  return infinite;
}

// A place for the result, in kept memory (memory.h) where x is contiguous: the next batch is written where the last was.
Tensor result_like(Tensor x) {
  std::vector<int64_t> sizes(x.dim()), strides(x.dim());
  for (int64_t d = 0; d < x.dim(); ++d) sizes[d] = x.size(d), strides[d] = x.stride(d);
  if (!x.is_contiguous()) return torch::stable::empty_like(x);
  return batchnorm::fresh_tensor(sizes, strides, x.scalar_type());
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(batchnorm, CPU, m) {
  m.impl("moments", TORCH_BOX(&moments));
  m.impl("affine", TORCH_BOX(&affine));
  m.impl("result_like", TORCH_BOX(&result_like));
}
