// The kernels of the layers: sums, normalize, grad_sums, grad_input.

#include <algorithm>
#include <memory>

#include "../dispatch.h"
#include "parts.h"
#include "values.h"

using namespace batchnorm;

namespace {

// Stores past the cache, where the kernels have them.
void write_past_cache(auto& forward, bool wanted) {
  if constexpr (requires { forward.past_cache; }) forward.past_cache = wanted;
}

struct Problem {
  Layout at;
  DType dtype;
  Activation activation;
  bool masked, added;
  const Kernels& kernels;
  Random random;

  int64_t runs() const { return at.rows ? at.n * at.positions : at.n * at.channels; }
  int64_t size() const { return at.n * at.channels * at.positions; }
  int64_t index(int64_t n, int64_t c, int64_t p) const {
    return at.rows ? (n * at.positions + p) * at.channels + c : (n * at.channels + c) * at.positions + p;
  }
  bool bit(const uint8_t* sign, int64_t n, int64_t c, int64_t p) const {
    const int64_t run = at.rows ? n * at.positions + p : n * at.channels + c, i = at.rows ? c : p;
    return sign[run * at.run_bytes() + i / 8] >> (i % 8) & 1;
  }
  // Planes are cut by channels or by units, rows by units only.
  std::vector<Range> cut(bool by_channel) const {
    std::vector<Range> ranges;
    const int64_t pieces = std::max<int64_t>(threads, 2);
    const int64_t of = by_channel ? at.channels : at.units();
    for (int64_t i = 0; i < pieces; ++i) {
      const int64_t from = of * i / pieces, to = of * (i + 1) / pieces;
      if (from < to) ranges.push_back(by_channel ? Range{from, to, 0, at.units()} : Range{0, at.channels, from, to});
    }
    return ranges;
  }
  void run(bool by_channel);
};

void Problem::run(bool by_channel) {
  const int64_t padded = at.channels + kPadding;
  const int64_t skipped = std::max<int64_t>(0, static_cast<int64_t>(random.next() * 16) - 4);  // aligned every third time
  const Data x = random.values(size(), dtype, 2, 5, skipped), grad = random.values(size(), dtype, 1, 0, skipped);
  const Data extra = random.values(added ? size() : 0, dtype, 1, 0, skipped);
  std::unique_ptr<uint8_t[]> mask(masked ? new uint8_t[at.n * at.positions] : nullptr);
  for (int64_t i = 0; masked && i < at.n * at.positions; ++i) mask[i] = random.next() > 0.35;
  const bool signs = added && (activation == Activation::relu || activation == Activation::leaky_relu);
  std::unique_ptr<uint8_t[]> sign(signs ? new uint8_t[runs() * at.run_bytes()] : nullptr);

  const Channels center(at.channels, dtype, random, 5), scale(at.channels, dtype, random, 0.6),
      shift(at.channels, dtype, random, 0);
  // One value of each channel lies as near to zero as rounding lets it: which side it is on must be the same forward and back.
  for (int64_t i = 0; at.n && at.positions && i < at.channels; ++i) {
    const int64_t middle = index(at.n / 2, i, at.positions / 2);
    shift.set(i, -((x[middle] - center[i]) * scale[i] + (added ? extra[middle] : 0)));
  }
  const Channels a(at.channels, dtype, random, 1), b(at.channels, dtype, random, 0),
      c(at.channels, dtype, random, 0);
  const Data y(size(), dtype, skipped), dx(size(), dtype, skipped), dresidual(size(), dtype, skipped);
  Forward forward{};
  forward.at = at;
  forward.activation = activation;
  forward.x = x.get();
  forward.residual = added ? extra.get() : nullptr;
  forward.mask = mask.get();
  forward.center = center.data();
  forward.scale = scale.data();
  forward.shift = shift.data();
  forward.y = y.get();
  forward.sign = sign.get();
  write_past_cache(forward, random.next() < 0.5);
  Backward backward{};
  backward.forward = forward;
  if (signs) backward.forward.residual = nullptr;
  backward.forward.y = nullptr;
  backward.grad = grad.get();
  backward.a = a.data();
  backward.b = b.data();
  backward.c = c.data();
  backward.dx = dx.get();
  backward.dresidual = dresidual.get();

  const std::vector<Range> ranges = cut(by_channel);
  const size_t copies = by_channel ? 1 : std::max<size_t>(1, ranges.size());
  std::vector<std::unique_ptr<double[]>> sums;
  for (size_t i = 0; i < 4 * copies; ++i) sums.emplace_back(new double[padded]());
  std::unique_ptr<double[]> origin(new double[padded]());
  for (int64_t i = 0; i < at.channels; ++i) origin[i] = at.n && at.positions ? x[index(0, i, 0)] : 0;
  for_each_piece(ranges, [&](const Range& range, size_t piece) {
    const auto* mine = &sums[by_channel ? 0 : 4 * piece];
    kernels.sums(forward, range, origin.get(), mine[0].get(), mine[1].get());
    kernels.normalize(forward, range);
    kernels.grad_sums(backward, range, mine[2].get(), mine[3].get());
    kernels.grad_input(backward, range);
  });

  // The same in plain loops.
  const double unit = rounding(dtype);
  for (int64_t channel = 0; channel < at.channels; ++channel) {
    double exact[4] = {}, size_of[4] = {}, doubtful[4] = {};
    for (int64_t n = 0; n < at.n; ++n) {
      for (int64_t p = 0; p < at.positions; ++p) {
        const int64_t i = index(n, channel, p);
        const bool real = !masked || mask[n * at.positions + p];
        if (!real) {
          expect_close("padding of y", y[i], 0, 0);
          expect_close("padding of dx", dx[i], 0, 0);
          expect_close("padding of dresidual", dresidual[i], 0, 0);
          continue;
        }
        const double centred = x[i] - center[channel], deviation = x[i] - origin[channel];
        const double z = centred * scale[channel] + shift[channel] + (added ? extra[i] : 0);
        const double big = std::abs(centred * scale[channel]) + std::abs(shift[channel]) + 1;
        expect_close("y", y[i], activate(activation, z), unit * big * 2);
        const bool at_kink = std::abs(z) < 1e-5 * big || std::abs(std::abs(z) - 3) < 1e-5 * big;
        if (signs && !at_kink) expect_close("sign", bit(sign.get(), n, channel, p), z > 0, 0);
        const double dz = grad[i] * slope(activation, z);
        const double out = dz * a[channel] - b[channel] - centred * c[channel];
        const double jump = at_kink ? 2 * std::abs(grad[i]) : 0;
        expect_close("dresidual", dresidual[i], dz, unit * 4 * (std::abs(grad[i]) + 1) + jump);
        if (activation == Activation::relu && bytes_of(dtype) > 2) {
          expect_close("side", dresidual[i], y[i] > 0 ? grad[i] : 0, 0);
        }
        const double parts = std::abs(dz * a[channel]) + std::abs(b[channel]) + std::abs(centred * c[channel]) + 1;
        expect_close("dx", dx[i], out, unit * 4 * parts + jump * std::abs(a[channel]));
        const double terms[4] = {deviation, deviation * deviation, dz, dz * centred};
        for (int k = 0; k < 4; ++k) exact[k] += terms[k], size_of[k] += std::abs(terms[k]) + std::abs(grad[i]);
        doubtful[2] += jump;
        doubtful[3] += jump * std::abs(centred);
      }
    }
    const double computed = dtype == DType::float64 ? 1e-13 : 2e-6;
    constexpr const char* names[] = {"sum", "square", "sum dz", "sum dz x"};
    for (int k = 0; k < 4; ++k) {
      double ours = 0;
      for (size_t piece = 0; piece < copies; ++piece) ours += sums[4 * piece + k][channel];
      expect_close(names[k], ours, exact[k], computed * (size_of[k] + 1) + doubtful[k]);
    }
  }
}

}  // namespace

