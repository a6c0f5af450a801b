# SPDX-License-Identifier: Apache-2.0
"""Files of LoRA adapters: which of their tensors belong to which layer, and how strong they are.

The names of PEFT (`<module>.lora_A.weight` [r, in], `<module>.lora_B.weight` [out, r]), diffusers,
musubi-tuner and kohya's scripts (`lora_unet_<module with underscores>.lora_down.weight`, `.alpha`),
SimpleTuner and ComfyUI are read. An adapter adds strength * B A to a weight, where the strength is
alpha / r, or alpha / sqrt(r) for rank-stabilised LoRA. alpha is, whichever comes first:

1. the layer's tensor `.alpha`;
2. what the header says: PEFT's configuration (`lora_adapter_metadata`), or one number;
3. what a configuration beside the file says, if its ranks are those of the file: it may be another
   file's;
4. r, so that the strength is 1.
"""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor, nn

from ..dit.linear import Linear
from ..files import read_json
from .headers import Entry, opened, printable, read_headers, read_metadata
from .variants import read, with_scales

CONFIG_NAMES = ("config_lora.json", "adapter_config.json")
METADATA_KEY = "lora_adapter_metadata"  # PEFT's configuration as JSON, in a file of diffusers
# One alpha for all layers: kohya and musubi-tuner, and what others write.
_ALPHA_KEYS = ("ss_network_alpha", "network_alpha", "lora_alpha", "alpha")

_PREFIX = re.compile(
    r"(base_model\.model\.|model\.|transformer\.|diffusion_model\.|unet\.|dit\."
    r"|lora_unet_|lora_transformer_|lycoris_)+"
)
_MATRIX = re.compile(
    r"(?P<module>.+?)\.lora(_(?P<half>A|B|down|up)|\.(?P<old>down|up))(\.[\w-]+)?\.weight"
)
_PLAIN = re.compile(r"[\w.^\\-]+")  # a name, with what PEFT may put before or into it
_HALVES = {"A": "down", "B": "up", "down": "down", "up": "up"}
# What adds to a network in another way than two matrices. What is not applied is named.
_OTHER_KINDS = (
    (r"\.lokr_w\d", "LoKr"),
    (r"\.hada_[wt]\d", "LoHa"),
    (r"\.dora_scale$|lora_magnitude_vector", "DoRA"),
    (r"\.diff(_b)?$", "a file of full differences (.diff)"),
    (r"\.lora_mid\.", "a LoRA of convolutions (lora_mid)"),
    (r"\.oft_|\.boft_|\.oft_blocks", "OFT"),
    (r"ia3_|\.on_input$", "IA3"),
    (r"\.lora_(B|up)(\.\w+)?\.bias$|\.bias$", "a LoRA with biases"),
    (r"modules_to_save", "a LoRA with whole modules (modules_to_save)"),
    (r"^(lora_te\d?_|text_encoder|text_model)", "a LoRA of a text encoder"),
)
# what the configuration may say and tensors do not
_UNUSED = {
    "use_dora": "DoRA",
    "use_qalora": "QALoRA",
    "lora_bias": "a LoRA with biases",
    "fan_in_fan_out": "a LoRA of transposed layers",
}
_CHANGES_BASE = (
    "pissa",
    "olora",
    "corda",
)  # beginnings that take a part off the weights themselves

_log = logging.getLogger(__name__)


@dataclass
class _Layer:
    """What a file holds for one layer."""

    halves: dict[str, Entry] = field(default_factory=dict)  # "down" and "up"
    alpha: Entry | None = None

    @property
    def rank(self) -> int:
        return self.halves["down"].shape[0]


@dataclass(frozen=True)
class AdapterFile:
    """An adapter: for each layer down [r, in] and up [out, r], of which up has the strength in it.

    trigger: the words that call it, if the file says any.
    """

    matrices: Mapping[str, tuple[Tensor, Tensor]]
    trigger: str


