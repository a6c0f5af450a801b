# SPDX-License-Identifier: Apache-2.0
"""The example workflows for ComfyUI, made from the nodes' own definitions: `python -m
kandinsky_model.comfyui_workflows` writes them.

A workflow is the JSON that ComfyUI saves: nodes with sockets and the values of their widgets in
order, and links between sockets.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from .nodes import NODES, RELEASED

FOLDER = Path(__file__).parent / "templates"
WIDGETS = ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO")
COLUMN, ROW, LINE = 420, 60, 26  # pixels: between columns, between nodes, per socket or widget
PREFIX = "KandinskyKernels"
PROMPT = "a red fox walks through fresh snow at dawn, the camera follows it"


@dataclass(frozen=True)
class Definition:
    """A node's inputs by name, in order: (type, value of the widget or None); whether each widget
    is followed by one for its next value; and its outputs, (name, type)."""

    inputs: dict[str, tuple[str, object]]
    outputs: tuple[tuple[str, str], ...]
    controlled: tuple[str, ...] = ()

    @classmethod
    def of(cls, node) -> Definition:
        """Of one of this package's nodes."""
        kinds = {name: kind for part in node.INPUT_TYPES().values() for name, kind in part.items()}
        options = {name: kind[1] if len(kind) > 1 else {} for name, kind in kinds.items()}
        inputs = {
            name: ("COMBO" if isinstance(kind[0], list) else kind[0], options[name].get("default"))
            for name, kind in kinds.items()
        }
        return cls(
            inputs,
            tuple(zip(node.RETURN_NAMES, node.RETURN_TYPES, strict=True)),
            tuple(name for name in options if options[name].get("control_after_generate")),
        )


# What ComfyUI's own nodes look like, as far as the workflows use them.
CORE = {
    "LoadImage": Definition(
        {"image": ("COMBO", "example.png")}, (("IMAGE", "IMAGE"), ("MASK", "MASK"))
    ),
    "SaveImage": Definition(
        {"images": ("IMAGE", None), "filename_prefix": ("STRING", "kandinsky")}, ()
    ),
    "CreateVideo": Definition(
        {"images": ("IMAGE", None), "fps": ("FLOAT", 24.0)}, (("VIDEO", "VIDEO"),)
    ),
    "SaveVideo": Definition(
        {
            "video": ("VIDEO", None),
            "filename_prefix": ("STRING", "video/kandinsky"),
            "format": ("COMBO", "auto"),
            "codec": ("COMBO", "auto"),
        },
        (),
    ),
    "UNETLoader": Definition(
        {"unet_name": ("COMBO", None), "weight_dtype": ("COMBO", "default")}, (("MODEL", "MODEL"),)
    ),
    "DualCLIPLoader": Definition(
        {
            "clip_name1": ("COMBO", "qwen_2.5_vl_7b_fp8_scaled.safetensors"),
            "clip_name2": ("COMBO", "clip_l.safetensors"),
            "type": ("COMBO", "kandinsky5"),
            "device": ("COMBO", "default"),
        },
        (("CLIP", "CLIP"),),
    ),
    "VAELoader": Definition(
        {"vae_name": ("COMBO", "hunyuan_video_vae_bf16.safetensors")}, (("VAE", "VAE"),)
    ),
    "CLIPTextEncode": Definition(
        {"text": ("STRING", ""), "clip": ("CLIP", None)}, (("CONDITIONING", "CONDITIONING"),)
    ),
    "ModelSamplingSD3": Definition(
        {"model": ("MODEL", None), "shift": ("FLOAT", 3.0)}, (("MODEL", "MODEL"),)
    ),
    "Kandinsky5ImageToVideo": Definition(
        {
            "positive": ("CONDITIONING", None),
            "negative": ("CONDITIONING", None),
            "vae": ("VAE", None),
            "width": ("INT", 768),
            "height": ("INT", 512),
            "length": ("INT", 121),
            "batch_size": ("INT", 1),
        },
        (
            ("positive", "CONDITIONING"),
            ("negative", "CONDITIONING"),
            ("latent", "LATENT"),
            ("cond_latent", "LATENT"),
        ),
    ),
    "KSampler": Definition(
        {
            "model": ("MODEL", None),
            "seed": ("INT", 0),
            "steps": ("INT", 20),
            "cfg": ("FLOAT", 8.0),
            "sampler_name": ("COMBO", "euler"),
            "scheduler": ("COMBO", "simple"),
            "positive": ("CONDITIONING", None),
            "negative": ("CONDITIONING", None),
            "latent_image": ("LATENT", None),
            "denoise": ("FLOAT", 1.0),
        },
        (("LATENT", "LATENT"),),
        ("seed",),
    ),
    "VAEDecode": Definition(
        {"samples": ("LATENT", None), "vae": ("VAE", None)}, (("IMAGE", "IMAGE"),)
    ),
}


