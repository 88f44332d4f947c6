// The operator batchnorm::add_products (src/batchnorm/moments/products.py) on CPU tensors: from which origin deviations are
// taken, and how threads share the work.

#include <torch/csrc/stable/library.h>

#include <atomic>

#include "samples.h"

namespace batchnorm {
namespace {

using Maybe = std::optional<Tensor>;

constexpr int64_t kWorthAThread = 1 << 22;  // products

template <class Visit>
void in_turn(int64_t count, Visit visit) {
  for (int64_t i = 0; i < count; ++i) visit(i);
}
// Each thread takes the next one when it is done with one.
template <class Visit>
void side_by_side(int64_t count, Visit visit) {
  std::atomic<int64_t> next{0};
  const auto threads = std::min<int64_t>(count, torch::stable::get_num_threads());
  if (threads <= 1) return in_turn(count, visit);
  torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    for (int64_t i = next.fetch_add(1); i < count; i = next.fetch_add(1)) visit(i);
  });
}

// What is known of some samples: their weight, the sums of their deviations from an origin, and, on the diagonal and below, of
// the products of these.
struct Sums {
  int64_t channels;
  double weight;
  std::vector<double> origin, s;
  double* products;
  std::vector<double> q;  // the diagonal, for a look at it

  double* row(int64_t i) const { return products + i * channels; }
  void read_diagonal() {
    q.resize(channels);
    for (int64_t i = 0; i < channels; ++i) q[i] = row(i)[i];
  }

  // With d' = d - c: sum d' d'^T = sum d d^T - c s^T - s c^T + n c c^T.
  void move_to(const std::vector<double>& to) {
    std::vector<double> c(channels), moved(channels);
    for (int64_t i = 0; i < channels; ++i) {
      c[i] = to[i] - origin[i];
      moved[i] = s[i] - weight * c[i];
    }
    if (weight > 0) {
      side_by_side((channels + kRows - 1) / kRows, [&](int64_t part) {
        for (int64_t i = part * kRows; i < std::min(channels, (part + 1) * kRows); ++i) {
          double* values = row(i);
          for (int64_t j = 0; j <= i; ++j) values[j] -= c[i] * s[j] + moved[i] * c[j];
        }
      });
      std::copy(moved.begin(), moved.end(), s.begin());
      read_diagonal();
    }
    std::copy_n(to.begin(), channels, origin.begin());
  }

  // Far from the mean sums of squares lose what the mean's square takes of them: with the mean k deviations away, a factor of
  // 1 + k^2. Where that would be much with `more` samples in, the origin that is better, otherwise nothing.
  std::vector<double> better_origin(double more, const std::vector<double>& more_s, const std::vector<double>& more_q) const {
    constexpr double kFar = 16;
    const double all = weight + more;
    bool far = false;
    for (int64_t i = 0; i < channels; ++i) {
      const double sum = s[i] + more_s[i], squares = q[i] + more_q[i], taken = sum / all * sum;
      far |= taken > kFar * (squares - taken) && std::isfinite(squares);
    }
    if (!far) return {};
    std::vector<double> to(origin);
    for (int64_t i = 0; i < channels; ++i) {
      const double c = (s[i] + more_s[i]) / all;
      if (std::isfinite(c)) to[i] += c;
    }
    return to;
  }

  static constexpr int64_t kRows = 64;  // of the matrix, for a thread
};

// An origin for nothing yet: the mean of the first samples, as deviations from the first.
void choose_origin(const Input& input, Sums& sums) {
  Block block(input);
  std::fill(sums.origin.begin(), sums.origin.end(), 0);
  std::fill(sums.s.begin(), sums.s.end(), 0);
  for (int64_t first = 0; first < input.runs.samples(); first += kDepth) {
    block.choose(first, std::min(first + kDepth, input.runs.samples()));
    if (input.skip_nan) block.leave_out_incomplete();
    if (!(block.weight > 0)) continue;
    block.first_sample(sums.origin);
    block.pack(sums.origin);
    for (int64_t i = 0; i < sums.channels; ++i) {
      const double mean = block.s[i] / block.weight;
      if (std::isfinite(mean)) sums.origin[i] += mean;
    }
    return;
  }
}

