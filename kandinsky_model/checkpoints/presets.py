# SPDX-License-Identifier: Apache-2.0
"""Which preset a checkpoint is: told by the sizes of its tensors, then by whatever names it.

Presets share networks: nine of them have the sizes of the Lite video transformer, and only names
and configurations tell whether one was distilled. Each piece of evidence narrows the choice where
it fits at all; what is left after the last is said to the user.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

from ..config import PRESETS, DiTConfig, NablaConfig, Preset, get_preset
from ..files import read_json
from .configs import infer_dit_config, read_dit_config
from .headers import CONFIG_NAME, find_weights, printable, read_headers, read_metadata
from .variants import TRANSFORMER_MARK, of_network

PRESET_KEY = "kandinsky_preset"  # of the config.json of a transformer that was trained here
# The texts in a header that may name the model; others describe its training data.
_NAMING_KEYS = re.compile(r"title|name|model|preset|architecture", re.IGNORECASE)
_PARENTS = 4  # folders above a file: in the hub's cache the fourth is called like the repository

# What words in a name say, by subject: at most one of each subject is true of a preset.
_WORDS = {
    "task": {task: rf"(?<![a-z]){task}(?![a-z0-9])" for task in ("t2v", "i2v", "t2i", "i2i")},
    "family": {"lite": r"lite(?![a-z])", "pro": r"(?<![a-z])pro(?![a-z])"},
    "training": {
        "distilled": r"distil",
        "nocfg": r"no-?_?cfg",
        "pretrain": r"pre-?_?train",
        "sft": r"(?<![a-z])sft(?![a-z])",
    },
    "length": {
        "10s": r"(?<![0-9])10[_-]?s(?:ec|econds)?(?![a-z0-9])",
        "5s": r"(?<![0-9])5[_-]?s(?:ec|econds)?(?![a-z0-9])",
    },
    "size": {"hd": r"(?<![a-z])hd(?![a-z])"},
}

_log = logging.getLogger(__name__)


def choose_preset(path: Path, name: str, fallback: str) -> Preset:
    """The preset of the checkpoint at `path`, which the user calls `name`, with a note to the user
    where the choice was not certain. fallback: the preset to take where nothing tells."""
    config = _config_at(path)
    left, reason = presets_of(path, name, config)
    if reason is None and not _fits_any(config):
        left = [get_preset(fallback)]
    preset = next((one for one in left if one.name == fallback), left[0])
    is_one_file = len({one.filename for one in left}) == 1
    if config is not None and not _fits_any(config) and (reason is None or not is_one_file):
        _log.warning(
            "%s has the sizes of no released checkpoint, so the settings of %s are taken; "
            "name others with --preset (preset=)",
            printable(name),
            preset.name,
        )
    elif not is_one_file:
        _log.warning(
            "%s may be any of %s: the settings of %s are taken, %s; "
            "name others with --preset (preset=)",
            printable(name),
            ", ".join(one.name for one in left),
            preset.name,
            "the first" if preset is left[0] else "the default of the class",
        )
    elif reason is not None:
        _log.info("%s is taken for %s, known by %s", printable(name), preset.name, reason)
    return preset


def presets_of(path: Path, name: str, config: DiTConfig | None) -> tuple[list[Preset], str | None]:
    """All presets that a checkpoint may be, and what decided it: None where nothing did.

    config: the sizes of its transformer, where they are known.
    """
    left = [preset for preset in PRESETS.values() if preset.repo]
    if config is not None and config == PRESETS["tiny"].dit:
        return [PRESETS["tiny"]], "its sizes"
    reason = None
    fitting = [preset for preset in left if config is not None and fits(preset, config)]
    if fitting:
        left, reason = fitting, "its sizes"
    for source, is_meant in _evidence(path, name):
        meant = [preset for preset in left if is_meant(preset)]
        if meant and len(meant) < len(left):
            left, reason = meant, source
    return left, reason


def fits(preset: Preset, config: DiTConfig) -> bool:
    """Whether a transformer of these sizes can be the preset's."""
    return _sizes(preset.dit) == _sizes(config)


def check_preset(preset: Preset, path: Path) -> None:
    """ValueError where the network at `path` has other sizes than the preset that the user named,
    though another preset has them."""
    config = _config_at(path)
    if config is not None and _fits_any(config) and not fits(preset, config):
        fitting = ", ".join(one.name for one in PRESETS.values() if fits(one, config))
        raise ValueError(
            f"the preset must have the sizes of the weights, but {path} is not a "
            f"{preset.name}; it may be one of {fitting}"
        )


