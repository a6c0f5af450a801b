# SPDX-License-Identifier: Apache-2.0
"""The example workflows fit the nodes and run, and `kandinsky comfyui` puts both where ComfyUI
finds them."""

import importlib.util
import json
import re
import shlex
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from kandinsky_model import comfyui
from kandinsky_model.__main__ import main
from kandinsky_model.comfyui import install, thumbnails
from kandinsky_model.comfyui.workflows import (
    CORE,
    FOLDER,
    TRY,
    WIDGETS,
    Graph,
    definitions,
    workflows,
)

from ..support import tiny_models

NAMES = sorted(workflows())


def load(name):
    return json.loads((FOLDER / name).read_text(encoding="utf-8"))


def widgets(node):
    """Name -> value: the values stand in the order of the definition, each that counts up by itself
    followed by how."""
    definition = definitions()[node["type"]]
    values = iter(node["widgets_values"])
    found = {}
    for name, (kind, _) in definition.inputs.items():
        if kind in WIDGETS:
            found[name] = next(values)
            if name in definition.controlled:
                assert next(values) in ("fixed", "increment", "decrement", "randomize")
    assert next(values, None) is None
    return found


def test_files_are_what_the_definitions_make_of_them():
    written = {path.name: path.read_text(encoding="utf-8") for path in FOLDER.glob("*.json")}
    assert written == workflows()


def test_every_workflow_has_a_small_picture():
    """ComfyUI's template browser asks for NAME.jpg beside NAME.json."""
    pictures = {path.stem: path for path in FOLDER.iterdir() if path.suffix != ".json"}
    assert {f"{name}.json" for name in pictures} == set(NAMES)
    for path in pictures.values():
        with Image.open(path) as picture:
            assert (picture.format, picture.size) == ("JPEG", thumbnails.SIZE)
            picture.load()
    assert sum(path.stat().st_size for path in pictures.values()) < 150_000


def test_pictures_are_drawn_from_clips():
    asked = []

    def draw(prompt):
        asked.append(prompt)
        return [Image.new("RGB", (160, 160), (250, 0, 40 * i)) for i in range(5)]

    drawn = thumbnails.thumbnails(draw)
    assert {f"{Path(name).stem}.json" for name in drawn} == set(NAMES)
    for name, picture in drawn.items():
        colors = {color for _, color in picture.getcolors(1 << 20)}
        ends = {(250, 0, 0), (250, 0, 80), (250, 0, 160)}  # a clip's beginning, middle and end
        one = "text to image" in name or "editing" in name
        assert colors & ends == ({(250, 0, 0)} if one else ends)
    assert all("moving" in prompt for prompt in asked)


@pytest.mark.parametrize("text", ["a yellow star moving up on a gray background", "accelerated"])
def test_no_letter_of_a_text_is_cut_off(text):
    strip = thumbnails._words(text)
    for left in (0, strip.width - 1):
        edge = strip.crop((left, 0, left + 1, strip.height)).getcolors()
        assert edge == [(strip.height, thumbnails.BACKGROUND)]


@pytest.mark.parametrize("name", NAMES)
def test_every_link_joins_sockets_of_one_type(name):
    graph = load(name)
    known = definitions()
    nodes = {node["id"]: node for node in graph["nodes"]}
    assert len(nodes) == len(graph["nodes"]) == graph["last_node_id"]
    assert len(graph["links"]) == graph["last_link_id"]
    for link, source, slot, target, socket, kind in graph["links"]:
        output = nodes[source]["outputs"][slot]
        taken = nodes[target]["inputs"][socket]
        assert output["type"] == taken["type"] == kind
        assert link in output["links"]
        assert taken["link"] == link
        assert known[nodes[source]["type"]].outputs[slot] == (output["name"], kind)
        assert known[nodes[target]["type"]].inputs[taken["name"]][0] == kind
        assert nodes[source]["order"] < nodes[target]["order"]
    links = [one for node in graph["nodes"] for one in node["inputs"] if one["link"] is not None]
    assert len(links) == len(graph["links"])


@pytest.mark.parametrize("name", NAMES)
def test_every_widget_has_a_value_that_its_node_takes(name):
    for node in load(name)["nodes"]:
        values = widgets(node)
        if node["type"] in CORE:
            continue
        kinds = comfyui.NODE_CLASS_MAPPINGS[node["type"]].INPUT_TYPES()
        for key, kind in (kinds["required"] | kinds["optional"]).items():
            if isinstance(kind[0], list):
                assert values[key] in kind[0]
            elif kind[0] in ("INT", "FLOAT"):
                assert kind[1]["min"] <= values[key] <= kind[1]["max"]
            elif kind[0] in WIDGETS:
                assert isinstance(values[key], {"STRING": str, "BOOLEAN": bool}[kind[0]])
        required = {
            key
            for key, kind in kinds["required"].items()
            if kind[0] not in WIDGETS and not isinstance(kind[0], list)
        }
        assert required <= {socket["name"] for socket in node["inputs"] if socket["link"]}


