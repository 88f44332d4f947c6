// Running averages of the batches' statistics.
#pragma once

#include <optional>
#include <vector>

#include "tensors.h"

namespace batchnorm {

// Moves both averages towards a batch's mean and biased variance, as the operator `update_running` in
// src/batchnorm/ops/schema.py says.
void move_running(const Tensor& running_mean, const Tensor& running_var, const std::vector<double>& mean,
                  const std::vector<double>& var, double count, std::optional<double> momentum,
                  const std::optional<Tensor>& num_batches, int64_t ddof);

}  // namespace batchnorm
