// SPDX-License-Identifier: Apache-2.0
// NABLA's choice of key blocks (arXiv 2507.13546). The map of logits never leaves the
// multiprocessor: a thread block makes a few of its rows by matrix instructions into shared memory,
// then each warp takes one row into registers, turns it into integer masses, finds the lightest one
// worth keeping and writes the row's packed bits. Nothing of PyTorch is in here: the tests run this
// source on a CPU.
//
// Cost, counted in the SASS for sm_90 at N = 1464, in warp instructions per row: products 26 D (a
// sixth of them matrix instructions, half of them splits keys and moves fragments, which every
// block of 16 rows does again), masses 900, search 207 a pass and some 8 passes, 500 for the last
// candidates, 250 for the bits. The 41 k rows of Lite 10 s are 0.22 ms at the full issue rate of
// 132 multiprocessors at 1.75 GHz and 0.37 ms at 60 % of it; the 47 k of Pro 0.34 and 0.57 ms.
// Beside it run the keys, read once per 16 rows out of the L2 cache: 0.97 and 2.2 GB, 0.2 and 0.4
// ms at 5 TB/s. Predictions: no GPU has run this.
#pragma once
#include <cmath>
#include <cstdint>

#include "ptx.cuh"

namespace kandinsky {

constexpr int kWarps = 8, kThreads = 32 * kWarps;
// keys a warp scores at once: two tiles of 16, so that a fragment of queries serves twice
constexpr int kStep = 32;
// head dims a warp scores at once: one 16-byte load per lane and two matrix instructions deep
constexpr int kChunk = 16;
// stands for 2^32, the mass of the maximum: the next lower one is 2^32 - 256
constexpr uint32_t kHeaviest = 0xFFFFFFFF;
// bits of 1.0f and of 2^32 in fp32
constexpr uint32_t kOne = 0x3F800000, kTwoTo32 = 0x4F800000;

struct SelectBlocks {
  // [B, H, N, D] with these strides, rows aligned to 16 bytes
  const float *query = nullptr, *key = nullptr;
  int64_t query_batch = 0, query_head = 0, query_row = 0, key_batch = 0, key_head = 0, key_row = 0;
  // [B, H, N, words]
  uint32_t* selection = nullptr;
  int H = 0, N = 0, D = 0;
  // rows of the map that a thread block takes
  int rows = 0;
  // log2(e) / sqrt(D)
  float factor = 0;
  // 1 - keep_mass
  double drop = 0;
  // whether ties are broken by index; otherwise all of them are kept or none
  bool stable = false;
  // grid of blocks and half widths of the window; T = 0: no window
  int T = 0, Y = 0, X = 0, near_t = 0, near_y = 0, near_x = 0;
  // Always 1, which the compiler does not know: it would make four instructions of what
  // multiply_add does in one, a multiplication and a 64-bit addition.
  uint32_t one = 1;

