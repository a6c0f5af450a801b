# SPDX-License-Identifier: Apache-2.0
"""Prompts to embeddings as the released checkpoints read them: hidden states of Qwen2.5-VL, and
CLIP's pooled vector.

The prompt stands in a fixed instruction that the checkpoints were trained with. Its text is not
kept here: it is taken from the installed diffusers at run time and accepted only when its SHA-256
is that of the official one.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..devices.budget import Weights
from .cache import TensorCache, checksum, identity
from .embeddings import TextEmbeddings
from .expand import STOPS, continue_greedily, request
from .parts import Parts
from .templates import KINDS, TEXTS, official_negative, official_template
from .vision import PICTURE, PLACEHOLDER, look_up, positions

EDIT_CROPS = ("official", "exact")
# the instruction has 52 tokens: the official code drops three of the prompt as well
OFFICIAL_EDIT_CROP = 55
EDIT_SHRINK = 2  # a picture to edit is shown with half its sides
EDIT_TOKENS = 1024  # as many as the transformer has positions for
CLIP_TOKENS = 77
END = "<|im_end|>"

_log = logging.getLogger(__name__)


class QwenClipEncoder(nn.Module):
    """Qwen2.5-VL without its head, and a CLIP text model, behind `encode` of `text.TextEmbeddings`.

    parts: networks, tokenizers and preprocessor as `text_parts.Parts` names them, each asked for
    when first needed: for prompts that are in the cache nothing is read. template: the instruction
    of a video, with one `{}` for the prompt; None takes the official one, as an "image" and an
    "image_edit" always do. The hidden states of what precedes the prompt are dropped. At most
    `max_length` tokens are kept after it; an edit is not cut, but may have 1024 tokens with its
    picture. edit_crop: whether before the prompt of an edit the "official" number of tokens is
    dropped or the "exact" one. Qwen is causal, so a prompt's rows depend on nothing behind them.
    """

    def __init__(
        self,
        parts,
        template: str | None = None,
        max_length: int = 256,
        edit_crop: str = "official",
        cache: TensorCache | None = None,
    ):
        super().__init__()
        if template is not None and template.count("{}") != 1:
            raise ValueError(
                f"a template needs exactly one {{}} for the prompt, got "
                f"{template.count('{}')}; pass such a text"
            )
        self.parts, self.max_length, self.edit_crop, self.cache = (
            parts,
            max_length,
            edit_crop,
            cache,
        )
        self.device, self._template = torch.device("cpu"), template
        self._place: Callable[[nn.Module], nn.Module] = lambda network: network.to(self.device)

    @classmethod
    def load(
        cls,
        sources,
        dtype: torch.dtype = torch.float32,
        template: str | None = None,
        cache: bool = True,
    ) -> QwenClipEncoder:
        """Both encoders of `locate.Sources`. Of their weights only the headers are read now; raises
        what `Parts` raises.

        cache: whether embeddings are kept on disk.
        """
        parts = Parts(sources, dtype)
        return cls(
            parts,
            template,
            sources.preset.text_max_length,
            cache=TensorCache(identity(parts.folders, dtype)) if cache else None,
        )

    @property
    def layers(self) -> nn.ModuleList:
        """The decoder layers of the language model, which is read for it but not moved."""
        return self.parts.language.layers

    @property
    def default_negative(self) -> str:
        """What videos are usually steered away from; empty, with a warning, where diffusers no
        longer has it."""
        return official_negative()

    def to(self, device: torch.device | str) -> QwenClipEncoder:
        """Work on `device` from now on. Networks go there when they are next needed, but leave for
        the CPU at once."""
        self.device = torch.device(device)
        return super().to(self.device) if self.device.type == "cpu" else self

    def weigh(self, vision: bool = False, head: bool = False) -> Weights:
        """Bytes of the networks that encoding needs, with the vision tower for pictures and the
        head for writing, read or not."""
        return self.parts.weigh(vision, head)

    @contextmanager
    def placing(
        self, device: torch.device, place: Callable[[nn.Module], nn.Module]
    ) -> Iterator[None]:
        """Work on `device`, where `place` brings each network whenever it is needed, as long as the
        body runs."""
        before = self.device, self._place
        self.device, self._place = device, place
        try:
            yield
        finally:
            self.device, self._place = before

    def template(self, kind: str) -> str:
        """The instruction for a "video", "image" or "image_edit"."""
        return self._template if kind == "video" and self._template else official_template(kind)

    def crop(self, kind: str) -> int:
        """How many tokens at the beginning are dropped: those of the instruction, but for an edit
        by the official count."""
        if self.edit_crop not in EDIT_CROPS:
            raise ValueError(
                f"edit_crop must be {' or '.join(EDIT_CROPS)}, got "
                f"{self.edit_crop!r}; choose one of them"
            )
        if kind == "image_edit" and self.edit_crop == "official":
            return OFFICIAL_EDIT_CROP
        return len(self._tokens(self.template(kind).partition("{}")[0]))

    @torch.no_grad()
    def encode(
        self, prompts: list[str], kind: str = "video", images: list[Tensor] | None = None
    ) -> TextEmbeddings:
        """Embed each prompt by itself, so that none is padded inside the models, as the wish for a
        "video", "image" or "image_edit".

        images: one uint8 [3, H, W] for each prompt of an edit; nothing else has any. Raises
        TypeError unless given a list of str, ValueError for an empty one, another kind, images that
        do not fit, edits too long.
        """
        if isinstance(prompts, str) or not all(isinstance(prompt, str) for prompt in prompts):
            raise TypeError(
                "encode needs a list of prompts, each a str; put a single prompt into a list"
            )
        if kind not in KINDS:
            raise ValueError(
                f"a prompt is for {' or '.join(KINDS)}, got {kind!r}; choose one of them"
            )
        if not prompts or len(images or []) != (len(prompts) if kind == "image_edit" else 0):
            raise ValueError(
                "encode needs at least one prompt, and an image for each of an "
                f"image_edit only, got {len(prompts)} prompts "
                f"and {len(images or [])} images for kind {kind}; pass as many"
            )
        rows = [
            self._embedded(prompt, kind, image)
            for prompt, image in zip(prompts, images or [None] * len(prompts), strict=True)
        ]
        embeds = nn.utils.rnn.pad_sequence([row["embeds"] for row in rows], batch_first=True)
        lengths = torch.tensor([len(row["embeds"]) for row in rows])
        return TextEmbeddings(
            embeds.to(self.device),
            lengths,
            torch.stack([row["pooled"] for row in rows]).to(self.device),
        )

    @torch.no_grad()
    def expand(self, prompt: str, kind: str = "video", image: Tensor | None = None) -> str:
        """The prompt rewritten in English and in detail by the language model, always in the same
        words.

        image: uint8 [3, H, W], what a video begins with or an "image_edit" changes. Raises
        ValueError for other combinations.
        """
        text, shrink = request(prompt, kind, image)

        def write() -> dict[str, Tensor]:
            tokenizer = self.parts.tokenizer
            tokens = continue_greedily(
                self._network("language"),
                self._network("head"),
                *self._sequence(text, image, shrink),
                tokenizer.convert_tokens_to_ids(list(STOPS)),
            )
            return {
                "text": torch.tensor(
                    list(tokenizer.decode(tokens, skip_special_tokens=True).encode()),
                    dtype=torch.uint8,
                )
            }

        written = (
            bytes(self._remembered(write, image, request=text)["text"].tolist()).decode().strip()
        )
        _log.info("expanded prompt: %s", written or "empty, so the prompt stays as it is")
        return written or prompt

    def _embedded(self, prompt: str, kind: str, image: Tensor | None) -> dict[str, Tensor]:
        """embeds [L, Dt] and pooled [Dp] of one prompt."""

        def compute() -> dict[str, Tensor]:
            text, crop = self.template(kind).replace("{}", prompt), self.crop(kind)
            if image is None:
                embeds, places = self._sequence(text, most=crop + self.max_length)
            else:
                embeds, places = self._sequence(text + PICTURE + END, image, EDIT_SHRINK)
                if embeds.shape[1] - crop > EDIT_TOKENS:
                    raise ValueError(
                        f"an edit may have {EDIT_TOKENS} tokens, got "
                        f"{embeds.shape[1] - crop} of prompt and picture; shorten "
                        "the prompt or take a smaller picture"
                    )
            hidden = self._network("language")(
                inputs_embeds=embeds, position_ids=places, use_cache=False
            ).last_hidden_state
            return {"embeds": hidden[0, crop:], "pooled": self._pooled(prompt)}

        template = self._template if kind == "video" else None
        return self._remembered(
            compute,
            image,
            prompt=prompt,
            kind=kind,
            max_length=self.max_length,
            edit_crop=self.edit_crop,
            template=hashlib.sha256(template.encode()).hexdigest() if template else TEXTS[kind][1],
        )

    def _remembered(
        self, compute: Callable[[], dict[str, Tensor]], image: Tensor | None, **wish
    ) -> dict[str, Tensor]:
        if self.cache is None:
            return compute()
        return self.cache.remember(
            compute, image=None if image is None else checksum({"image": image.cpu()}), **wish
        )

    def _sequence(
        self, text: str, image: Tensor | None = None, shrink: int = 1, most: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """Embeddings [1, L, Dt] and positions [4, 1, L] of text, cut at `most` tokens, or of text
        with an image in its place."""
        language = self._network("language")
        pieces = [text] if image is None else text.split(PLACEHOLDER)
        if len(pieces) > 2:
            raise ValueError(
                f"a prompt about a picture must not contain {PLACEHOLDER}, which "
                "stands for the picture; leave it out"
            )
        tokens = [self._tokens(piece) for piece in pieces]
        if most is not None and len(tokens[0]) > most:
            _log.warning(
                "the prompt is too long by %d tokens, which are not read: %.200s",
                len(tokens[0]) - most,
                self.parts.tokenizer.decode(tokens[0][most:]).removesuffix(END),
            )
        embeds = [look_up(language, part[:most]) for part in tokens]
        if image is None:
            return embeds[0], positions(embeds[0].shape[1]).to(embeds[0].device)
        patches, rows, columns = self.parts.preprocessor.patches(image, shrink)
        vision, merge = self._network("vision"), self.parts.preprocessor.merge_size
        seen = vision(
            patches.to(vision.device, vision.dtype),
            grid_thw=torch.tensor([[1, rows, columns]], device=vision.device),
        )
        # transformers < 5 returns the features [n, Dt] themselves
        seen = getattr(seen, "pooler_output", seen)[None].to(embeds[0])
        places = positions(embeds[0].shape[1], rows // merge, columns // merge, embeds[1].shape[1])
        return torch.cat([embeds[0], seen, embeds[1]], dim=1), places.to(seen.device)

    def _tokens(self, text: str) -> list[int]:
        return self.parts.tokenizer(text)["input_ids"] if text else []

    def _pooled(self, prompt: str) -> Tensor:
        tokens = self.parts.clip_tokenizer(
            prompt,
            max_length=CLIP_TOKENS,
            truncation=True,
            padding="max_length",
            return_tensors="pt",
        )
        return self._network("clip")(**tokens.to(self.device)).pooler_output[0]  # [Dp]

    def _network(self, name: str) -> nn.Module:
        """A network of the parts, on the device; from now on it is a child of this module."""
        self.add_module(name, getattr(self.parts, name))
        return self._place(getattr(self, name))