// Adds samples to sums, a few blocks at a time. `each(count, visit)` says whether blocks, and tiles of the matrix, go to threads.
template <class Each>
class Addition {
 public:
  Addition(const Input& input, Sums& sums, int64_t blocks, int64_t edge, Each each)
      : input_(input), sums_(sums), each_(each), s_(sums.channels), q_(sums.channels) {
    for (int64_t b = 0; b < blocks; ++b) blocks_.emplace_back(input);
    // The lower triangle, with what is on its diagonal, and only half the work, last.
    const int64_t channels = sums.channels, side = (channels + edge - 1) / edge;
    for (int64_t apart = side - 1; apart >= 0; --apart) {
      for (int64_t j = 0; j + apart < side; ++j) {
        const int64_t i = j + apart;
        tiles_.push_back({i * edge, std::min((i + 1) * edge, channels), j * edge, std::min((j + 1) * edge, channels)});
      }
    }
  }

  void add(int64_t first, int64_t last) {
    const auto step = static_cast<int64_t>(blocks_.size()) * kDepth;
    for (; first < last; first += step) add_blocks(first, std::min(first + step, last), last);
  }

 private:
  void add_blocks(int64_t first, int64_t last, int64_t end) {
    used_ = (last - first + kDepth - 1) / kDepth;
    each_(used_, [&](int64_t b) {
      blocks_[b].choose(first + b * kDepth, std::min(first + (b + 1) * kDepth, last));
      blocks_[b].pack(sums_.origin);
    });
    double weight = add_up();
    if (!(weight > 0)) return;
    if (const auto origin = sums_.better_origin(weight, s_, q_); !origin.empty()) {
      sums_.move_to(origin);
      each_(used_, [&](int64_t b) { blocks_[b].pack(sums_.origin); });
      weight = add_up();
    }
    sums_.weight += weight;
    for (int64_t i = 0; i < sums_.channels; ++i) {
      sums_.s[i] += s_[i];
      sums_.q[i] += q_[i];
    }
    const Ahead next = input_.runs.ahead(last, std::min(2 * last - first, end));
    const int64_t share = next.bytes / static_cast<int64_t>(tiles_.size());
    each_(static_cast<int64_t>(tiles_.size()), [&](int64_t t) {
      for (int64_t b = 0; b < used_; ++b) {
        blocks_[b].multiply(tiles_[t], sums_.products, b == 0 ? Ahead{next.at + t * share, share} : Ahead{});
      }
    });
  }
  double add_up() {
    double weight = blocks_[0].weight;
    s_ = blocks_[0].s;
    q_ = blocks_[0].q;
    for (int64_t b = 1; b < used_; ++b) {
      weight += blocks_[b].weight;
      for (int64_t i = 0; i < sums_.channels; ++i) {
        s_[i] += blocks_[b].s[i];
        q_[i] += blocks_[b].q[i];
      }
    }
    return weight;
  }

  const Input& input_;
  Sums& sums_;
  Each each_;
  int64_t used_ = 0;
  std::vector<Block> blocks_;
  std::vector<Tile> tiles_;
  std::vector<double> s_, q_;
};

// `pieces` runs of samples at the same time, each with sums of its own, which are added up in the end.
void add_by_samples(Sums& sums, const Input& input, int64_t pieces) {
  constexpr int64_t kEdge = 192;
  const int64_t channels = sums.channels, samples = input.runs.samples();
  std::vector<Sums> parts;
  std::vector<std::vector<double>> memory(pieces);
  for (int64_t p = 0; p < pieces; ++p) {
    parts.push_back(sums);
    if (p == 0) continue;
    parts[p].weight = 0;
    std::fill(parts[p].s.begin(), parts[p].s.end(), 0);
    std::fill(parts[p].q.begin(), parts[p].q.end(), 0);
  }
  const auto work = [&](int64_t p) {
    if (p > 0) {
      memory[p].resize(channels * channels);
      parts[p].products = memory[p].data();
    }
    Addition(input, parts[p], 1, kEdge, [](int64_t count, auto visit) {
      in_turn(count, visit);
    }).add(samples * p / pieces, samples * (p + 1) / pieces);
  };
  if (pieces == 1) {
    work(0);
    sums = parts[0];
    return;
  }
  torch::stable::parallel_for(0, pieces, 1, [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p) work(p);
  });
  // To one origin, their common mean, unless all have kept theirs.
  Sums& all = parts[0];
  if (std::any_of(parts.begin(), parts.end(), [&](const Sums& part) { return part.origin != all.origin; })) {
    std::vector<double> mean(all.origin);
    double weight = 0;
    for (const Sums& part : parts) weight += part.weight;
    for (int64_t i = 0; i < channels; ++i) {
      double c = 0;
      for (const Sums& part : parts) c += (part.s[i] + part.weight * (part.origin[i] - all.origin[i])) / weight;
      if (std::isfinite(c)) mean[i] += c;
    }
    for (Sums& part : parts) part.move_to(mean);
  }
  side_by_side((channels + Sums::kRows - 1) / Sums::kRows, [&](int64_t r) {
    for (int64_t p = 1; p < pieces; ++p) {
      for (int64_t i = r * Sums::kRows; i < std::min(channels, (r + 1) * Sums::kRows); ++i) {
        for (int64_t j = 0; j <= i; ++j) all.row(i)[j] += parts[p].row(i)[j];
      }
    }
  });
  for (int64_t p = 1; p < pieces; ++p) {
    all.weight += parts[p].weight;
    for (int64_t i = 0; i < channels; ++i) all.s[i] += parts[p].s[i];
  }
  sums = all;
}

