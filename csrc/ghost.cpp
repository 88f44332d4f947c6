// The operators of ghost batch norm on CPU tensors: the training kernels on each virtual batch. The samples of a batch lie one
// after the other in either layout, so that a ghost is a slice of the data and nothing is copied.

#include <torch/csrc/stable/library.h>

#include <tuple>

#include "backward.h"
#include "running.h"

namespace batchnorm {
namespace {

struct Ghosts {
  int64_t size, number, samples;

  Ghosts(int64_t size_, int64_t number_, const Dense& x) : size(size_), number(number_), samples(x.at.n) {
    STD_TORCH_CHECK(size > 0 && number > 0 && (number - 1) * size < std::max<int64_t>(1, samples), "expected ", samples,
                    " samples to fill ", number, " ghosts of ", size);
  }
  int64_t first(int64_t g) const { return g * size; }
  int64_t last(int64_t g) const { return g == number - 1 ? samples : first(g + 1); }

  // Side by side over the threads where that keeps them all busy; otherwise one after the other, each over all threads.
  template <class Visit>
  void for_each(const Layout& at, Visit visit) const {
    constexpr int64_t kWorthAThread = 32768;
    const int64_t threads = torch::stable::get_num_threads(), values = std::max<int64_t>(1, size * at.channels * at.positions);
    const bool even = number % threads == 0 || number >= 4 * threads;
    if (!even && values >= threads * kWorthAThread) {
      for (int64_t g = 0; g < number; ++g) visit(g);
      return;
    }
    torch::stable::parallel_for(0, number, std::max<int64_t>(1, kWorthAThread / values), [&](int64_t begin, int64_t end) {
      for (int64_t g = begin; g < end; ++g) visit(g);
    });
  }
};

template <class Pointer>
Pointer moved(Pointer data, int64_t bytes) {
  if (data == nullptr) return nullptr;
  return static_cast<Pointer>(const_cast<void*>(static_cast<const void*>(static_cast<const char*>(data) + bytes)));
}

// The part of a problem that is samples [first, last).
Forward slice(const Forward& whole, int64_t first, int64_t last, int64_t value_bytes) {
  Forward part = whole;
  const Layout& at = whole.at;
  const int64_t bytes = first * at.channels * at.positions * value_bytes;
  part.at.n = last - first;
  part.x = moved(whole.x, bytes);
  part.residual = moved(whole.residual, bytes);
  part.y = moved(whole.y, bytes);
  if (whole.mask) part.mask = whole.mask + first * at.positions;
  if (whole.sign) part.sign = whole.sign + first * (at.rows ? at.positions : at.channels) * at.run_bytes();
  return part;
}

Backward slice(const Backward& whole, int64_t first, int64_t last, int64_t value_bytes) {
  Backward part = whole;
  const Layout& at = whole.forward.at;
  const int64_t bytes = first * at.channels * at.positions * value_bytes;
  part.forward = slice(whole.forward, first, last, value_bytes);
  part.grad = moved(whole.grad, bytes);
  part.dx = moved(whole.dx, bytes);
  part.dresidual = moved(whole.dresidual, bytes);
  return part;
}

Mask slice(const Mask& whole, int64_t first, int64_t last, int64_t positions) {
  Mask part = whole;
  const int64_t begin = first * positions, end = last * positions;
  part.first = begin;
  part.count = end - begin;
  if (whole.data) {
    part.first = std::find(whole.data + begin, whole.data + end, 1) - whole.data;
    part.count = std::count(whole.data + begin, whole.data + end, 1);
  }
  return part;
}

// A ghost's row of `saved`: mean, var and invstd of each channel, and the count.
template <class T>
struct Saved {
  T* values;
  int64_t channels;

