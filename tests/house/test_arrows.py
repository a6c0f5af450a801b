# SPDX-License-Identifier: Apache-2.0
"""Who may import whom. The tables below are the design: read them to know the house.

A room is a folder of a package, or a file that stands directly in it. Every import counts, whether
at the top of a module or inside a function; imports for type checkers alone count as well.
"""

import ast
import sys
from collections import defaultdict
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# room: what it may import. "text.embeddings" allows that one module of a room.
MODEL = {
    "config": "",
    "files": "",
    "devices": "",
    "dit": "kernels config devices",
    "vae": "kernels config devices",
    "media": "files",
    "checkpoints": "config files dit vae",
    "text": "config files devices checkpoints.contents checkpoints.encoders checkpoints.headers"
    " checkpoints.locate checkpoints.variants",
    "sampling": "config files dit vae media text.embeddings checkpoints.headers",
    "placement": "config devices dit vae",
    "inspection": "kernels config dit media",
    "pipeline": "config devices dit vae text sampling placement checkpoints media",
    "acceleration": "kernels config dit vae",
    "comfyui": "config media sampling text.embeddings pipeline acceleration checkpoints.contents",
    "training": "kernels config files devices dit vae media checkpoints text sampling pipeline",
    "tiny": "config files devices dit vae text checkpoints pipeline training",
    "cli": "kernels config files devices media checkpoints sampling inspection pipeline comfyui"
    " training tiny __init__",
    "__main__": "cli",
    "__init__": "config pipeline sampling acceleration",
}
KERNELS = {
    "tuning": "",
    "checks": "",
    "_precision": "",
    "_derivatives": "",
    "_memory": "",
    "selections": "checks _memory",
    "reference": "checks _derivatives _memory _precision selections",
    "_guard": "",
    "cards": "",
    "_ops": "",
    "_library": "cards checks _derivatives _guard _memory _ops _precision tuning",
    "norm": "checks _library reference",
    "nabla": "checks _library reference",
    "vae": "checks _library _memory reference",
    "flops": "_ops selections",
    "triton": "",
    "launch": "_library cards reference selections tuning triton",
    "__init__": "_library flops norm nabla vae reference selections",
}
PACKAGES = {"kandinsky_model": MODEL, "kandinsky_kernels": KERNELS}
# packages that are slow to import or may be absent: only inside functions
HEAVY = {
    "transformers",
    "diffusers",
    "av",
    "huggingface_hub",
    "matplotlib",
    "peft",
    "gguf",
    "bitsandbytes",
}
FILES = sorted(path for package in PACKAGES for path in ROOT.joinpath(package).rglob("*.py"))


def parts_of(path):
    """("kandinsky_model", "dit", "attention") of a file."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return parts[:-1] if parts[-1] == "__init__" and len(parts) > 2 else parts


def imports(path, tree=None):
    """(line, parts of the imported name) of every import in a file, or in one of its trees."""
    package = path.relative_to(ROOT).parent.parts
    for node in ast.walk(tree or ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, tuple(alias.name.split("."))) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            base = (*above, *(node.module.split(".") if node.module else ()))
            yield from ((node.lineno, (*base, alias.name)) for alias in node.names)


def room_of(parts):
    """("dit", "dit.attention") of the parts of "kandinsky_model.dit.attention.Attention"."""
    names = parts[1:]
    folder = ROOT.joinpath(parts[0], names[0]) if names else ROOT
    if folder.is_dir():
        return names[0], ".".join(names[:2])
    if folder.with_suffix(".py").is_file():
        return names[0], names[0]
    return "__init__", "__init__"


def name(path):
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", FILES, ids=name)
def test_imports_go_where_the_table_allows(path):
    own = parts_of(path)
    table = PACKAGES[own[0]]
    room, _ = room_of(own)
    assert room in table, f"{name(path)} lies in a room that the table does not know: {room}"
    allowed = set(table[room].split())
    for line, parts in imports(path):
        where = f"{name(path)}:{line} imports {'.'.join(parts)}"
        if parts[0] not in PACKAGES:
            assert parts[0] not in ("tests", "benchmarks", "setup"), where
            kernels = own[0] == "kandinsky_kernels"
            known = {"torch", "triton"} | sys.stdlib_module_names
            assert not kernels or parts[0] in known, f"{where}: kernels need torch and triton alone"
            continue
        if parts[0] != own[0]:
            assert own[0] == "kandinsky_model", f"{where}: kernels know no model"
            assert "kernels" in allowed, f"{where}: {room} knows no kernels"
            assert len(parts) <= 2, f"{where}: only public names of the kernels"
            continue
        other, module = room_of(parts)
        assert other == room or {other, module} & allowed, f"{where}: {room} may not"


@pytest.mark.parametrize("table", PACKAGES.values(), ids=PACKAGES)
def test_the_tables_have_no_circle(table):
    """Rooms can be put in an order in which each imports earlier ones only."""
    waiting = {room: {one.partition(".")[0] for one in table[room].split()} for room in table}
    assert all(needs <= {*table, "kernels"} for needs in waiting.values())
    done = {"kernels"}
    while waiting:
        ready = {room for room, needs in waiting.items() if needs <= done}
        assert ready, f"these rooms import each other: {sorted(waiting)}"
        done |= ready
        waiting = {room: needs for room, needs in waiting.items() if room not in ready}


def test_modules_have_no_circle():
    """No module imports one that imports it, however long the way, at the top level."""
    graph = defaultdict(set)
    known = {parts_of(path): path for path in FILES}
    for own, path in known.items():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for _, parts in imports(path, ast.Module(list(top_level(tree)), [])):
            found = next((p for p in (parts, parts[:-1]) if p in known), None)
            if found and found != own:
                graph[own].add(found)
    seen, open_now = set(), []

    def visit(module):
        assert module not in open_now, f"a circle: {[*open_now, module]}"
        if module in seen:
            return
        open_now.append(module)
        for other in graph[module]:
            visit(other)
        open_now.pop()
        seen.add(module)

    for module in known:
        visit(module)


def top_level(tree):
    """The statements that run when a module is imported."""
    for node in tree.body:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        yield node if not isinstance(node, ast.FunctionDef | ast.ClassDef) else ast.Pass()


def top_level_imports(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return imports(path, ast.Module(list(top_level(tree)), []))


@pytest.mark.parametrize("path", FILES, ids=name)
def test_heavy_packages_are_imported_where_they_are_used(path):
    for line, parts in top_level_imports(path):
        where = f"{name(path)}:{line} imports {parts[0]} outside a function"
        assert parts[0] not in HEAVY, where


def test_token_orders_live_in_one_module():
    users = {path for path in FILES for _, parts in imports(path) if parts[0] == "einops"}
    assert users == {ROOT / "kandinsky_model/dit/geometry.py"}


def test_few_files_stand_in_the_hall():
    standing = sorted(path.name for path in ROOT.joinpath("kandinsky_model").glob("*.py"))
    assert len(standing) <= 12, standing
