# SPDX-License-Identifier: Apache-2.0
"""Prompts to embeddings: what the diffusion transformer reads, behind one method, `encode(prompts,
kind, images) -> TextEmbeddings`."""

from __future__ import annotations

import json
import re
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from .embeddings import TextEmbeddings

CONFIG_NAME, WEIGHTS_NAME = "config.json", "model.safetensors"
START, UNKNOWN = 0, 1  # vocabulary indices with a meaning of their own


class TinyTextEncoder(nn.Module):
    """Words of a closed vocabulary -> embeddings mixed by one transformer layer, small enough to be
    bundled.

    A sequence is a start token and the prompt's words in lower case, cut at `max_length` tokens.
    Words outside the vocabulary become one learned unknown word; an empty prompt is the start token
    alone, which training uses as the unconditional prompt. `aliases` maps further spellings to
    words of the vocabulary.
    """

    def __init__(
        self,
        words: list[str],
        aliases: dict[str, str] | None = None,
        dim: int = 64,
        pooled_dim: int = 64,
        max_length: int = 24,
    ):
        super().__init__()
        strangers = sorted(set((aliases or {}).values()) - set(words))
        if strangers:
            raise ValueError(
                f"aliases must lead to words of the vocabulary, got {strangers[:3]}; "
                "add them to the words"
            )
        self.config = {
            "words": list(words),
            "aliases": dict(aliases or {}),
            "dim": dim,
            "pooled_dim": pooled_dim,
            "max_length": max_length,
        }
        self._index = {word: i + 2 for i, word in enumerate(words)}
        self.word_embedding = nn.Embedding(len(words) + 2, dim)
        self.position_embedding = nn.Embedding(max_length, dim)
        self.attention_norm, self.feed_norm, self.out_norm = (nn.LayerNorm(dim) for _ in range(3))
        self.attention_in, self.attention_out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.feed_in, self.feed_out = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)
        self.pool = nn.Linear(dim, pooled_dim)
        nn.init.normal_(self.position_embedding.weight, std=0.2)

    def tokens(self, prompt: str) -> list[int]:
        """Vocabulary indices of a prompt, the start token first. Raises TypeError for anything but
        a str."""
        if not isinstance(prompt, str):
            raise TypeError(
                f"a prompt must be a str, got {type(prompt).__name__}; pass a list of str to encode"
            )
        aliases = self.config["aliases"]
        words = re.findall(r"\w+", prompt.lower())
        return [START, *(self._index.get(aliases.get(word, word), UNKNOWN) for word in words)][
            : self.config["max_length"]
        ]

    def unknown_words(self, prompt: str) -> list[str]:
        """The words of a prompt that the vocabulary lacks; they all read as the same unknown
        word."""
        aliases = self.config["aliases"]
        return [
            word
            for word in re.findall(r"\w+", prompt.lower())
            if aliases.get(word, word) not in self._index
        ]

    def encode(
        self, prompts: list[str], kind: str = "video", images: list[Tensor] | None = None
    ) -> TextEmbeddings:
        """Embed prompts together; a prompt's rows do not depend on its neighbours. Raises
        TypeError, or ValueError for an empty list.

        kind and images, which other encoders read, change nothing.
        """
        if isinstance(prompts, str):
            raise TypeError("encode needs a list of prompts, got one str; put it into a list")
        if not prompts:
            raise ValueError(
                "encode needs at least one prompt, got an empty list; the empty prompt is ['']"
            )
        return self([self.tokens(prompt) for prompt in prompts])

    def expand(self, *_) -> str:
        """There is no language model to write with: raises ValueError."""
        raise ValueError(
            "a prompt is expanded by the language model of a released checkpoint, "
            "which tiny lacks; leave expand_prompt out"
        )

    def forward(self, sequences: list[list[int]]) -> TextEmbeddings:
        """Token indices, one non-empty list per prompt -> TextEmbeddings."""
        lengths = torch.tensor([len(sequence) for sequence in sequences])
        longest, device = int(lengths.max()), self.word_embedding.weight.device
        padded = [sequence + [START] * (longest - len(sequence)) for sequence in sequences]
        there = (torch.arange(longest) < lengths[:, None]).to(device)  # [B, L]
        # [B, L, Dt]
        x = (
            self.word_embedding(torch.tensor(padded, device=device))
            + self.position_embedding.weight[:longest]
        )
        query, key, value = self.attention_in(self.attention_norm(x)).chunk(3, dim=-1)
        x = x + self.attention_out(
            F.scaled_dot_product_attention(query, key, value, attn_mask=there[:, None])
        )
        x = x + self.feed_out(F.gelu(self.feed_in(self.feed_norm(x))))
        embeds = self.out_norm(x) * there[..., None]
        pooled = self.pool(embeds.sum(1) / there.sum(1, keepdim=True))  # [B, Dp]
        return TextEmbeddings(embeds, lengths, pooled)

    def save(self, folder: str | Path, dtype: torch.dtype = torch.float32) -> None:
        """Write config.json and model.safetensors, weights stored as `dtype`."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / CONFIG_NAME).write_text(
            json.dumps(self.config, indent=2) + "\n", encoding="utf-8"
        )
        save_file(
            {
                name: tensor.detach().to(dtype).contiguous()
                for name, tensor in self.state_dict().items()
            },
            folder / WEIGHTS_NAME,
        )

    @classmethod
    def load(cls, folder: str | Path) -> TinyTextEncoder:
        """Read what `save` wrote, strictly, into fp32. Raises ValueError naming the folder when it
        is incomplete or does not fit."""
        folder = Path(folder)
        try:
            encoder = cls(**json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8")))
            encoder.load_state_dict(
                {name: tensor.float() for name, tensor in load_file(folder / WEIGHTS_NAME).items()}
            )
        # missing file, JSON, safetensors and state-dict errors share no base class
        except Exception as error:
            reason = " ".join(str(error).split())[:200]
            raise ValueError(
                f"a text encoder needs {CONFIG_NAME} and {WEIGHTS_NAME} that fit, "
                f"got {folder}: {reason}"
            ) from error
        return encoder.eval()
