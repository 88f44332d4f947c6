// Runs every kernel over many shapes in exactly-sized buffers and compares with plain loops in double. Without torch, so
// that it can be built with a sanitizer or for another processor: see run.sh beside this file and docs/kernel-tests.md.
//
//   driver [threads]     with more than one thread, pieces of work run at the same time, shared out as the operators do it.

#include <algorithm>
#include <cstdlib>

#include "../dispatch.h"
#include "parts.h"

int main(int count, char** arguments) {
  if (count > 1) threads = std::max(1, std::atoi(arguments[1]));
  for (const std::string& name : batchnorm::instruction_sets()) {
    batchnorm::choose_instruction_set(name);
    const int64_t before = compared;
    check_layers();
    check_preprocessing();
    check_products();
    check_halves();
    std::printf("%s: %lld comparisons, %d thread%s\n", name.c_str(), static_cast<long long>(compared - before), threads,
                threads == 1 ? "" : "s");
  }
  std::printf(wrong ? "%lld comparisons failed\n" : "all agree\n", static_cast<long long>(wrong));
  return wrong ? 1 : 0;
}
