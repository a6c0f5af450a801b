# SPDX-License-Identifier: Apache-2.0
"""A model's name -> where each of its parts lies on this disk, and the settings it was released
for.

A name is a preset, a path, or a hub repository `owner/name` (downloaded once into the hub library's
cache; its HF_HOME and HF_HUB_OFFLINE are honoured). Three layouts are understood:

- diffusers: `transformer/ vae/ text_encoder/ tokenizer/ text_encoder_2/ tokenizer_2/`; the bundled
  model has the first three;
- official folder: `model/<one>.safetensors vae/ text_encoder/ text_encoder2/`, for image
  checkpoints with `flux/vae/`;
- official file: a .safetensors file that holds the other parts too, or whose folder, or the folder
  above it, does.

The text encoders and the VAE may also be single files, as ComfyUI keeps them. Those hold weights
alone: their tokenizers come from where the model has them, or else from the hub.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from pathlib import Path

from ..config import PARTS, PRESETS, Preset, get_preset
from ..files import read_json
from .configs import read_dit_config
from .contents import parts_inside
from .headers import CONFIG_NAME, find_weights
from .presets import PRESET_KEY as PRESET_KEY
from .presets import check_preset, choose_preset

TINY = Path(__file__).parents[1] / "tiny" / "weights"
# Diffusers' folder -> the part it belongs to.
FOLDERS = {"vae": "vae", "text_encoder": "text", "text_encoder_2": "text"}
OFFICIAL_NAMES = {
    "vae": "vae",
    "image vae": "flux/vae",
    "text_encoder": "text_encoder",
    "text_encoder_2": "text_encoder2",
}
PATTERNS = ("*.safetensors", "*.json", "*.txt")  # never pickles
# What the official checkpoints share: the repositories that publish it, and the files in them.
SHARED_REPOS = {
    "vae": ("hunyuanvideo-community/HunyuanVideo", ("vae/*.safetensors", "vae/*.json")),
    "image vae": ("black-forest-labs/FLUX.1-dev", ("vae/*.safetensors", "vae/*.json")),
    "text_encoder": ("Qwen/Qwen2.5-VL-7B-Instruct", PATTERNS),
    "text_encoder_2": ("openai/clip-vit-large-patch14", PATTERNS),
}
# Each text encoder -> its tokenizer; in the hub's repository they lie together.
TOKENIZERS = {"text_encoder": "tokenizer", "text_encoder_2": "tokenizer_2"}
TOKENIZER_FILES = ("tokenizer.json", "vocab.json")
_REPO = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True)
class Sources:
    """Where one model's parts lie, as files or folders; tokenizers are folders. Parts that were not
    asked for are None, and so is what the bundled model lacks."""

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
    """What `locate` was called with, once the model is on this disk.

    preset: its settings; None where they are still to be found out. shared: whether missing parts
    may come from `SHARED_REPOS`.
    """

    name: str
    places: Mapping[str, Path]
    parts: Collection[str]
    fallback: str
    preset: Preset | None = None
    shared: bool = False

    @property
    def folders(self) -> list[str]:
        return [folder for folder, part in FOLDERS.items() if part in self.parts]

    def preset_of(self, path: Path) -> Preset:
        """The settings of the model at `path`."""
        if self.preset is not None:
            return self.preset
        return choose_preset(path, self.name, self.fallback)


def locate(
    model: str | Path,
    revision: str | None = None,
    fallback: str = "t2v-lite-sft-5s",
    places: Mapping[str, str | Path] | None = None,
    parts: Collection[str] = PARTS,
    preset: str | None = None,
) -> Sources:
    """Find the `parts` of `model`.

    places: files or folders "vae", "text_encoder" and "text_encoder_2" (or "clip"), and folders
    "tokenizer" and "tokenizer_2", where they do not lie with the model. preset: whose settings to
    take; None finds out by the sizes of the network, names and configurations (see presets.py), and
    takes `fallback` where nothing tells. What the folder's own configuration files say goes before
    any preset. Raises ValueError for a name that is none of the three kinds or a preset of another
    network, OSError for missing parts,
    RuntimeError when the hub has no answer.
    """
    name = str(model)
    path = Path(name).expanduser()
    given = {
        "text_encoder_2" if key == "clip" else key: Path(place).expanduser()
        for key, place in (places or {}).items()
        if place
    }
    _check_words(given, [*FOLDERS, *TOKENIZERS.values()])
    _check_words(parts, PARTS)
    named = get_preset(preset) if preset is not None else None
    request = _Request(name, given, parts, fallback, named)
    if name == "tiny":
        return _in_folder(TINY, replace(request, preset=named or get_preset("tiny")))
    if name in PRESETS:
        return _preset(request, PRESETS[name], revision)
    if path.exists():
        return _on_disk(path, request)
    if _REPO.fullmatch(name) and path.suffix.lower() not in (".safetensors", ".gguf"):
        root = download(name, _patterns(parts), revision)
        return _on_disk(root, replace(request, shared=True))
    try:
        get_preset(name)
    except ValueError as error:
        raise ValueError(
            f"a model is a preset, an existing path or a hub repository owner/name, but {error}"
        ) from None
    raise AssertionError("presets were handled above")


def _check_words(given: Collection[str], known: Collection[str]) -> None:
    unknown = sorted(set(given) - set(known))
    if unknown:
        raise TypeError(
            f"a model's parts are {', '.join(known)}, got {', '.join(unknown)}; drop it"
        )


def _preset(request: _Request, preset: Preset, revision: str | None) -> Sources:
    """The parts of a published checkpoint, from the hub."""
    file = Path("none") / preset.filename
    if "dit" in request.parts:
        inside = f"model/{preset.filename}"
        file = download(preset.repo, (inside, "*.json"), revision) / inside
    return _official(file, replace(request, preset=request.preset or preset, shared=True))


def _on_disk(path: Path, request: _Request) -> Sources:
    if request.preset is not None:
        check_preset(request.preset, path)
    return _in_folder(path, request) if path.is_dir() else _official(path, request)


def _patterns(parts: Collection[str]) -> tuple[str, ...]:
    """The files of these parts in a hub repository of either layout."""
    weights = [f"{folder}/*.safetensors" for folder, part in FOLDERS.items() if part in parts]
    if "dit" in parts:
        weights += ["transformer/*.safetensors", "model/*.safetensors"]
    return (*weights, "*.json", "*.txt")


_downloads = ContextVar("downloads", default=True)


@contextmanager
def without_downloads() -> Iterator[None]:
    """While the body runs, `locate` takes of the hub only what its cache has."""
    token = _downloads.set(False)
    try:
        yield
    finally:
        _downloads.reset(token)


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
        folder = snapshot_download(
            repo,
            revision=revision,
            allow_patterns=list(patterns),
            local_files_only=not _downloads.get(),
        )
        return Path(folder)
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


def _in_folder(root: Path, request: _Request) -> Sources:
    """A model in diffusers' layout; of another layout if the folder has no transformer/."""
    transformer = root / "transformer"
    if not transformer.is_dir():
        wanted = "dit" in request.parts
        file = find_weights(root, "transformer")[0][0] if wanted else root / "model" / "none"
        return _official(file, request)
    found = {folder: request.places.get(folder, root / folder) for folder in request.folders}
    tokenizers = {}
    if "words" in _read_if_there(root / "text_encoder" / CONFIG_NAME):
        # The small encoder of the bundled model has no second one, and the model its settings.
        _refuse_encoders(request)
        found.pop("text_encoder_2", None)
        tiny = get_preset("tiny")
        preset = _settings(root, request.preset or tiny)
        scale = (request.preset or tiny).scheduler_scale
        preset = replace(preset, vae=tiny.vae, text=tiny.text, scheduler_scale=scale)
    else:
        preset = _settings(root, request.preset_of(root))
        _require(found, request.name)
        tokenizers = _tokenizers(request, found, [root])
    _require(found, request.name)
    dit = transformer if "dit" in request.parts else None
    return Sources(request.name, preset, dit, **found, **tokenizers)


