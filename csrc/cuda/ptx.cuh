// SPDX-License-Identifier: Apache-2.0
// The instructions that CUDA C++ has no name for. The tests replace this header by one that
// computes the same on a CPU.
#pragma once
#ifndef KANDINSKY_PTX

#include <cstdint>

namespace kandinsky {

// The block's dynamic shared memory.
__device__ inline float4* dynamic_shared() {
  extern __shared__ float4 kandinsky_dynamic_shared[];
  return kandinsky_dynamic_shared;
}

// The larger of two numbers; NaN when one of them is.
__device__ inline float max_or_nan(float a, float b) {
  float result;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(result) : "f"(a), "f"(b));
  return result;
}

// 2^x within 2^-22 of it; exactly 1 for zeros.
__device__ inline float exp2_approximate(float x) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}

// sum += a b in one instruction, where the compiler makes two of it.
__device__ inline void multiply_add(uint64_t& sum, uint32_t a, uint32_t b) {
  asm("mad.wide.u32 %0, %1, %2, %0;" : "+l"(sum) : "r"(a), "r"(b));
}

// sum += a b for a 16 x 8 row by row, b 8 x 8 column by column, both in tf32: their low 13 bits
// must be zero. With g = lane / 4 and t = lane % 4: a = (g, t), (g + 8, t), (g, t + 4), (g + 8, t +
// 4); b = (t, g), (t + 4, g); sum = (g, 2t), (g, 2t + 1), (g + 8, 2t), (g + 8, 2t + 1).
__device__ inline void mma_tf32(float (&sum)[4], float a0, float a1, float a2, float a3, float b0,
                                float b1) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, "
      "%9}, {%0, %1, %2, %3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(__float_as_uint(a0)), "r"(__float_as_uint(a1)), "r"(__float_as_uint(a2)),
        "r"(__float_as_uint(a3)), "r"(__float_as_uint(b0)), "r"(__float_as_uint(b1)));
}

}  // namespace kandinsky
#endif