def read_adapter(file: Path, network: nn.Module) -> AdapterFile:
    """The adapter in `file`, checked against the network. Raises FileNotFoundError, or ValueError:
    a file of another kind, modules the network lacks, other widths, values that are not finite."""
    layers = _layers(with_scales(read_headers([file])), network, file)
    metadata = read_metadata(file)
    ranks = {module: layer.rank for module, layer in layers.items()}
    strengths = _strengths(file, metadata, ranks)
    matrices = {}
    with opened(file) as source:
        for module, layer in layers.items():
            strength = strengths[module]
            if layer.alpha is not None:
                strength = read(source, layer.alpha).float().mean().item() / layer.rank
            down, up = (read(source, layer.halves[half]) for half in ("down", "up"))
            if not math.isfinite(strength):
                raise ValueError(
                    f"{file.name} must have finite strengths, but alpha of {module} is not; "
                    "take another file of the adapter"
                )
            matrices[module] = (down, (up.float() * strength).to(up.dtype))
    return AdapterFile(matrices, metadata.get("trigger", ""))


def _layers(entries: Mapping[str, Entry], network: nn.Module, file: Path) -> dict[str, _Layer]:
    """The tensors of the file by the layer that they belong to."""
    modules = {name: layer for name, layer in network.named_modules() if isinstance(layer, Linear)}
    names = {name.replace(".", "_"): name for name in modules} | {name: name for name in modules}
    layers: dict[str, _Layer] = {}
    for key, entry in entries.items():
        _check_kind(key, file)
        short = _PREFIX.sub("", key, count=1) if _PREFIX.match(key) else key
        match = _MATRIX.fullmatch(short)
        if match is None and not short.endswith(".alpha"):
            raise ValueError(
                f"{file.name} must hold only LoRA tensors <module>.lora_A.weight and "
                f".lora_B.weight, got {printable(key)}; check that this is a LoRA of Kandinsky 5"
            )
        written = short.removesuffix(".alpha") if match is None else match["module"]
        module = names.get(written)
        if module is None:
            raise ValueError(
                f"{file.name} must fit the network, but {printable(written)} is no linear layer of "
                "this network; check which checkpoint it was made for"
            )
        layer = layers.setdefault(module, _Layer())
        if match is None:
            layer.alpha = entry
            continue
        half = _HALVES[match["half"] or match["old"]]
        if half in layer.halves:
            raise ValueError(
                f"{file.name} must hold each matrix once, but {module} has two for {half}; "
                "take another file of the adapter"
            )
        layer.halves[half] = entry
    if not layers:
        raise ValueError(f"{file.name} must hold LoRA tensors, got none; download it again")
    for module, layer in layers.items():
        _check_shapes(file, module, layer, modules[module])
    return layers


def _check_kind(key: str, file: Path) -> None:
    kind = next((kind for form, kind in _OTHER_KINDS if re.search(form, key)), None)
    if kind is not None:
        raise ValueError(
            f"an adapter must be a LoRA of linear layers, but {file.name} is {kind} "
            f"({printable(key)}), which is not applied here; merge it into the weights elsewhere"
        )


def _check_shapes(file: Path, module: str, layer: _Layer, linear: Linear) -> None:
    if layer.halves.keys() != {"down", "up"}:
        raise ValueError(
            f"{file.name} must fit the network, but {module} has only one of its two matrices; "
            "check which checkpoint it was made for"
        )
    down, up = (layer.halves[half].shape for half in ("down", "up"))
    fits = len(down) == len(up) == 2 and down[0] == up[1] > 0
    if not fits or (down[1], up[0]) != (linear.in_features, linear.out_features):
        raise ValueError(
            f"{file.name} must fit the network, but for {module} "
            f"({linear.in_features} to {linear.out_features} channels) "
            f"it holds {_sizes(down)} and {_sizes(up)}; it was made "
            "for a checkpoint of another width"
        )
    if layer.alpha is not None and math.prod(layer.alpha.shape) != 1:
        raise ValueError(
            f"{file.name} must have one number as alpha of {module}, got "
            f"{list(layer.alpha.shape)}; take another file of the adapter"
        )


def _sizes(shape: tuple[int, ...]) -> str:
    """ "256 to 4" of a matrix [4, 256]."""
    return f"{shape[1]} to {shape[0]}" if len(shape) == 2 else str(list(shape))