def definitions() -> dict[str, Definition]:
    """Of every node that a workflow may use, by its type."""
    return CORE | {name: Definition.of(node) for name, node in NODES.items()}


@dataclass(frozen=True)
class Output:
    """One output of a node that was added."""

    node: int
    slot: int
    kind: str


class Graph:
    """A workflow that grows node by node, each after those it reads from."""

    def __init__(self):
        self.known, self.nodes, self.links, self._columns = definitions(), [], [], []

    def add(self, kind: str, **inputs) -> dict[str, Output]:
        """Add a node: an input is an `Output` to read from or what its widget says. Its outputs by
        name. ValueError for what it lacks."""
        kind = kind if kind in self.known else PREFIX + kind
        definition, number = self.known[kind], len(self.nodes) + 1
        sockets = [
            self._socket(number, name, definition, inputs)
            for name in definition.inputs
            if definition.inputs[name][0] not in WIDGETS or isinstance(inputs.get(name), Output)
        ]
        for slot, socket in enumerate(sockets):
            if socket["link"]:
                self.links[socket["link"] - 1][4] = slot
        if set(inputs) - set(definition.inputs):
            raise ValueError(
                f"{kind} has the inputs {', '.join(definition.inputs)}, got "
                f"{sorted(set(inputs) - set(definition.inputs))}"
            )
        outputs = [
            {"name": name, "type": one, "links": [], "slot_index": i}
            for i, (name, one) in enumerate(definition.outputs)
        ]
        column = 1 + max(
            (self._columns[one.node - 1] for one in inputs.values() if isinstance(one, Output)),
            default=-1,
        )
        values = list(_widgets(definition, inputs))
        height = ROW + LINE * (
            max(len(sockets), len(outputs))
            + len(values)
            + 3 * ("text" in inputs or "prompt" in inputs)
        )
        above = sum(
            node["size"][1] + ROW
            for node, other in zip(self.nodes, self._columns, strict=True)
            if other == column
        )
        self.nodes.append(
            {
                "id": number,
                "type": kind,
                "pos": [column * COLUMN, above],
                "size": [COLUMN - ROW, height],
                "flags": {},
                "order": number - 1,
                "mode": 0,
                "inputs": sockets,
                "outputs": outputs,
                "properties": {"Node name for S&R": kind},
                "widgets_values": values,
            }
        )
        self._columns.append(column)
        return {
            name: Output(number, slot, one) for slot, (name, one) in enumerate(definition.outputs)
        }

    def _socket(self, number: int, name: str, definition: Definition, inputs: dict) -> dict:
        source, (kind, default) = inputs.get(name), definition.inputs[name]
        socket = {"name": name, "type": kind, "link": None}
        if default is not None:
            socket["widget"] = {"name": name}
        if isinstance(source, Output):
            if source.kind != kind:
                raise ValueError(f"{name} reads {kind}, got {source.kind}")
            socket["link"] = len(self.links) + 1
            self.links.append([socket["link"], source.node, source.slot, number, 0, kind])
            self.nodes[source.node - 1]["outputs"][source.slot]["links"].append(socket["link"])
        return socket

    def json(self) -> str:
        """As a file that ComfyUI opens."""
        return (
            json.dumps(
                {
                    "last_node_id": len(self.nodes),
                    "last_link_id": len(self.links),
                    "nodes": self.nodes,
                    "links": self.links,
                    "groups": [],
                    "config": {},
                    "extra": {},
                    "version": 0.4,
                },
                indent=1,
            )
            + "\n"
        )