def _official(file: Path, request: _Request) -> Sources:
    """A model whose transformer is one file, with the other parts beside or above it, or, where
    they may be, from the repositories that publish them."""
    preset = request.preset_of(file)
    inside = parts_inside(file)
    roots = [file.parent, file.parent.parent]
    found = {}
    for folder in request.folders:
        published = "image vae" if folder == "vae" and preset.vae is None else folder
        nearby = [root / OFFICIAL_NAMES[published] for root in roots]
        there = [file] if folder in inside else [place for place in nearby if place.is_dir()]
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
        preset,
        file if "dit" in request.parts else None,
        **found,
        **_tokenizers(request, found, roots),
    )


def _tokenizers(
    request: _Request, found: Mapping[str, Path], roots: Collection[Path]
) -> dict[str, Path]:
    """The folder of the tokenizer of each text encoder that was found. roots: of the model."""
    return {
        tokenizer: _tokenizer(request, encoder, found[encoder], roots)
        for encoder, tokenizer in TOKENIZERS.items()
        if encoder in found
    }


def _tokenizer(request: _Request, encoder: str, place: Path, roots: Collection[Path]) -> Path:
    """Where the tokenizer of an encoder at `place` lies: where the user says, with the model, with
    the encoder or, for an encoder that is a file, on the hub."""
    name = TOKENIZERS[encoder]
    if name in request.places:
        return request.places[name]
    usual = [root / name for root in roots]
    if place.is_dir():
        return next((folder for folder in usual if folder.is_dir()), place)
    encoders = [root / one for root in roots for one in (encoder, OFFICIAL_NAMES[encoder])]
    # Right beside the file comes last: what lies there may be another encoder's.
    for folder in (place.parent / name, *usual, *encoders, place.parent):
        if any((folder / file).is_file() for file in TOKENIZER_FILES):
            return folder
    repo, _ = SHARED_REPOS[encoder]
    try:
        return download(repo, ("*.json", "*.txt"))
    except RuntimeError as error:
        raise RuntimeError(
            f"{place} holds weights alone, and its tokenizer is neither in {place.parent / name} "
            f"nor in the model's folder nor to be had from the hub ({error}); put the .json and "
            f".txt files of {repo} into {place.parent / name}"
        ) from error


