# SPDX-License-Identifier: Apache-2.0
"""Laws that only a GPU can keep or break: which kernel ran, streams, graphs, synchronisation,
memory, addresses beyond 2^31.

What every case computes is tested in test_triton.py, on the GPU where there is one.
"""

import pytest
import torch
from torch.testing import assert_close

import kandinsky_kernels as ops
from kandinsky_kernels import kernels
from kandinsky_model.config import DiTConfig, NablaConfig
from kandinsky_model.devices.budget import Weights
from kandinsky_model.devices.offload import Offload
from kandinsky_model.dit.accounting import Job, sampling_bytes
from kandinsky_model.dit.geometry import Grid, block_offsets
from kandinsky_model.dit.layout import Chunks, make_layout
from kandinsky_model.dit.transformer import DiffusionTransformer3D
from kandinsky_model.sampling.sampler import Sampling, noise, sample
from kandinsky_model.text.embeddings import Conditioning

from ..cases import OPERATORS, Case, attention, frames, heads, means, normed, rows, tensors, video
from ..support.backward import INPUTS, Backward

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

BF16 = torch.bfloat16
SMALL = {
    "modulated_norm": rows(2, 70, 1792),
    "gated_add_norm": rows(2, 70, 1792, branch=True),
    "norm_rope": heads(2, 130, 4, 64),
    "norm_rope_means": heads(2, 130, 4, 64, block=64),
    "select_blocks": means(2, 3, (2, 4, 9), 64, 0.8, (3, 3, 3)),
    "block_sparse_attention": attention(2, 3, Grid(3, 16, 16), 64, 0.4, lse=True),
    "group_moments": video(2, 3, 9, 17, 128, 32),
    "group_norm_silu": normed(2, 3, 9, 17, 128),
    "frame_causal_attention": frames(2, 3, 70, 128),
}
FORWARD = [Case(op, "gpu", make, BF16) for op, make in SMALL.items()]
by_op = pytest.mark.parametrize(
    "case",
    FORWARD + [Backward(f"{op}_backward", "gpu", SMALL[op], BF16) for op in INPUTS],
    ids=lambda case: case.op,
)


def on_gpu(case, seed=0):
    return {
        name: x.cuda() if isinstance(x, torch.Tensor) else x
        for name, x in case.inputs(seed).items()
    }


def assert_same(actual, wanted):
    assert all(torch.equal(a, w) for a, w in zip(actual, wanted, strict=True))


def test_table_covers_every_operator():
    assert SMALL.keys() == OPERATORS.keys()


@by_op
def test_the_kernel_runs_and_not_the_reference(case):  # law 2
    inputs = on_gpu(case)
    case.run(inputs)  # compiles, and makes the trial
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        case.run(inputs)
        torch.cuda.synchronize()
    op = case.op.replace("_means", "")
    assert kernels()[op]["cuda"].startswith("triton"), kernels()[op]["cuda"]
    kernel = {"group_moments": "slab_moments"}.get(op, op)
    assert any(event.key.startswith(kernel) for event in profile.key_averages()), [
        event.key for event in profile.key_averages()
    ]


@by_op
def test_views_and_misaligned_bases(case):  # law 5
    inputs = on_gpu(case)
    shifted = {
        name: torch.cat([x.flatten()[:1], x.flatten()])[1:].view(x.shape)
        for name, x in tensors(inputs).items()
    }
    sliced = {
        name: torch.cat([x, x], 1)[:, : x.shape[1]]
        for name, x in tensors(inputs).items()
        if name in case.operator.narrow
    }
    for views in (shifted, sliced):
        case.check(tuple(x.cpu() for x in case.run(inputs | views)), case.inputs())


@by_op
def test_ten_runs_on_two_streams_are_the_same(case):  # laws 11, 14
    inputs, side = on_gpu(case), torch.cuda.Stream()
    wanted = case.run(inputs)
    for _ in range(5):
        assert_same(case.run(inputs), wanted)
        late = {
            name: torch.zeros_like(x)
            for name, x in tensors(inputs).items()
            if name in case.operator.narrow
        }
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            torch.cuda._sleep(1_000_000)
            for name, x in late.items():
                x.copy_(inputs[name])
            outputs = case.run(inputs | late)
        torch.cuda.current_stream().wait_stream(side)
        assert_same(outputs, wanted)


@by_op
def test_graph_replays_with_new_inputs(case):  # law 15
    inputs, other = on_gpu(case), on_gpu(case, seed=1)
    changed = [name for name in tensors(inputs) if name not in ("block_offsets", "positions")]
    wanted = [case.run(inputs), case.run(inputs | {name: other[name] for name in changed})]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = case.run(inputs)
    for source, result in ((other, wanted[1]), (other, wanted[1]), (on_gpu(case), wanted[0])):
        for name in changed:
            inputs[name].copy_(source[name])
        graph.replay()
        torch.cuda.synchronize()
        assert_same(outputs, result)


@by_op
def test_nothing_waits_for_the_gpu(case):  # law 18
    inputs = on_gpu(case)
    case.run(inputs)
    torch.cuda.set_sync_debug_mode("error")
    try:
        case.run(inputs)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("case", FORWARD, ids=lambda case: case.op)
