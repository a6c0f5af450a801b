// SPDX-License-Identifier: Apache-2.0
// Launches select_blocks.cuh. An operator of its own, select_blocks_cuda, so that Python chooses
// between it and Triton.
#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>

#include <string>
#include <vector>

#include "../check.h"
#include "select_blocks.cuh"

namespace kandinsky {
namespace {

// In fp32 with rows that 16-byte loads may read: the model's means are, others are copied once.
Tensor loadable(const Tensor& means) {
  const Tensor wide = to_float(means);
  bool aligned = reinterpret_cast<uintptr_t>(wide.data_ptr()) % 16 == 0 && wide.stride(3) == 1;
  for (int64_t i = 0; i < 3; ++i) aligned = aligned && wide.stride(i) % 4 == 0;
  return aligned ? wide : torch::stable::clone(torch::stable::contiguous(wide));
}

Tensor select_blocks_cuda(const Tensor& query_means, const Tensor& key_means, double keep_mass,
                          const std::vector<int64_t>& tiles, const std::vector<int64_t>& window,
                          const std::string& ties) {
  require(query_means.dim() == 4, "query_means must have shape [B, H, N, D], got ",
          shape_of(query_means), ".");
  const int64_t B = query_means.size(0), H = query_means.size(1), N = query_means.size(2),
                D = query_means.size(3);
  require_shape(key_means, "key_means", {B, H, N, D});
  require(B * H * N > 0 && N <= kLongestRow && D > 0 && D % 8 == 0 && D <= kWidestHead,
          "this kernel takes 1 to ", kLongestRow,
          " blocks and head dims that are multiples of 8 up to ", kWidestHead, ", got ",
          shape_of(query_means), "; use select_blocks.");
  require(B * H * N < int64_t(1) << 31, "this kernel takes fewer than 2^31 rows, got ", B * H * N,
          "; select some heads at a time.");
  require_choice(keep_mass, tiles, window, ties, N);
  require_float(query_means, "query_means");
  require_type(key_means, "key_means", query_means.scalar_type());
  const int32_t device = query_means.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  const Tensor query = loadable(query_means), key = loadable(key_means);
  const Tensor selection = fresh(query, "the selection", {B, H, N, (N + 31) / 32}, ScalarType::Int);
  SelectBlocks p;
  p.query = data<float>(query), p.key = data<float>(key),
  p.selection = mutable_data<uint32_t>(selection);
  p.query_batch = query.stride(0), p.query_head = query.stride(1), p.query_row = query.stride(2);
  p.key_batch = key.stride(0), p.key_head = key.stride(1), p.key_row = key.stride(2);
  p.H = int(H), p.N = int(N), p.D = int(D);
  set_meaning(p, keep_mass, ties == "stable", tiles.empty() ? nullptr : tiles.data(),
              window.data());
  int shared_limit = 0;
  STD_CUDA_CHECK(
      cudaDeviceGetAttribute(&shared_limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
  const SelectBlocksKernel kernel = configure(p, shared_limit);
  STD_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                      int(shared_bytes(p))));
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  kernel<<<unsigned(B * H * p.blocks_per_head()), kThreads, shared_bytes(p),
           static_cast<cudaStream_t>(stream)>>>(p);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return selection;
}

}  // namespace
}  // namespace kandinsky

STABLE_TORCH_LIBRARY_FRAGMENT(kandinsky_kernels, library) {
  library.def(
      "select_blocks_cuda(Tensor query_means, Tensor key_means, float keep_mass, int[] tiles, "
      "int[] window, str ties) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(kandinsky_kernels, CUDA, library) {
  library.impl("select_blocks_cuda", TORCH_BOX(&kandinsky::select_blocks_cuda));
}
