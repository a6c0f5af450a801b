# SPDX-License-Identifier: Apache-2.0
"""Real videos and pictures through the VAE: ours against diffusers' on what such frames hold, not
on noise."""

import itertools

import pytest
import torch

from kandinsky_model.checkpoints.load import load_vae
from kandinsky_model.checkpoints.locate import TINY
from kandinsky_model.config import HUNYUAN_VAE
from kandinsky_model.media.picture import read_image, resize
from kandinsky_model.sampling.given import latent_of
from kandinsky_model.vae.hunyuan import HunyuanVideoVAE

from ..conftest import shared_data
from ..support.tiny_models import diffusers_video_vae


def clip(name, frames, height, width):
    """The middle of a shared video: [1, 3, F, H, W] in -1..1."""
    av = pytest.importorskip("av")
    with av.open(str(shared_data() / "clips" / name)) as container:
        pictures = [
            torch.from_numpy(frame.to_ndarray(format="rgb24"))
            for frame in itertools.islice(container.decode(video=0), frames)
        ]
    top = (pictures[0].shape[0] - height) // 2
    left = (pictures[0].shape[1] - width) // 2
    video = torch.stack(pictures)[:, top : top + height, left : left + width].permute(3, 0, 1, 2)[
        None
    ]
    return video.float() / 127.5 - 1


def rel_l2(actual, exact):
    return ((actual - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize("name", ["kandinsky_a.mp4", "kandinsky_b.mp4"])
def test_tiny_vae_on_real_clips(name):
    pytest.importorskip("diffusers")
    vae = load_vae(TINY / "vae", dtype=torch.float32)
    video = clip(name, 9, 128, 160)
    peer = diffusers_video_vae(vae)
    with torch.no_grad():
        mean, logvar = vae.encode(video)
        posterior = peer.encode(video).latent_dist
        decoded = vae.decode(mean)
        theirs = peer.decode(mean).sample
    assert decoded.shape == video.shape
    for name, ours, other in (
        ("mean", mean, posterior.mean),
        ("logvar", logvar, posterior.logvar),
        ("decoded", decoded, theirs),
    ):
        print(f"{name}: rel_l2 {rel_l2(ours, other):.2g}")
        assert rel_l2(ours, other) <= 1e-5
    # learned on flat shapes, but it is a picture
    assert torch.corrcoef(torch.stack([decoded.flatten(), video.flatten()]))[0, 1] > 0.7


def in_double(model):
    """The model, each of whose layers has fp64 weights while it runs: two gigabytes less at once
    than all of them have."""

    def widen(module, _):
        module.narrow = {name: parameter.data for name, parameter in module.named_parameters()}
        module.double()

    def restore(module, *_):
        for name, parameter in module.named_parameters():
            parameter.data = module.narrow.pop(name)

    for module in model.modules():
        if not list(module.children()):
            module.register_forward_pre_hook(widen)
            module.register_forward_hook(restore)
    return model


def test_released_sizes_on_a_real_clip():
    """In fp32 oneDNN adds up the 13,824 products of a convolution in another order in each layout
    and for each kind of CPU: the peer is diffusers in the layout that comes out worse. ``pytest
    -s`` prints all of them."""
    pytest.importorskip("diffusers")
    torch.manual_seed(0)
    vae = HunyuanVideoVAE(HUNYUAN_VAE).eval().requires_grad_(False)
    video = clip("kandinsky_a.mp4", 5, 32, 32)

    def run(peer, video, latents, layout=torch.contiguous_format):
        peer = peer.to(memory_format=layout)
        moments = peer.encode(video.contiguous(memory_format=layout)).latent_dist.parameters
        return moments, peer.decode(latents.contiguous(memory_format=layout)).sample

    with torch.no_grad():
        latents = vae.encode(video)[0]
        ours = torch.cat(vae.encode(video), 1), vae.decode(latents)
        for parameter in vae.parameters():  # one at a time, so that no second gigabyte is needed
            parameter.data = parameter.data.contiguous()
        peer = diffusers_video_vae(vae)  # of the same tensors
        del vae
        peers = [
            run(peer, video, latents, layout)
            for layout in (torch.contiguous_format, torch.channels_last_3d)
        ]
        exact = run(in_double(peer), video.double(), latents.double())
    for name, wanted, actual, *others in zip(
        ("moments", "decoded"), exact, ours, *peers, strict=True
    ):
        error, *theirs = ((x - wanted).abs().max().item() for x in (actual, *others))
        print(
            f"{name}: off by {error:.2g}, diffusers by {theirs[0]:.2g}, channels-last by "
            f"{theirs[1]:.2g}"
        )
        assert actual.shape == wanted.shape
        assert error <= 2 * max(theirs)


@pytest.mark.parametrize("name", ["bear.jpg", "cat_in_hat.png"])
def test_pictures_become_first_frames(name):
    vae = load_vae(TINY / "vae", dtype=torch.float32)
    image = read_image(shared_data() / "clips" / name)
    with torch.no_grad():
        latent = latent_of(resize(image, 128, 160), vae, seed=0)
    assert latent.shape == (1, 1, 16, 20, 16)
    assert latent.isfinite().all()
    assert latent.std() > 0.1
