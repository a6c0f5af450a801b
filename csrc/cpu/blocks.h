// SPDX-License-Identifier: Apache-2.0
// What block-sparse attention and its gradients share: the rule for block_offsets, and the packing
// of heads.
#pragma once
#include "../check.h"

namespace kandinsky {

constexpr int64_t kMaxBlock = 64;

// The heads [first, first + count) of one sample of a tensor [B, S, H, D], as a contiguous fp32
// [count, S, D].
inline Tensor pack(const Tensor& t, int64_t sample, int64_t first, int64_t count) {
  Tensor heads = torch::stable::select(t, 0, sample);
  return gapless(
      to_float(torch::stable::transpose(torch::stable::narrow(heads, 1, first, count), 0, 1)));
}

// Requires offsets that ascend from 0 to S in blocks of 1 to kMaxBlock tokens.
inline void require_blocks(const Tensor& offsets, int64_t S) {
  require_list(offsets);
  const int32_t* p = data<int32_t>(offsets);
  const int64_t N = offsets.numel() - 1;
  bool fit = p[0] == 0 && p[N] == S;
  for (int64_t i = 0; i < N; ++i) fit = fit && p[i] < p[i + 1] && p[i + 1] - p[i] <= kMaxBlock;
  require(fit, "block_offsets must ascend from 0 to S = ", S, " in blocks of 1 to ", kMaxBlock,
          " tokens.");
}

}  // namespace kandinsky
