# SPDX-License-Identifier: Apache-2.0
"""The gate for a machine with a GPU: rehearsed without one, so that its few minutes are not there
to find a typing error."""

import json
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from benchmarks import report
from benchmarks.gpu import __main__ as gate

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("kandinsky_kernels", "kandinsky_model")
NAME = "kandinsky_kernels-0.1.0"
# what compute-sanitizer is given before the program that it watches
SANITIZER = '#!/bin/sh\n[ "$1 $2 $3 $4" = "--tool memcheck --error-exitcode 9" ] || exit 9\n'
SANITIZER += 'shift 4\nexec "$@"\n'


def wheel(folder):
    """Stands in for that of `make wheel-cuda`: this tree, with what was built in it."""
    path = folder / f"{NAME}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as file:
        for one in (one for package in PACKAGES for one in (ROOT / package).rglob("*")):
            if one.is_file() and "__pycache__" not in one.parts:
                file.write(one, one.relative_to(ROOT))
        metadata = {
            "METADATA": "Metadata-Version: 2.1\nName: kandinsky-kernels\nVersion: 0.1.0\n",
            "WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
            "RECORD": "",
        }
        for name, text in metadata.items():
            file.writestr(f"{NAME}.dist-info/{name}", text)
    return path


def run_gate(folder, *arguments, **environment):
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
    environment = {**kept, "PYTHON": sys.executable, "OUT": str(folder / "out"), **environment}
    command = [ROOT / "benchmarks/gpu/gate.sh", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


@pytest.mark.skipif(sys.platform != "linux", reason="the gate is for Linux")
def test_the_whole_gate_runs_at_toy_size(tmp_path):
    """Every line of the script, every section and every peer on a CPU."""
    pytest.importorskip("triton", reason="needs Triton")
    tool = tmp_path / "bin/compute-sanitizer"
    tool.parent.mkdir()
    tool.write_text(SANITIZER)
    tool.chmod(0o755)
    path = f"{tool.parent}{os.pathsep}{os.environ['PATH']}"
    names = list(gate.BY_NAME)
    arguments = ("--small", "--minutes", "60", "--only", ",".join(names))
    run = run_gate(tmp_path, *arguments, WHEEL=str(wheel(tmp_path)), PATH=path)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "cannot run" not in run.stdout, run.stdout
    results = [json.loads((tmp_path / "out" / f"{name}.json").read_text()) for name in names]
    for name, result in zip(names, results, strict=True):
        assert not result["failed"]
        assert result["rows"][name]
        assert all(row["ms"]["ours"] > 0 for row in result["rows"][name])
    verdicts = {row["verdict"] for row in results[0]["rows"]["selftests"]}
    assert verdicts == {"right"}
    (whole,) = report.joined(results)
    table = report.markdown(whole)
    assert table.count("\n| block_sparse_attention | toy | ") == 6 + 16 + 1
    assert "useful TFLOP/s" not in table  # a bar of another size
    assert "every norm, times faster than eager" in table
    assert all(row["modelled_tflop_s"] > 0 for row in whole["rows"]["attention"])


def test_without_a_wheel_the_gate_says_how_to_make_one(tmp_path):
    run = run_gate(tmp_path, WHEEL=str(tmp_path / "absent.whl"))
    assert run.returncode == 2
    assert "run make wheel-cuda" in run.stderr


def test_sections_are_in_order_of_worth():
    names = [section.name for section in gate.SECTIONS]
    wanted = ["selftests", "l2", "attention", "selection", "norms", "transformer", "decode"]
    wanted += ["memory", "gradients"]
    assert names[: len(wanted)] == wanted
    spent = 0
    for section in gate.SECTIONS[: len(wanted)]:
        spent += section.seconds
    assert spent <= 11 * 60  # of twelve minutes, with what installing takes


def planted(monkeypatch, seconds, broken=None):
    """Sections that take no time, of so many expected seconds: two rows of each size."""

    def rows(section, clock, size, roof):
        yield {"op": section.name, "size": size.name, "ms": {"ours": 1.0}}
        if section.name == broken:
            raise KeyboardInterrupt
        yield {"op": section.name, "size": size.name, "ms": {"ours": 2.0}}

    sections = tuple(gate.Section(name, "", count) for name, count in seconds.items())
    monkeypatch.setattr(gate, "SECTIONS", sections)
    monkeypatch.setattr(gate.Section, "rows", rows)


def test_minutes_cut_from_the_end(tmp_path, monkeypatch, capsys):
    """Nothing runs after the first section that does not fit, although the last one would."""
    planted(monkeypatch, {"first": 50, "second": 100, "third": 125, "last": 1})
    gate.main(["--small", "--out", str(tmp_path), "--minutes", "4", "--spent", "120"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["first.json", "second.json"]
    assert "no time is left for third, last" in capsys.readouterr().out


def test_a_gate_that_is_cut_off_leaves_what_it_measured(tmp_path, monkeypatch):
    planted(monkeypatch, {"first": 1, "second": 1, "last": 1}, broken="second")
    with pytest.raises(KeyboardInterrupt):
        gate.main(["--small", "--out", str(tmp_path)])
    found = {path.stem: json.loads(path.read_text())["rows"] for path in tmp_path.glob("*.json")}
    assert {name: len(rows[name]) for name, rows in found.items()} == {"first": 2, "second": 1}


def test_a_section_that_fails_costs_no_other(tmp_path, monkeypatch):
    """Such as one whose package is not installed."""
    sections = (gate.Section("broken", ".absent", 1), gate.Section("l2", ".l2", 1))
    monkeypatch.setattr(gate, "SECTIONS", sections)
    with pytest.raises(SystemExit, match="failed: broken"):
        gate.main(["--small", "--out", str(tmp_path)])
    broken, good = (json.loads((tmp_path / f"{x.name}.json").read_text()) for x in sections)
    assert "ModuleNotFoundError" in broken["failed"]["broken"]
    assert not good["failed"] and len(good["rows"]["l2"]) == 3


def test_the_script_and_the_makefile_name_one_folder():
    make = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert re.search(r"^wheel-cuda:.*\n\t\$\(call wheel,cuda,.*,dist/cuda\)$", make, re.MULTILINE)
    assert "dist/cuda/*.whl" in (ROOT / "benchmarks/gpu/gate.sh").read_text(encoding="utf-8")
