# SPDX-License-Identifier: Apache-2.0
"""What a person sees in ComfyUI: its page in a Chromium, with a screenshot of everything checked.

`run_in_comfyui --screenshots FOLDER` calls this. It needs the package `playwright`, and either the
Chromium that belongs to it or one in PATH.
"""

import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path

from kandinsky_model.comfyui.workflows import FOLDER, PREFIX, TRY, WIDGETS, definitions, workflows

SLOW_S = 300  # until a page has loaded or a small video is made
VIEW = {"width": 2700, "height": 1000}  # pixels: a workflow side by side
TITLE = 30  # pixels of a node's title, which lies above its position
TITLES = [Path(name).stem for name in workflows()]

NODES = """() => window.app.graph.nodes.map(node => ({
    type: node.type,
    title: node.title,
    pos: [...node.pos],
    size: [...node.size],
    least: [...node.computeSize()],
    missing: !(node.type in window.LiteGraph.registered_node_types),
    widgets: Object.fromEntries((node.widgets || []).map(one => [one.name, one.value])),
}))"""

# resolves when the prompt has ended, with how it ended
RUN = """(small) => new Promise(done => {
    for (const node of window.app.graph.nodes)
        for (const widget of node.widgets || [])
            if (node.type === "KandinskyKernelsSample" && widget.name in small)
                widget.value = small[widget.name];
    for (const end of ["success", "error", "interrupted"])
        window.app.api.addEventListener("execution_" + end, () => done(end));
    window.app.queuePrompt(0);
})"""


async def check_in_browser(
    base: str,
    folder: Path,
    small: dict[str, int],
    holds: Callable[..., None],
) -> None:
    """Open ComfyUI's page at `base`, look at templates and workflows, and run one of them.

    folder: for the screenshots. small: widgets of the sampler for a quick run. holds: is told what
    should hold, and whether it does.
    """
    from playwright.async_api import async_playwright

    folder.mkdir(parents=True, exist_ok=True)
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox"]
        )
        page = await browser.new_page(viewport=VIEW)
        page.set_default_timeout(1000 * SLOW_S)
        # otherwise the page greets a newcomer with a workflow of its own
        await page.request.post(f"{base}/api/settings/Comfy.TutorialCompleted", data="true")
        await page.goto(base)
        await page.wait_for_function("window.app?.extensionManager?.command && window.app.canvas")
        await check_templates(page, folder, holds)
        for title in TITLES:
            await check_workflow(page, title, folder, holds)
        await check_run(page, folder, small, holds)
        await browser.close()


async def browse(page) -> None:
    """Open the template browser on this package's templates, all pictures loaded."""
    await page.evaluate("window.app.extensionManager.command.execute('Comfy.BrowseTemplates')")
    await page.get_by_text("kandinsky5", exact=True).last.click()
    for title in TITLES:
        await page.get_by_alt_text(title, exact=True).wait_for()


async def check_templates(page, folder: Path, holds) -> None:
    await browse(page)
    loaded = (
        "titles => titles.every(one => document.querySelector(`img[alt='${one}']`)?.naturalWidth)"
    )
    await page.wait_for_function(loaded, arg=TITLES)
    holds("the template browser shows a picture for each of the six", True)
    await page.screenshot(path=folder / "templates.png")


async def check_workflow(page, title: str, folder: Path, holds) -> None:
    """Open a template as a person does, by its card."""
    if not await page.get_by_alt_text(title, exact=True).is_visible():
        await browse(page)
    await page.get_by_alt_text(title, exact=True).click()
    saved = json.loads((FOLDER / f"{title}.json").read_text(encoding="utf-8"))["nodes"]
    types = [node["type"] for node in saved]
    await page.wait_for_function(
        "types => types.join() === window.app.graph?.nodes.map(one => one.type).join()", arg=types
    )
    nodes = await page.evaluate(NODES)
    holds(f"{title!r} opens with nodes that exist", not any(node["missing"] for node in nodes))
    wrong = [node for node in nodes if node["type"].startswith(PREFIX) and not fits(node)]
    holds(
        f"{title!r}: our nodes are as large as their contents, and hardly larger", not wrong, wrong
    )
    wrong = [(one, two) for one, two in itertools.combinations(nodes, 2) if overlap(one, two)]
    holds(f"{title!r}: no node covers another", not wrong, wrong)
    for node, one in zip(nodes, saved, strict=True):
        values = widgets(one)
        shown = {name: node["widgets"].get(name) for name in values}
        holds(f"{title!r}: {node['title']!r} shows what was saved", shown == values, shown)
    models = [one["name"] for node in saved for one in node["properties"].get("models", ())]
    for name in models:
        await page.get_by_text(name).first.wait_for()
    holds(f"{title!r} names the files that are missing: {len(models)}", True)
    await page.screenshot(path=folder / f"{title}.png")


def fits(node: dict) -> bool:
    (width, height), (least_width, least_height) = node["size"], node["least"]
    return width >= least_width and least_height <= height <= least_height + 100


def overlap(one: dict, two: dict) -> bool:
    """Whether two nodes, their titles included, share a piece of the canvas."""
    (x, y), (other_x, other_y) = one["pos"], two["pos"]
    (width, height), (other_width, other_height) = one["size"], two["size"]
    beside = x + width <= other_x or other_x + other_width <= x
    below = y + height <= other_y - TITLE or other_y + other_height <= y - TITLE
    return not beside and not below


def widgets(node: dict) -> dict[str, object]:
    """The values of the widgets of a saved node, by name."""
    definition = definitions()[node["type"]]
    values = iter(node["widgets_values"])
    found = {}
    for name, (kind, _) in definition.inputs.items():
        if kind in WIDGETS:
            found[name] = next(values)
            if name in definition.controlled:
                next(values)
    return found


async def check_run(page, folder: Path, small: dict[str, int], holds) -> None:
    """Press Run on the workflow that needs no download."""
    await browse(page)
    await page.get_by_alt_text(f"Kandinsky 5 - {TRY}", exact=True).click()
    end = await page.evaluate(RUN, small)
    holds("a video is made from the page", end == "success", end)
    await page.screenshot(path=folder / "run.png")
