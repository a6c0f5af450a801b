# SPDX-License-Identifier: Apache-2.0
"""Runs the nodes and the acceleration inside a real ComfyUI:

    python -m tests.comfyui.run_in_comfyui COMFYUI [--screenshots FOLDER]

COMFYUI is the folder with its main.py, and the Python is one that runs it. The nodes are installed
into a base directory of their own, so nothing in COMFYUI changes. The command starts the server on
a free port, runs workflows through its interface as a browser does, prints one line for each thing
that holds, and fails at the first that does not. With --screenshots it looks at ComfyUI's page in a
Chromium, too, and writes into FOLDER what it saw.
"""

import argparse
import asyncio
import json
import socket
import subprocess
import sys
import tempfile
import urllib.parse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from tests.comfyui import in_process

ROOT = Path(__file__).resolve().parents[2]
START_S = 180  # until the server must answer
PREFIX = "KandinskyKernels"
SMALL = {"width": 64, "height": 64, "frames": 9, "steps": 3}


def holds(what: str, is_so: bool, seen: object = "") -> None:
    """Print that something holds, or end the command."""
    if not is_so:
        raise SystemExit(f"does not hold: {what} {seen}")
    print(f"holds: {what}", flush=True)


# Workflows as the server takes them


def as_prompt(workflow: dict, changes: dict[str, dict]) -> dict[str, dict]:
    """A saved workflow in the form that ComfyUI's queue takes.

    changes: type of a node -> values of its widgets to use instead.
    """
    from kandinsky_model.comfyui.workflows import WIDGETS, definitions

    known = definitions()
    links = {link[0]: link for link in workflow["links"]}
    prompt = {}
    for node in workflow["nodes"]:
        definition = known[node["type"]]
        values = iter(node["widgets_values"])
        inputs: dict[str, object] = {}
        for name, (kind, _) in definition.inputs.items():
            if kind in WIDGETS:
                inputs[name] = next(values)
                if name in definition.controlled:
                    next(values)  # how the value changes after a run
        inputs |= changes.get(node["type"].removeprefix(PREFIX), {})
        for socket_ in node["inputs"]:
            if socket_["link"]:
                _, source, slot, *_ = links[socket_["link"]]
                inputs[socket_["name"]] = [str(source), slot]
        inputs = {name: value for name, value in inputs.items() if value is not None}
        prompt[str(node["id"])] = {"class_type": node["type"], "inputs": inputs}
    return prompt


@dataclass
class Outcome:
    """What the server said while a prompt ran, by the node's type."""

    kinds: dict[str, str]
    progress: dict[str, list[tuple[int, int]]] = field(default_factory=dict)
    cached: set[str] = field(default_factory=set)
    previews: int = 0
    end: str = ""
    failed_in: str = ""
    message: str = ""

    def take(self, event: str, data: dict) -> None:
        kind = self.kinds.get(str(data.get("node") or data.get("node_id")), "")
        if event == "progress":
            self.progress.setdefault(kind, []).append((data["value"], data["max"]))
        elif event == "execution_cached":
            self.cached |= {self.kinds[node] for node in data["nodes"]}
        elif event in ("execution_success", "execution_error", "execution_interrupted"):
            self.end = event.removeprefix("execution_")
            self.failed_in = kind
            self.message = data.get("exception_message", "")


class Server:
    """The interface of a running ComfyUI."""

    def __init__(self, session, port: int):
        self.session = session
        self.base = f"http://127.0.0.1:{port}"

    async def get(self, path: str):
        async with self.session.get(self.base + path) as answer:
            answer.raise_for_status()
            return json.loads(await answer.text())

    async def run(self, prompt: dict, stop_when: Callable[[Outcome], bool] | None = None):
        """Queue a prompt and follow it to its end; press Stop once `stop_when` says so."""
        outcome = Outcome(
            {node: one["class_type"].removeprefix(PREFIX) for node, one in prompt.items()}
        )
        async with self.session.ws_connect(self.base + "/ws?clientId=test") as messages:
            queued = {"prompt": prompt, "client_id": "test"}
            async with self.session.post(self.base + "/prompt", json=queued) as answer:
                text = await answer.text()
                if answer.status != 200:
                    raise SystemExit(f"ComfyUI refuses the workflow: {text}")
            async for message in messages:
                if not isinstance(message.data, str):
                    outcome.previews += 1
                    continue
                event = json.loads(message.data)
                outcome.take(event["type"], event.get("data") or {})
                if outcome.end:
                    return outcome
                if stop_when and stop_when(outcome):
                    stop_when = None
                    await self.session.post(self.base + "/interrupt")
        raise SystemExit("the server closed the connection")