// All threads on the same samples, several blocks at a time so that the matrix is read and written less often.
void add_by_tiles(Sums& sums, const Input& input) {
  constexpr int64_t kWide = 1536, kPanelBytes = int64_t{128} << 20;
  const int64_t samples = input.runs.samples(), threads = torch::stable::get_num_threads();
  const int64_t bytes = kDepth * padded(sums.channels) * static_cast<int64_t>(sizeof(double));
  const int64_t at_once = std::min(std::clamp<int64_t>(2 * threads, 8, 32), std::max<int64_t>(1, kPanelBytes / bytes));
  const int64_t blocks = std::min(at_once, (samples + kDepth - 1) / kDepth);
  Addition(input, sums, blocks, sums.channels < kWide ? 96 : 192, [](int64_t count, auto visit) {
    side_by_side(count, visit);
  }).add(0, samples);
}

double* doubles_of(const Tensor& tensor, int64_t size, const char* name) {
  STD_TORCH_CHECK(tensor.scalar_type() == ScalarType::Double && tensor.is_cpu() && tensor.is_contiguous() && tensor.numel() == size,
                  "expected ", name, " to be ", size, " contiguous float64 values");
  return static_cast<double*>(tensor.mutable_data_ptr());
}

void add_products(Tensor x, Maybe weights, bool skip_nan, Tensor count, Tensor origin, Tensor total, Tensor products) {
  Input input{Runs(x), nullptr, skip_nan, feature_kernels(dtype_of(x))};
  const int64_t channels = input.runs.channels, samples = input.runs.samples();
  if (weights) {
    weights = torch::stable::contiguous(*weights);
    STD_TORCH_CHECK(weights->scalar_type() == ScalarType::Double && weights->is_cpu() && weights->dim() == 1 &&
                        weights->size(0) == x.size(0) && x.dim() == 2,
                    "expected weights of shape (N,), float64, for x of shape (N, C)");
    input.weights = static_cast<const double*>(weights->const_data_ptr());
  }
  double *n = doubles_of(count, 1, "count"), *o = doubles_of(origin, channels, "origin"), *s = doubles_of(total, channels, "total");
  Sums sums{channels, *n, std::vector<double>(padded(channels)), std::vector<double>(channels),
            doubles_of(products, channels * channels, "products"), {}};
  if (samples == 0 || channels == 0) return;
  std::copy_n(o, channels, sums.origin.begin());
  std::copy_n(s, channels, sums.s.begin());
  sums.read_diagonal();
  if (!(sums.weight > 0)) choose_origin(input, sums);

  // Sums of its own for each thread cost it a pass over the matrix or two, and memory.
  constexpr int64_t kNarrow = 128, kManySamples = 4096, kMemory = int64_t{64} << 20;
  const double all_products = static_cast<double>(samples) * static_cast<double>((channels + 8) * (channels + 8));
  const auto useful = static_cast<int64_t>(std::clamp<double>(all_products / kWorthAThread, 1, torch::stable::get_num_threads()));
  const bool affordable = useful * channels * channels * static_cast<int64_t>(sizeof(double)) <= kMemory;
  if (useful == 1 || channels <= kNarrow || (affordable && samples / useful >= kManySamples)) {
    add_by_samples(sums, input, useful);
  } else {
    add_by_tiles(sums, input);
  }
  *n = sums.weight;
  std::copy_n(sums.origin.begin(), channels, o);
  std::copy_n(sums.s.begin(), channels, s);
}

}  // namespace
}  // namespace batchnorm

STABLE_TORCH_LIBRARY_IMPL(batchnorm, CPU, m) { m.impl("add_products", TORCH_BOX(&batchnorm::add_products)); }