def test_a_wrong_link_or_name_is_refused():
    graph = Graph()
    outputs = graph.add("LoadImage")
    with pytest.raises(ValueError, match="samples reads LATENT, got IMAGE"):
        graph.add("VAEDecode", samples=outputs["IMAGE"])
    with pytest.raises(ValueError, match="has the inputs"):
        graph.add("LoadModel", modle="tiny")


# what ComfyUI's own nodes do, as far as the workflows need it
CORE_NODES = {
    "LoadImage": lambda image: (torch.rand(1, 60, 100, 3), None),
    "CreateVideo": lambda images, fps: (images,),
    "SaveVideo": lambda video, **_: (video,),
    "SaveImage": lambda images, **_: (images,),
}


def execute(graph, change):
    """Runs a workflow as ComfyUI does: change(type) -> values instead of those of widgets."""
    made = {}
    saved = []
    for node in sorted(graph["nodes"], key=lambda node: node["order"]):
        inputs = {**widgets(node), **change(node["type"])}
        for socket in node["inputs"]:
            if socket["link"]:
                _, source, slot, *_ = graph["links"][socket["link"] - 1]
                inputs[socket["name"]] = made[source][slot]
        if node["type"] in CORE:
            outputs = CORE_NODES[node["type"]](**inputs)
        else:
            with torch.inference_mode():
                outputs = comfyui.NODE_CLASS_MAPPINGS[node["type"]]().run(**inputs)
        made[node["id"]] = outputs
        saved += outputs if node["type"].startswith("Save") else []
    return saved


@pytest.fixture(scope="module")
def folders(tmp_path_factory, text_parts):
    root = tmp_path_factory.mktemp("models")
    video = tiny_models.tiny_folder(root / "tiny")
    folders = {"text to video": video, "image to video": video}
    for task, name in (("t2i", "text to image"), ("i2i", "image editing")):
        folders[name] = tiny_models.diffusers_folder(
            root / f"Kandinsky-5.0-{task.upper()}-Lite-Diffusers", text_parts, task
        )
    return folders


@pytest.mark.parametrize(
    "name", ["text to video", "image to video", "text to image", "image editing"]
)
def test_workflows_run(name, folders, monkeypatch):
    graph = load(f"Kandinsky 5 - {name}.json")
    loader = comfyui.NODE_CLASS_MAPPINGS["KandinskyKernelsLoadModel"]
    run = loader.run
    video = name.endswith("video")

    def load_small(self, **inputs):
        (model,) = run(self, **inputs)
        changes = {"sizes": ((64, 80), (80, 64))} | (
            {"task": "i2v", "name": "tiny-i2v"} if name == "image to video" else {}
        )
        model.model.preset = replace(model.model.preset, **changes)
        return (model,)

    monkeypatch.setattr(loader, "run", load_small)
    # as for the shape, an image or the preset settles it
    sizes = {"steps": 2} | ({"frames": 5} if video else {})
    given = {
        "KandinskyKernelsLoadModel": {"path": str(folders[name])},
        "KandinskyKernelsSample": sizes,
    }
    (images,) = execute(graph, lambda kind: given.get(kind, {}))
    assert images.shape[-1] == 3
    assert images.shape[0] == (5 if video else 1)
    assert 0 <= images.min() < images.max() <= 1


