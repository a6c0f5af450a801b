// SPDX-License-Identifier: Apache-2.0
// csrc/cuda/select_blocks.cuh as a C function on the emulator, for ctypes.
#include "intrinsics.h"

#include "../../csrc/cuda/select_blocks.cuh"

// Contiguous query and key [heads, N, D], selection [heads, N, words]; tiles and window of three
// numbers, or null. Returns the rows of a thread block, of which only the first most_blocks run.
extern "C" int select_blocks(const float* query, const float* key, uint32_t* selection, int heads,
                             int N, int D, double keep_mass, const int64_t* tiles,
                             const int64_t* window, bool stable, int64_t shared_limit,
                             int most_blocks, bool backwards) {
  kandinsky::SelectBlocks p;
  p.query = query, p.key = key, p.selection = selection;
  p.H = heads, p.N = N, p.D = D;
  p.query_row = p.key_row = D;
  p.query_head = p.key_head = int64_t(N) * D;
  kandinsky::set_meaning(p, keep_mass, stable, tiles, window);
  const auto kernel = kandinsky::configure(p, shared_limit);
  const int blocks = std::min(heads * p.blocks_per_head(), most_blocks);
  emulator::launch(
      blocks, kandinsky::kThreads, kandinsky::shared_bytes(p), [&] { kernel(p); }, backwards);
  return p.rows;
}
