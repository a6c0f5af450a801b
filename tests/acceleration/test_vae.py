# SPDX-License-Identifier: Apache-2.0
"""`accelerate` on diffusers' video VAE: the same videos and latents without masks and enlarged
copies, however its weights are kept."""

import copy

import pytest
import torch

from kandinsky_model import accelerate
from kandinsky_model.vae import winograd

from ..support import tiny_models
from ..support.accelerated import ROUNDING, off, told

CPU = torch.device("cpu")


def stock():
    pytest.importorskip("diffusers")
    return tiny_models.diffusers_video_vae(tiny_models.random_vae())


def latents(frames=3, height=5, width=6, batch=1):
    return torch.randn(batch, 16, frames, height, width)


def video(frames=9, height=24, width=32):
    return torch.rand(1, 3, frames, height, width) * 2 - 1


@torch.no_grad()
def both(vae, z, x):
    return vae.decode(z).sample, vae.encode(x).latent_dist.parameters


@pytest.mark.parametrize("in_pairs", [False, True])
@pytest.mark.parametrize("frames", [1, 2, 4])
def test_equals_stock(frames, in_pairs, monkeypatch):
    """As exact as diffusers against fp64, for one frame, two and more, with convolutions frame by
    frame and in pairs of frames."""
    monkeypatch.setattr(winograd, "LEAST_FLOPS", 0 if in_pairs else 2**60)
    vae = stock()
    z = latents(frames, batch=2)
    x = video(4 * frames - 3)
    peers = both(vae, z, x)
    truths = both(copy.deepcopy(vae).double(), z.double(), x.double())
    accelerate(vae)
    for ours, truth, peer in zip(both(vae, z, x), truths, peers, strict=True):
        assert ours.dtype == peer.dtype
        assert ours.is_contiguous() == peer.is_contiguous()
        # at these sizes luck decides about a factor of two
        assert off(ours, truth) <= min(5e-6, 4 * off(peer, truth))


def test_tiles_stay_those_of_diffusers():
    """In time as by default and in space; blended by diffusers' own code."""
    vae = stock()
    vae.use_framewise_decoding = vae.use_framewise_encoding = True
    vae.enable_tiling(
        tile_sample_min_height=32,
        tile_sample_min_width=32,
        tile_sample_stride_height=24,
        tile_sample_stride_width=24,
    )
    z = latents(7, 6, 6)
    x = video(21, 48, 48)
    wanted = both(vae, z, x)
    accelerate(vae)
    assert all(
        off(ours, one) <= 3 * ROUNDING for ours, one in zip(both(vae, z, x), wanted, strict=True)
    )


def test_builds_neither_masks_nor_enlarged_copies(monkeypatch):
    vae = stock()
    accelerate(vae)
    module = pytest.importorskip("diffusers.models.autoencoders.autoencoder_kl_hunyuan_video")
    monkeypatch.delattr(module, "prepare_causal_attention_mask")
    monkeypatch.delattr(torch.nn.functional, "interpolate")
    monkeypatch.delattr(torch.nn.functional, "pad")
    monkeypatch.delattr(torch.nn.functional, "group_norm")
    both(vae, latents(), video())


def test_undo_restores_every_bit():
    vae = stock()
    z = latents()
    x = video()
    wanted = both(vae, z, x)
    classes = [type(m) for m in vae.modules()]
    state = vae.state_dict(keep_vars=True)
    with accelerate(vae) as handle:
        assert handle.replaced["HunyuanVideoResnetBlockCausal3D"] == 16
        assert not handle.kept
        assert [type(m).__name__ for m in vae.modules()] == [c.__name__ for c in classes]
        now = vae.state_dict(keep_vars=True)
        assert list(now) == list(state)
        assert all(now[name] is state[name] for name in state)
        assert not torch.equal(both(vae, z, x)[0], wanted[0])
    assert [type(m) for m in vae.modules()] == classes
    assert all(torch.equal(a, b) for a, b in zip(both(vae, z, x), wanted, strict=True))