  static int64_t width(int64_t channels) { return 3 * channels + 1; }
  T* row(int64_t g) const { return values + g * width(channels); }
  T* mean(int64_t g) const { return row(g); }
  T* var(int64_t g) const { return row(g) + channels; }
  T* invstd(int64_t g) const { return row(g) + 2 * channels; }
  T& count(int64_t g) const { return row(g)[3 * channels]; }
};

std::tuple<Tensor, Tensor, Tensor> ghost_forward(Tensor input, Maybe weight, Maybe bias, Maybe residual, Maybe real,
                                                 int64_t size, int64_t number, double eps, std::string activation) {
  Normalization all(input, weight, bias, residual, real, activation);
  const Layout& at = all.x.at;
  const Ghosts ghosts(size, number, all.x);
  const auto& kernels = batchnorm::kernels(all.x.dtype);
  const int64_t value_bytes = all.x.x.element_size();
  Tensor saved = fresh_matrix(number, Saved<double>::width(at.channels), ScalarType::Double);
  const Saved<double> to{static_cast<double*>(saved.mutable_data_ptr()), at.channels};
  ghosts.for_each(at, [&](int64_t g) {
    const int64_t first = ghosts.first(g), last = ghosts.last(g);
    const Mask mask = slice(all.mask, first, last, at.positions);
    ForwardCoefficients coefficients(at.channels, all.x.dtype);
    Forward part = slice(all.problem, first, last, value_bytes);
    part.center = coefficients.center.data();
    part.scale = coefficients.scale.data();
    part.shift = coefficients.shift.data();
    BatchStatistics batch(at.channels);
    const auto count = static_cast<double>(mask.count);
    to.count(g) = count;
    with_statistics(
        Plan(part.at, (all.residual ? 2 : 1) * value_bytes), all.x, mask, part, batch,
        [&](int64_t c) {
          const double var = batch.m2[c] / std::max(1.0, count), invstd = 1 / std::sqrt(var + eps);
          to.mean(g)[c] = batch.mean[c];
          to.var(g)[c] = var;
          to.invstd(g)[c] = invstd;
          coefficients.set(c, batch.mean[c], invstd, all.weight, all.bias);
        },
        [&](const Range& range) { kernels.normalize(part, range); });
  });
  return {all.result(), saved, all.sign};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> ghost_backward(Tensor grad, Tensor input, Tensor saved, Maybe weight, Maybe bias,
                                                          Maybe residual, Maybe sign, Maybe real, int64_t size,
                                                          std::string activation, bool want_residual) {
  const int64_t channels = input.size(1), padded = channels + kPadding;
  Gradient all(grad, input, std::vector<double>(padded), std::vector<double>(padded), weight, bias, residual, sign, real,
               activation);
  const Ghosts ghosts(size, saved.size(0), all.x);
  const auto values = doubles(saved, ghosts.number * Saved<double>::width(channels), "saved");
  const auto biases = doubles(bias, channels, "bias");
  const Saved<const double> from{values.data(), channels};
  Tensor dx = all.x.output(), dresidual = want_residual ? all.x.output() : fresh_vector(0, input.scalar_type());
  all.problem.dx = dx.mutable_data_ptr();
  all.problem.dresidual = want_residual ? dresidual.mutable_data_ptr() : nullptr;
  const auto& kernels = batchnorm::kernels(all.x.dtype);
  const int64_t value_bytes = all.x.x.element_size();
  std::vector<double> dz(ghosts.number * padded), dz_xhat(ghosts.number * padded);
  ghosts.for_each(all.x.at, [&](int64_t g) {
    Gradient part = all;
    std::copy_n(from.mean(g), channels, part.mean.begin());
    std::copy_n(from.invstd(g), channels, part.invstd.begin());
    for (int64_t c = 0; c < channels; ++c) part.coefficients.set(c, part.mean[c], part.invstd[c], part.weight, biases);
    part.problem = slice(all.problem, ghosts.first(g), ghosts.last(g), value_bytes);
    part.problem.forward.center = part.coefficients.center.data();
    part.problem.forward.scale = part.coefficients.scale.data();
    part.problem.forward.shift = part.coefficients.shift.data();
    part.problem.a = part.a.data();
    part.problem.b = part.b.data();
    part.problem.c = part.c.data();
    const double n = std::max(1.0, from.count(g));
    double *sum = dz.data() + g * padded, *product = dz_xhat.data() + g * padded;
    Plan(part.problem.forward.at, (all.residual ? 3 : 2) * value_bytes)
        .run([&](const Range& range, double* s, double* q) { kernels.grad_sums(part.problem, range, s, q); },
             [&](int64_t c0, int64_t c1, const double* s, const double* q) {
               for (int64_t c = c0; c < c1; ++c) {
                 sum[c] = s[c];
                 product[c] = part.normalized(c, s[c], q[c]);
                 part.set(c, n, sum[c], product[c]);
               }
             },
             [&](const Range& range) { kernels.grad_input(part.problem, range); });
  });
  std::vector<double> dbias(padded), dweight(padded);
  for (int64_t g = 0; g < ghosts.number; ++g) {  // always in this order: the same result for any number of threads
    for (int64_t c = 0; c < channels; ++c) {
      dbias[c] += dz[g * padded + c];
      dweight[c] += dz_xhat[g * padded + c];
    }
  }
  return {all.x.finished(dx), parameter_gradient(weight, dweight), parameter_gradient(bias, dbias),
          want_residual ? all.x.finished(dresidual) : dresidual};
}

void ghost_update(Tensor running_mean, Tensor running_var, Tensor saved, std::optional<double> momentum, Maybe num_batches,
                  int64_t ddof) {
  STD_TORCH_CHECK(momentum || num_batches, "expected a momentum or num_batches, got neither");
  const int64_t channels = running_mean.numel(), number = saved.size(0);
  const auto values = doubles(saved, number * Saved<double>::width(channels), "saved");
  const Saved<const double> from{values.data(), channels};
  int64_t batches = momentum ? 0 : static_cast<int64_t>(scalar(*num_batches, "num_batches"));  // before this call
  for (int64_t g = 0; g < number; ++g) batches -= from.count(g) > 0;
  for (int64_t g = 0; g < number; ++g) {
    if (from.count(g) == 0) continue;
    ++batches;
    const std::vector<double> mean(from.mean(g), from.mean(g) + channels), var(from.var(g), from.var(g) + channels);
    const double step = momentum ? *momentum : 1 / static_cast<double>(batches);
    move_running(running_mean, running_var, mean, var, from.count(g), step, std::nullopt, ddof);
  }
}

}  // namespace
}  // namespace batchnorm

STABLE_TORCH_LIBRARY_IMPL(batchnorm, CPU, m) {
  m.impl("ghost_forward", TORCH_BOX(&batchnorm::ghost_forward));
  m.impl("ghost_backward", TORCH_BOX(&batchnorm::ghost_backward));
  m.impl("ghost_update", TORCH_BOX(&batchnorm::ghost_update));
}
