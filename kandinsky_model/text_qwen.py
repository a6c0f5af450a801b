# SPDX-License-Identifier: Apache-2.0
"""Prompts to embeddings as the released checkpoints read them: hidden states of Qwen2.5-VL, and CLIP's pooled vector.

The prompt stands in a fixed instruction that the checkpoints were trained with. Its text is not kept here: it is taken from the
installed diffusers at run time and accepted only when its SHA-256 is that of the official one.
"""

from __future__ import annotations

import hashlib
import inspect
import logging
import re
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn

from .text import TextEmbeddings
from .weights import find_weights, read_headers

# What is made -> the pipeline of diffusers that holds its instruction, and the instruction's SHA-256.
TEMPLATES = {
    "video": ("Kandinsky5T2VPipeline", "09efacd0c7584e236b605dfa1d8b76e87051f5d4ca99f79243e46cbec993c3bc"),
    "image": ("Kandinsky5T2IPipeline", "04de998d6e835997641241c6d0ec3dc0fab9e8c70f87dccf98333822ccdff04f"),
    "image_edit": ("Kandinsky5I2IPipeline", "8cd783f4ed62c3dd395209b429809f5fe5ef9fb9ef684bc4d17d611503757db9"),
}
OFFICIAL_CROPS = {"image_edit": 55}  # three tokens more than its instruction has, so that the prompt loses as many: trained like that
VIDEO_NEGATIVE_SHA256 = "0c7acab80fec7c0fc9195770616e90570e9a33cb4a1826f11a65215582119e82"
CLIP_TOKENS = 77

_log = logging.getLogger(__name__)


class QwenClipEncoder(nn.Module):
    """Qwen's language model without its head, a CLIP text model and their tokenizers, behind `encode` of `text.TextEmbeddings`.

    `template` holds one `{}` for the prompt of a video; those for a still "image" and an "image_edit" are the official ones, looked up
    when first used. The hidden states of what precedes the prompt are dropped, and at most `max_length` tokens are kept after it. Qwen
    sees token indices only and is causal, so a prompt's rows depend on nothing behind them.
    """

    def __init__(self, qwen: nn.Module, tokenizer, clip: nn.Module, clip_tokenizer, template: str, max_length: int = 256):
        super().__init__()
        if template.count("{}") != 1:
            raise ValueError(f"a template needs exactly one {{}} for the prompt, got {template.count('{}')}; pass such a text")
        self.qwen, self.tokenizer, self.clip, self.clip_tokenizer = qwen, tokenizer, clip, clip_tokenizer
        self.templates, self.max_length = {"video": template}, max_length

    @property
    def default_negative(self) -> str:
        """What the checkpoints are usually steered away from; empty, with a warning, where diffusers no longer has it."""
        return official_negative()

    def template(self, kind: str) -> tuple[str, int]:
        """The instruction for a "video", "image" or "image_edit", and how many tokens of it are dropped."""
        if kind not in self.templates:
            self.templates[kind] = official_template(kind)
        text = self.templates[kind]
        return text, OFFICIAL_CROPS.get(kind) or len(self.tokenizer(text.partition("{}")[0])["input_ids"])

    @torch.no_grad()
    def encode(self, prompts: list[str], kind: str = "video") -> TextEmbeddings:
        """Embed each prompt by itself, so that none is padded inside the models, as the wish for a "video", "image" or "image_edit".

        Raises TypeError unless given a list of str, ValueError for another kind.
        """
        if isinstance(prompts, str) or not all(isinstance(prompt, str) for prompt in prompts):
            raise TypeError("encode needs a list of prompts, each a str; put a single prompt into a list")
        template = self.template(kind)
        rows = [self._hidden_states(prompt, *template) for prompt in prompts]
        lengths = torch.tensor([len(row) for row in rows])
        return TextEmbeddings(nn.utils.rnn.pad_sequence(rows, batch_first=True), lengths, self._pooled(prompts))

    def _hidden_states(self, prompt: str, template: str, crop: int) -> Tensor:
        ids = self.tokenizer(template.replace("{}", prompt), return_tensors="pt")["input_ids"]  # [1, crop + L]
        if ids.shape[1] > crop + self.max_length:
            _log.warning("the prompt has %d tokens; only the first %d are read", ids.shape[1] - crop, self.max_length)
            ids = ids[:, : crop + self.max_length]
        hidden = self.qwen(input_ids=ids.to(self.qwen.device), use_cache=False).last_hidden_state
        return hidden[0, crop:]  # [L, Dt]

    def _pooled(self, prompts: list[str]) -> Tensor:
        tokens = self.clip_tokenizer(prompts, max_length=CLIP_TOKENS, truncation=True, padding="max_length", return_tensors="pt")
        return self.clip(**tokens.to(self.clip.device)).pooler_output  # [B, Dp]

    @classmethod
    def load(cls, sources, dtype: torch.dtype = torch.float32, template: str | None = None) -> QwenClipEncoder:
        """Read both encoders named by `locate.Sources`; the vision part and the output head stay on disk. CLIP is kept in fp32.

        Raises RuntimeError without transformers (or, for the template, diffusers), ValueError for files that are damaged or lack tensors.
        """
        try:
            from transformers import AutoConfig, AutoTokenizer, CLIPTextModel, CLIPTokenizer
            from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLTextModel
        except ImportError as error:
            raise RuntimeError(f"this checkpoint's text encoders require transformers >= 4.57, which cannot be imported ({error}); "
                               "pip install 'kandinsky-kernels[text]'") from error

        config = AutoConfig.from_pretrained(sources.text_encoder, local_files_only=True)
        qwen = _from_folder(Qwen2_5_VLTextModel, sources.text_encoder, dtype, config=config.text_config,
                            key_mapping={r"^model\.language_model\.": "model."})
        clip = _from_folder(CLIPTextModel, sources.text_encoder_2, torch.float32)
        return cls(qwen, AutoTokenizer.from_pretrained(sources.tokenizer, local_files_only=True), clip,
                   CLIPTokenizer.from_pretrained(sources.tokenizer_2, local_files_only=True),
                   template or official_template(), sources.preset.text_max_length)