def load(name: str) -> dict:
    from kandinsky_model.comfyui.workflows import FOLDER

    return json.loads((FOLDER / name).read_text(encoding="utf-8"))


async def check_what_is_shown(server: Server) -> None:
    """Nodes with tooltips, and templates with their titles."""
    from kandinsky_model.comfyui import NODE_CLASS_MAPPINGS
    from kandinsky_model.comfyui.workflows import workflows

    for name, node in NODE_CLASS_MAPPINGS.items():
        info = (await server.get(f"/object_info/{name}"))[name]
        inputs = {**info["input"]["required"], **info["input"].get("optional", {})}
        silent = [key for key, kind in inputs.items() if not kind[1].get("tooltip")]
        silent += [] if all(info.get("output_tooltips") or [None]) else ["an output"]
        holds(f"{node.TITLE!r} is there, every socket with a tooltip", not silent, silent)
        holds(f"{node.TITLE!r} has its title", info["display_name"] == node.TITLE)
    shown = (await server.get("/workflow_templates"))["kandinsky5"]
    wanted = {name.removesuffix(".json") for name in workflows()}
    holds("six templates are listed", set(shown) == wanted and len(wanted) == 6, shown)
    for name in workflows():
        path = f"/api/workflow_templates/kandinsky5/{urllib.parse.quote(name)}"
        holds(f"{name} can be opened", await server.get(path) == load(name))
    core = await server.get("/object_info")
    for name in workflows():
        missing = {node["type"] for node in load(name)["nodes"]} - core.keys()
        holds(f"{name} uses nodes that exist", not missing, missing)


async def check_a_video(server: Server, output: Path) -> None:
    """The workflow that needs no download: bar, previews, Stop, and what runs again."""
    from kandinsky_model.comfyui.workflows import TRY

    workflow = load(f"Kandinsky 5 - {TRY}.json")
    first = await server.run(as_prompt(workflow, {"Sample": SMALL | {"seed": 2**64 - 1}}))
    holds("a video is made without a download", first.end == "success", first.message)
    holds("its file is written", any(path.suffix == ".mp4" for path in output.rglob("*")))
    holds("the sampler's bar counts steps", first.progress["Sample"][-1] == (3, 3))
    holds("sampling shows previews", first.previews >= 3, first.previews)
    percents = sorted({done for done, _ in first.progress["Decode"]})
    holds("the decoder's bar moves before the end", len(percents) > 2, percents)

    long = as_prompt(workflow, {"Sample": SMALL | {"seed": 5, "frames": 121, "steps": 1}})
    stopped = await server.run(long, lambda seen: bool(seen.progress.get("Decode")))
    interrupted = (stopped.end, stopped.failed_in) == ("interrupted", "Decode")
    last = stopped.progress["Decode"][-1]
    holds(f"Stop ends decoding at {last[0]} %", interrupted and last[0] < 100, stopped)
    again = await server.run(long)
    holds("afterwards it runs to its end", again.end == "success", again.message)
    kept = {"LoadModel", "EncodeText", "Sample"}
    holds("nothing finished is computed again", kept <= again.cached, again.cached)

    wrong = await server.run(as_prompt(workflow, {"Sample": {"width": 64, "height": 0}}))
    one_sentence = "given together" in wrong.message and wrong.failed_in == "Sample"
    holds("a width without a height is refused on the node", one_sentence, wrong)


