# SPDX-License-Identifier: Apache-2.0
"""The gate for a machine with a GPU: rehearsed without one, so that its few minutes are not there
to find a typing error."""

import json
import os
import re
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import report
from benchmarks.gpu import __main__ as gate
from benchmarks.gpu import selftests
from benchmarks.gpu.card import SMALL, Clock

from ..cases import OPERATORS
from ..conftest import needs_triton

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
    needs_triton()
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
        timed = [row for row in result["rows"][name] if "ms" in row]
        assert timed or name in ("selftests", "tests", "memcheck")
        assert all(row["ms"]["ours"] > 0 for row in timed)
    (whole,) = report.joined(results)
    table = report.markdown(whole)
    assert table.count("\n| block_sparse_attention | toy | ") == 6 + 16
    assert "\nSelf-tests on released shapes: 14 of 14 right.\n" in table
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


def test_programs_read_the_tiles_that_they_are_timed_for():
    """Under the interpreter: three programs, five turns, over eight tiles."""
    needs_triton()
    from benchmarks.gpu.l2_kernel import read_tiles

    tiles = torch.arange(8.0).repeat_interleave(16)
    sums = torch.zeros(3)
    read_tiles[(3,)](tiles, sums, 8, 5, 16)
    wanted = [16 * sum((i + 3 * turn) % 8 for turn in range(5)) for i in range(3)]
    assert sums.tolist() == wanted


def test_a_self_test_tells_a_wrong_kernel_from_a_right_one(monkeypatch):
    """The others are tried all the same, and the section fails at its end."""
    right = OPERATORS["group_moments"]

    def call(x, groups):  # what it is held against is in fp64
        return right.call(x, groups) * (1.01 if x.dtype == torch.bfloat16 else 1)

    monkeypatch.setitem(OPERATORS, "group_moments", replace(right, call=call))
    rows = []
    with pytest.raises(AssertionError, match="not right: group_moments 32 channels"):
        for row in selftests.selftests(Clock(torch.device("cpu"), 0.0), SMALL[0], {}):
            rows.append(row)
    verdicts = {row["op"]: row["verdict"] for row in rows}
    assert [op for op, verdict in verdicts.items() if verdict != "right"] == ["group_moments"]
    assert len(verdicts) == len(rows) == 14


@pytest.mark.skipif(sys.platform != "linux", reason="the gate is for Linux")
def test_the_gate_stops_at_its_minutes(tmp_path):
    """The first section does not fit into one minute: none is begun, and nothing but the log
    is left, in the folder or beside it."""
    run = run_gate(
        tmp_path, "--small", "--minutes", "1", WHEEL=str(wheel(tmp_path)), TMPDIR=str(tmp_path)
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert f"no time is left for {', '.join(one.name for one in gate.SECTIONS)}" in run.stdout
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["gate.log"]
    assert sorted(path.suffix for path in tmp_path.iterdir()) == ["", ".whl"]


def test_the_script_and_the_makefile_name_one_folder():
    make = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert re.search(r"^wheel-cuda:.*\n\t\$\(call wheel,cuda,.*,dist/cuda\)$", make, re.MULTILINE)
    assert "dist/cuda/*.whl" in (ROOT / "benchmarks/gpu/gate.sh").read_text(encoding="utf-8")
