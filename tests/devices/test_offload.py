# SPDX-License-Identifier: Apache-2.0
"""Weights that come to the device layer by layer: the same bits however many stay there, and a
network that is usable afterwards."""

import itertools
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from torch import nn

from kandinsky_model.checkpoints.lora import Adapters
from kandinsky_model.devices import offload
from kandinsky_model.devices.host import Store, tensors_of
from kandinsky_model.devices.offload import LayerStream, Offload, streamed_layers
from kandinsky_model.dit.geometry import Grid
from kandinsky_model.dit.layout import Chunks, make_layout
from kandinsky_model.dit.quantized import quantize
from kandinsky_model.sampling.sampler import Sampling, noise, sample
from kandinsky_model.sampling.step_cache import FirstBlockCache, MagCache
from kandinsky_model.text.embeddings import Conditioning

from ..checkpoints.test_lora import matrices, write
from ..dit.test_transformer import CONFIG, MODES, SCALE, build, inputs

GRID = Grid(2, 8, 9)
CPU = torch.device("cpu")
WHOLE = Chunks()
LAYERS = CONFIG.num_text_blocks + CONFIG.num_visual_blocks


def network(config=CONFIG):
    return build(config).prepare()


def out(dit, mode="dense", chunks=WHOLE):
    with torch.no_grad():
        return dit(
            *inputs(CONFIG, GRID, 2), make_layout(CONFIG, GRID, SCALE, MODES[mode], chunks=chunks)
        )


def run(dit, cache=None):
    g = torch.Generator().manual_seed(4)
    cond, uncond = (
        Conditioning(
            torch.randn(1, n, CONFIG.in_text_dim, generator=g),
            None,
            torch.randn(1, CONFIG.in_text_dim2, generator=g),
        )
        for n in (5, 3)
    )
    start = noise(1, (1, GRID.T, 2 * GRID.Y, 2 * GRID.X, 16))
    *_, (_, latents) = sample(
        dit,
        start,
        cond,
        make_layout(CONFIG, GRID, SCALE),
        Sampling(4, 5.0, 3.0, cache=cache),
        uncond,
    )
    return latents


def addresses(dit):
    return [tensor.data_ptr() for tensor in tensors_of([dit])]


# Which layers


@pytest.mark.parametrize(
    "count, resident, streamed",
    [
        (5, 5, []),
        (5, 9, []),
        (5, 0, [0, 1, 2, 3, 4]),
        (6, 3, [0, 2, 4]),
        (7, 5, [0, 4]),
        (64, 62, [0, 32]),
        (0, 0, []),
    ],
)
def test_streamed_layers_are_spread(count, resident, streamed):
    assert streamed_layers(count, resident) == streamed


# The same bits


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("resident", [LAYERS, LAYERS - 1, 2, 0])
def test_streamed_is_resident(mode, resident):
    """Text blocks and visual blocks are of different sizes; one product still gives queries, keys
    and values."""
    dit = network()
    joint = []
    wanted = out(dit, mode)
    chunked = out(dit, mode, Chunks(1, 30))
    before = addresses(dit)
    hosted = Offload(dit, CPU)
    for block in dit.visual_transformer_blocks:
        block.register_forward_pre_hook(
            lambda block, _: joint.append(block.self_attention._is_joint())
        )
    with hosted.on_device(resident) as placed:
        inside = addresses(dit)
        assert torch.equal(out(placed, mode), wanted)
        assert torch.equal(out(placed, mode, Chunks(1, 30)), chunked)
        assert torch.equal(out(placed, mode), wanted)
        assert addresses(dit) == inside
    assert joint == [True] * 9
    assert addresses(dit) not in (before, inside)
    assert torch.equal(out(dit, mode), wanted)


@pytest.mark.parametrize("mode", ["int8", "fp8", "int8-dynamic"])
def test_quantised_weights_stream(mode):
    dit = quantize(build(), mode)
    wanted = out(dit)
    chunked = out(dit, "dense", Chunks(1, 30))
    with Offload(dit, CPU).on_device(1) as placed:
        assert torch.equal(out(placed), wanted)
        assert torch.equal(out(placed, "dense", Chunks(1, 30)), chunked)
    assert (chunked - wanted).norm() <= 1e-5 * wanted.norm()
    assert torch.equal(out(dit), wanted)