def _refuse_encoders(request: _Request) -> None:
    """ValueError for text encoders that the user gives to a model with a small one of its own."""
    for name, place in request.places.items():
        small = name == "text_encoder" and "words" in _read_if_there(place / CONFIG_NAME)
        if name != "vae" and not small:
            raise ValueError(
                f"the model {request.name} reads prompts with a small text encoder of its own, "
                f"got {place} as {name}; leave it out"
            )


def _require(found: Mapping[str, Path], name: str) -> None:
    missing = [f"{key} at {place}" for key, place in found.items() if not place.exists()]
    if missing:
        raise FileNotFoundError(
            f"the model {name} requires all its parts, but there is no "
            f"{' and no '.join(missing)}; "
            "complete the folder or say where the part is"
        )


def _settings(root: Path, preset: Preset) -> Preset:
    """`preset` with what the folder's own configuration files say about sizes, attention and
    schedule."""
    config, nabla = read_dit_config(root / "transformer")
    if config is not None:
        preset = replace(preset, dit=config, nabla=nabla)
    path = root / "scheduler" / "scheduler_config.json"
    shift = _read_if_there(path).get("shift")
    if shift is None or _is_published(root):
        return preset
    if isinstance(shift, bool) or not isinstance(shift, (int, float)) or not 0 < shift < 1e6:
        raise ValueError(f"{path} must give a positive number as shift, got {shift!r}; correct it")
    return replace(preset, scheduler_scale=float(shift))


def _is_published(root: Path) -> bool:
    """Whether a folder is called as its repository is: the shift in those is not the model's."""
    names = {preset.repo.rpartition("/")[2] for preset in PRESETS.values() if preset.repo}
    return root.name in names | {f"{name}-Diffusers" for name in names}


def _read_if_there(path: Path) -> dict:
    return read_json(path) if path.is_file() else {}
