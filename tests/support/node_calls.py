# SPDX-License-Identifier: Apache-2.0
"""Calls of the nodes for ComfyUI, as ComfyUI makes them."""

import torch

from kandinsky_model import comfyui

PROMPT = "a red circle moving right"
SMALL = dict(width=64, height=48, num_frames=5, num_inference_steps=2)
SIZE = dict(width=64, height=48, frames=5, steps=2)  # the same in the words of the node


def call(name, **inputs):
    """Run one node in inference mode, as ComfyUI does, and return its output, or all of several.

    Widgets that are left out have their defaults.
    """
    node = comfyui.NODE_CLASS_MAPPINGS[f"KandinskyKernels{name}"]
    widgets = {
        key: kind[1]["default"]
        for part in node.INPUT_TYPES().values()
        for key, kind in part.items()
        if len(kind) > 1 and "default" in kind[1]
    }
    with torch.inference_mode():
        outputs = getattr(node(), node.FUNCTION)(**widgets | inputs)
    assert len(outputs) == len(node.RETURN_TYPES) == len(node.RETURN_NAMES)
    return outputs[0] if len(outputs) == 1 else outputs


def image(height=60, width=100, seed=0, channels=3):
    """A random IMAGE [1, H, W, channels]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(1, height, width, channels, generator=generator)