def test_layers_of_any_kind():
    """Of integers, without weights, of sizes that differ by a lot; a linear order is not needed."""

    class Integers(nn.Module):
        def __init__(self, seed):
            super().__init__()
            g = torch.Generator().manual_seed(seed)
            self.register_buffer(
                "values", torch.randint(-127, 128, (16, 16), generator=g, dtype=torch.int8)
            )
            self.register_buffer("scale", torch.rand(16, 1, generator=g) / 127)

        def forward(self, x):
            return x @ (self.values * self.scale).T

    wide = nn.Sequential(nn.Linear(16, 512), nn.GELU(), nn.Linear(512, 16))
    layers = nn.ModuleList(
        [Integers(0), nn.Linear(16, 16), nn.Identity(), wide, Integers(1)]
    ).requires_grad_(False)
    x = torch.randn(3, 16)
    orders = [(0, 1, 2, 3, 4), (0, 0, 3, 1, 4, 4, 2), (4, 3, 2, 1, 0)]

    def through(order):
        y = x
        for i in order:
            y = layers[i](y)
        return y

    wanted = [through(order) for order in orders]
    for count in (1, 2, 5):
        stores = [Store([layer], [], False) for layer in layers[:count]]
        for store in stores:
            store.refresh()
        stream = LayerStream(layers[:count], stores, CPU)
        assert all(
            torch.equal(through(order), result)
            for order, result in zip(orders, wanted, strict=True)
        )
        stream.close()
        assert all(
            torch.equal(through(order), result)
            for order, result in zip(orders, wanted, strict=True)
        )
    assert not any(layer._forward_hooks or layer._forward_pre_hooks for layer in layers)


@pytest.mark.parametrize(
    "cache",
    [None, MagCache(((1.0,) * 4,) * 2, retention=0.0), FirstBlockCache(1e9, most_skipped=1)],
)
def test_whole_runs_with_and_without_caches(cache):
    dit = network()
    wanted = run(dit, cache)
    for resident in (1, 0):
        with Offload(dit, CPU).on_device(resident) as placed:
            assert torch.equal(run(placed, cache), wanted)


def test_each_pass_copies_each_streamed_layer_once(monkeypatch):
    dit = network()
    copied = []
    hosted = Offload(dit, CPU)
    copy_to = Store.copy_to
    monkeypatch.setattr(
        Store, "copy_to", lambda store, buffer: copied.append(store) or copy_to(store, buffer)
    )
    with hosted.on_device(2) as placed:
        out(placed)
        streamed = [hosted.stores[i] for i in streamed_layers(LAYERS, 2)]
        assert copied[3:] == [*streamed, streamed[0]]  # the next pass is begun
        out(placed)
        assert copied[7:] == [*streamed[1:], streamed[0]]


# Adapters come and go


def test_adapters_while_weights_are_in_host_memory(tmp_path):
    paths = [
        write(tmp_path / f"{name}.safetensors", matrices(seed, rank))
        for name, seed, rank in (("a", 1, 4), ("b", 2, 3))
    ]
    plain = network()
    streamed = network()
    hosted = Offload(streamed, CPU)
    adapters = [Adapters(plain), Adapters(streamed)]
    out_plain = out(plain)

    def same():
        with hosted.on_device(1) as placed:
            result = out(placed)
        assert torch.equal(result, out(plain))
        assert torch.equal(out(streamed), result)
        return result

    results = [same()]
    for change in (
        lambda a: a.load(paths[0]),
        lambda a: a.load(paths[1], scale=0.5),
        lambda a: a.set({"a": -1.0}),
        lambda a: a.set({}),
        lambda a: a.remove(),
        lambda a: a.load(paths[1], name="c"),
        lambda a: a.merge(),
    ):
        for one in adapters:
            change(one)
        results.append(same())
    assert torch.equal(results[0], out_plain)
    assert torch.equal(results[5], out_plain)
    assert not torch.equal(results[7], out_plain)
    assert all(not torch.equal(a, b) for a, b in itertools.combinations(results[:4], 2))


def test_an_adapter_loaded_while_weights_are_streamed_works_at_once(tmp_path):
    plain = network()
    streamed = network()
    path = write(tmp_path / "a.safetensors", matrices(1))
    Adapters(plain).load(path)
    with Offload(streamed, CPU).on_device(0) as placed:
        Adapters(streamed).load(path)
        assert torch.equal(out(placed), out(plain))


# Interruptions


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("resident", [3, 0])
def test_an_exception_in_the_middle_leaves_all_usable(error, resident):
    dit = network()
    wanted = out(dit)
    hosted = Offload(dit, CPU)

    def stop(*_):
        raise error("stop")

    with pytest.raises(error), hosted.on_device(resident) as placed:
        handle = dit.visual_transformer_blocks[1].feed_forward.register_forward_pre_hook(stop)
        with pytest.raises(error):
            out(placed)
        handle.remove()
        assert torch.equal(out(placed), wanted), "the same stream goes on"
        dit.visual_transformer_blocks[1].feed_forward.register_forward_pre_hook(stop)
        out(placed)
    dit.visual_transformer_blocks[1].feed_forward._forward_pre_hooks.clear()
    homes = {
        piece.host.untyped_storage().data_ptr()
        for store in (hosted.rest, *hosted.stores)
        for piece in store.pieces
    }
    assert {tensor.untyped_storage().data_ptr() for tensor in tensors_of([dit], dit.once)} == homes
    assert torch.equal(out(dit), wanted)
    with hosted.on_device(1) as placed:
        assert torch.equal(out(placed), wanted)