def _strengths(file: Path, metadata: Mapping[str, str], ranks: dict[str, int]) -> dict[str, float]:
    """The strength of every layer that has no alpha of its own."""
    config = _header_config(file, metadata)
    for module, rank in ranks.items():
        said = _said_rank(config or {}, module)
        if said not in (None, rank):
            raise ValueError(
                f"the header of {file.name} must be about its tensors, but it says rank "
                f"{printable(str(said))} for {module}, which has {rank}; save the adapter again"
            )
    if config is None:
        config = _config_beside(file, ranks)
    if config is None:
        return dict.fromkeys(ranks, 1.0)
    return {module: _strength(config, module, rank, file) for module, rank in ranks.items()}


def _strength(config: Mapping, module: str, rank: int, file: Path) -> float:
    """alpha / r, or alpha / sqrt(r), as a PEFT configuration has it."""
    key, kind = _other_kind(config)
    if key:
        raise ValueError(
            f"an adapter must be a LoRA of linear layers, but {file.name} is {kind} ({key}), "
            "which is not applied here; merge it into the weights elsewhere"
        )
    alpha = _of_pattern(config.get("alpha_pattern"), module, config.get("lora_alpha"))
    if alpha is None:
        return 1.0
    try:
        value = float(str(alpha))
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ValueError(
            f"{file.name} must have a finite number as alpha, got {printable(str(alpha))} for "
            f"{module}; correct its configuration"
        )
    return value / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _other_kind(config: Mapping) -> tuple[str, str]:
    """The key of a configuration that says it is no plain LoRA, and what it is; or "" twice."""
    for key, kind in _UNUSED.items():
        if config.get(key):
            return key, kind
    kind = str(config.get("peft_type") or "LORA")
    if kind != "LORA":
        return "peft_type", printable(kind)
    begun = str(config.get("init_lora_weights"))
    if begun.lower().startswith(_CHANGES_BASE):
        return "init_lora_weights", f"for weights that {printable(begun)} has changed"
    return "", ""


def _said_rank(config: Mapping, module: str) -> object:
    """The rank that a configuration says a module has; None where it says none."""
    return _of_pattern(config.get("rank_pattern"), module, config.get("r"))


def _of_pattern(pattern: object, module: str, otherwise: object) -> object:
    """What PEFT's `rank_pattern` or `alpha_pattern` has for a module, by the end of its name. PEFT
    takes the keys as regular expressions; those that it and diffusers write are names."""
    for key, value in pattern.items() if isinstance(pattern, Mapping) else ():
        if not _PLAIN.fullmatch(str(key)):
            raise ValueError(
                "the rank_pattern and alpha_pattern of an adapter must name layers, got the "
                f"regular expression {printable(str(key))}; write the names of the layers instead"
            )
        name = _PREFIX.sub("", str(key).lstrip("^").replace("\\.", "."), count=1)
        if module == name or module.endswith(f".{name}"):
            return value
    return otherwise


def _header_config(file: Path, metadata: Mapping[str, str]) -> dict | None:
    """PEFT's configuration from a file's header; None where it says nothing about alpha."""
    text = metadata.get(METADATA_KEY)
    if text is not None:
        try:
            config = json.loads(text)
        except (ValueError, RecursionError):
            config = None
        if not isinstance(config, dict):
            raise ValueError(
                f"{file.name} must have a JSON object as {METADATA_KEY} in its header, got "
                f"{printable(text)}; take another file of the adapter"
            )
        # diffusers writes the name of the network before each key.
        return {key.removeprefix("transformer."): value for key, value in config.items()}
    alpha = next((metadata[key] for key in _ALPHA_KEYS if key in metadata), None)
    return None if alpha in (None, "None", "") else {"lora_alpha": alpha}


def _config_beside(file: Path, ranks: Mapping[str, int]) -> dict | None:
    """PEFT's configuration from the folder of the file, if it is this file's."""
    paths = [file.parent / name for name in CONFIG_NAMES if (file.parent / name).is_file()]
    if not paths:
        return None
    path = paths[0]
    config = read_json(path)
    for module, rank in ranks.items():
        said = _said_rank(config, module)
        if said not in (None, rank):
            _log.warning(
                "%s is not about %s (it says rank %s for %s, which has %d), so it is left aside "
                "and the adapter has strength 1",
                path.name,
                file.name,
                printable(str(said)),
                module,
                rank,
            )
            return None
    return config
