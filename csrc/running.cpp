#include "running.h"

#include <torch/csrc/stable/library.h>

namespace batchnorm {
namespace {

// running = (1 - step) * running + step * batch * correction, in place.
void move(const Tensor& running, const std::vector<double>& batch, double step, double correction) {
  auto values = doubles(running, running.numel(), "a running statistic");
  for (int64_t c = 0; c < running.numel(); ++c) values[c] = (1 - step) * values[c] + step * batch[c] * correction;
  if (running.is_contiguous()) return assign(running, values);
  Tensor dense = torch::stable::contiguous(running), target = running;
  assign(dense, values);
  torch::stable::copy_(target, dense);
}

}  // namespace

void move_running(const Tensor& running_mean, const Tensor& running_var, const std::vector<double>& mean,
               const std::vector<double>& var, double count, std::optional<double> momentum, const std::optional<Tensor>& num_batches,
               int64_t ddof) {
  STD_TORCH_CHECK(momentum || num_batches, "expected a momentum or num_batches, got neither");
  const double step = momentum ? *momentum : 1 / scalar(*num_batches, "num_batches");
  if (step == 0) return;
  // As the reference: no real value says nothing; too few for an unbiased variance, nothing about that.
  const auto freedom = count - static_cast<double>(ddof);
  if (count > 0) move(running_mean, mean, step, 1);
  if (freedom > 0) move(running_var, var, step, count / freedom);
}

namespace {

void update_running(Tensor running_mean, Tensor running_var, Tensor mean, Tensor var, Tensor count,
                    std::optional<double> momentum, std::optional<Tensor> num_batches, int64_t ddof) {
  const int64_t channels = running_mean.numel();
  move_running(running_mean, running_var, doubles(mean, channels, "mean"),
            doubles(var, channels, "var"), scalar(count, "count"), momentum, num_batches, ddof);
}

}  // namespace
}  // namespace batchnorm

STABLE_TORCH_LIBRARY_IMPL(batchnorm, CPU, m) {
  m.impl("update_running", TORCH_BOX(&batchnorm::update_running));
}