def test_no_memory_for_the_resident_layers_leaves_all_usable(monkeypatch):
    dit = network()
    wanted = out(dit)
    hosted = Offload(dit, CPU)
    empty = torch.empty
    with hosted.on_device(0):
        pass

    def scarce(*args, **options):
        if options.get("dtype") == torch.uint8:
            made.append(1)
            if len(made) == 3:
                raise torch.OutOfMemoryError("injected")
        return empty(*args, **options)

    made = []
    monkeypatch.setattr(torch, "empty", scarce)
    with pytest.raises(torch.OutOfMemoryError), hosted.on_device(LAYERS):
        pytest.fail("there was no room")
    monkeypatch.undo()
    assert torch.equal(out(dit), wanted)


# Streams and events, acted on a CPU


class Event:
    def __init__(self):
        self.due = []

    def record(self, stream):
        self.due = list(stream.tasks)
        stream.log.append(("record", stream, self))


class Stream:
    """Runs nothing by itself: its copies happen when another stream waits for an event behind
    them."""

    def __init__(self, log):
        self.tasks, self.log = [], log

    def wait_event(self, event):
        self.log.append(("wait", self, event))
        for task in event.due:
            task()
        event.due = []

    def synchronize(self):
        for task in self.tasks:
            task()


@pytest.fixture
def acted(monkeypatch):
    """LayerStream as on a GPU, with the least that its events promise: what is not waited for has
    not happened."""
    log = []
    computing = Stream([])
    copies = Stream([])
    current = []
    computing.log = copies.log = log

    @contextmanager
    def switch(stream):
        current.append(stream)
        yield
        current.pop()

    copy_to, enter = Store.copy_to, Store.enter

    def used(store, buffer):
        log.append(("use", computing, buffer.data_ptr()))
        enter(store, buffer)

    def later(store, buffer):
        if not current:
            return copy_to(store, buffer)
        pending = [True]

        def task():
            if pending:
                pending.clear()
                copy_to(store, buffer)

        log.append(("copy", copies, buffer.data_ptr()))
        return copies.tasks.append(task)

    monkeypatch.setattr(offload, "_copy_stream", lambda device: copies)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: computing)
    monkeypatch.setattr(torch.cuda, "stream", switch)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(Store, "copy_to", later)
    monkeypatch.setattr(Store, "enter", used)
    return log


def test_layers_wait_for_their_copies_and_copies_for_their_layers(acted):
    dit = network()
    wanted = out(dit)
    with Offload(dit, CPU).on_device(1) as placed:
        for _ in range(3):
            assert torch.equal(out(placed), wanted), "a layer computed before its weights had come"
    copies = [i for i, (what, *_) in enumerate(acted) if what == "copy"]
    for i in copies:
        _, stream, buffer = acted[i]
        used = max(
            (j for j in range(i) if acted[j][0] == "use" and acted[j][2] == buffer), default=-1
        )
        done = [
            j for j in range(used + 1, i) if acted[j][0] == "record" and acted[j][1] is not stream
        ]
        waited = [
            acted[j][2]
            for j in range(i)
            if acted[j][:2] == ("wait", stream) and done and j > done[0]
        ]
        assert any(acted[j][2] in waited for j in done), (
            "a buffer was overwritten while a layer used it"
        )
    assert len(copies) == 3 * (LAYERS - 1) + 1


# What is used once


def test_modulations_stay_in_host_memory():
    """Of the network, an eighth is used once per prompt; nothing of it comes to the device."""
    dit = network(replace(CONFIG, time_dim=32))
    hosted = Offload(dit, CPU)
    homes = {id(tensor): tensor.data_ptr() for tensor in tensors_of(dit.once)}
    seen = []
    for module in dit.once:
        module.register_forward_hook(lambda module, *_: seen.append(module) or None)
    with hosted.on_device(0) as placed:
        out(placed)
        assert all(homes[id(tensor)] == tensor.data_ptr() for tensor in tensors_of(dit.once))
    assert seen == dit.once
    assert sum(map(len, (store.pieces for store in hosted.stores))) == LAYERS
