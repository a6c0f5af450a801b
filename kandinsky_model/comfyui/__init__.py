# SPDX-License-Identifier: Apache-2.0
"""Nodes for ComfyUI, in both of its conventions.

`kandinsky comfyui PATH` writes a folder under `custom_nodes` that imports the names below. ComfyUI
reads `NODE_CLASS_MAPPINGS` where there is one and calls `comfy_entrypoint` otherwise, so a version
that knows only one of the two finds it. Importing this imports neither torch nor ComfyUI.
"""

from __future__ import annotations

from typing import Any

from .nodes import NODES, Node

NODE_CLASS_MAPPINGS: dict[str, type[Node]] = dict(NODES)
NODE_DISPLAY_NAME_MAPPINGS: dict[str, str] = {name: node.TITLE for name, node in NODES.items()}

_KINDS = {
    "INT": "Int",
    "FLOAT": "Float",
    "STRING": "String",
    "BOOLEAN": "Boolean",
    "IMAGE": "Image",
    "LATENT": "Latent",
    "MODEL": "Model",
}


async def comfy_entrypoint():
    """The nodes as an extension of ComfyUI's current convention."""
    from comfy_api.latest import ComfyExtension, io

    nodes = [_current(name, node, io) for name, node in NODES.items()]

    class Kandinsky(ComfyExtension):
        async def get_node_list(self):
            return nodes

    return Kandinsky()


def _current(name: str, node: type[Node], io: Any) -> type:
    """A node class of the current convention that runs `node`. io: `comfy_api.latest.io`."""

    def define_schema(cls):
        inputs = [
            _input(io, key, kind, key in node.OPTIONAL)
            for part in node.INPUT_TYPES().values()
            for key, kind in part.items()
        ]
        described = zip(node.RETURN_TYPES, node.RETURN_NAMES, node.OUTPUT_TOOLTIPS, strict=True)
        outputs = [
            # ComfyUI refuses an output with the id of an input
            _kind(io, kind).Output(f"out_{label}", display_name=label, tooltip=tooltip)
            for kind, label, tooltip in described
        ]
        return io.Schema(
            node_id=name,
            display_name=node.TITLE,
            category=node.CATEGORY,
            description=node.__doc__,
            inputs=inputs,
            outputs=outputs,
        )

    def execute(cls, **inputs):
        return io.NodeOutput(*node().run(**inputs))

    members = {"define_schema": classmethod(define_schema), "execute": classmethod(execute)}
    return type(name, (io.ComfyNode,), members)


def _input(
    io: Any,
    key: str,
    kind: tuple,
    optional: bool,
):
    options = {"optional": optional, **kind[1]}
    if isinstance(kind[0], list):
        return io.Combo.Input(key, options=kind[0], **options)
    return _kind(io, kind[0]).Input(key, **options)


def _kind(io: Any, kind: str):
    return getattr(io, _KINDS[kind]) if kind in _KINDS else io.Custom(kind)
