# SPDX-License-Identifier: Apache-2.0
"""The text encoder of the bundled model: words of a small vocabulary become embeddings."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from ..files import check_regular, replacing
from .embeddings import Conditioning

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "model.safetensors"
# The first indices of the vocabulary: the start of every prompt, and every unknown word.
START, UNKNOWN, FIRST_WORD = range(3)
POSITION_STD = 0.2  # of untrained position embeddings


class TinyTextEncoder(nn.Module):
    """Embeddings of a prompt's words, mixed by one transformer layer.

    A prompt becomes a start token and its words in lower case, cut at `max_length` tokens. Words
    outside the vocabulary become one learned unknown word. An empty prompt is the start token
    alone, which training uses as the unconditional prompt.

    words: the vocabulary. aliases: further spellings, each with its word of the vocabulary.
    dim, pooled_dim: channels of the embeddings and of the pooled vector.
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
        aliases = dict(aliases or {})
        strangers = sorted(set(aliases.values()) - set(words))
        if strangers:
            raise ValueError(
                f"aliases must lead to words of the vocabulary, got {strangers[:3]}; "
                "add them to the words"
            )
        self.config: dict[str, Any] = {
            "words": list(words),
            "aliases": aliases,
            "dim": dim,
            "pooled_dim": pooled_dim,
            "max_length": max_length,
        }
        self._index = {word: index for index, word in enumerate(words, FIRST_WORD)}
        self.word_embedding = nn.Embedding(len(words) + FIRST_WORD, dim)
        self.position_embedding = nn.Embedding(max_length, dim)
        self.attention_norm = nn.LayerNorm(dim)
        self.feed_norm = nn.LayerNorm(dim)
        self.out_norm = nn.LayerNorm(dim)
        self.attention_in = nn.Linear(dim, 3 * dim)
        self.attention_out = nn.Linear(dim, dim)
        self.feed_in = nn.Linear(dim, 4 * dim)
        self.feed_out = nn.Linear(4 * dim, dim)
        self.pool = nn.Linear(dim, pooled_dim)
        nn.init.normal_(self.position_embedding.weight, std=POSITION_STD)

    def tokens(self, prompt: str) -> list[int]:
        """Vocabulary indices of a prompt, the start token first. Raises TypeError for anything but
        a str."""
        if not isinstance(prompt, str):
            raise TypeError(
                f"a prompt must be a str, got {type(prompt).__name__}; pass a list of str to encode"
            )
        words = [word for _, word in self._words(prompt)]
        tokens = [START, *(self._index.get(word, UNKNOWN) for word in words)]
        return tokens[: self.config["max_length"]]

    def unknown_words(self, prompt: str) -> list[str]:
        """The words of a prompt that the vocabulary lacks; all of them become the same token."""
        return [written for written, word in self._words(prompt) if word not in self._index]

    def _words(self, prompt: str) -> list[tuple[str, str]]:
        """(as written, in lower case; as the vocabulary spells it) for every word of a prompt."""
        aliases = self.config["aliases"]
        return [(word, aliases.get(word, word)) for word in re.findall(r"\w+", prompt.lower())]

    def encode(
        self, prompts: list[str], kind: str = "video", images: list[Tensor] | None = None
    ) -> Conditioning:
        """Embed prompts together; a prompt's rows do not depend on its neighbours.

        kind, images: for other encoders; they change nothing here. Raises TypeError for a single
        str, ValueError for an empty list.
        """
        if isinstance(prompts, str):
            raise TypeError("encode needs a list of prompts, got one str; put it into a list")
        if not prompts:
            raise ValueError(
                "encode needs at least one prompt, got an empty list; the empty prompt is ['']"
            )
        return self([self.tokens(prompt) for prompt in prompts])

    def expand(self, *_) -> str:
        """Raises ValueError, because there is no language model that could write."""
        raise ValueError(
            "a prompt is expanded by the language model of a released checkpoint, "
            "which tiny lacks; leave expand_prompt out"
        )

    def forward(self, sequences: list[list[int]]) -> Conditioning:
        """sequences: for each of B prompts its vocabulary indices, at least one."""
        device = self.word_embedding.weight.device
        lengths = torch.tensor([len(sequence) for sequence in sequences])  # [B]
        longest = int(lengths.max())
        padded = [sequence + [START] * (longest - len(sequence)) for sequence in sequences]
        places = torch.arange(longest)
        is_text = (places < lengths[:, None]).to(device)  # [B, L]
        x = self.word_embedding(torch.tensor(padded, device=device))  # [B, L, Dt]
        x = x + self.position_embedding.weight[:longest]
        query, key, value = self.attention_in(self.attention_norm(x)).chunk(3, dim=-1)
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=is_text[:, None])
        x = x + self.attention_out(attended)
        x = x + self.feed_out(F.gelu(self.feed_in(self.feed_norm(x))))
        embeds = self.out_norm(x) * is_text[..., None]
        pooled = self.pool(embeds.sum(1) / is_text.sum(1, keepdim=True))  # [B, Dp]
        return Conditioning(embeds, lengths, pooled)

    def save(self, folder: str | Path, dtype: torch.dtype = torch.float32) -> None:
        """Write config.json and model.safetensors, with weights stored as `dtype`. Each file is
        written whole or not at all."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        config = json.dumps(self.config, indent=2) + "\n"
        with replacing(folder / CONFIG_NAME) as target:
            target.write_text(config, encoding="utf-8")
        weights = {
            name: tensor.detach().to(dtype).contiguous()
            for name, tensor in self.state_dict().items()
        }
        with replacing(folder / WEIGHTS_NAME) as target:
            save_file(weights, target)

    @classmethod
    def load(cls, folder: str | Path) -> TinyTextEncoder:
        """Read what `save` wrote, strictly, into fp32. Raises ValueError, naming the folder, where
        something does not fit, and what `check_regular` raises."""
        folder = Path(folder)
        for name in (CONFIG_NAME, WEIGHTS_NAME):
            check_regular(folder / name)
        try:
            encoder = cls(**json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8")))
            weights = load_file(folder / WEIGHTS_NAME)
            encoder.load_state_dict({name: tensor.float() for name, tensor in weights.items()})
        # missing file, JSON, safetensors and state-dict errors share no base class
        except Exception as error:
            reason = " ".join(str(error).split())[:200]
            raise ValueError(
                f"a text encoder needs {CONFIG_NAME} and {WEIGHTS_NAME} that fit, "
                f"got {folder}: {reason}"
            ) from error
        return encoder.eval()