def test_compiles_into_one_graph(case):  # law 17
    inputs = on_gpu(case)
    torch._dynamo.reset()
    assert_same(torch.compile(lambda **x: case.run(x), fullgraph=True)(**inputs), case.run(inputs))


@pytest.mark.parametrize(
    "H, tiles, D, mib",
    [(28, (61, 4, 6), 64, 64), (32, (61, 6, 10), 128, 256)],
    ids=["lite 10 s", "pro 10 s hd"],
)
def test_selection_never_holds_the_map(H, tiles, D, mib):  # law 19
    N = tiles[0] * tiles[1] * tiles[2]
    query, key = (torch.randn(1, H, N, D, device="cuda") for _ in range(2))
    ops.select_blocks(query, key, 0.9, tiles, (11, 3, 3))
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    chosen = ops.select_blocks(query, key, 0.9, tiles, (11, 3, 3))
    torch.cuda.synchronize()
    assert torch.cuda.max_memory_allocated() - before - chosen.numel() * 4 <= mib << 20


needs_memory = pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.mem_get_info()[1] < 40 << 30, reason="needs 40 GiB"
)


@needs_memory
def test_norms_beyond_2_to_the_31_elements():  # law 13
    S, C = 2**31 // 4096 + 70, 4096
    x, vector = torch.randn(1, S, C, device="cuda", dtype=BF16), torch.randn(1, C, device="cuda")
    last = x[:, -70:].contiguous()
    assert_close(
        ops.modulated_norm(x, vector, vector)[:, -70:], ops.modulated_norm(last, vector, vector)
    )
    for out, wanted in zip(
        ops.gated_add_norm(x, x, vector, vector, vector),
        ops.gated_add_norm(last, last, vector, vector, vector),
        strict=True,
    ):
        assert_close(out[:, -70:], wanted)
    weight = torch.rand(128, device="cuda")
    assert_close(
        ops.norm_rope(x.view(1, S, 32, 128), weight)[:, -70:],
        ops.norm_rope(last.view(1, 70, 32, 128), weight),
    )


@needs_memory
def test_attention_beyond_2_to_the_31_elements():  # law 13
    N, H, D = 4104, 64, 128  # 64 N H D = 2^31 + 2^22 elements
    query, key, value = (torch.randn(1, 64 * N, H, D, device="cuda", dtype=BF16) for _ in range(3))
    keep = torch.eye(N, dtype=torch.bool, device="cuda")
    selection = ops.pack_selection(keep).expand(1, H, N, -1).contiguous()
    out = ops.block_sparse_attention(
        query,
        key,
        value,
        selection,
        torch.arange(0, 64 * N + 1, 64, dtype=torch.int32, device="cuda"),
    )
    last = [x[:, -64:].contiguous() for x in (query, key, value)]
    one = ops.block_sparse_attention(
        *last,
        torch.ones(1, H, 1, 1, dtype=torch.int32, device="cuda"),
        block_offsets(Grid(1, 8, 8)).cuda(),
    )
    assert_close(out[:, -64:], one)


@pytest.mark.parametrize("resident", [2, 0])
def test_weights_stream_from_pinned_memory(resident):
    """Real copies, streams and events: the same bits as with all weights there, in several passes;
    and no more memory than predicted."""
    config = DiTConfig(
        in_text_dim=256,
        in_text_dim2=64,
        time_dim=64,
        model_dim=512,
        ff_dim=2048,
        num_text_blocks=1,
        num_visual_blocks=6,
        visual_cond=True,
        axes_dims=(32, 48, 48),
    )
    torch.manual_seed(0)
    dit = DiffusionTransformer3D(config).eval().requires_grad_(False).to(BF16)
    for parameter in dit.parameters():
        parameter.normal_(0, 0.02)
    hosted, device, grid = (
        Offload(dit.prepare(), torch.device("cuda")),
        torch.device("cuda"),
        Grid(4, 32, 32),
    )
    job, chunks = (
        Job(config, grid, nabla=True, guided=False, steps=3, text_tokens=64),
        Chunks(2, 1024),
    )
    cond = Conditioning(
        torch.randn(1, 64, 256, device=device, dtype=BF16), None, torch.randn(1, 64, device=device)
    )
    layout = make_layout(
        config, grid, (1.0, 2.0, 2.0), NablaConfig(0.9, (3, 1, 1)), device, chunks=chunks
    )

    def latents(count):
        with hosted.on_device(count) as placed:
            assert all(
                piece.host.is_pinned()
                for store in (hosted.rest, *hosted.stores)
                for piece in store.pieces
            )
            *_, (_, last) = sample(
                placed, noise(0, (1, 4, 64, 64, 16), device), cond, layout, Sampling(3, 5.0, 1.0)
            )
        return last

    wanted = latents(7)  # which also compiles what runs
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    assert torch.equal(latents(resident), wanted)
    assert torch.cuda.max_memory_allocated() - before <= Weights.of(dit).on_device(
        resident
    ) + sampling_bytes(job, chunks)
    assert dit.dtype == BF16 and not any(parameter.is_cuda for parameter in dit.parameters())