def _widgets(definition: Definition, inputs: dict) -> Iterator[object]:
    """Their values in order; one that counts up by itself is followed by how."""
    for name, (kind, default) in definition.inputs.items():
        if kind in WIDGETS:
            given = inputs.get(name)
            yield default if given is None or isinstance(given, Output) else given
        if name in definition.controlled:
            yield "randomize"


def _ours(preset: str, prompt: str, takes_image: bool, video: bool, **settings) -> Graph:
    """Load, encode, sample, decode and save, with this package's nodes."""
    graph = Graph()
    model, given = graph.add("LoadModel", model=preset)["model"], {}
    if takes_image:
        given = graph.add("EncodeImage", model=model, image=graph.add("LoadImage")["IMAGE"])
    seen = {"image": given["image"]} if takes_image and not video else {}
    text = graph.add("EncodeText", model=model, prompt=prompt, **seen)["text"]
    first = {"image_latent": given["latent"]} if takes_image else {}
    latent = graph.add("Sample", model=model, text=text, **first, **settings)["latent"]
    images = graph.add("Decode", model=model, latent=latent)["images"]
    if video:
        graph.add("SaveVideo", video=graph.add("CreateVideo", images=images)["VIDEO"])
    else:
        graph.add("SaveImage", images=images)
    return graph


def _accelerated() -> Graph:
    """ComfyUI's own nodes for the 10 s model, accelerated."""
    graph = Graph()
    model = graph.add("UNETLoader", unet_name="kandinsky5lite_t2v_sft_10s.safetensors")["MODEL"]
    model = graph.add(
        "ModelSamplingSD3", model=graph.add("Accelerate", model=model)["model"], shift=10.0
    )["MODEL"]
    clip, vae = graph.add("DualCLIPLoader")["CLIP"], graph.add("VAELoader")["VAE"]
    positive, negative = (
        graph.add("CLIPTextEncode", clip=clip, text=text)["CONDITIONING"]
        for text in (PROMPT, "static, blurred")
    )
    begun = graph.add(
        "Kandinsky5ImageToVideo", positive=positive, negative=negative, vae=vae, length=241
    )
    latent = graph.add(
        "KSampler",
        model=model,
        positive=begun["positive"],
        negative=begun["negative"],
        latent_image=begun["latent"],
        steps=50,
        cfg=5.0,
    )["LATENT"]
    images = graph.add("VAEDecode", samples=latent, vae=vae)["IMAGE"]
    graph.add("SaveVideo", video=graph.add("CreateVideo", images=images)["VIDEO"])
    return graph


def workflows() -> dict[str, str]:
    """Name of the file -> its text."""
    made = {
        "text_to_video": _ours("t2v-lite-sft-5s", PROMPT, False, True, attention=RELEASED),
        "image_to_video": _ours("i2v-lite-5s", "the bear waves", True, True),
        "text_to_image": _ours("t2i-lite-sft", PROMPT, False, False),
        "image_editing": _ours("i2i-lite-sft", "make it night", True, False),
        "accelerated_native": _accelerated(),
    }
    return {f"kandinsky5_{name}.json": graph.json() for name, graph in made.items()}


def write(folder: Path = FOLDER) -> list[Path]:
    """Write all of them into `folder`, and return their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in workflows().items():
        (folder / name).write_text(text, encoding="utf-8")
    return [folder / name for name in workflows()]


if __name__ == "__main__":
    write()
