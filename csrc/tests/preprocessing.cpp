// The kernels for preprocessing: moments, alone and merged, and affine maps.

#include <algorithm>
#include <memory>

#include "../dispatch.h"
#include "parts.h"
#include "values.h"

using namespace batchnorm;

namespace {

// Where the data lie: rows `stride` values apart, the first `skipped` bytes away from where memory is aligned.
struct Shape {
  int64_t rows, columns, stride, skipped;

  int64_t size() const { return rows == 0 ? 0 : (rows - 1) * stride + columns; }
};

struct Cut {
  int64_t r0, r1, c0, c1;
};

std::vector<Cut> by_rows(const Shape& at) {
  std::vector<Cut> cuts;
  const int64_t pieces = std::max(threads, 2);
  for (int64_t i = 0; i < pieces; ++i) cuts.push_back({at.rows * i / pieces, at.rows * (i + 1) / pieces, 0, at.columns});
  return cuts;
}

// Columns come in kinds: plain ones, constant ones, ones whose first value is far from all others; and in data that are not
// clean also ones with NaN, of nothing but NaN, and with an infinity.
Data table(const Shape& at, DType dtype, bool clean, Random& random) {
  Data x = random.values(at.size(), dtype, 2, 5, at.skipped);
  const double far = dtype == DType::float64 ? 1e8 : dtype == DType::float32 ? 1e4 : 50;
  for (int64_t c = 0; c < at.columns; ++c) {
    for (int64_t r = 0; r < at.rows; ++r) {
      const int64_t i = r * at.stride + c;
      if (c % 4 == 1) x.set(i, far + x[i]);
      if (c % 5 == 4) x.set(i, 3);
      if (c % 6 == 2 && r == 0) x.set(i, 3000);
      if (clean) continue;
      if (c % 7 == 3 && random.next() < 0.2) x.set(i, NAN);
      if (c % 11 == 6) x.set(i, NAN);
      if (c % 13 == 7 && r == at.rows / 2) x.set(i, c % 2 ? INFINITY : -INFINITY);
    }
  }
  return x;
}

// ---- moments -------------------------------------------------------------------------------------------------------

// What is known of so many columns, in arrays as long as features.h promises and no longer.
class Known {
 public:
  explicit Known(int64_t columns) : columns_(columns), width_((columns + kPadding - 1) / kPadding * kPadding) {
    for (int k = 0; k < 6; ++k) {
      all_[k].reset(new double[width_]);
      // Columns that are not of this matrix hold something already, which has to stay.
      for (int64_t c = 0; c < width_; ++c) all_[k][c] = c < columns ? kNothing[k] : kOthers[k];
    }
  }
  MomentsState state() const {
    return {all_[0].get(), all_[1].get(), all_[2].get(), all_[3].get(), all_[4].get(), all_[5].get()};
  }
  void merge(const Known& other) {
    for (int64_t c = 0; c < columns_; ++c) {
      const auto both = merge_moments<double>({all_[0][c], all_[1][c], all_[2][c], all_[3][c]},
                                              {other.all_[0][c], other.all_[1][c], other.all_[2][c], other.all_[3][c]});
      all_[0][c] = both.count, all_[1][c] = both.mean, all_[2][c] = both.mean_low, all_[3][c] = both.m2;
      all_[4][c] = std::min(all_[4][c], other.all_[4][c]);
      all_[5][c] = std::max(all_[5][c], other.all_[5][c]);
    }
  }
  void expect_others_kept() const {
    for (int64_t c = columns_; c < width_; ++c) {
      for (int k = 0; k < 6; ++k) expect_close("another's column", all_[k][c], kOthers[k], 0);
    }
  }