def _from_folder(kind: type, folder: Path, dtype: torch.dtype, **options) -> nn.Module:
    """`kind.from_pretrained`, strict about missing tensors and silent about those of other parts; damaged files are named first."""
    # The subclass keeps name and module, because transformers >= 5 picks its renaming of old tensor names by them.
    kind = type(kind.__name__, (kind,), {"_keys_to_ignore_on_load_unexpected": [""], "__module__": kind.__module__})
    read_headers(find_weights(folder, "text_encoder")[0])
    model, report = kind.from_pretrained(folder, dtype=dtype, local_files_only=True, use_safetensors=True, output_loading_info=True,
                                         **options)
    missing = sorted(report["missing_keys"])
    if missing:
        raise ValueError(f"the text encoder in {folder} must be complete, but {len(missing)} tensors are missing, {missing[0]} first; "
                         "download it again")
    return model.eval().requires_grad_(False)


@cache
def official_template(kind: str = "video") -> str:
    """The instruction around every prompt of a kind; RuntimeError where the installed diffusers does not hold the official text."""
    if kind not in TEMPLATES:
        raise ValueError(f"an instruction is for {' or '.join(TEMPLATES)}, got {kind!r}; choose one of them")
    pipeline, digest = TEMPLATES[kind]
    names = ("transformer", "vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "scheduler")
    text = _diffusers_pipeline(pipeline)(**dict.fromkeys(names)).prompt_template
    if kind == "image_edit":  # diffusers' lacks two line ends and holds the picture's place, which comes with the picture
        text = text.partition("{}")[0].replace("<|im_end|><|im_start|>user", "<|im_end|>\n<|im_start|>user\n") + "{}"
    # diffusers >= 0.41 corrects a spelling that the checkpoints were trained with.
    for candidate in (text, text.replace("a prompt engineer", "a promt engineer")):
        if hashlib.sha256(candidate.encode()).hexdigest() == digest:
            return candidate
    raise RuntimeError("the prompt template in the installed diffusers must be the official one, but its text has changed; "
                       "install diffusers 0.42 or pass template")


@cache
def official_negative() -> str:
    source = inspect.getsource(_diffusers_pipeline("Kandinsky5T2VPipeline").__call__)
    for text in re.findall(r'"([^"\n]+)"', source):
        if hashlib.sha256(text.encode()).hexdigest() == VIDEO_NEGATIVE_SHA256:
            return text
    _log.warning("the installed diffusers no longer holds the usual negative prompt, so an empty one is used; pass one to be sure")
    return ""


def _diffusers_pipeline(name: str) -> type:
    try:
        import diffusers

        return getattr(diffusers, name)
    except (ImportError, AttributeError) as error:
        raise RuntimeError(f"the prompt template is read from diffusers >= 0.37, which cannot be imported ({error}); "
                           "pip install diffusers, or pass template") from error
