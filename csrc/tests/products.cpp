// The kernels for products between columns: panels of deviations, and the tiles that are multiplied from them.

#include <algorithm>
#include <memory>

#include "../dispatch.h"
#include "parts.h"
#include "values.h"

using namespace batchnorm;

namespace {

// So many samples, as rows with gaps between them or as columns with gaps, the first value so many bytes off.
struct Lie {
  int64_t rows, columns, gap, skipped;
  bool across;

  int64_t stride() const { return (across ? columns : rows) + gap; }
  int64_t at(int64_t r, int64_t c) const { return across ? r * stride() + c : c * stride() + r; }
  int64_t size() const { return rows == 0 || columns == 0 ? 0 : at(rows - 1, columns - 1) + 1; }
  Samples samples(const Data& x, int64_t first, int64_t last) const {
    return {x.get(at(first, 0)), last - first, columns, across ? stride() : 1, across ? 1 : stride()};
  }
};

void products_of(const Lie& lie, DType dtype, bool weighted, bool missing, Random random) {
  const int64_t rows = lie.rows, columns = lie.columns, padded = (columns + kPanelPadding - 1) / kPanelPadding * kPanelPadding;
  const FeatureKernels& kernels = feature_kernels(dtype);
  const Data x = random.values(lie.size(), dtype, 2, 5, lie.skipped);
  std::unique_ptr<double[]> roots(new double[rows]), origin(new double[padded]()), s(new double[padded]()), q(new double[padded]());
  for (int64_t c = 0; c < columns; ++c) origin[c] = 5 + random.next();
  std::vector<double> expected_root(rows, 1);
  for (int64_t r = 0; r < rows; ++r) {
    if (weighted && random.next() < 0.2) expected_root[r] = 0;
    if (weighted && expected_root[r] > 0) expected_root[r] = 2 * random.next();
    roots[r] = expected_root[r];
    // A sample without weight is not seen, whatever it holds; one that is not complete gets none.
    if (expected_root[r] == 0) x.set(lie.at(r, columns / 2), r % 2 ? NAN : INFINITY);
    if (missing && random.next() < 0.1) {
      x.set(lie.at(r, static_cast<int64_t>(random.next() * static_cast<double>(columns))), NAN);
      expected_root[r] = 0;
    }
  }
  if (missing) kernels.leave_out_incomplete(lie.samples(x, 0, rows), roots.get());
  for (int64_t r = 0; missing && r < rows; ++r) expect_close("root", roots[r], expected_root[r], 0);

  // In two steps into panels of more samples than there are.
  const int64_t depth = rows + 3, middle = rows / 3;
  std::unique_ptr<double[]> panels(new double[depth * padded]), out(new double[columns * columns]);
  std::fill_n(out.get(), columns * columns, 1);
  const auto pack = [&](int64_t first, int64_t last) {
    const Panels to{panels.get(), depth, first, s.get(), q.get()};
    kernels.pack(lie.samples(x, first, last), weighted || missing, roots.get() + first, origin.get(), to);
  };
  pack(0, middle);
  pack(middle, rows);

  // Tiles are the pieces: none may touch another's, nor anything beyond the matrix.
  const int64_t edge = 3 * kPanelPadding;
  std::vector<Tile> tiles;
  for (int64_t i = 0; i < columns; i += edge) {
    for (int64_t j = 0; j <= i; j += edge) {
      tiles.push_back({i, std::min(i + edge, columns), j, std::min(j + edge, columns)});
    }
  }
  for (size_t first = 0; first < tiles.size(); first += 8) {
    const std::vector<Tile> some(tiles.begin() + first, tiles.begin() + std::min(first + 8, tiles.size()));
    for_each_piece(some, [&](const Tile& tile, size_t) {
      const Panels of{panels.get(), depth, 0, nullptr, nullptr};
      kernels.multiply(of, rows, tile, out.get(), columns, {x.get(), lie.size() * bytes_of(dtype)});
    });
  }

  std::vector<double> d(rows * columns);
  for (int64_t c = 0; c < columns; ++c) {
    double sum = 0, squares = 0;
    for (int64_t r = 0; r < rows; ++r) {
      const double root = expected_root[r], value = root > 0 ? (x[lie.at(r, c)] - origin[c]) * root : 0;
      d[r * columns + c] = value;
      sum += value * root;
      squares += value * value;
    }
    expect_close("s", s[c], sum, 1e-13 * static_cast<double>(rows));
    expect_close("q", q[c], squares, 1e-14 * squares);
    for (int64_t i = 0; i < c; ++i) {
      double product = 0;
      for (int64_t r = 0; r < rows; ++r) product += d[r * columns + i] * d[r * columns + c];
      expect_close("product", out[c * columns + i] - 1, product, 1e-13 * static_cast<double>(rows));
      if (c - i >= kPanelPadding) expect_close("above the diagonal", out[i * columns + c], 1, 0);
    }
    expect_close("square", out[c * columns + c] - 1, squares, 1e-13 * static_cast<double>(rows));
  }
}

}  // namespace

void check_products() {
  std::vector<Lie> all;
  for (const int64_t rows : {0, 1, 2, 7, 8, 9, 19, 40}) {
    for (const int64_t columns : {1, 2, 3, 5, 7, 8, 9, 15, 16, 17, 24, 25, 31, 33, 48, 70}) {
      for (const bool across : {false, true}) all.push_back({rows, columns, (rows + columns) % 3, rows * columns % 5, across});
    }
  }
  all.insert(all.end(), {{300, 9, 0, 0, true}, {301, 35, 2, 8, false}, {130, 203, 0, 3, true}, {33, 150, 1, 0, false}});
  uint64_t seed = 5000;
  for (const Lie& lie : all) {
    for (int dtype = 0; dtype < 4; ++dtype) {
      for (int kind = 0; kind < 4; ++kind) {
        products_of(lie, static_cast<DType>(dtype), kind & 1, kind & 2, Random{++seed});
      }
    }
  }
}
