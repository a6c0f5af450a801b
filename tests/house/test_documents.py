# SPDX-License-Identifier: Apache-2.0
"""The documents speak of what exists: every file, make target, module and link they name is there,
and the README fits on its page."""

import importlib.util
import re
from pathlib import Path

import pytest

from ..support import oldest

ROOT = Path(__file__).resolve().parents[2]
IGNORED = {".venv", ".git", "build", "node_modules"}
DOCUMENTS = sorted(
    path for path in ROOT.rglob("*.md") if not IGNORED & set(path.relative_to(ROOT).parts)
)
# A path in a code span: it has a folder or begins a list of files of one, and an ending of ours.
PATH = re.compile(r"`((?:[\w.-]+/)+[\w.-]+\.(?:py|md|sh|h|cpp|cu|json|toml|png))(?::\d+)?`")
# The changelog and the notes may name what was there once, and say so.
HISTORIES = {"CHANGELOG.md", "NOTES.md"}


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def makefile_targets() -> set[str]:
    text = ROOT.joinpath("Makefile").read_text(encoding="utf-8")
    return set(re.search(r"^\.PHONY: (.*)$", text, re.M)[1].split())


@pytest.mark.parametrize("path", DOCUMENTS, ids=name)
def test_files_that_a_document_names_exist(path):
    text = path.read_text(encoding="utf-8")
    if path.name in HISTORIES:
        return
    places = [ROOT, path.parent, ROOT / "kandinsky_model", ROOT / "kandinsky_kernels"]
    missing = [
        named for named in PATH.findall(text) if not any((p / named).exists() for p in places)
    ]
    assert not missing, missing


@pytest.mark.parametrize("path", DOCUMENTS, ids=name)
def test_links_lead_somewhere(path):
    for link in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", path.read_text(encoding="utf-8")):
        if not link.startswith(("http://", "https://", "mailto:")):
            assert path.parent.joinpath(link).exists(), link


@pytest.mark.parametrize("path", DOCUMENTS, ids=name)
def test_commands_that_a_document_shows_exist(path):
    text = path.read_text(encoding="utf-8")
    targets = set(re.findall(r"(?:`|^)make ([a-z][\w-]*)", text, re.M))
    assert targets <= makefile_targets(), targets - makefile_targets()
    for module in re.findall(r"python3? -m ((?:benchmarks|tests|kandinsky_\w+)[\w.]*\w)", text):
        if path.name not in HISTORIES:
            assert importlib.util.find_spec(module), module


def test_the_readme_fits_on_its_page():
    assert ROOT.joinpath("README.md").read_text(encoding="utf-8").count("\n") <= 150


def test_every_package_has_a_lower_bound():
    """`make test-oldest` installs the bounds, so a package without one would go untested."""
    text = oldest.PYPROJECT.read_text(encoding="utf-8")
    packages = text[text.index("\ndependencies = ") : text.index("\ndev = ")]
    named = set(re.findall(r'"([\w-]+)[^"]*"', packages))
    assert named == set(oldest.bounds())
    assert {"torch", "av", "diffusers", "triton"} <= named
