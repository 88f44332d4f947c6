#include "memory.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <atomic>
#include <chrono>
#include <cstdlib>
#include <mutex>
#if defined(__linux__)
#include <pthread.h>
#include <sys/mman.h>
#include <unistd.h>
#endif

// In torch from 2.11 on. Weak: with 2.10, which has no tensors with a deleter, it is null and nothing is kept.
extern "C" __attribute__((weak, visibility("default"))) AOTITorchError torch_from_blob(
    void* data, int64_t ndim, const int64_t* sizes, const int64_t* strides, int64_t storage_offset, int32_t dtype,
    int32_t device_type, int32_t device_index, AtenTensorHandle* ret, int32_t layout, const uint8_t* opaque_metadata,
    int64_t opaque_metadata_size, void (*deleter)(void* data, void* ctx), void* deleter_ctx);

namespace batchnorm {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kHugePage = int64_t{2} << 20;
constexpr int64_t kWorthHuge = 2 * kHugePage;
// Smaller blocks stay in malloc's own heap, of which only the end is given back.
constexpr int64_t kLarge = int64_t{128} << 10;
constexpr int64_t kGrain = int64_t{64} << 10;

int64_t round_up(int64_t bytes, int64_t grain) { return (bytes + grain - 1) / grain * grain; }

int32_t code_of(ScalarType dtype) { return torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype)); }

int64_t bytes_of(const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides, ScalarType dtype) {
  int64_t last = 1;
  for (size_t d = 0; d < sizes.size(); ++d) {
    if (sizes[d] == 0) return 0;
    last += (sizes[d] - 1) * strides[d];
  }
  return last * static_cast<int64_t>(dtype == ScalarType::Double ? 8 : dtype == ScalarType::Float ? 4 : dtype == ScalarType::Byte ? 1 : 2);
}

#if defined(__linux__)

using Clock = std::chrono::steady_clock;

struct Block {
  char* begin;
  int64_t bytes;
  Clock::time_point since{};  // when it was given back
  bool offered = false;       // to the system, to take when it needs memory
};

// The blocks that are in no tensor, in the order in which they were given back.
class Kept {
 public:
  // Lives as long as the process: tensors may be freed after every static object is gone.
  static Kept& instance() {
    static Kept* const kept = [] {
      auto* fresh = new Kept;
      // A child of fork has one thread, and must not find a lock that another thread held.
      pthread_atfork([] { instance().mutex_.lock(); }, [] { instance().mutex_.unlock(); },
                     [] { instance().mutex_.unlock(); });
      return fresh;
    }();
    return *kept;
  }

  bool keeps() const { return most_ > 0; }

  Block take(int64_t bytes) {
    const int64_t wanted = round_up(bytes, bytes >= kWorthHuge ? kHugePage : kGrain);
    {
      const std::lock_guard lock(mutex_);
      // The block used last is the one most likely still in the cache. One that is a quarter larger will do.
      for (auto block = free_.rbegin(); block != free_.rend(); ++block) {
        if (block->bytes >= wanted && block->bytes <= wanted + wanted / 4) {
          const Block found = *block;
          free_.erase(std::next(block).base());
          total_ -= found.bytes;
          return found;
        }
      }
    }
    return map(wanted);
  }

  void give_back(Block block) {
    std::vector<Block> old;
    {
      const std::lock_guard lock(mutex_);
      if (block.bytes > most_) {
        old.push_back(block);
      } else {
        block.since = Clock::now();
        free_.push_back(block);
        total_ += block.bytes;
        offer_idle(block.since);
        shrink(most_, old);
      }
    }
    for (const Block& each : old) munmap(each.begin, each.bytes);
  }

  int64_t total() {
    const std::lock_guard lock(mutex_);
    return total_;
  }

  void release(int64_t most) {
    std::vector<Block> old;
    {
      const std::lock_guard lock(mutex_);
      if (most >= 0) most_ = most;
      shrink(0, old);
    }
    for (const Block& each : old) munmap(each.begin, each.bytes);
  }

 private:
  std::mutex mutex_;
  std::vector<Block> free_;
  int64_t total_ = 0;
  std::atomic<int64_t> most_ = limit();  // asked for without the lock

  // An eighth of the machine's memory: more than the activations that a step on a CPU works with.
  static int64_t limit() {
    if (const char* chosen = std::getenv("BATCHNORM_KEEP_MEMORY")) return std::atoll(chosen);
    return static_cast<int64_t>(sysconf(_SC_PHYS_PAGES)) / 8 * sysconf(_SC_PAGE_SIZE);
  }

