# SPDX-License-Identifier: Apache-2.0
"""The parts of the released checkpoints' text encoders, each read from its files when it is first
asked for."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..checkpoints.contents import what_it_is
from ..checkpoints.encoders import (
    CLIP,
    HEAD,
    LANGUAGE,
    VISION,
    Qwen,
    check_whole,
    encoder_entries,
    find_clip,
    find_qwen,
)
from ..checkpoints.headers import Entry, find_weights, opened
from ..checkpoints.locate import Sources
from ..checkpoints.variants import read
from ..devices.budget import Weights
from ..files import check_regular
from . import networks
from .quantized import check_text_mode, is_packed, packed_bytes
from .vision import Preprocessor

CLIP_DTYPE = torch.float32
FOLDERS = ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")  # of `locate.Sources`
# A token that each tokenizer must know, by which it is told from another.
QWEN_TOKEN = "<|im_end|>"
CLIP_TOKEN = "<|startoftext|>"
_LAYER = re.compile(r"layers\.(\d+)\.")


class Parts:
    """The networks of Qwen2.5-VL one by one, a CLIP text model, and what prepares their inputs.

    sources: the files or folders. dtype: of Qwen's networks; CLIP's is fp32. quantize: one of
    `TEXT_QUANTIZATIONS`, to keep the matrices of the language model's layers in fewer bits.

    Only the headers of the weights are read before a part is asked for. A network is strict about
    its tensors, silent about those of the other networks, in eval mode and without gradients.
    Raises RuntimeError without the packages that are needed, ValueError or OSError for weights that
    are damaged, incomplete or of another network.
    """

    def __init__(
        self,
        sources: Sources,
        dtype: torch.dtype = torch.float32,
        quantize: str | None = None,
    ):
        if find_spec("transformers") is None:
            raise RuntimeError(
                "this checkpoint's text encoders require transformers >= 4.57, "
                "which is not installed; "
                "pip install 'kandinsky-kernels[text]'"
            )
        check_text_mode(quantize)
        self.dtype = dtype
        self.quantize = quantize
        self.places: dict[str, Path] = {name: getattr(sources, name) for name in FOLDERS}
        files, self._qwen_home = find_weights(self.places["text_encoder"], "text_encoder")
        clip_files, self._clip_home = find_weights(self.places["text_encoder_2"], "text_encoder_2")
        # of all weights, and the folders of everything else
        self.files = [*files, *clip_files, *self._folders("text_encoder", "tokenizer")]
        self.files += self._folders("text_encoder_2", "tokenizer_2")
        self._qwen = _qwen(files, self.places["text_encoder"])
        self._clip = _clip(clip_files, self.places["text_encoder_2"])

    def _folders(self, *names: str) -> list[Path]:
        folders = [place for place in map(self.places.__getitem__, names) if place.is_dir()]
        for folder in folders:
            _check_files(folder)
        return folders

    def weigh(self, vision: bool = False, head: bool = False) -> Weights:
        """Bytes of the language model and CLIP as they will be once they are read. vision, head:
        also those of the vision tower and of the output head."""
        layers: Counter[int] = Counter()
        table = rest = 0
        for name, entry in self._qwen.language.items():
            size = self._bytes(name, entry)
            layer = _LAYER.match(name)
            if layer:
                layers[int(layer[1])] += size
            elif name == "embed_tokens.weight":
                table = size
            else:
                rest += size
        rest += sum(math.prod(one.shape) for one in self._clip.values()) * CLIP_DTYPE.itemsize
        if vision:
            rest += sum(self._bytes("", entry) for entry in self._qwen.vision.values())
        if head:  # the token embeddings are the head where the checkpoint has none of its own
            rest += self._bytes("", self._qwen.head) if self._qwen.head else table
        return Weights(tuple(layers[i] for i in sorted(layers)), table, rest)

    def _bytes(self, name: str, entry: Entry) -> int:
        if self.quantize and is_packed(name):
            return packed_bytes(entry.shape, self.quantize)
        return math.prod(entry.shape) * self.dtype.itemsize

    @cached_property
    def language(self) -> nn.Module:
        """Token embeddings, decoder layers and final norm, without the output head.

        Its attribute `once` lists the token embeddings: `devices.offload` leaves them on the CPU.
        """
        from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLTextModel

        language: Any = networks.build(
            Qwen2_5_VLTextModel,
            self._config.text_config,
            self._qwen.language,
            LANGUAGE,
            self.dtype,
            self.quantize,
        )
        language.once = [language.embed_tokens]
        return language

    @cached_property
    def vision(self) -> nn.Module:
        """The vision tower: from patches to features of the language model's width."""
        from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import (
            Qwen2_5_VisionTransformerPretrainedModel,
        )

        if not self._qwen.vision:
            raise ValueError(
                "showing a picture to the text encoder needs its vision tower, but "
                f"{self.places['text_encoder']} holds a language model alone; take a file of the "
                "whole Qwen2.5-VL"
            )
        return networks.build(
            Qwen2_5_VisionTransformerPretrainedModel,
            self._config.vision_config,
            self._qwen.vision,
            VISION,
            self.dtype,
        )

    @cached_property
    def head(self) -> nn.Linear:
        """From hidden states to logits of tokens: a tensor of its own, or the token embeddings
        where the checkpoint ties the two."""
        entry = self._qwen.head
        if entry is not None:
            with opened(entry.path) as file:
                tensor = read(file, entry).to(self.dtype)
            weight = nn.Parameter(tensor, requires_grad=False)
        elif self._config.tie_word_embeddings:
            weight = self.language.get_parameter("embed_tokens.weight")
        else:
            raise ValueError(
                "expanding a prompt needs the head of the language model, but "
                f"{self.places['text_encoder']} holds no {HEAD}; "
                "download it again"
            )
        with torch.device("meta"):  # the weight replaces what would be allocated here
            head = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        head.weight = weight
        return head

    @cached_property
    def tokenizer(self):
        from transformers import AutoTokenizer

        return _tokenizer(AutoTokenizer, self.places["tokenizer"], "Qwen2.5-VL", QWEN_TOKEN)

    @cached_property
    def preprocessor(self) -> Preprocessor:
        return Preprocessor.read(self.places["tokenizer"], self._qwen_home)

    @cached_property
    def clip(self) -> nn.Module:
        from transformers import CLIPTextModel

        config = networks.clip_config(self._clip_home, self.places["tokenizer_2"])
        return networks.build(CLIPTextModel, config, self._clip, CLIP, CLIP_DTYPE)

    @cached_property
    def clip_tokenizer(self):
        from transformers import CLIPTokenizer

        return _tokenizer(CLIPTokenizer, self.places["tokenizer_2"], "CLIP", CLIP_TOKEN)

    @cached_property
    def _config(self):
        return networks.qwen_config(self._qwen_home, self.places["tokenizer"])


