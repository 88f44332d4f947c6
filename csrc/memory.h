// Memory of large outputs, kept for the next ones.
//
// malloc gives large blocks back to the system as soon as they are freed, and every training step pays for them anew: the system
// clears each page at the first write, which takes longer than normalizing what is then written. (PyTorch keeps the memory of
// a GPU for the same reason.) Kept blocks that nobody wants are offered to the system, to take when memory runs short.
#pragma once

#include <cstdint>
#include <vector>

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

namespace batchnorm {

// A fresh CPU tensor, its content not set: in kept memory where it is large, otherwise in torch's.
torch::stable::Tensor fresh_tensor(const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides,
                                   torch::headeronly::ScalarType dtype);

// Advises huge pages for memory that something else has allocated: fresh memory costs a page fault each 4 KB otherwise.
void ask_for_huge_pages(const torch::stable::Tensor& fresh);

// Bytes that are kept and in no tensor now.
int64_t kept_bytes();
// Gives those back to the system, and keeps no more than `most` bytes from now on where that is not negative.
void release_kept(int64_t most);

}  // namespace batchnorm