@pytest.mark.parametrize("reason", ["gradients are recorded", "activations are torch.float64"])
def test_falls_back_to_stock_and_says_so_once(reason, caplog):
    vae = stock()
    z = latents()
    x = video()
    ours = copy.deepcopy(vae)
    handle = accelerate(ours)
    if "float64" in reason:
        vae = vae.double()
        ours = ours.double()
        z = z.double()
        x = x.double()
    elif "gradients" in reason:
        z.requires_grad_(), x.requires_grad_()
    with told(caplog) as messages:
        results = [
            one
            for vae in (ours, vae)
            for one in (vae.decode(z).sample, vae.encode(x).latent_dist.parameters)
        ]
    assert all(torch.equal(a, b) for a, b in zip(results[:2], results[2:], strict=True))
    assert {message.partition(": ")[2].partition(";")[0] for message in messages} == {reason}
    assert len(messages) == len(set(messages)) == len(handle.reports)
    if z.requires_grad:
        first, second = (torch.autograd.grad(video.square().mean(), z)[0] for video in results[::2])
        assert torch.equal(first, second)


def leaf_offload(vae, folder):
    from diffusers.hooks import apply_group_offloading

    with pytest.MonkeyPatch.context() as patch:
        # diffusers up to 0.40 insists on one
        patch.setattr(torch.accelerator, "current_accelerator", lambda *_: CPU)
        apply_group_offloading(
            vae, CPU, CPU, offload_type="leaf_level", offload_to_disk_path=str(folder)
        )


def block_offload(vae, folder):
    from diffusers.hooks import apply_group_offloading

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.accelerator, "current_accelerator", lambda *_: CPU)
        apply_group_offloading(vae, CPU, CPU, offload_type="block_level", num_blocks_per_group=1)


def weights_on_meta(vae, folder):
    pytest.importorskip("accelerate").cpu_offload(vae, execution_device=CPU)


@pytest.mark.parametrize("change", [leaf_offload, block_offload, weights_on_meta])
@pytest.mark.parametrize("order", ["before", "after"])
def test_weights_may_come_and_go(order, change, tmp_path):
    vae = stock()
    z = latents()
    x = video()
    wanted = both(vae, z, x)
    if order == "before":
        change(vae, tmp_path)
    handle = accelerate(vae)
    if order == "after":
        change(vae, tmp_path)
    assert all(
        off(ours, one) <= 3 * ROUNDING for ours, one in zip(both(vae, z, x), wanted, strict=True)
    )
    handle.undo()
    assert all(
        off(theirs, one) <= ROUNDING for theirs, one in zip(both(vae, z, x), wanted, strict=True)
    )


def test_the_decoder_is_one_graph():
    torch._dynamo.reset()
    vae = stock()
    z = latents()
    accelerate(vae)
    compiled = torch.compile(vae.decoder, fullgraph=True, backend="eager")
    with torch.no_grad():
        assert off(compiled(z), vae.decoder(z)) <= 2 * ROUNDING
    torch._dynamo.reset()


def test_saves_copies_and_leaves_the_unlike_alone(tmp_path):
    vae = stock()
    z = latents()
    x = video()
    accelerate(vae)
    wanted = both(vae, z, x)
    vae.save_pretrained(tmp_path)
    stock_class = type(stock())
    loaded = stock_class.from_pretrained(tmp_path)
    loaded.use_framewise_encoding = loaded.use_framewise_decoding = False
    accelerate(loaded)
    for other in (loaded, copy.deepcopy(vae)):
        assert all(torch.equal(a, b) for a, b in zip(both(other, z, x), wanted, strict=True))


def test_a_replaced_convolution_runs_as_diffusers_wrote_it(caplog):
    vae = stock()
    z = latents()
    x = video()
    wanted = both(vae, z, x)
    vae.decoder.conv_in.conv = torch.nn.Sequential(vae.decoder.conv_in.conv)
    handle = accelerate(vae)
    with told(caplog) as messages:
        made = both(vae, z, x)
    assert all(off(ours, one) <= 3 * ROUNDING for ours, one in zip(made, wanted, strict=True))
    assert len(messages) == 1
    assert "a Sequential stands in place of" in messages[0]
    assert messages[0].partition(" ")[2] in str(handle)
