// Which instruction set's kernels run, as operators: for `batchnorm selftest` and for tests, which run every set there is.

#include <torch/csrc/stable/library.h>

#include "dispatch.h"
#include "tensors.h"

namespace {

// The instruction set in use, after choosing `name` where one is given; the sets that this processor has. For tests.
std::string instruction_set(std::string name) {
  STD_TORCH_CHECK(name.empty() || batchnorm::choose_instruction_set(name), "this processor has no ", name);
  return batchnorm::chosen_instruction_set();
}
std::string instruction_sets() {
  std::string names;
  for (const auto& name : batchnorm::instruction_sets()) names += (names.empty() ? "" : " ") + name;
  return names;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(batchnorm, m) {
  m.def("_instruction_set(str name) -> str");
  m.def("_instruction_sets() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(batchnorm, CompositeExplicitAutograd, m) {
  m.impl("_instruction_set", TORCH_BOX(&instruction_set));
  m.impl("_instruction_sets", TORCH_BOX(&instruction_sets));
}
