// SPDX-License-Identifier: Apache-2.0
// Runs CUDA C++ kernels on a CPU, one thread block after the other and every thread of a block as a
// fiber, so that barriers and exchanges between the lanes of a warp mean what they mean on a GPU. A
// thread gives way only where it must wait for others: whatever is not ordered by a barrier happens
// in the order of `emulator::launch(..., backwards)`, and a kernel whose result depends on that
// order has a race.
//
// Include it before the kernel. Dynamic shared memory starts as NaN; a block that writes beyond it,
// waits for ever or leaves threads behind at a barrier ends the program with one line.
#pragma once
#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static  // blocks run one after the other

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};

inline uint3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;

namespace emulator {

constexpr size_t kStack = 64 << 10, kGuard = 4096,
                 kBytes = 64;  // bytes of a lane's contribution to an exchange
constexpr unsigned char kCanary = 0xA5;

[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "emulator: block (%u, %u, %u): %s\n", blockIdx.x, blockIdx.y, blockIdx.z,
               what);
  std::abort();
}

// A meeting point: whoever comes last opens it for all.
struct Gate {
  unsigned arrived = 0, round = 0;
};

struct Warp {
  Gate gate;
  unsigned mask = 0;                                // of the exchange under way
  alignas(16) unsigned char shared[2][32][kBytes];  // in turns: a lane may enter the next exchange
                                                    // before others have read this one
};

struct Thread {
  uint3 index;
  std::vector<char> stack;
  ucontext_t start;
  jmp_buf state;
  bool started = false, done = false;
  const Gate* waits = nullptr;
  unsigned round = 0;  // that it waits to end
};

struct Block {
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  Gate gate;
  unsigned votes = 0;
  std::function<void()> kernel;
  jmp_buf scheduler;
  unsigned current = 0;
};

inline Block block;
inline std::vector<unsigned char> shared;
inline size_t shared_size = 0;

inline unsigned lane() { return block.current % 32; }
inline Warp& warp() { return block.warps[block.current / 32]; }

// Returns when `count` threads have come to the gate.
inline void meet(Gate& gate, unsigned count) {
  Thread& self = block.threads[block.current];
  if (++gate.arrived == count) {
    gate.arrived = 0;
    ++gate.round;
    return;
  }
  self.waits = &gate;
  self.round = gate.round;
  if (!_setjmp(self.state)) _longjmp(block.scheduler, 1);
}

// Every lane of `mask` contributes a value; calls read(lane) -> the value of that lane, when all
// have.
template <class T, class Read>
auto exchange(unsigned mask, const T& value, Read read) {
  static_assert(sizeof(T) <= kBytes);
  if (!(mask >> lane() & 1)) fail("a lane takes part in an exchange whose mask it is not in");
  Warp& w = warp();
  if (w.gate.arrived && w.mask != mask) fail("lanes of a warp meet with different masks");
  w.mask = mask;
  auto* slot = w.shared[w.gate.round % 2];
  std::memcpy(slot[lane()], &value, sizeof(T));
  meet(w.gate, std::popcount(mask));
  return read([slot](unsigned from) {
    T other;
    std::memcpy(&other, slot[from], sizeof(T));
    return other;
  });
}

// Combines the values of all lanes in `mask`.
template <class T, class Combine>
T reduce(unsigned mask, T value, Combine combine) {
  return exchange(mask, value, [&](auto of) {
    T result = of(std::countr_zero(mask));
    for (unsigned i = std::countr_zero(mask) + 1; i < 32; ++i)
      if (mask >> i & 1) result = combine(result, of(i));
    return result;
  });
}

inline void enter() {
  block.kernel();
  block.threads[block.current].done = true;
  _longjmp(block.scheduler, 1);
}

inline void resume(unsigned index) {
  Thread& thread = block.threads[index];
  block.current = index;
  threadIdx = thread.index;
  thread.waits = nullptr;
  if (_setjmp(block.scheduler)) return;
  if (thread.started) _longjmp(thread.state, 1);
  thread.started = true;
  getcontext(&thread.start);
  thread.start.uc_stack.ss_sp = thread.stack.data();
  thread.start.uc_stack.ss_size = thread.stack.size();
  makecontext(&thread.start, enter, 0);
  setcontext(&thread.start);
}

inline void run_block(bool backwards) {
  const unsigned count = block.threads.size();
  std::fill_n(shared.begin(), shared_size, 0xFF);  // NaN in every float type
  std::fill(shared.begin() + shared_size, shared.end(), kCanary);
  for (Thread& thread : block.threads) thread.started = thread.done = false, thread.waits = nullptr;
  for (unsigned done = 0; done < count;) {
    bool moved = false;
    for (unsigned i = 0; i < count; ++i) {
      const unsigned index = backwards ? count - 1 - i : i;
      Thread& thread = block.threads[index];
      if (thread.done || (thread.waits && thread.waits->round == thread.round)) continue;
      resume(index);
      moved = true;
      done += thread.done;
    }
    if (!moved)
      fail("its threads wait for one another: not all of them come to a barrier or an exchange");
  }
  for (size_t i = shared_size; i < shared.size(); ++i)
    if (shared[i] != kCanary) fail("it writes beyond its shared memory");
}

// Calls kernel() for every thread of every block.
inline void launch(dim3 grid, dim3 threads, size_t shared_bytes, std::function<void()> kernel,
                   bool backwards = false) {
  gridDim = grid;
  blockDim = threads;
  const unsigned count = threads.x * threads.y * threads.z;
  block.kernel = std::move(kernel);
  block.threads.resize(count);
  block.warps.assign((count + 31) / 32, Warp{});
  block.gate = Gate{};
  for (unsigned i = 0; i < count; ++i) {
    block.threads[i].index = {i % threads.x, i / threads.x % threads.y, i / threads.x / threads.y};
    block.threads[i].stack.resize(kStack);
  }
  shared_size = shared_bytes;
  shared.resize(shared_bytes + kGuard);
  for (unsigned z = 0; z < grid.z; ++z)
    for (unsigned y = 0; y < grid.y; ++y)
      for (unsigned x = 0; x < grid.x; ++x) {
        blockIdx = {x, y, z};
        run_block(backwards);
      }
}

}  // namespace emulator
