#include "dispatch.h"

#include <atomic>
#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace batchnorm {

extern const Kernels kernels_baseline[4];
extern const FeatureKernels features_baseline[4];
#if defined(__x86_64__)
extern const Kernels kernels_avx2[4];
extern const FeatureKernels features_avx2[4];
extern const Kernels kernels_avx512[4];
extern const FeatureKernels features_avx512[4];
#endif

namespace {

std::vector<InstructionSet> available() {
  std::vector<InstructionSet> sets;
#if defined(__x86_64__)
  __builtin_cpu_init();
  unsigned a, b, c = 0, d;  // Clang's __builtin_cpu_supports did not know F16C for long
  const bool f16c = __get_cpuid(1, &a, &b, &c, &d) && c & bit_F16C;
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && f16c;
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (avx512) sets.push_back({"avx512", kernels_avx512, features_avx512});
  if (avx2) sets.push_back({"avx2", kernels_avx2, features_avx2});
#endif
  // What the compiler assumes of every processor: SSE2 on x86-64, NEON on 64-bit Arm.
  sets.push_back({"baseline", kernels_baseline, features_baseline});
  return sets;
}

const std::vector<InstructionSet>& sets() {
  static const std::vector<InstructionSet> all = available();
  return all;
}

std::atomic<const InstructionSet*> chosen{nullptr};

const InstructionSet& current() {
  const InstructionSet* set = chosen.load(std::memory_order_acquire);
  return set != nullptr ? *set : sets().front();
}

}  // namespace

const Kernels& kernels(DType dtype) { return current().by_dtype[static_cast<int>(dtype)]; }
const FeatureKernels& feature_kernels(DType dtype) { return current().features_by_dtype[static_cast<int>(dtype)]; }

std::vector<std::string> instruction_sets() {
  std::vector<std::string> names;
  for (const InstructionSet& set : sets()) names.emplace_back(set.name);
  return names;
}

const char* chosen_instruction_set() { return current().name; }

bool choose_instruction_set(const std::string& name) {
  for (const InstructionSet& set : sets()) {
    if (name == set.name) {
      chosen.store(&set, std::memory_order_release);
      return true;
    }
  }
  return false;
}

}  // namespace batchnorm