  __host__ __device__ int words() const { return (N + 31) / 32; }
  __host__ __device__ int chunks() const { return (D + kChunk - 1) / kChunk; }
  // Floats between rows of the map: 4 modulo 16, so that the 8 x 4 places a warp writes at once lie
  // in 32 banks.
  __host__ __device__ int stride() const { return 32 * words() + 4; }
  __host__ __device__ int blocks_per_head() const { return (N + rows - 1) / rows; }
};

template <class T, class Combine>
__device__ inline T over_warp(T value, Combine combine) {
  for (int distance = 16; distance; distance /= 2)
    value = combine(value, __shfl_xor_sync(~0u, value, distance));
  return value;
}

// The sum over a warp of numbers below 2^44, exactly, by two reductions of 32 bits: 20 and 24 bits
// of 32 numbers each.
__device__ inline uint64_t sum_over_warp(uint64_t value) {
  const uint32_t low = __reduce_add_sync(~0u, uint32_t(value) & 0xFFFFF),
                 high = __reduce_add_sync(~0u, uint32_t(value >> 20));
  return (uint64_t(high) << 20) + low;
}

// ---- logits

// x = big + small, both in tf32, but for 2^-22 of x. Infinities and NaN give a NaN, and `repair`
// takes over.
__device__ inline void split(float x, float& big, float& small) {
  big = __uint_as_float((__float_as_uint(x) + 0x1000) & 0xFFFFE000);
  small = __uint_as_float(__float_as_uint(x - big) & 0xFFFFE000);
}

__device__ inline void split(const float4& x, float4& big, float4& small) {
  split(x.x, big.x, small.x);
  split(x.y, big.y, small.y);
  split(x.z, big.z, small.z);
  split(x.w, big.w, small.w);
}

// Numbers 4 t to 4 t + 3 of a chunk of a row, zeros beyond D. The order of head dims inside a chunk
// is the same for both factors, so it need not be the one the matrix instructions have in mind.
__device__ inline float4 quarter(const float* row, int chunk, int D) {
  const int dim = chunk * kChunk + threadIdx.x % 4 * 4;
  return dim < D ? *reinterpret_cast<const float4*>(row + dim) : float4{0, 0, 0, 0};
}

// The block's queries as fragments: [chunk][tile of 8 rows][big, small][lane].
template <int TILES>
__device__ inline void load_queries(const SelectBlocks& p, const float* query, int first,
                                    float4* fragments) {
  for (int i = threadIdx.x; i < p.chunks() * TILES * 32; i += kThreads) {
    const int row = min(first + i / 32 % TILES * 8 + i % 32 / 4, p.N - 1);
    float4* to = fragments + i / 32 * 64 + i % 32;
    split(quarter(query + row * p.query_row, i / 32 / TILES, p.D), to[0], to[32]);
  }
}

// Two steps of 8 head dims: tf32 products of big and small parts, the small ones first; small times
// small is below fp32's rounding.
template <int TILES>
__device__ inline void multiply(const float4 (&keys)[4], const float4* fragments,
                                float (&sum)[2][TILES][4]) {
  float4 big[4], small[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) split(keys[i], big[i], small[i]);
#pragma unroll
  for (int n = 0; n < TILES; ++n) {
    const float4 q = fragments[n * 64], rest = fragments[n * 64 + 32];
#pragma unroll
    for (int m = 0; m < 2; ++m) {
      const float4 &a = big[2 * m], &b = big[2 * m + 1], &c = small[2 * m], &d = small[2 * m + 1];
      mma_tf32(sum[m][n], c.x, d.x, c.y, d.y, q.x, q.y);
      mma_tf32(sum[m][n], a.x, b.x, a.y, b.y, rest.x, rest.y);
      mma_tf32(sum[m][n], a.x, b.x, a.y, b.y, q.x, q.y);
      mma_tf32(sum[m][n], c.z, d.z, c.w, d.w, q.z, q.w);
      mma_tf32(sum[m][n], a.z, b.z, a.w, b.w, rest.z, rest.w);
      mma_tf32(sum[m][n], a.z, b.z, a.w, b.w, q.z, q.w);
    }
  }
}

// Plain fp32 products of the keys from `start` on, one per lane: where an operand or a sum is not
// finite its parts say nothing.
__device__ inline void repair(const SelectBlocks& p, const float* query, const float* key,
                              int first, int start, float* logits) {
  __syncwarp();
  const int lane = threadIdx.x % 32;
  const float* k = key + min(start + lane, p.N - 1) * p.key_row;
  for (int row = 0; row < p.rows; ++row) {
    const float* q = query + min(first + row, p.N - 1) * p.query_row;
    float sum = 0;
    for (int d = 0; d < p.D; ++d) sum = fmaf(q[d], k[d], sum);
    logits[row * p.stride() + start + lane] = sum;
  }
}

// logits [rows][stride], before the division by sqrt(D). A key is read by one warp only, straight
// into its fragments: staging keys in shared memory would move every byte once more. Columns beyond
// N repeat the last key.
template <int TILES>
__device__ inline void score(const SelectBlocks& p, const float* query, const float* key, int first,
                             const float4* fragments, float* logits) {
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  for (int start = threadIdx.x / 32 * kStep; start < p.N; start += kWarps * kStep) {
    const float* row[4];
    float4 keys[4], next[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      row[i] = key + min(start + 8 * i + g, p.N - 1) * p.key_row;
      next[i] = quarter(row[i], 0, p.D);
    }
    float sum[2][TILES][4] = {}, probe = 0;
    for (int chunk = 0; chunk < p.chunks(); ++chunk) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        keys[i] = next[i];
        next[i] = quarter(row[i], chunk + 1, p.D);
      }
      multiply<TILES>(keys, fragments + chunk * TILES * 64 + lane, sum);
    }
#pragma unroll
    for (int i = 0; i < 8 * TILES; ++i) {
      const int m = i / 4 / TILES, n = i / 4 % TILES, query_row = 8 * n + 2 * t + i % 2;
      const float value = sum[m][n][i % 4];
      probe += 0 * value;  // NaN for infinities and NaN
      if (query_row < p.rows)
        logits[query_row * p.stride() + start + 16 * m + i % 4 / 2 * 8 + g] = value;
    }
    if (__any_sync(~0u, probe != 0)) repair(p, query, key, first, start, logits);
  }
}

