# SPDX-License-Identifier: Apache-2.0
"""The parts of the released checkpoints' text encoders, each read from its folder when it is first
asked for."""

from __future__ import annotations

import math
import re
from collections import Counter
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

from ..checkpoints.headers import find_weights, read_headers
from ..checkpoints.locate import Sources
from ..devices.budget import Weights
from ..files import check_regular
from .vision import Preprocessor

HEAD = "lm_head.weight"
CLIP_DTYPE = torch.float32
FOLDERS = ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")  # of `locate.Sources`
_LAYER = re.compile(r"\blayers\.(\d+)\.")


class Parts:
    """The networks of Qwen2.5-VL one by one, a CLIP text model, and what prepares their inputs.

    sources: the folders. dtype: of Qwen's networks; CLIP's is fp32.

    Only the headers of the weights are read before a part is asked for. A network is strict about
    missing tensors, silent about those of the other networks, in eval mode and without gradients.
    Raises RuntimeError without transformers, ValueError or OSError for weights that are damaged or
    incomplete.
    """

    def __init__(self, sources: Sources, dtype: torch.dtype = torch.float32):
        if find_spec("transformers") is None:
            raise RuntimeError(
                "this checkpoint's text encoders require transformers >= 4.57, "
                "which is not installed; "
                "pip install 'kandinsky-kernels[text]'"
            )
        self.dtype = dtype
        self.folders: dict[str, Path] = {name: getattr(sources, name) for name in FOLDERS}
        for folder in self.folders.values():
            _check_files(folder)
        qwen_files, _ = find_weights(self.folders["text_encoder"], "text_encoder")
        clip_files, _ = find_weights(self.folders["text_encoder_2"], "text_encoder_2")
        self._entries = read_headers(qwen_files)
        self._clip_entries = read_headers(clip_files)

    def weigh(self, vision: bool = False, head: bool = False) -> Weights:
        """Bytes of the language model and CLIP as they will be once they are read. vision, head:
        also those of the vision tower and of the output head."""
        layers: Counter[int] = Counter()
        others: Counter[str] = Counter()
        for name, entry in self._entries.items():
            size = math.prod(entry.shape) * self.dtype.itemsize
            part = _part_of(name)
            layer = _LAYER.search(name)
            if part == "language" and layer:
                layers[int(layer[1])] += size
            else:
                others[part] += size
        clip = sum(math.prod(entry.shape) for entry in self._clip_entries.values())
        rest = others["language"] + clip * CLIP_DTYPE.itemsize
        if vision:
            rest += others["vision"]
        if head:  # the token embeddings are the head where the checkpoint has none of its own
            rest += others["head"] or others["table"]
        return Weights(tuple(layers[i] for i in sorted(layers)), others["table"], rest)

    @cached_property
    def language(self) -> nn.Module:
        """Token embeddings, decoder layers and final norm, without the output head.

        Its attribute `once` lists the token embeddings: `devices.offload` leaves them on the CPU.
        """
        from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLTextModel

        language: Any = _from_folder(
            Qwen2_5_VLTextModel,
            self.folders["text_encoder"],
            self.dtype,
            config=self._config.text_config,
            key_mapping={r"^model\.language_model\.": "model."},
        )
        language.once = [language.embed_tokens]
        return language

    @cached_property
    def vision(self) -> nn.Module:
        """The vision tower: from patches to features of the language model's width."""
        from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import (
            Qwen2_5_VisionTransformerPretrainedModel,
        )

        return _from_folder(
            Qwen2_5_VisionTransformerPretrainedModel,
            self.folders["text_encoder"],
            self.dtype,
            config=self._config.vision_config,
            key_mapping={r"^(model\.)?visual\.": "model."},
        )

    @cached_property
    def head(self) -> nn.Linear:
        """From hidden states to logits of tokens: a tensor of its own, or the token embeddings
        where the checkpoint ties the two."""
        if HEAD in self._entries:
            with safe_open(self._entries[HEAD].path, framework="pt") as file:
                weight = nn.Parameter(file.get_tensor(HEAD).to(self.dtype), requires_grad=False)
        elif self._config.tie_word_embeddings:
            weight = self.language.get_parameter("embed_tokens.weight")
        else:
            raise ValueError(
                "expanding a prompt needs the head of the language model, but "
                f"{self.folders['text_encoder']} holds no {HEAD}; "
                "download it again"
            )
        with torch.device("meta"):  # the weight replaces what would be allocated here
            head = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        head.weight = weight
        return head

    @cached_property
    def tokenizer(self):
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self.folders["tokenizer"], local_files_only=True)

    @cached_property
    def preprocessor(self) -> Preprocessor:
        return Preprocessor.read(self.folders["tokenizer"], self.folders["text_encoder"])

    @cached_property
    def clip(self) -> nn.Module:
        from transformers import CLIPTextModel

        return _from_folder(CLIPTextModel, self.folders["text_encoder_2"], CLIP_DTYPE)

    @cached_property
    def clip_tokenizer(self):
        from transformers import CLIPTokenizer

        return CLIPTokenizer.from_pretrained(self.folders["tokenizer_2"], local_files_only=True)

    @cached_property
    def _config(self):
        from transformers import AutoConfig

        return AutoConfig.from_pretrained(self.folders["text_encoder"], local_files_only=True)


def _part_of(name: str) -> str:
    """Which part of Qwen2.5-VL a tensor belongs to."""
    if "visual." in name:
        return "vision"
    if name == HEAD:
        return "head"
    return "table" if "embed_tokens" in name else "language"


def _check_files(folder: Path) -> None:
    """OSError for a FIFO or a device among the files, where a library's read would never end."""
    for path in folder.iterdir():
        if path.exists() and not path.is_dir():
            check_regular(path)


def _from_folder(kind: type, folder: Path, dtype: torch.dtype, **options) -> nn.Module:
    """`kind.from_pretrained`, strict about missing tensors and silent about those of other
    networks."""
    # The subclass keeps name and module, because transformers >= 5 picks its renaming of old tensor
    # names by them.
    strict: Any = type(
        kind.__name__,
        (kind,),
        {"_keys_to_ignore_on_load_unexpected": [""], "__module__": kind.__module__},
    )
    model, report = strict.from_pretrained(
        folder,
        dtype=dtype,
        local_files_only=True,
        use_safetensors=True,
        output_loading_info=True,
        **options,
    )
    missing = sorted(report["missing_keys"])
    if missing:
        raise ValueError(
            f"the text encoder in {folder} must be complete, but {len(missing)} "
            f"tensors are missing, {missing[0]} first; "
            "download it again"
        )
    return model.eval().requires_grad_(False)
