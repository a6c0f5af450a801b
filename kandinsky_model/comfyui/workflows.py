# SPDX-License-Identifier: Apache-2.0
"""The example workflows for ComfyUI, made from the nodes' own definitions:

    python -m kandinsky_model.comfyui.workflows

writes them into `templates/`. A workflow is the JSON that ComfyUI saves: nodes, each with its
sockets and the values of its widgets in order, and links between sockets. ComfyUI shows the name of
the file as the title.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..config import PRESETS
from .nodes import NODES, RELEASED, Node

FOLDER = Path(__file__).parent / "templates"
WIDGETS = ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO")
COLUMN, ROW, LINE = 420, 60, 26  # pixels: between columns, between nodes, per socket or widget
TEXT_LINES = 3  # more for a prompt
TRY = "try it without a download"
PREFIX = "KandinskyKernels"
PROMPT = "a red fox walks through fresh snow at dawn, the camera follows it"


@dataclass(frozen=True)
class Definition:
    """How a node looks, as far as a workflow needs it.

    inputs: name -> (type, value of its widget, or None where it has none), in order. outputs:
    (name, type). controlled: names of the widgets that another one follows, which says how the
    value changes after each run.
    """

    inputs: dict[str, tuple[str, object]]
    outputs: tuple[tuple[str, str], ...]
    controlled: tuple[str, ...] = ()

    @classmethod
    def of(cls, node: type[Node]) -> Definition:
        """Of one of this package's nodes."""
        inputs: dict[str, tuple[str, object]] = {}
        controlled = []
        for part in node.INPUT_TYPES().values():
            for name, (kind, options) in part.items():
                is_choice = isinstance(kind, list)
                inputs[name] = ("COMBO" if is_choice else kind, options.get("default"))
                if options.get("control_after_generate"):
                    controlled.append(name)
        outputs = tuple(zip(node.RETURN_NAMES, node.RETURN_TYPES, strict=True))
        return cls(inputs, outputs, tuple(controlled))


@dataclass(frozen=True)
class ModelFile:
    """A file that one of ComfyUI's own nodes loads, with where it comes from and belongs to.
    ComfyUI offers to fetch it where it is missing."""

    name: str
    url: str
    directory: str

    @classmethod
    def on_the_hub(
        cls,
        repository: str,
        path: str,
        directory: str,
    ) -> ModelFile:
        url = f"https://huggingface.co/{repository}/resolve/main/{path}"
        return cls(path.rpartition("/")[2], url, directory)


LITE_10S = PRESETS["t2v-lite-sft-10s"]
TRANSFORMER = ModelFile.on_the_hub(LITE_10S.repo, f"model/{LITE_10S.filename}", "diffusion_models")
QWEN = ModelFile.on_the_hub(
    "Comfy-Org/HunyuanVideo_1.5_repackaged",
    "split_files/text_encoders/qwen_2.5_vl_7b_fp8_scaled.safetensors",
    "text_encoders",
)
CLIP = ModelFile.on_the_hub(
    "comfyanonymous/flux_text_encoders", "clip_l.safetensors", "text_encoders"
)
VAE = ModelFile.on_the_hub(
    "Comfy-Org/HunyuanVideo_repackaged",
    "split_files/vae/hunyuan_video_vae_bf16.safetensors",
    "vae",
)

# ComfyUI's own nodes, as far as the workflows use them.
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
            "clip_name1": ("COMBO", QWEN.name),
            "clip_name2": ("COMBO", CLIP.name),
            "type": ("COMBO", "kandinsky5"),
            "device": ("COMBO", "default"),
        },
        (("CLIP", "CLIP"),),
    ),
    "VAELoader": Definition({"vae_name": ("COMBO", VAE.name)}, (("VAE", "VAE"),)),
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

    def __init__(self) -> None:
        self.known = definitions()
        self.nodes: list[dict] = []
        self.links: list[list] = []
        self._columns: list[int] = []  # of each node, from the left

    def add(
        self,
        kind: str,
        models: tuple[ModelFile, ...] = (),
        **inputs: object,
    ) -> dict[str, Output]:
        """Add a node and return its outputs by name.

        inputs: each an `Output` to read from, or what the widget says. models: the files that the
        node loads. Raises ValueError for an input that the node lacks, or of another type.
        """
        kind = kind if kind in self.known else PREFIX + kind
        definition = self.known[kind]
        unknown = sorted(set(inputs) - set(definition.inputs))
        if unknown:
            raise ValueError(
                f"{kind} has the inputs {', '.join(definition.inputs)}, got {unknown}; "
                "leave these out"
            )
        number = len(self.nodes) + 1
        sockets = self._sockets(number, definition, inputs)
        outputs = [
            {"name": name, "type": one, "links": [], "slot_index": i}
            for i, (name, one) in enumerate(definition.outputs)
        ]
        values = list(_widgets(definition, inputs))
        has_text = any(isinstance(inputs.get(name), str) for name in ("text", "prompt"))
        text_lines = TEXT_LINES * has_text
        height = ROW + LINE * (max(len(sockets), len(outputs)) + len(values) + text_lines)
        properties: dict[str, object] = {"Node name for S&R": kind}
        if models:
            properties["models"] = [asdict(model) for model in models]
        self.nodes.append(
            {
                "id": number,
                "type": kind,
                "pos": self._place(inputs),
                "size": [COLUMN - ROW, height],
                "flags": {},
                "order": number - 1,
                "mode": 0,
                "inputs": sockets,
                "outputs": outputs,
                "properties": properties,
                "widgets_values": values,
            }
        )
        return {
            name: Output(number, slot, one) for slot, (name, one) in enumerate(definition.outputs)
        }

    def _place(self, inputs: dict[str, object]) -> list[int]:
        """[x, y] of the next node: one column to the right of all that it reads from, below what
        stands there."""
        sources = [one for one in inputs.values() if isinstance(one, Output)]
        column = 1 + max((self._columns[source.node - 1] for source in sources), default=-1)
        above = sum(
            node["size"][1] + ROW
            for node, other in zip(self.nodes, self._columns, strict=True)
            if other == column
        )
        self._columns.append(column)
        return [column * COLUMN, above]

    def _sockets(
        self,
        number: int,
        definition: Definition,
        inputs: dict[str, object],
    ) -> list[dict]:
        """The inputs that are sockets: those without a widget, and those that are linked."""
        sockets: list[dict] = []
        for name, (kind, default) in definition.inputs.items():
            source = inputs.get(name)
            if kind in WIDGETS and not isinstance(source, Output):
                continue
            socket: dict = {"name": name, "type": kind, "link": None}
            if default is not None:
                socket["widget"] = {"name": name}
            if isinstance(source, Output):
                if source.kind != kind:
                    raise ValueError(
                        f"{name} reads {kind}, got {source.kind}; link an output of that type"
                    )
                link = len(self.links) + 1
                socket["link"] = link
                self.links.append([link, source.node, source.slot, number, len(sockets), kind])
                self.nodes[source.node - 1]["outputs"][source.slot]["links"].append(link)
            sockets.append(socket)
        return sockets

    def json(self) -> str:
        """As a file that ComfyUI opens."""
        workflow = {
            "last_node_id": len(self.nodes),
            "last_link_id": len(self.links),
            "nodes": self.nodes,
            "links": self.links,
            "groups": [],
            "config": {},
            "extra": {},
            "version": 0.4,
        }
        return json.dumps(workflow, indent=1) + "\n"