// ---- choice

template <int SLOTS>
struct Row {
  // masses of blocks 32 i + lane, zeros beyond N
  uint32_t mass[SLOTS];
  // exact sum of all masses, with 2^32 for the heaviest
  uint64_t total;
  // no mass is below this one
  uint32_t least;

  // Sum of the masses that are at most `limit`, which is not the heaviest.
  __device__ uint64_t up_to(uint32_t limit, uint32_t one) const {
    uint64_t sum = 0;
#pragma unroll
    for (int i = 0; i < SLOTS; ++i) multiply_add(sum, mass[i], mass[i] <= limit ? one : 0);
    return sum_over_warp(sum);
  }
};

__device__ inline uint32_t mass_of(float logit, float top, float factor) {
  // half to even; 2^32 saturates to kHeaviest
  return __float2uint_rn(exp2_approximate((logit - top) * factor) * 0x1p32f);
}

// Turns a row of logits into masses; false where its maximum is not finite or a logit is NaN.
template <int SLOTS>
__device__ inline bool weigh(const SelectBlocks& p, const float* logits, Row<SLOTS>& row) {
  const int lane = threadIdx.x % 32;
  const float first = logits[lane];  // repeated where there are no blocks
  float top = first, bottom = first;
#pragma unroll
  for (int i = 0; i < SLOTS; ++i) {
    const float logit = 32 * i < p.N ? logits[32 * i + lane] : first;
    top = max_or_nan(top, logit);
    bottom = fminf(bottom, logit);
    row.mass[i] = __float_as_uint(logit);  // for now
  }
  top = over_warp(top, max_or_nan);
  bottom = over_warp(bottom, [](float a, float b) { return fminf(a, b); });
  const float factor = p.factor;
  const int left = p.N - lane;
  uint32_t heaviest = 0;
  uint64_t sum = 0;
#pragma unroll
  for (int i = 0; i < SLOTS; ++i) {
    row.mass[i] = 32 * i < left ? mass_of(__uint_as_float(row.mass[i]), top, factor) : 0;
    heaviest += row.mass[i] == kHeaviest;
    multiply_add(sum, row.mass[i], p.one);
  }
  row.total = sum_over_warp(sum + heaviest);
  row.least = mass_of(bottom, top, p.factor);
  return fabsf(top) < INFINITY;
}

// Of the masses from `low` to `high`, at most 32 with `below` the sum of all lighter ones, the
// lightest up to which they sum to target.
template <int SLOTS>
__device__ inline uint32_t lightest(const Row<SLOTS>& row, uint32_t low, uint32_t high,
                                    uint64_t below, uint64_t target, uint32_t* memory) {
  const int lane = threadIdx.x % 32;
  int count = 0;
#pragma unroll
  for (int i = 0; i < SLOTS; ++i) {
    const bool inside = row.mass[i] - low <= high - low;
    const uint32_t mask = __ballot_sync(~0u, inside);
    if (!mask) continue;  // in most slots
    if (inside) memory[count + __popc(mask & ((1u << lane) - 1))] = row.mass[i];
    count += __popc(mask);
  }
  __syncwarp();
  const uint32_t own = lane < count ? memory[lane] : high;
  for (int i = 0; i < count; ++i) below += memory[i] <= own ? memory[i] : 0;
  __syncwarp();
  // the sum up to `high` reaches the target, however it is counted
  return __reduce_min_sync(~0u, below >= target ? own : high);
}