def _check_files(folder: Path) -> None:
    """OSError for a FIFO or a device among the files, where a library's read would never end."""
    for path in folder.iterdir():
        if path.exists() and not path.is_dir():
            check_regular(path)


def _qwen(files: list[Path], place: Path) -> Qwen:
    """The networks of Qwen2.5-VL in the files; ValueError for files of another model."""
    entries = encoder_entries(files)
    qwen = find_qwen(entries)
    if qwen is None:
        raise ValueError(
            f"a text encoder must be Qwen2.5-VL, but {place} is {what_it_is(entries)}; "
            "give a folder or file of Qwen2.5-VL-7B-Instruct"
        )
    check_whole(qwen.language, LANGUAGE)
    return qwen


def _clip(files: list[Path], place: Path) -> Mapping[str, Entry]:
    """The tensors of CLIP's text model in the files, likewise."""
    entries = encoder_entries(files)
    clip = find_clip(entries)
    if not clip:
        raise ValueError(
            f"the second text encoder must be CLIP's text model, but {place} is "
            f"{what_it_is(entries)}; give a folder or file of CLIP ViT-L/14, such as "
            "clip_l.safetensors"
        )
    check_whole(clip, CLIP)
    return clip


def _tokenizer(kind: Any, folder: Path, name: str, token: str):
    """The tokenizer in `folder`; ValueError where it is none, or that of another model."""
    try:
        tokenizer = kind.from_pretrained(folder, local_files_only=True)
        knows = token in tokenizer.get_vocab()
    # transformers' errors run over many lines and have many types.
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"{folder} must hold the tokenizer of {name}, which cannot be read there ({reason}); "
            "put its files there"
        ) from error
    if not knows:
        raise ValueError(
            f"{folder} must hold the tokenizer of {name}, but that there knows no {token}: it is "
            "another model's; put each text encoder into a folder of its own"
        )
    return tokenizer