async def check_a_picture(server: Server, model: Path) -> None:
    """Image editing by a random model: another seed for the sampler encodes nothing again."""
    workflow = load("Kandinsky 5 - image editing.json")
    changes = {
        "LoadModel": {"path": str(model)},
        "EncodeImage": {"width": 64, "height": 64},
        "Sample": {"steps": 2, "seed": 1},
    }
    first = await server.run(as_prompt(workflow, changes))
    holds("a picture is edited", first.end == "success", first.message)
    changes["Sample"]["seed"] = 2
    again = await server.run(as_prompt(workflow, changes))
    kept = {"LoadModel", "LoadImage", "EncodeImage", "EncodeText"}
    holds("another seed encodes nothing again", kept <= again.cached, again.cached)
    holds("and samples", again.end == "success" and "Sample" not in again.cached)


@contextmanager
def running(comfyui: Path, base: Path, has_page: bool) -> Iterator[int]:
    """A server with `base` for its nodes, inputs and outputs; its port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, str(comfyui / "main.py"), "--cpu", "--disable-auto-launch"]
    command += ["--base-directory", str(base), "--port", str(port), "--disable-api-nodes"]
    command += ["--preview-method", "latent2rgb"]
    if not has_page:
        empty = base / "frontend"
        empty.mkdir()
        command += ["--front-end-root", str(empty)]
    with (base / "log.txt").open("w", encoding="utf-8") as log:
        path = {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
        server = subprocess.Popen(
            command, cwd=comfyui, stdout=log, stderr=log, env={**os_environment(), **path}
        )
        try:
            yield port
        finally:
            server.terminate()
            server.wait()


def os_environment() -> dict[str, str]:
    import os

    return dict(os.environ)


async def answers(server: Server) -> None:
    """Wait until the server answers."""
    import aiohttp

    for _ in range(START_S):
        try:
            await server.get("/queue")
            return
        except aiohttp.ClientError:
            await asyncio.sleep(1)
    raise SystemExit("ComfyUI did not start")


async def check_nodes(comfyui: Path, base: Path, screenshots: Path | None) -> None:
    import aiohttp

    from tests.comfyui.in_browser import check_in_browser
    from tests.support import tiny_models

    parts = tiny_models.text_parts()
    editing = tiny_models.diffusers_folder(base / "Kandinsky-5.0-I2I-Lite", parts, "i2i")
    with running(comfyui, base, screenshots is not None) as port:
        timeout = aiohttp.ClientTimeout(total=None)
        async with aiohttp.ClientSession(timeout=timeout) as session:
            server = Server(session, port)
            await answers(server)
            await check_what_is_shown(server)
            await check_a_video(server, base / "output")
            await check_a_picture(server, editing)
            if screenshots:
                await check_in_browser(server.base, screenshots, SMALL, holds)


def prepare(base: Path) -> None:
    """The folders of a ComfyUI with the nodes and a picture."""
    from PIL import Image

    from kandinsky_model.comfyui.install import install

    for name in ("custom_nodes", "input", "output", "models", "temp", "user"):
        (base / name).mkdir()
    install(base)
    Image.new("RGB", (100, 60), "red").save(base / "input" / "example.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("comfyui", type=Path, help="the folder with ComfyUI's main.py")
    parser.add_argument("--screenshots", type=Path, help="a folder for pictures of its page")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    comfyui = options.comfyui.resolve()
    if not (comfyui / "main.py").is_file():
        parser.error(f"ComfyUI's folder must hold main.py, but {comfyui} does not")
    if options.inside:
        in_process.check_acceleration(comfyui, holds)
        return
    command = [sys.executable, "-m", "tests.comfyui.run_in_comfyui", str(comfyui), "--inside"]
    if subprocess.run(command, cwd=ROOT).returncode:
        raise SystemExit(1)
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder)
        prepare(base)
        try:
            asyncio.run(check_nodes(comfyui, base, options.screenshots))
        except BaseException:
            log = base / "log.txt"
            print(log.read_text(encoding="utf-8")[-3000:] if log.exists() else "", file=sys.stderr)
            raise


if __name__ == "__main__":
    main()
