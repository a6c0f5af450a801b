# SPDX-License-Identifier: Apache-2.0
"""What the tests of the nodes share: calls as ComfyUI makes them, models with random weights, and
a stand-in for the modules of ComfyUI that nodes import."""

import sys
from dataclasses import replace
from types import ModuleType, SimpleNamespace

import pytest
import torch

from ..support import tiny_models
from ..support.node_calls import call


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_models.tiny_folder(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def model(folder):
    return call("LoadModel", path=str(folder))


@pytest.fixture(scope="module")
def from_image(folder):
    """The same as an image-to-video checkpoint."""
    model = call("LoadModel", path=str(folder))
    model.model.preset = replace(model.model.preset, name="tiny-i2v", task="i2v", sizes=((64, 64),))
    return model


@pytest.fixture
def comfy(monkeypatch):
    """A stand-in of those of ComfyUI's modules that nodes ask; what the tests look at and set is in
    the result."""

    class Stopped(Exception):
        pass

    state = SimpleNamespace(
        bars=[],
        asked=0,
        stop_when=lambda: False,
        Stopped=Stopped,
        device="cpu",
        freed=[],
        previews=False,
        formats=[],
    )

    class ProgressBar:
        def __init__(self, total):
            self.total = total
            self.seen = []
            self.previews = []
            state.bars.append(self)

        def update_absolute(self, value, total=None, preview=None):
            self.seen.append((value, total))
            self.previews.append(preview)

    def interrupted():
        state.asked += 1
        if state.stop_when():
            raise Stopped("stopped")

    class Previewer:
        def decode_latent_to_preview_image(self, preview_format, x0):
            return (preview_format, x0.clone(), 512)

    def get_previewer(device, latent_format):
        state.formats.append(type(latent_format).__name__)
        return Previewer() if state.previews else None

    names = (
        "comfy",
        "comfy.utils",
        "comfy.model_management",
        "comfy.latent_formats",
        "comfy.sd1_clip",
        "latent_preview",
        "folder_paths",
    )
    modules = {name: ModuleType(name) for name in names}
    modules["latent_preview"].get_previewer = get_previewer
    modules["latent_preview"].MAX_PREVIEW_RESOLUTION = 512
    for name in ("Flux", "HunyuanVideo"):
        setattr(modules["comfy.latent_formats"], name, type(name, (), {}))
    modules["comfy.utils"].ProgressBar = ProgressBar
    modules["comfy.model_management"].throw_exception_if_processing_interrupted = interrupted
    management = modules["comfy.model_management"]
    management.get_torch_device = lambda: torch.device(state.device)
    management.unload_all_models = lambda: state.freed.append("models")
    management.soft_empty_cache = lambda: state.freed.append("cache")
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    state.folders = modules["folder_paths"]
    state.sd1_clip = modules["comfy.sd1_clip"]
    return state