 private:
  static constexpr double kNothing[6] = {0, 0, 0, 0, INFINITY, -INFINITY}, kOthers[6] = {2, 1, 0x1p-60, 3, -1, 4};
  int64_t columns_, width_;
  std::unique_ptr<double[]> all_[6];
};

void expect_moments(const Data& x, const Shape& at, const double* weights, bool skip_nan, const MomentsState& s, int64_t c) {
  double count = 0, low = INFINITY, high = -INFINITY, origin = 0;
  bool finite = true;
  const auto each = [&](auto visit) {
    for (int64_t r = 0; r < at.rows; ++r) {
      const double weight = weights == nullptr ? 1 : weights[r], value = x[r * at.stride + c];
      if (weight > 0 && !(skip_nan && std::isnan(value))) visit(weight, value);
    }
  };
  each([&](double weight, double value) {
    count += weight;
    finite &= std::isfinite(value);
    low = value < low ? value : low;
    high = value > high ? value : high;
    origin = value;
  });
  expect_close("count", s.count[c], count, 1e-14 * count);
  expect_close("min", s.low[c], low, 0);
  expect_close("max", s.high[c], high, 0);
  if (!finite) {
    expect_close("mean", s.mean[c] + s.mean_low[c], NAN, 0);
    expect_close("m2", s.m2[c], NAN, 0);
    return;
  }
  // From an origin among the values, so that a mean that is large beside the deviations costs nothing; and in two passes.
  double mean = 0, rest = 0, m2 = 0;
  each([&](double weight, double value) { mean += weight * (value - origin) / count; });
  each([&](double weight, double value) { rest += weight * (value - origin - mean) / count; });
  mean += rest;
  each([&](double weight, double value) { m2 += weight * (value - origin - mean) * (value - origin - mean); });
  const double deviation = count > 0 ? std::sqrt(m2 / count) : 0, ours = (s.mean[c] - origin) + s.mean_low[c];
  expect_close("mean", ours, mean, 1e-13 * deviation);
  expect_close("m2", s.m2[c], m2, 1e-12 * m2);
}

void moments_of(const Shape& at, DType dtype, bool weighted, bool skip_nan, bool clean, Random random) {
  const Data x = table(at, dtype, clean, random);
  std::unique_ptr<double[]> weights(weighted ? new double[at.rows] : nullptr);
  for (int64_t r = 0; weighted && r < at.rows; ++r) {
    weights[r] = random.next() < 0.2 ? 0 : 2 * random.next();
    for (int64_t c = 0; weights[r] == 0 && c < at.columns; ++c) x.set(r * at.stride + c, c % 2 ? NAN : INFINITY);  // unseen
  }
  const auto kernel = feature_kernels(dtype).moments;
  const auto add = [&](int64_t r0, int64_t r1, int64_t c0, int64_t c1, const MomentsState& to) {
    kernel({x.get(r0 * at.stride + c0), r1 - r0, c1 - c0, at.stride}, weighted ? &weights[r0] : nullptr, skip_nan, to);
  };

  // Pieces of rows, each into a state of its own in two steps, merged in their order.
  const std::vector<Cut> cuts = by_rows(at);
  std::vector<Known> known;
  for (size_t i = 0; i < cuts.size(); ++i) known.emplace_back(at.columns);
  for_each_piece(cuts, [&](const Cut& cut, size_t i) {
    const int64_t middle = cut.r0 + (cut.r1 - cut.r0) / 3;
    add(cut.r0, middle, 0, at.columns, known[i].state());
    add(middle, cut.r1, 0, at.columns, known[i].state());
  });
  for (size_t i = 1; i < known.size(); ++i) known[0].merge(known[i]);

  // Pieces of columns, into their parts of one state.
  constexpr int64_t kSome = 32;
  const int64_t step = std::max(kSome, at.columns / 4 / kPadding * kPadding);
  std::vector<Cut> parts;
  for (int64_t c = 0; c < at.columns; c += step) parts.push_back({0, at.rows, c, 0});
  for (size_t i = 0; i < parts.size(); ++i) parts[i].c1 = i + 1 < parts.size() ? parts[i + 1].c0 : at.columns;
  const Known whole(at.columns);
  for_each_piece(parts, [&](const Cut& cut, size_t) { add(0, at.rows, cut.c0, cut.c1, whole.state().at(cut.c0)); });

  for (const Known* each : {static_cast<const Known*>(known.data()), &whole}) {
    for (int64_t c = 0; c < at.columns; ++c) expect_moments(x, at, weights.get(), skip_nan, each->state(), c);
    each->expect_others_kept();
  }
}

// ---- affine maps ---------------------------------------------------------------------------------------------------

// What rounding to a type loses, of a value and at least.
double half_step(DType dtype, double value) {
  constexpr double steps[] = {0x1.01p-24, 0, 0x1.01p-8, 0x1.01p-11}, least[] = {0, 0, 0, 0x1.01p-25};
  return std::max(steps[static_cast<int>(dtype)] * std::abs(value), least[static_cast<int>(dtype)]);
}

void affine_of(const Shape& at, DType dtype, bool inverse, bool uniform, bool clean, Random random) {
  Data x = table(at, dtype, clean, random);
  const bool in_place = random.next() < 0.3, clipped = random.next() < 0.5;
  const int64_t y_stride = in_place ? at.stride : at.columns + static_cast<int64_t>(random.next() * 3);
  const Shape to{at.rows, at.columns, y_stride, in_place ? at.skipped : random.next() < 0.5 ? at.skipped : 0};
  const Data before = random.values(in_place ? 0 : to.size(), dtype, 1, 0, to.skipped);
  Data given(at.size(), dtype), original(to.size(), dtype), y(in_place ? 0 : to.size(), dtype, to.skipped);
  std::copy_n(x.get(), at.size() * bytes_of(dtype), given.get());
  std::copy_n(in_place ? x.get() : before.get(), to.size() * bytes_of(dtype), original.get());
  if (!in_place) std::copy_n(before.get(), to.size() * bytes_of(dtype), y.get());
  const Data& out = in_place ? x : y;

  const int64_t coefficients = uniform ? 1 : at.columns;
  const Data mean = random.values(coefficients, DType::float64, 3, 5);
  const Data low = random.values(coefficients, DType::float64, 1e-9, 0);
  const Data scale = random.values(coefficients, DType::float64, 0.4, 1);
  const auto doubles = [](const Data& data) { return reinterpret_cast<const double*>(data.get()); };
  AffineMap map{doubles(mean), doubles(low), doubles(scale), 0.25, -INFINITY, INFINITY, inverse, uniform};
  if (clipped) map.low = -1, map.high = 1.5;

  const std::vector<Cut> cuts = by_rows(at);
  std::vector<char> infinite(cuts.size());
  for_each_piece(cuts, [&](const Cut& cut, size_t i) {
    const Matrix matrix{x.get(cut.r0 * at.stride), cut.r1 - cut.r0, at.columns, at.stride};
    infinite[i] = feature_kernels(dtype).affine(matrix, map, out.get(cut.r0 * y_stride), y_stride);
  });

  bool some_infinite = false;
  for (int64_t r = 0; r < at.rows; ++r) {
    for (int64_t c = 0; c < at.columns; ++c) {
      const int64_t k = uniform ? 0 : c;
      const double value = given[r * at.stride + c], d = (value - mean[k]) - low[k];
      double exact = inverse ? ((value - map.offset) * scale[k] + low[k]) + mean[k] : d / scale[k] + map.offset;
      const double parts = inverse ? std::abs(value * scale[k]) + std::abs(mean[k]) + 1 : std::abs(d / scale[k]) + 1;
      if (!inverse && !std::isnan(exact)) exact = std::clamp(exact, map.low, map.high);
      some_infinite |= std::isinf(value);
      const double allowed = half_step(dtype, exact) + (std::isfinite(parts) ? 1e-15 * parts : 0);
      expect_close("affine", out[r * y_stride + c], exact, allowed);
    }
    for (int64_t c = at.columns; r + 1 < at.rows && c < y_stride; ++c) {
      expect_close("between rows", out[r * y_stride + c], original[r * y_stride + c], 0);
    }
  }
  expect_close("infinite", std::count(infinite.begin(), infinite.end(), 1) > 0, some_infinite, 0);
}

}  // namespace

void check_preprocessing() {
  std::vector<Shape> shapes;
  for (const int64_t rows : {0, 1, 2, 9, 33, 50}) {
    for (const int64_t columns : {1, 2, 3, 5, 7, 8, 9, 15, 16, 17, 31, 33, 70}) {
      shapes.push_back({rows, columns, columns + (rows + columns) % 3, (rows * columns) % 5});
    }
  }
  // More rows and more columns than a block, and than are summed at a time.
  shapes.insert(shapes.end(), {{3001, 5, 5, 0}, {1100, 35, 40, 8}, {601, 530, 530, 0}, {70, 1030, 1031, 3}, {1, 3000, 0, 8}});
  uint64_t seed = 1000;
  for (const Shape& at : shapes) {
    for (int dtype = 0; dtype < 4; ++dtype) {
      for (int kind = 0; kind < 8; ++kind) {
        const auto type = static_cast<DType>(dtype);
        const bool first = kind & 1, second = kind & 2, clean = kind & 4;
        if (at.size() > 30000 && (kind + dtype) % 3) continue;
        moments_of(at, type, first, second, clean, Random{++seed});
        affine_of(at, type, first, second, clean, Random{++seed});
      }
    }
  }
}