def test_one_workflow_needs_no_download(monkeypatch):
    """It runs as it is, with the bundled model; two steps of it are enough here."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    given = {"KandinskyKernelsSample": {"steps": 2}}
    graph = load(f"Kandinsky 5 - {TRY}.json")
    (images,) = execute(graph, lambda kind: given.get(kind, {}))
    assert images.shape[0] > 1
    assert images.shape[-1] == 3


@pytest.mark.parametrize("name", NAMES)
def test_files_that_comfyui_must_load_say_where_they_are(name):
    """ComfyUI reads `properties.models` of a node to offer what is missing."""
    for node in load(name)["nodes"]:
        files = {value for value in node["widgets_values"] if str(value).endswith(".safetensors")}
        models = node["properties"].get("models", [])
        assert {model["name"] for model in models} == files
        for model in models:
            assert model["url"].startswith("https://")
            assert model["url"].endswith(model["name"])
            assert model["directory"] in ("diffusion_models", "text_encoders", "vae")


def test_only_the_seed_of_a_sampler_changes_by_itself():
    """So that a run with another seed encodes neither pictures nor texts again."""
    changing = {
        (node["type"], name)
        for workflow in NAMES
        for node in load(workflow)["nodes"]
        for name in definitions()[node["type"]].controlled
    }
    assert changing == {("KandinskyKernelsSample", "seed"), ("KSampler", "seed")}


def test_every_seed_says_whether_it_changes_by_itself():
    """ComfyUI's page puts a widget for that after an INT of these names where nothing is said, and
    the values of a saved workflow would then stand one place off."""
    for node in comfyui.NODE_CLASS_MAPPINGS.values():
        for part in node.INPUT_TYPES().values():
            for name in part.keys() & {"seed", "noise_seed"}:
                assert "control_after_generate" in part[name][1]


@pytest.fixture
def comfy_folder(tmp_path):
    (tmp_path / "ComfyUI" / "custom_nodes").mkdir(parents=True)
    return tmp_path / "ComfyUI"


def files(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def imported(stub):
    spec = importlib.util.spec_from_file_location("stub_of_comfyui", stub / "__init__.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_command_writes_the_nodes_and_the_workflows(comfy_folder, capsys):
    assert main(["comfyui", str(comfy_folder)]) == 0
    target = comfy_folder / "custom_nodes" / "kandinsky5"
    assert str(target) in capsys.readouterr().out
    copied = {path.name for path in (target / "example_workflows").iterdir()}
    assert copied == {path.name for path in FOLDER.iterdir()} > set(NAMES)
    module = imported(target)
    assert module.NODE_CLASS_MAPPINGS is comfyui.NODE_CLASS_MAPPINGS
    assert module.comfy_entrypoint is comfyui.comfy_entrypoint
    assert module.NODE_DISPLAY_NAME_MAPPINGS.keys() == module.NODE_CLASS_MAPPINGS.keys()


def test_the_command_repeats_and_repairs_itself(comfy_folder):
    target = install.install(comfy_folder)
    before = files(comfy_folder)
    (target / "example_workflows" / "of_another_version.json").write_text("{}")
    (target / "example_workflows" / NAMES[0]).unlink()
    assert install.install(comfy_folder) == target
    assert files(comfy_folder) == before


@pytest.mark.parametrize("problem", ["copying", "renaming"])
def test_a_failure_leaves_what_was_there(comfy_folder, monkeypatch, problem):
    def fail(*_):
        raise OSError("disk full")

    target = install.install(comfy_folder)
    (target / "mine.txt").write_text("kept")
    before = files(comfy_folder)
    rename = Path.rename
    if problem == "copying":
        monkeypatch.setattr(shutil, "copytree", fail)
    else:
        monkeypatch.setattr(
            Path, "rename", lambda self, to: fail() if self.name == "new" else rename(self, to)
        )
    with pytest.raises(OSError, match="disk full"):
        install.install(comfy_folder)
    assert files(comfy_folder) == before
    assert [path.name for path in target.parent.iterdir()] == ["kandinsky5"]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda root: root / "nowhere", "there is no"),
        (lambda root: root / "custom_nodes", "must hold custom_nodes"),
    ],
)
def test_what_is_no_comfyui_is_refused(comfy_folder, capsys, make, message):
    assert main(["comfyui", str(make(comfy_folder))]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert files(comfy_folder) == {}


def test_a_folder_of_someone_else_is_left_alone(comfy_folder):
    other = comfy_folder / "custom_nodes" / "kandinsky5"
    other.mkdir()
    (other / "__init__.py").write_text("NODE_CLASS_MAPPINGS = {}")
    with pytest.raises(FileExistsError, match="holds something else"):
        install.install(comfy_folder)
    assert files(other) == {"__init__.py": b"NODE_CLASS_MAPPINGS = {}"}


def test_a_python_without_the_package_is_told_so_in_one_sentence(comfy_folder, monkeypatch):
    target = install.install(comfy_folder)
    monkeypatch.setitem(sys.modules, "kandinsky_model.comfyui", None)
    with pytest.raises(ImportError, match="require the package kandinsky-kernels") as error:
        imported(target)
    assert "\n" not in str(error.value)


def test_the_lines_of_the_readme_do_what_it_says(comfy_folder, monkeypatch):
    monkeypatch.chdir(comfy_folder.parent)
    readme = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    section = re.search(r"## Use it from ComfyUI\n(.*?)\n## ", readme, re.DOTALL)[1]
    commands = re.findall(r"^kandinsky (.*)$", section, re.MULTILINE)
    assert len(commands) == 1
    assert [main(shlex.split(line, comments=True)) for line in commands] == [0]
    stub = comfy_folder / "custom_nodes" / "kandinsky5"
    assert stub.name in section
    assert "six workflows" in section
    assert len(list((stub / "example_workflows").glob("*.json"))) == 6
    module = imported(stub)
    assert "Accelerate Kandinsky 5" in section
    assert "Accelerate Kandinsky 5" in module.NODE_DISPLAY_NAME_MAPPINGS.values()
    assert {node.CATEGORY for node in module.NODE_CLASS_MAPPINGS.values()} == {"Kandinsky 5"}
