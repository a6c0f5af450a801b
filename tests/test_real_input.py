# SPDX-License-Identifier: Apache-2.0
"""Real videos and pictures through the VAE: ours against diffusers' on what such frames hold, not on noise."""
import itertools

import pytest
import torch

from kandinsky_model.config import HUNYUAN_VAE
from kandinsky_model.image import first_frame, read_image
from kandinsky_model.locate import TINY
from kandinsky_model.vae import HunyuanVideoVAE
from kandinsky_model.weights import load_vae

from .conftest import shared_data


def clip(name, frames, height, width):
    """The middle of a shared video: [1, 3, F, H, W] in -1..1."""
    av = pytest.importorskip("av")
    with av.open(str(shared_data() / "clips" / name)) as container:
        pictures = [torch.from_numpy(frame.to_ndarray(format="rgb24")) for frame in itertools.islice(container.decode(video=0), frames)]
    top, left = (pictures[0].shape[0] - height) // 2, (pictures[0].shape[1] - width) // 2
    video = torch.stack(pictures)[:, top : top + height, left : left + width].permute(3, 0, 1, 2)[None]
    return video.float() / 127.5 - 1


def rel_l2(actual, exact):
    return ((actual - exact).norm() / exact.norm()).item()


def compare_with_diffusers(vae, video, limit=1e-5):
    kind = pytest.importorskip("diffusers").AutoencoderKLHunyuanVideo
    config = vae.config
    peer = kind(latent_channels=config.latent_channels, block_out_channels=config.block_out_channels,
                layers_per_block=config.layers_per_block, norm_num_groups=config.norm_num_groups).eval().requires_grad_(False)
    peer.use_framewise_encoding = peer.use_framewise_decoding = False
    peer.load_state_dict(vae.state_dict())
    with torch.no_grad():
        mean, logvar = vae.encode(video)
        posterior = peer.encode(video).latent_dist
        assert rel_l2(mean, posterior.mean) <= 1e-5 and rel_l2(logvar, posterior.logvar) <= 1e-5
        ours, theirs = vae.decode(mean), peer.decode(mean).sample
    print(f"decoded {list(video.shape)}: rel_l2 {rel_l2(ours, theirs):.2g}")
    assert ours.shape == video.shape and rel_l2(ours, theirs) <= limit
    return ours


@pytest.mark.parametrize("name", ["kandinsky_a.mp4", "kandinsky_b.mp4"])
def test_tiny_vae_on_real_clips(name):
    vae, video = load_vae(TINY / "vae", dtype=torch.float32), clip(name, 9, 128, 160)
    decoded = compare_with_diffusers(vae, video)
    assert torch.corrcoef(torch.stack([decoded.flatten(), video.flatten()]))[0, 1] > 0.7  # learned on flat shapes, but it is a picture


def test_released_sizes_on_a_real_clip():
    """Both are fp32: oneDNN adds up the 13,824 products of a channels-last convolution in longer chains than the loops that diffusers'
    layout meets. ``pytest -s`` prints how far apart that brings them."""
    torch.manual_seed(0)
    compare_with_diffusers(HunyuanVideoVAE(HUNYUAN_VAE).eval().requires_grad_(False), clip("kandinsky_a.mp4", 5, 32, 48), limit=3e-5)


@pytest.mark.parametrize("name", ["bear.jpg", "cat_in_hat.png"])
def test_pictures_become_first_frames(name):
    vae, image = load_vae(TINY / "vae", dtype=torch.float32), read_image(shared_data() / "clips" / name)
    with torch.no_grad():
        latent = first_frame(image, vae, 128, 160, seed=0)
    assert latent.shape == (1, 1, 16, 20, 16) and latent.isfinite().all() and latent.std() > 0.1