  // What nobody has wanted for a while the system may take instead of running out of memory. Not at once: the first write to
  // an offered page costs as much as writing the page.
  void offer_idle(Clock::time_point now) {
    for (Block& block : free_) {
      if (now - block.since < std::chrono::seconds(2)) break;
      if (!block.offered) madvise(block.begin, block.bytes, MADV_FREE);
      block.offered = true;
    }
  }

  void shrink(int64_t most, std::vector<Block>& old) {
    auto end = free_.begin();
    for (; total_ > most && end != free_.end(); ++end) {
      total_ -= end->bytes;
      old.push_back(*end);
    }
    free_.erase(free_.begin(), end);
  }

  // Large ones aligned, so that huge pages fit; a null block where there is no memory.
  static Block map(int64_t bytes) {
    if (bytes < kWorthHuge) {
      void* all = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
      return {all == MAP_FAILED ? nullptr : static_cast<char*>(all), bytes, {}, false};
    }
    void* all = mmap(nullptr, bytes + kHugePage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (all == MAP_FAILED) return {nullptr, 0, {}, false};
    char* first = static_cast<char*>(all);
    char* begin = reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(first) + kHugePage - 1) / kHugePage * kHugePage);
    if (begin > first) munmap(first, begin - first);
    if (begin < first + kHugePage) munmap(begin + bytes, first + kHugePage - begin);
    madvise(begin, bytes, MADV_HUGEPAGE);  // advice: a refusal changes nothing
    return {begin, bytes, {}, false};
  }
};

Tensor in_kept_memory(const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides, ScalarType dtype,
                      int64_t bytes) {
  Block block = Kept::instance().take(bytes);
  if (block.begin == nullptr) return Tensor();
  const auto give_back = [](void* data, void* size) {
    Kept::instance().give_back({static_cast<char*>(data), static_cast<int64_t>(reinterpret_cast<intptr_t>(size)), {}, false});
  };
  AtenTensorHandle handle = nullptr;
  const auto error = torch_from_blob(block.begin, static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(), 0,
                                     code_of(dtype), aoti_torch_device_type_cpu(), -1, &handle, aoti_torch_layout_strided(),
                                     nullptr, 0, give_back, reinterpret_cast<void*>(static_cast<intptr_t>(block.bytes)));
  if (error != 0) {
    Kept::instance().give_back(block);
    return Tensor();
  }
  return Tensor(handle);
}

#endif

}  // namespace

Tensor fresh_tensor(const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides, ScalarType dtype) {
#if defined(__linux__)
  const int64_t bytes = bytes_of(sizes, strides, dtype);
  if (bytes >= kLarge && torch_from_blob != nullptr && Kept::instance().keeps()) {
    Tensor kept = in_kept_memory(sizes, strides, dtype, bytes);
    if (kept.defined()) return kept;
  }
#endif
  // Past the dispatcher, whose call costs more than a small tensor's arithmetic.
  AtenTensorHandle handle = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(),
                                                         code_of(dtype), aoti_torch_device_type_cpu(), 0, &handle));
  Tensor fresh(handle);
  ask_for_huge_pages(fresh);
  return fresh;
}

void ask_for_huge_pages([[maybe_unused]] const Tensor& fresh) {
#if defined(__linux__)
  const int64_t bytes = fresh.numel() * static_cast<int64_t>(fresh.element_size());
  if (bytes < kWorthHuge) return;
  const auto begin = reinterpret_cast<uintptr_t>(fresh.mutable_data_ptr());
  const uintptr_t from = (begin + kHugePage - 1) / kHugePage * kHugePage, to = (begin + bytes) / kHugePage * kHugePage;
  if (to > from) madvise(reinterpret_cast<void*>(from), to - from, MADV_HUGEPAGE);
#endif
}

#if defined(__linux__)
int64_t kept_bytes() { return Kept::instance().total(); }
void release_kept(int64_t most) { Kept::instance().release(most); }
#else
int64_t kept_bytes() { return 0; }
void release_kept(int64_t) {}
#endif

}  // namespace batchnorm

STABLE_TORCH_LIBRARY_FRAGMENT(batchnorm, m) {
  m.def("_kept_memory() -> int");
  m.def("_release_memory(int most) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(batchnorm, CompositeExplicitAutograd, m) {
  m.impl("_kept_memory", TORCH_BOX(&batchnorm::kept_bytes));
  m.impl("_release_memory", TORCH_BOX(&batchnorm::release_kept));
}