// The lightest mass worth keeping: the smallest up to which the row's masses sum to target, or zero
// when that is nothing. Bisects the bits of fp32 numbers, which order like the numbers, from the
// lightest mass to the heaviest. The masses between two limits weigh at least the lower one each:
// the difference of two exact sums tells when no more than a warp of them is left.
template <int SLOTS>
__device__ inline uint32_t threshold(const SelectBlocks& p, const Row<SLOTS>& row, uint64_t target,
                                     uint32_t* memory) {
  if (target == 0) return 0;
  uint32_t low = max(kOne, __float_as_uint(__uint2float_rd(row.least))), high = kTwoTo32;
  uint64_t below = 0, reached = row.total;  // sums of the masses below `low` and up to `high`
  while (low < high && reached - below >= uint64_t(33) * __float2uint_rd(__uint_as_float(low))) {
    const uint32_t middle = (low + high) / 2;
    const uint64_t sum = row.up_to(__float2uint_rd(__uint_as_float(middle)), p.one);
    if (sum >= target) {
      high = middle;
      reached = sum;
    } else {
      low = middle + 1;
      below = sum;
    }
  }
  const uint32_t heavy = __float2uint_rd(__uint_as_float(high));
  if (low == high) return heavy;
  return lightest(row, __float2uint_ru(__uint_as_float(low)), heavy, below, target, memory);
}

// The row's bits, of all its slots: keep(i) for block 32 i + lane.
template <int SLOTS, class Keep>
__device__ inline void pack(int words, uint32_t* packed, Keep keep) {
  const int lane = threadIdx.x % 32;
  uint32_t word[(SLOTS + 31) / 32] = {};
#pragma unroll
  for (int i = 0; i < SLOTS; ++i) {
    const uint32_t bits = __ballot_sync(~0u, keep(i));
    word[i / 32] = lane == i % 32 ? bits : word[i / 32];
  }
#pragma unroll
  for (int i = 0; i < (SLOTS + 31) / 32; ++i)
    if (32 * i + lane < words) packed[32 * i + lane] = word[i];
  __syncwarp();
}

// Writes the row's words, bits beyond N included: masses above `least`, and those equal to it but
// for the first `skip`.
template <int SLOTS>
__device__ inline void pack(const Row<SLOTS>& row, uint32_t least, uint32_t skip, int words,
                            uint32_t* packed) {
  if (!skip) return pack<SLOTS>(words, packed, [&](int i) { return row.mass[i] >= least; });
  const uint32_t lower = (1u << threadIdx.x % 32) - 1;
  uint32_t seen = 0;
  pack<SLOTS>(words, packed, [&](int i) {
    const uint32_t equal = __ballot_sync(~0u, row.mass[i] == least),
                   before = seen + __popc(equal & lower);
    seen += __popc(equal);
    return row.mass[i] > least || (row.mass[i] == least && before >= skip);
  });
}

// Adds the blocks around block `at` of the grid: a lane per line of blocks, whose bits are
// neighbours.
__device__ inline void add_window(const SelectBlocks& p, int at, uint32_t* packed) {
  const int t = at / (p.Y * p.X), y = at / p.X % p.Y, x = at % p.X;
  const int t0 = max(0, t - p.near_t), t1 = min(p.T - 1, t + p.near_t), y0 = max(0, y - p.near_y),
            y1 = min(p.Y - 1, y + p.near_y);
  const int x0 = max(0, x - p.near_x), x1 = min(p.X - 1, x + p.near_x), lines = y1 - y0 + 1;
  for (int i = threadIdx.x % 32; i < (t1 - t0 + 1) * lines; i += 32) {
    const int line = ((t0 + i / lines) * p.Y + y0 + i % lines) * p.X, last = line + x1;
    for (int j = line + x0; j <= last; j = (j | 31) + 1)
      atomicOr(packed + j / 32, (~0u << j % 32) & (~0u >> (31 - min(last - j / 32 * 32, 31))));
  }
  __syncwarp();
}

