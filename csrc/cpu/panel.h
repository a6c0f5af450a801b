// SPDX-License-Identifier: Apache-2.0
// Products of matrices as the attention kernels compute them. A panel is float [depth][P] with one
// query in each of its P lanes. A query keeps its lane from the first product to the last sum:
// nothing is reduced across lanes, keys and values are read as they lie in memory, and the result
// of a query cannot depend on its neighbours.
#pragma once
#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

#include "../check.h"
#include "lanes.h"

namespace kandinsky {

// Working memory of one thread. It starts on a cache line, because each unaligned vector would
// touch two of them.
class Scratch {
 public:
  explicit Scratch(int64_t floats) : lines_(zeros<Line>((floats + 15) / 16 + 1)) {}
  float* floats() { return lines_[0].floats; }

 private:
  struct alignas(64) Line {
    float floats[16];
  };
  std::vector<Line> lines_;
};

// Lanes of a panel.
template <int W>
constexpr int kPanel = 2 * W;

// Rows of a product whose sums are in registers at once: 8 x 2 of the 32 registers of AVX-512, 6 x
// 2 of the 16 of the others. On a Zen 5 core at 4 GHz, AVX-512 reached 229 GFLOP/s with 8 x 2, 204
// with 4 x 4 and 161 with 6 x 4; AVX2 reached 118 with 6 x 2 and 109 with 4 x 2.
template <int W>
constexpr int kRows = W == 16 ? 8 : 6;

// Terms that are added to one accumulator before it is set aside, because the error of a sum grows
// with the length of its chain.
constexpr int64_t kChain = 128;

// low[r] and high[r] = sum_k a[r * row_step + k * depth_step] * panel[k], over `depth` terms.
template <int W, int R>
KANDINSKY_INLINE void accumulate(const float* a, int64_t row_step, int64_t depth_step,
                                 const float* panel, int64_t depth, typename Lanes<W>::F (&low)[R],
                                 typename Lanes<W>::F (&high)[R]) {
  using F = typename Lanes<W>::F;
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) low[r] = high[r] = F{};
  for (int64_t k = 0; k < depth; ++k, a += depth_step, panel += kPanel<W>) {
    const F x = load<W>(panel), y = load<W>(panel + W);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const float scalar = a[r * row_step];
      low[r] += scalar * x;
      high[r] += scalar * y;
    }
  }
}

// Calls done(row, low, high) with sum_k a[row * row_step + k * depth_step] * panel[k] for R rows
// from `row` on.
template <int W, int R, class Done>
KANDINSKY_INLINE void tile(const float* a, int64_t row_step, int64_t depth_step, const float* panel,
                           int64_t depth, int64_t row, const Done& done) {
  typename Lanes<W>::F low[R], high[R], more_low[R], more_high[R];
  a += row * row_step;
  accumulate<W, R>(a, row_step, depth_step, panel, std::min(depth, kChain), low, high);
  for (int64_t k = kChain; k < depth; k += kChain) {
    accumulate<W, R>(a + k * depth_step, row_step, depth_step, panel + k * kPanel<W>,
                     std::min(depth - k, kChain), more_low, more_high);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) low[r] += more_low[r], high[r] += more_high[r];
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) done(row + r, low[r], high[r]);
}

// The same for the rows [row, rows): kRows at a time, and fewer at the end.
template <int W, int R = kRows<W>, class Done>
KANDINSKY_INLINE void product(const float* a, int64_t row_step, int64_t depth_step,
                              const float* panel, int64_t depth, int64_t rows, const Done& done,
                              int64_t row = 0) {
  for (; row + R <= rows; row += R) tile<W, R>(a, row_step, depth_step, panel, depth, row, done);
  if constexpr (R > 1) {
    constexpr int kFewer = R == 6 ? 4 : R / 2;
    if (row < rows) product<W, kFewer>(a, row_step, depth_step, panel, depth, rows, done, row);
  }
}

// Swaps the lanes of a with Step set and those of b without.
template <int W, int Step, int... Lane>
KANDINSKY_INLINE void swap_corners(typename Lanes<W>::F& a, typename Lanes<W>::F& b,
                                   std::integer_sequence<int, Lane...>) {
  const auto x = a, y = b;
#if defined(__clang__)
  a = __builtin_shufflevector(x, y, (Lane & Step ? W + Lane - Step : Lane)...);
  b = __builtin_shufflevector(x, y, (Lane & Step ? W + Lane : Lane + Step)...);
#else
  using I = typename Lanes<W>::I;
  a = __builtin_shuffle(x, y, I{(Lane & Step ? W + Lane - Step : Lane)...});
  b = __builtin_shuffle(x, y, I{(Lane & Step ? W + Lane : Lane + Step)...});
#endif
}

// Transposes a square of W x W numbers in registers: its off-diagonal quarters are swapped, then
// those of its quarters, and so on.
template <int W, int Step = W / 2>
KANDINSKY_INLINE void transpose_square(typename Lanes<W>::F (&rows)[W]) {
#pragma GCC unroll 16
  for (int i = 0; i < W; ++i)
    if (!(i & Step))
      swap_corners<W, Step>(rows[i], rows[i + Step], std::make_integer_sequence<int, W>());
  if constexpr (Step > 1) transpose_square<W, Step / 2>(rows);
}

// to[column][row] = from[row][column]. Squares are moved at a time, because the loads of W rows
// hide each other's latency.
template <int W>
KANDINSKY_INLINE void transpose(const float* from, int64_t from_stride, int64_t rows,
                                int64_t columns, float* to, int64_t to_stride) {
  const int64_t square_rows = rows - rows % W, square_columns = columns - columns % W;
  for (int64_t r = 0; r < square_rows; r += W) {
    for (int64_t c = 0; c < square_columns; c += W) {
      typename Lanes<W>::F square[W];
#pragma GCC unroll 16
      for (int i = 0; i < W; ++i) square[i] = load<W>(from + (r + i) * from_stride + c);
      transpose_square<W>(square);
#pragma GCC unroll 16
      for (int i = 0; i < W; ++i) store<W>(to + (c + i) * to_stride + r, square[i]);
    }
  }
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = r < square_rows ? square_columns : 0; c < columns; ++c)
      to[c * to_stride + r] = from[r * from_stride + c];
}

// 2^t for t <= 0, with a relative error of 8e-8, and zero below 2^-126. It is 2^round(t) times a
// polynomial of the rest, |rest| <= 1/2.
template <class F>
KANDINSKY_INLINE F exp2_of_negative(const F& t) {
  using I = decltype(t < t);
  // Adding kShift leaves round(t) + 127 in the low bits, which is the exponent of 2^round(t).
  constexpr float kShift = 0x1.8p23f + 127;
  const F shifted = t + kShift, rest = t - (shifted - kShift);
  F power = rest * 1.53533620e-4f + 1.33988750e-3f;
  power = power * rest + 9.61843692e-3f;
  power = power * rest + 5.55033237e-2f;
  power = power * rest + 2.40226477e-1f;
  power = power * rest + 6.93147182e-1f;
  power = power * rest + 1.0f;
  power *= bits<F>(bits<I>(shifted) << 23);
  return t < -126.0f ? F{} : power;
}

}  // namespace kandinsky
