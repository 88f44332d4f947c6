// Which instruction set's kernels run: the best that this processor has, unless someone asks for another.
#pragma once

#include <string>
#include <vector>

#include "kernels/features.h"
#include "kernels/problem.h"

namespace batchnorm {

// The kernels for a type of data, of the chosen instruction set.
const Kernels& kernels(DType dtype);
const FeatureKernels& feature_kernels(DType dtype);

// The names of the sets that this processor can run, the best first; the first is chosen to begin with.
std::vector<std::string> instruction_sets();
const char* chosen_instruction_set();
// False, and no change, where this processor cannot run that set.
bool choose_instruction_set(const std::string& name);

}  // namespace batchnorm
