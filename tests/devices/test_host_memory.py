# SPDX-License-Identifier: Apache-2.0
"""Weights in host memory: all that layers hold, in one copy, in flat pieces that are pinned where
that is possible."""

import logging

import torch
from torch import nn

from kandinsky_model.checkpoints.lora import Adapters
from kandinsky_model.devices import host
from kandinsky_model.devices.host import ALIGNMENT, PAGE, Store, layout, tensors_of
from kandinsky_model.devices.offload import LayerStream, Offload

from ..checkpoints.test_lora import MODULES, matrices, write
from .test_offload import CPU, LAYERS, network, out


def test_tensors_that_share_memory_share_it_in_a_piece():
    joint = torch.arange(24.0).view(6, 4)
    apart = torch.randn(3, 5)
    whole = torch.randn(1000)
    tensors = [
        joint[4:],
        apart,
        joint,
        joint[:4],
        whole[:10],
        whole[500:507],
        torch.empty(0),
        torch.randn(2, 3, 4, 5, 6).to(memory_format=torch.channels_last_3d),
        torch.randn(7).to(torch.float8_e4m3fn),
        torch.tensor(3, dtype=torch.int8),
    ]
    spots, size = layout(tensors)
    assert (
        size
        == layout(
            [
                tensor.clone(memory_format=torch.preserve_format)
                if i not in (0, 2, 3, 4, 5)
                else tensor
                for i, tensor in enumerate(tensors)
            ]
        )[1]
    ), "a question of where tensors happen to lie"
    # neither the joint twice nor all of `whole`
    assert size <= 4 * (24 + 15 + 10 + 7 + 720) + 8 + len(tensors) * ALIGNMENT
    flat = torch.empty(size, dtype=torch.uint8)
    for tensor, spot in zip(tensors, spots, strict=True):
        spot.view(flat).copy_(tensor)
    for tensor, spot in zip(tensors, spots, strict=True):
        view = spot.view(flat)
        assert torch.equal(view.float(), tensor.float())
        assert view.stride() == tensor.stride()
        assert view.dtype == tensor.dtype
    assert spots[0].start - spots[2].start == 64
    assert spots[3].start == spots[2].start
    starts = [spot.start for i, spot in enumerate(spots) if i not in (0, 6)]
    assert all(start % ALIGNMENT == 0 for start in starts)


def test_everything_a_layer_holds_is_found_once(tmp_path):
    dit = network()
    hidden = nn.Linear(2, 2)
    dit.visual_transformer_blocks[0].aside = (hidden,)  # in a tuple, where nn.Module does not look
    plain = tensors_of([dit, dit])
    Adapters(dit).load(write(tmp_path / "a.safetensors", matrices(1)))
    found = {id(tensor) for tensor in tensors_of([dit])}
    assert all(
        id(tensor) in found
        for tensor in [*dit.parameters(), *dit.buffers(), *hidden.parameters(), *plain]
    )
    assert len(found) == len(plain) + 2 * len(MODULES)
    parts = [([layer], dit.once) for layer in dit.layers] + [
        (dit.once, []),
        ([dit], [*dit.layers, *dit.once]),
    ]
    shares = [{id(tensor) for tensor in tensors_of(*part)} for part in parts]
    assert set.union(*shares) == found
    assert sum(map(len, shares)) == len(found)


def test_weights_are_in_host_memory_once_and_only_what_changed_is_packed_again(tmp_path):
    dit = network()
    state = {name: tensor.clone() for name, tensor in dit.state_dict().items()}
    hosted = Offload(dit, CPU)
    adapters = Adapters(dit)

    def pieces():
        with hosted.on_device(0):
            pass
        return [piece for store in (hosted.rest, *hosted.stores) for piece in store.pieces]

    first = pieces()
    assert len(first) == LAYERS + 1
    held = {tensor.untyped_storage().data_ptr() for tensor in tensors_of([dit], dit.once)}
    assert held == {piece.host.untyped_storage().data_ptr() for piece in first}
    assert sum(piece.host.untyped_storage().nbytes() for piece in first) <= 1.2 * sum(
        tensor.numel() * 4 for tensor in dit.parameters()
    )
    assert pieces() == first
    adapters.load(write(tmp_path / "a.safetensors", matrices(1)))
    adapted = pieces()
    assert set(first) < set(adapted)
    assert sum(piece.size for piece in adapted) < 1.5 * sum(piece.size for piece in first)
    adapters.remove()
    assert pieces() == first
    dit.layers[2].self_attention.prepare()  # a joint weight of its own
    assert len(set(first) - set(pieces())) == 1
    assert all(torch.equal(tensor, state[name]) for name, tensor in dit.state_dict().items())


# Pinned memory


class Runtime:
    def __init__(self, code):
        self.code, self.pinned, self.calls = code, {}, 0

    def cudaHostRegister(self, address, size, flags):  # noqa: N802 - CUDA's name
        self.calls += 1
        assert not any(
            address < end and start < address + size for start, end in self.pinned.items()
        ), "two pieces share a page"
        assert address % PAGE == size % PAGE == 0
        if self.code == 0:
            self.pinned[address] = address + size
        return self.code

    def cudaHostUnregister(self, address):  # noqa: N802
        del self.pinned[address]


def test_pieces_are_pinned_where_they_are_while_they_live(monkeypatch):
    runtime = Runtime(0)
    dit = network()
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    stores = [Store([layer], [], True) for layer in dit.layers]
    for store in stores:
        store.refresh()
    assert len(runtime.pinned) == LAYERS
    for store in stores:
        (piece,) = store.pieces
        end = runtime.pinned[piece.host.data_ptr()]
        # not the next power of two
        assert piece.size <= end - piece.host.data_ptr() < piece.size + PAGE
    del store, piece
    stores.clear()
    assert not runtime.pinned
    assert torch.isfinite(out(dit)).all()


def test_memory_that_cannot_be_pinned_is_one_note(monkeypatch, caplog):
    runtime = Runtime(2)
    dit = network()
    wanted = out(dit)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    stores = [Store([layer], dit.once, True) for layer in dit.layers]
    host._warn.cache_clear()
    with caplog.at_level(logging.WARNING, host.__name__), monkeypatch.context() as patch:
        patch.setattr(
            torch,
            "zeros",
            lambda *_, device: (_ for _ in ()).throw(RuntimeError("CUDA error: the one of before")),
        )
        for store in stores:
            store.refresh()
    (note,) = [record.getMessage() for record in caplog.records if record.name == host.__name__]
    assert "pinned host memory cannot be had (CUDA error 2)" in note
    assert "\n" not in note
    stream = LayerStream(dit.layers, stores, CPU)
    assert torch.equal(out(dit), wanted)
    stream.close()