def _widgets(definition: Definition, inputs: dict) -> Iterator[object]:
    """The values of a node's widgets in order; one that changes after each run is followed by
    how."""
    for name, (kind, default) in definition.inputs.items():
        if kind in WIDGETS:
            given = inputs.get(name)
            yield default if given is None or isinstance(given, Output) else given
        if name in definition.controlled:
            yield "randomize"


def _staged(
    preset: str,
    prompt: str,
    takes_image: bool,
    video: bool,
    **settings,
) -> Graph:
    """Load, encode, sample, decode and save, with this package's nodes."""
    graph = Graph()
    model = graph.add("LoadModel", model=preset)["model"]
    begin: dict[str, Any] = {}
    seen: dict[str, Any] = {}
    if takes_image:
        picture = graph.add("LoadImage")["IMAGE"]
        encoded = graph.add("EncodeImage", model=model, image=picture)
        begin = {"image_latent": encoded["latent"]}
        seen = {} if video else {"image": encoded["image"]}
    text = graph.add("EncodeText", model=model, prompt=prompt, **seen)["text"]
    latent = graph.add("Sample", model=model, text=text, **begin, **settings)["latent"]
    images = graph.add("Decode", model=model, latent=latent)["images"]
    if video:
        graph.add("SaveVideo", video=graph.add("CreateVideo", images=images)["VIDEO"])
    else:
        graph.add("SaveImage", images=images)
    return graph


def _accelerated() -> Graph:
    """ComfyUI's own nodes for the 10 s model, accelerated."""
    graph = Graph()
    loaded = graph.add("UNETLoader", (TRANSFORMER,), unet_name=TRANSFORMER.name)["MODEL"]
    fast = graph.add("Accelerate", model=loaded)["model"]
    model = graph.add("ModelSamplingSD3", model=fast, shift=LITE_10S.scheduler_scale)["MODEL"]
    clip = graph.add("DualCLIPLoader", (QWEN, CLIP))["CLIP"]
    vae = graph.add("VAELoader", (VAE,))["VAE"]
    positive, negative = (
        graph.add("CLIPTextEncode", clip=clip, text=text)["CONDITIONING"]
        for text in (PROMPT, "static, blurred")
    )
    begun = graph.add(
        "Kandinsky5ImageToVideo",
        positive=positive,
        negative=negative,
        vae=vae,
        length=LITE_10S.frames,
    )
    latent = graph.add(
        "KSampler",
        model=model,
        positive=begun["positive"],
        negative=begun["negative"],
        latent_image=begun["latent"],
        steps=LITE_10S.steps,
        cfg=LITE_10S.guidance,
    )["LATENT"]
    images = graph.add("VAEDecode", samples=latent, vae=vae)["IMAGE"]
    graph.add("SaveVideo", video=graph.add("CreateVideo", images=images)["VIDEO"])
    return graph


def workflows() -> dict[str, str]:
    """Name of the file -> its text."""
    made = {
        TRY: _staged("tiny", "a red circle moving right", False, True),
        "text to video": _staged("t2v-lite-sft-5s", PROMPT, False, True, attention=RELEASED),
        "image to video": _staged("i2v-lite-5s", "the bear waves", True, True),
        "text to image": _staged("t2i-lite-sft", PROMPT, False, False),
        "image editing": _staged("i2i-lite-sft", "make it night", True, False),
        "accelerated ComfyUI nodes": _accelerated(),
    }
    return {f"Kandinsky 5 - {name}.json": graph.json() for name, graph in made.items()}


def write(folder: Path = FOLDER) -> list[Path]:
    """Write all of them into `folder`, in place of what is there, and return their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    texts = workflows()
    for path in folder.glob("*.json"):
        if path.name not in texts:
            path.unlink()
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")
    return [folder / name for name in texts]


if __name__ == "__main__":
    write()
