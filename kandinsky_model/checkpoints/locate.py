# SPDX-License-Identifier: Apache-2.0
"""A model's name -> where each of its parts lies on this disk, and the settings it was released
for.

A name is a preset, a path, or a hub repository `owner/name` (downloaded once into the hub library's
cache; its HF_HOME and HF_HUB_OFFLINE are honoured). Three layouts are understood:

- diffusers: `transformer/ vae/ text_encoder/ tokenizer/ text_encoder_2/ tokenizer_2/`; the bundled
  model has the first three;
- official folder: `model/<one>.safetensors vae/ text_encoder/ text_encoder2/`, for image
  checkpoints with `flux/vae/`;
- official file: a .safetensors file whose folder, or the folder above it, holds the other parts.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from ..config import PRESETS, DiTConfig, Preset, get_preset
from .configs import infer_dit_config, read_dit_config
from .headers import find_weights, read_headers

TINY = Path(__file__).parents[1] / "tiny" / "weights"
PARTS = ("text", "dit", "vae")
# diffusers' folder -> the part it belongs to
FOLDERS = {"vae": "vae", "text_encoder": "text", "text_encoder_2": "text"}
OFFICIAL_NAMES = {
    "vae": "vae",
    "image vae": "flux/vae",
    "text_encoder": "text_encoder",
    "text_encoder_2": "text_encoder2",
}
PATTERNS = ("*.safetensors", "*.json", "*.txt")  # never pickles
# What the official checkpoints share, in the repositories that publish it.
SHARED_REPOS = {
    "vae": ("hunyuanvideo-community/HunyuanVideo", ("vae/*.safetensors", "vae/*.json")),
    "image vae": ("black-forest-labs/FLUX.1-dev", ("vae/*.safetensors", "vae/*.json")),
    "text_encoder": ("Qwen/Qwen2.5-VL-7B-Instruct", PATTERNS),
    "text_encoder_2": ("openai/clip-vit-large-patch14", PATTERNS),
}
PRESET_KEY = "kandinsky_preset"  # of the config.json of a transformer that was trained here
_REPO = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True)
class Sources:
    """One model: `dit` is a file or folder, the others folders. Parts that were not asked for are
    None, as is what tiny lacks."""

    name: str
    preset: Preset
    dit: Path | None = None
    vae: Path | None = None
    text_encoder: Path | None = None
    tokenizer: Path | None = None
    text_encoder_2: Path | None = None
    tokenizer_2: Path | None = None


@dataclass(frozen=True)
class _Request:
    name: str
    preset: Preset
    places: Mapping[str, Path]
    parts: Collection[str]
    shared: bool = False  # whether missing parts may come from SHARED_REPOS

    @property
    def folders(self) -> list[str]:
        return [folder for folder, part in FOLDERS.items() if part in self.parts]


def locate(
    model: str | Path,
    revision: str | None = None,
    fallback: str = "t2v-lite-sft-5s",
    places: Mapping[str, str | Path] | None = None,
    parts: Collection[str] = PARTS,
) -> Sources:
    """Find the `parts` of `model`. `places` may give the folders "vae", "text_encoder" and
    "text_encoder_2" explicitly.

    Settings are those of the preset whose repository or file this is, else of the first preset with
    such a network, else of the preset `fallback`; and what the folder's own configuration files
    say. Raises ValueError for a name that is none of the three kinds, OSError for missing parts,
    RuntimeError when the hub has no answer.
    """
    name = str(model)
    places = {key: Path(path).expanduser() for key, path in (places or {}).items() if path}
    path = Path(name).expanduser()
    for given, known in ((places, FOLDERS), (parts, PARTS)):
        if set(given) - set(known):
            raise TypeError(
                f"a model's parts are {', '.join(known)}, got "
                f"{', '.join(sorted(set(given) - set(known)))}; drop it"
            )
    if name == "tiny":
        return _in_folder(TINY, _Request(name, get_preset("tiny"), places, parts))
    if name in PRESETS:
        request = _Request(name, PRESETS[name], places, parts, shared=True)
        file = f"model/{request.preset.filename}"
        return _official(
            download(request.preset.repo, (file, "*.json"), revision) / file
            if "dit" in parts
            else path,
            request,
        )
    if path.exists():
        request = _Request(
            name, recognise(path) or _like(path) or get_preset(fallback), places, parts
        )
        return (_in_folder if path.is_dir() else _official)(path, request)
    if _REPO.fullmatch(name) and path.suffix != ".safetensors":
        weights = [f"{folder}/*.safetensors" for folder, part in FOLDERS.items() if part in parts]
        weights += ["transformer/*.safetensors", "model/*.safetensors"] if "dit" in parts else []
        root = download(name, (*weights, "*.json", "*.txt"), revision)
        return _in_folder(
            root,
            _Request(
                name,
                recognise(path) or _like(root) or get_preset(fallback),
                places,
                parts,
                shared=True,
            ),
        )
    try:
        get_preset(name)
    except ValueError as error:
        raise ValueError(
            f"a model is a preset, an existing path or a hub repository owner/name, but {error}"
        ) from None
    raise AssertionError("presets were handled above")


def download(repo: str, patterns: tuple[str, ...], revision: str | None = None) -> Path:
    """The local folder of a hub repository's files, fetched where the cache lacks them;
    RuntimeError, in one sentence, otherwise."""
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise RuntimeError(
            f"the repository {repo} requires huggingface_hub, which cannot be "
            f"imported ({error}); install it"
        ) from error
    try:
        return Path(snapshot_download(repo, revision=revision, allow_patterns=list(patterns)))
    except Exception as error:  # the library's errors have no common base, and run over many lines
        if type(error).__name__ == "GatedRepoError":
            raise RuntimeError(
                f"{repo} is given out only to those who accepted its licence; "
                f"accept it on the hub's page of {repo}, log in "
                "with `hf auth login`, or give a local path"
            ) from error
        raise RuntimeError(
            f"{repo} is needed, but it is neither in the hub cache nor can it be "
            f"downloaded now ({type(error).__name__}); "
            "check its name, the network and HF_HUB_OFFLINE, or give a local path"
        ) from error


def recognise(path: Path) -> Preset | None:
    """The preset that was published under this file or repository name."""
    for preset in PRESETS.values():
        repo = preset.repo.rpartition("/")[2]
        if repo and path.name in (preset.filename, repo, f"{repo}-Diffusers"):
            return preset
    return None


def _like(path: Path) -> Preset | None:
    """The preset that what lies at `path` was trained from here, or the first whose network has its
    sizes: a file may have any name."""
    try:
        files, folder = find_weights(path, "transformer")
        known = PRESETS.get(read_json(folder / "config.json").get(PRESET_KEY))
        if known is not None:
            return known
        config = read_dit_config(folder)[0] or infer_dit_config(read_headers(files))
    except (OSError, ValueError):
        return None  # whoever loads it says what is wrong
    sizes = _sizes(config)
    return next((preset for preset in PRESETS.values() if _sizes(preset.dit) == sizes), None)


def _sizes(config: DiTConfig) -> DiTConfig:
    """`config` with one name for 33 input channels, which image editing checkpoints call otherwise
    than video ones."""
    return replace(
        config, visual_cond=config.in_channels > config.in_visual_dim, instruct_type=None
    )


def _in_folder(root: Path, request: _Request) -> Sources:
    transformer = root / "transformer"
    if not transformer.is_dir():
        return _official(
            find_weights(root, "transformer")[0][0]
            if "dit" in request.parts
            else root / "model" / "none",
            request,
        )
    found = {folder: request.places.get(folder, root / folder) for folder in request.folders}
    preset = _settings(root, request.preset)
    tokenizers = {}
    # the small learned encoder of the bundled model
    if "words" in read_json(root / "text_encoder" / "config.json"):
        found.pop("text_encoder_2", None)
        tiny = get_preset("tiny")
        preset = replace(tiny, dit=preset.dit, nabla=preset.nabla)
    elif "text" in request.parts:
        tokenizers = {
            "tokenizer": _first(root / "tokenizer", found["text_encoder"]),
            "tokenizer_2": _first(root / "tokenizer_2", found["text_encoder_2"]),
        }
    _require(found, request.name)
    return Sources(
        request.name, preset, transformer if "dit" in request.parts else None, **found, **tokenizers
    )


def _official(file: Path, request: _Request) -> Sources:
    found = {}
    for folder in request.folders:
        published = "image vae" if folder == "vae" and request.preset.vae is None else folder
        nearby = [root / OFFICIAL_NAMES[published] for root in (file.parent, file.parent.parent)]
        there = [place for place in nearby if place.is_dir()]
        if folder in request.places or there:
            found[folder] = request.places.get(folder) or there[0]
        elif request.shared:
            repo, patterns = SHARED_REPOS[published]
            found[folder] = download(repo, patterns) / ("vae" if folder == "vae" else "")
        else:
            found[folder] = nearby[1]
    _require(found, request.name)
    return Sources(
        request.name,
        request.preset,
        file if "dit" in request.parts else None,
        **found,
        tokenizer=found.get("text_encoder"),
        tokenizer_2=found.get("text_encoder_2"),
    )


def _first(wanted: Path, otherwise: Path) -> Path:
    return wanted if wanted.is_dir() else otherwise


def _require(found: Mapping[str, Path], name: str) -> None:
    missing = [f"{key} at {folder}" for key, folder in found.items() if not folder.is_dir()]
    if missing:
        raise FileNotFoundError(
            f"the model {name} requires all its parts, but there is no "
            f"{' and no '.join(missing)}; "
            "complete the folder or say where the part is"
        )


def _settings(root: Path, preset: Preset) -> Preset:
    """`preset` with what the folder's own configuration files say about size, attention and
    schedule."""
    config, nabla = read_dit_config(root / "transformer")
    if config is not None:
        preset = replace(preset, dit=config, nabla=nabla)
    if recognise(root) is None:
        shift = read_json(root / "scheduler" / "scheduler_config.json").get("shift")
        preset = replace(preset, scheduler_scale=float(shift or preset.scheduler_scale))
    return preset


def read_json(path: Path) -> dict:
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except ValueError as error:
        raise ValueError(f"{path} must be valid JSON, got {error}; download it again") from error
