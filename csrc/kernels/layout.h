// Where the values of a channel lie in memory. No tensor type here: the kernels outlive any one version of torch.
#pragma once

#include <cstdint>

namespace batchnorm {

// x as (n, channels, positions): all spatial dimensions are one, which contiguous and channels-last memory allow.
struct Layout {
  int64_t n;
  int64_t channels;
  int64_t positions;
  int64_t stride_n;
  int64_t stride_channel;
  int64_t stride_position;

  // Whether neighbouring values in memory belong to neighbouring channels ((N, C) and channels-last data).
  bool channels_are_inner() const {
    return stride_channel == 1 && (positions == 1 || stride_position == channels);
  }
};

}  // namespace batchnorm
