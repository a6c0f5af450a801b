# SPDX-License-Identifier: Apache-2.0
"""The text encoders of the released checkpoints: hidden states of Qwen2.5-VL, and CLIP's pooled
vector.

The prompt stands in a fixed instruction, the template, that the checkpoints were trained with. Its
text is not kept here: it is taken from the installed diffusers at run time, and accepted only when
its SHA-256 is that of the official one.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..checkpoints.locate import Sources
from ..devices.budget import Weights
from .cache import TensorCache, checksum, identity
from .embeddings import Conditioning
from .expand import STOPS, continue_greedily, request
from .parts import Parts
from .templates import KINDS, TEXTS, official_negative, official_template
from .vision import PICTURE, PLACEHOLDER, look_up, positions

EDIT_CROPS = ("official", "exact")
# The template of an edit has 52 tokens; the official code drops three of the prompt as well.
OFFICIAL_EDIT_CROP = 55
EDIT_SHRINK = 2  # a picture to edit is shown with half its sides
EDIT_TOKENS = 1024  # the transformer has no more positions
CLIP_TOKENS = 77
END = "<|im_end|>"  # of a turn of Qwen's chat

_log = logging.getLogger(__name__)


class QwenClipEncoder(nn.Module):
    """Qwen2.5-VL without its head, and a CLIP text model.

    parts: the networks, tokenizers and preprocessor, named as in `text.parts.Parts`. Each is asked
    for when it is first needed, so that nothing is read for prompts that are in the cache.
    template: for videos, with one `{}` for the prompt. None takes the official one, which pictures
    and edits always take. The hidden states of the template are dropped.
    max_length: tokens that are kept behind the template. An edit is not cut, but may have 1024
    tokens with its picture.
    edit_crop: whether the "official" number of tokens is dropped before the prompt of an edit, or
    the "exact" length of the template.

    Qwen is causal, so a prompt's rows depend on nothing behind them.
    """

    def __init__(
        self,
        parts: Parts,
        template: str | None = None,
        max_length: int = 256,
        edit_crop: str = "official",
        cache: TensorCache | None = None,
    ):
        super().__init__()
        if template is not None and template.count("{}") != 1:
            raise ValueError(
                "a template needs exactly one {} for the prompt, got "
                f"{template.count('{}')}; pass such a text"
            )
        self.parts = parts
        self.max_length = max_length
        self.edit_crop = edit_crop
        self.cache = cache
        self.device = torch.device("cpu")
        self._template = template
        self._place: Callable[[nn.Module], nn.Module] = lambda network: network.to(self.device)

    @classmethod
    def load(
        cls,
        sources: Sources,
        dtype: torch.dtype = torch.float32,
        template: str | None = None,
        cache: bool = True,
        quantize: str | None = None,
    ) -> QwenClipEncoder:
        """Both encoders of a checkpoint. Only the headers of their weights are read now.

        cache: whether embeddings are kept on disk. quantize: as for `Parts`, which says what is
        raised.
        """
        parts = Parts(sources, dtype, quantize)
        kept = TensorCache(identity(parts.files, dtype, quantize)) if cache else None
        return cls(parts, template, sources.preset.text_max_length, cache=kept)

    @property
    def layers(self) -> nn.ModuleList:
        """The decoder layers of the language model, which is read for them but not moved."""
        return cast(nn.ModuleList, self.parts.language.layers)

    @property
    def default_negative(self) -> str:
        """The usual negative prompt of videos; empty, with a warning, where diffusers no longer has
        it."""
        return official_negative()

    # The dtype is no argument, unlike a module's, because the networks differ in it.
    def to(self, device: torch.device | str) -> QwenClipEncoder:  # type: ignore[override]
        """Work on `device` from now on. Networks go to an accelerator when they are next needed,
        but leave for the CPU at once."""
        self.device = torch.device(device)
        return super().to(self.device) if self.device.type == "cpu" else self

    def weigh(self, vision: bool = False, head: bool = False) -> Weights:
        """Bytes of the networks that encoding needs, whether they were read yet or not. vision:
        also of the vision tower, for pictures. head: also of the head, for writing."""
        return self.parts.weigh(vision, head)

    @contextmanager
    def placing(
        self, device: torch.device, place: Callable[[nn.Module], nn.Module]
    ) -> Iterator[None]:
        """While the body runs, work on `device`, where `place` brings each network whenever it is
        needed."""
        before = self.device, self._place
        self.device, self._place = device, place
        try:
            yield
        finally:
            self.device, self._place = before

    def template(self, kind: str) -> str:
        """The instruction for a "video", "image" or "image_edit", with `{}` for the prompt."""
        return self._template if kind == "video" and self._template else official_template(kind)

    def crop(self, kind: str) -> int:
        """How many tokens are dropped before the prompt: those of the template, or for an edit the
        official count."""
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
    ) -> Conditioning:
        """Embed each prompt by itself, so that none is padded inside the networks.

        kind: what the prompts are for, "video", "image" or "image_edit". images: uint8 [3, H, W],
        one for each prompt of an edit, and none for other kinds. Raises TypeError unless given a
        list of str, and ValueError for an empty list, an unknown kind, another number of images, or
        an edit of too many tokens.
        """
        if isinstance(prompts, str) or not all(isinstance(prompt, str) for prompt in prompts):
            raise TypeError(
                "encode needs a list of prompts, each a str; put a single prompt into a list"
            )
        if kind not in KINDS:
            raise ValueError(
                f"a prompt is for {' or '.join(KINDS)}, got {kind!r}; choose one of them"
            )
        pictures = images or []
        if not prompts or len(pictures) != (len(prompts) if kind == "image_edit" else 0):
            raise ValueError(
                "encode needs at least one prompt, and an image for each of an image_edit only, "
                f"got {len(prompts)} prompts and {len(pictures)} images for kind {kind}; "
                "pass as many"
            )
        shown: Sequence[Tensor | None] = pictures or [None] * len(prompts)
        rows = [
            self._embedded(prompt, kind, picture)
            for prompt, picture in zip(prompts, shown, strict=True)
        ]
        embeds = [row["embeds"] for row in rows]
        padded = nn.utils.rnn.pad_sequence(embeds, batch_first=True)  # [B, L, Dt]
        lengths = torch.tensor([len(one) for one in embeds])
        pooled = torch.stack([row["pooled"] for row in rows])  # [B, Dp]
        return Conditioning(padded.to(self.device), lengths, pooled.to(self.device))

    @torch.no_grad()
    def expand(self, prompt: str, kind: str = "video", image: Tensor | None = None) -> str:
        """The prompt rewritten in English and in detail by the language model; the same prompt
        always gives the same text.

        image: uint8 [3, H, W], what a video begins with or an "image_edit" changes. Raises
        ValueError for other combinations.
        """
        text, shrink = request(prompt, kind, image)

        def write() -> dict[str, Tensor]:
            tokenizer = self.parts.tokenizer
            embeds, places = self._sequence(text, image, shrink)
            stops = tokenizer.convert_tokens_to_ids(list(STOPS))
            networks = self._network("language"), self._network("head")
            tokens = continue_greedily(*networks, embeds, places, stops)
            written = tokenizer.decode(tokens, skip_special_tokens=True)
            return {"text": torch.tensor(list(written.encode()), dtype=torch.uint8)}

        stored = self._remembered(write, image, request=text)["text"]
        written = bytes(stored.tolist()).decode().strip()
        _log.info("expanded prompt: %s", written or "empty, so the prompt stays as it is")
        return written or prompt

    def _embedded(self, prompt: str, kind: str, image: Tensor | None) -> dict[str, Tensor]:
        """embeds [L, Dt] and pooled [Dp] of one prompt."""

        def compute() -> dict[str, Tensor]:
            text = self.template(kind).replace("{}", prompt)
            crop = self.crop(kind)
            if image is None:
                embeds, places = self._sequence(text, most=crop + self.max_length)
            else:
                embeds, places = self._sequence(text + PICTURE + END, image, EDIT_SHRINK)
                length = embeds.shape[1] - crop
                if length > EDIT_TOKENS:
                    raise ValueError(
                        f"an edit may have {EDIT_TOKENS} tokens, got {length} of prompt and "
                        "picture; shorten the prompt or take a smaller picture"
                    )
            language = self._network("language")
            output = language(inputs_embeds=embeds, position_ids=places, use_cache=False)
            hidden = output.last_hidden_state  # [1, crop + L, Dt]
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
        """What `compute` returns, or what the cache has for the same wish and image."""
        if self.cache is None:
            return compute()
        image_sum = None if image is None else checksum({"image": image.cpu()})
        return self.cache.remember(compute, image=image_sum, **wish)

    def _sequence(
        self, text: str, image: Tensor | None = None, shrink: int = 1, most: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """Embeddings [1, L, Dt] and positions [4, 1, L] of a text, which may hold an image.

        image: uint8 [3, H, W] for the place that `PLACEHOLDER` marks, shown `shrink` times smaller.
        most: the number of tokens at which a text without an image is cut.
        """
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
        embeds = [look_up(language, part[:most]) for part in tokens]  # each [1, L, Dt]
        if image is None:
            return embeds[0], positions(embeds[0].shape[1]).to(embeds[0].device)
        before, after = embeds
        seen, rows, columns = self._seen(image, shrink)
        places = positions(before.shape[1], rows, columns, after.shape[1])
        return torch.cat([before, seen.to(before), after], dim=1), places.to(before.device)

    def _seen(self, image: Tensor, shrink: int) -> tuple[Tensor, int, int]:
        """Features [1, rows * columns, Dt] of an image's tokens, and the rows and columns."""
        vision: Any = self._network("vision")  # of a class of transformers
        preprocessor = self.parts.preprocessor
        patches, rows, columns = preprocessor.patches(image, shrink)
        grid = torch.tensor([[1, rows, columns]], device=vision.device)
        output = vision(patches.to(vision.device, vision.dtype), grid_thw=grid)
        # transformers < 5 returns the features [rows * columns, Dt] themselves
        features = getattr(output, "pooler_output", output)
        merge = preprocessor.merge_size
        return features[None], rows // merge, columns // merge

    def _tokens(self, text: str) -> list[int]:
        return self.parts.tokenizer(text)["input_ids"] if text else []

    def _pooled(self, prompt: str) -> Tensor:
        """CLIP's pooled vector [Dp] of a prompt."""
        tokens = self.parts.clip_tokenizer(
            prompt,
            max_length=CLIP_TOKENS,
            truncation=True,
            padding="max_length",
            return_tensors="pt",
        )
        return self._network("clip")(**tokens.to(self.device)).pooler_output[0]

    def _network(self, name: str) -> nn.Module:
        """A network of the parts, on the device. From now on it is a child of this module."""
        self.add_module(name, getattr(self.parts, name))
        return self._place(getattr(self, name))