void check_layers() {
  const int64_t channels[] = {1, 3, 7, 8, 16, 17, 33, 70}, positions[] = {0, 1, 2, 5, 8, 15, 49, 64};
  std::vector<Layout> layouts;
  for (const bool rows : {false, true}) {
    for (const int64_t c : channels) {
      for (const int64_t p : positions) layouts.push_back({1 + (c + p) % 6, c, p, rows});
    }
    layouts.push_back({0, 5, 4, rows});
    layouts.push_back({2, 0, 4, rows});
    layouts.push_back({3, 2, 16421, rows});  // more than a segment of a plane
    layouts.push_back({1, 1, 32768, rows});
  }
  uint64_t seed = 1;
  for (const Layout& at : layouts) {
    for (int dtype = 0; dtype < 4; ++dtype) {
      for (int activation = 0; activation < 6; ++activation) {
        for (int kind = 0; kind < 4; ++kind) {
          // Each way of masks and residuals with each activation, though not with each shape and type.
          const bool large = at.positions > 1000;
          if (large ? dtype % 2 || activation > 1 || kind % 3 : (kind + activation + dtype + at.channels + at.positions) % 4) {
            continue;
          }
          const auto type = static_cast<DType>(dtype);
          Problem problem{at, type, static_cast<Activation>(activation), kind % 2 == 1, kind / 2 == 1,
                          kernels(type), Random{++seed}};
          problem.run(false);
          if (!at.rows && kind % 2 == activation % 2) problem.run(true);
        }
      }
    }
  }
}