template <int SLOTS>
__device__ inline void choose(const SelectBlocks& p, int at, float* logits, uint32_t* selection) {
  Row<SLOTS> row;
  uint32_t least = 0, skip = 0;
  // the row's place is free once it is in registers
  uint32_t* memory = reinterpret_cast<uint32_t*>(logits);
  const bool usual = weigh(p, logits, row);
  __syncwarp();
  if (usual) {  // the same in the whole warp
    const uint64_t target = __double2ull_ru(p.drop * double(row.total));
    least = threshold(p, row, target, memory);
    if (p.stable && least) {
      const uint64_t below = row.up_to(least - 1, p.one);  // still short of the target
      skip = (target - 1 - below) / (least + uint64_t(least == kHeaviest));
    }
  }
  pack(row, least, skip, p.words(), memory);
  if (p.T) add_window(p, at, memory);
  for (int i = threadIdx.x % 32; i < p.words(); i += 32)
    selection[i] = memory[i] & (i < p.N / 32 ? ~0u : (1u << p.N % 32) - 1);
}

// Grid: blocks_per_head() * B * H. TILES * 8 >= rows, 32 * SLOTS >= N, shared memory:
// shared_bytes().
template <int TILES, int SLOTS>
__global__ void __launch_bounds__(kThreads, SLOTS <= 64 ? 2 : 1) select_blocks(SelectBlocks p) {
  float4* fragments = dynamic_shared();
  float* logits = reinterpret_cast<float*>(fragments + p.chunks() * TILES * 64);
  const int head = blockIdx.x / p.blocks_per_head(),
            first = blockIdx.x % p.blocks_per_head() * p.rows;
  const float* query = p.query + head / p.H * p.query_batch + head % p.H * p.query_head;
  const float* key = p.key + head / p.H * p.key_batch + head % p.H * p.key_head;
  load_queries<TILES>(p, query, first, fragments);
  __syncthreads();
  score<TILES>(p, query, key, first, fragments, logits);
  __syncthreads();
  for (int i = __shfl_sync(~0u, threadIdx.x / 32, 0); i < min(p.rows, p.N - first);
       i += kWarps)  // the same in the whole warp
    choose<SLOTS>(p, first + i, logits + i * p.stride(),
                  p.selection + (int64_t(head) * p.N + first + i) * p.words());
}

// ---- configuration

using SelectBlocksKernel = void (*)(SelectBlocks);

constexpr int kLongestRow = 122 * 32, kWidestHead = 128;

// tiles and window: three numbers each, or null.
inline void set_meaning(SelectBlocks& p, double keep_mass, bool stable, const int64_t* tiles,
                        const int64_t* window) {
  p.factor = float(1.4426950408889634 / std::sqrt(double(p.D)));
  p.drop = 1.0 - keep_mass;
  p.stable = stable;
  if (!tiles) return;
  p.T = int(tiles[0]), p.Y = int(tiles[1]), p.X = int(tiles[2]);
  p.near_t = int(window[0] / 2), p.near_y = int(window[1] / 2), p.near_x = int(window[2] / 2);
}

inline int64_t shared_bytes(const SelectBlocks& p) {
  return int64_t(p.chunks()) * ((p.rows + 7) / 8) * 64 * sizeof(float4) +
         int64_t(p.rows) * p.stride() * sizeof(float);
}

// Chooses the rows of a thread block and the kernel for N, D and the shared memory a block may
// have, which is 99 KiB at least. Sixteen rows halve the traffic of keys and are two blocks on a
// multiprocessor with 228 KiB; four are for 10 s of HD where it has 100 KiB.
inline SelectBlocksKernel configure(SelectBlocks& p, int64_t shared_limit) {
  for (p.rows = p.N <= 46 * 32 ? 16 : 8; p.rows > 4 && shared_bytes(p) > shared_limit;
       p.rows /= 2) {
  }
  const bool two = p.rows == 16;
  if (p.N <= 24 * 32 && two) return select_blocks<2, 24>;
  if (p.N <= 46 * 32) return two ? select_blocks<2, 46> : select_blocks<1, 46>;
  return p.N <= 60 * 32 ? select_blocks<1, 60> : select_blocks<1, 122>;
}

}  // namespace kandinsky