def _config_at(path: Path) -> DiTConfig | None:
    """The sizes of the transformer at `path`; None where there is none that can be read: whoever
    loads it says what is wrong."""
    try:
        files, folder = find_weights(path, "transformer")
        entries = of_network(read_headers(files), TRANSFORMER_MARK)
        return read_dit_config(folder)[0] or infer_dit_config(entries)
    except (OSError, ValueError, RuntimeError):
        return None


def _fits_any(config: DiTConfig | None) -> bool:
    return config is not None and any(fits(preset, config) for preset in PRESETS.values())


def _sizes(config: DiTConfig) -> DiTConfig:
    """`config` with one name for 33 input channels, which image editing checkpoints call otherwise
    than video ones."""
    conditioned = config.in_channels > config.in_visual_dim
    return replace(config, visual_cond=conditioned, instruct_type=None)


def _evidence(path: Path, name: str) -> Iterator[tuple[str, Callable[[Preset], bool]]]:
    """(where it was found, whether it can mean a preset), the most certain first."""
    files: list[Path] = []
    folder = path if path.is_dir() else path.parent
    try:
        files, folder = find_weights(path, "transformer")
        said = _read_quietly(folder / CONFIG_NAME).get(PRESET_KEY)
        yield "its config.json", partial(_is_called, str(said))
    except (OSError, ValueError):
        pass  # whoever loads it says what is wrong
    file = files[0] if files else path
    own = list(dict.fromkeys([path.name, name.rpartition("/")[2], file.name]))
    above = [parent.name for parent in file.absolute().parents][:_PARENTS]
    for text in own + above:
        yield from _published(text)
    for text in own:
        yield from _words_of(text, "its name")
    for text in above:
        # A folder called hd may be a hard disk.
        certain = "kandinsky" in text.lower()
        yield from _words_of(text if certain else text.lower().replace("hd", ""), "its folder")
    for source in files[:1]:
        yield from _words_of(_titles(source), "the metadata in its header")
    for root in (folder, folder.parent):
        pipeline = str(_read_quietly(root / "model_index.json").get("_class_name", ""))
        yield from _words_of(pipeline.removeprefix("Kandinsky5").lower()[:3], "model_index.json")
    yield from _attention_of(folder)


def _published(text: str) -> Iterator[tuple[str, Callable[[Preset], bool]]]:
    """Whether this is the name under which a file or repository was published, in any case."""
    lower = text.lower()

    def is_meant(preset: Preset) -> bool:
        repo = preset.repo.rpartition("/")[2].lower()
        return lower in (preset.filename.lower(), repo, f"{repo}-diffusers")

    yield "the name it was published under", is_meant


def _words_of(text: str, source: str) -> Iterator[tuple[str, Callable[[Preset], bool]]]:
    for subject, patterns in _WORDS.items():
        found = next((word for word, form in patterns.items() if re.search(form, text.lower())), "")
        if found:
            yield source, partial(_is_said, subject, found)


def _is_called(name: str, preset: Preset) -> bool:
    return preset.name == name


def _is_said(subject: str, word: str, preset: Preset) -> bool:
    return _word(preset, subject) == word


def _word(preset: Preset, subject: str) -> str:
    """What is true of a preset: one of the words of the subject, or ""."""
    if subject == "training" and "distilled" in preset.name:
        return "distilled"
    words = preset.name.split("-")
    return next((word for word in _WORDS[subject] if word in words), _UNSAID.get(subject, ""))


_UNSAID = {"training": "sft"}  # of presets whose names do not say how they were trained


def _attention_of(folder: Path) -> Iterator[tuple[str, Callable[[Preset], bool]]]:
    """What the configuration beside the weights says of attention, and the scheduler's of its
    shift."""
    try:
        config, nabla = read_dit_config(folder)
    except (OSError, ValueError):
        return

    def attends_alike(preset: Preset) -> bool:
        return _keep_mass(preset.nabla) == _keep_mass(nabla)

    if config is not None:
        yield "the attention in its config.json", attends_alike
    scheduler = folder.parent / "scheduler" / "scheduler_config.json"
    shift = _read_quietly(scheduler).get("shift")
    if shift is not None:
        yield "its scheduler's shift", lambda preset: preset.scheduler_scale == shift


def _keep_mass(nabla: NablaConfig | None) -> float | None:
    return None if nabla is None else nabla.keep_mass


def _titles(file: Path) -> str:
    try:
        metadata = read_metadata(file)
    except (OSError, ValueError, RuntimeError):
        return ""
    return " ".join(str(text) for key, text in metadata.items() if _NAMING_KEYS.search(key))


def _read_quietly(path: Path) -> dict:
    """The JSON object at `path`, or {}: evidence that cannot be read is none."""
    try:
        return read_json(path)
    except (OSError, ValueError):
        return {}
