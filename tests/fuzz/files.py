# SPDX-License-Identifier: Apache-2.0
"""Whatever the files of a model and of an adapter hold, loading and verifying them works or is
refused soon, by a ValueError or OSError of one line that a terminal can show.

    python -m tests.fuzz.files --minutes 10

Every case is made from its number alone: a model of a few kilobytes, of which one file is changed.
"""

import argparse
import copy
import inspect
import json
import logging
import shutil
import struct
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from random import Random

import torch
from safetensors.torch import save_file

from kandinsky_model.checkpoints.adapter_files import read_adapter
from kandinsky_model.checkpoints.headers import CONFIG_NAME, WEIGHTS_NAME
from kandinsky_model.checkpoints.load import load_any_vae, load_dit, load_vae
from kandinsky_model.checkpoints.locate import locate
from kandinsky_model.checkpoints.verify import verify

from ..support.tiny_models import random_dit, tiny_folder

SECONDS = 20.0  # of a call: none takes a second on an idle machine; what hangs takes minutes
JUNK = [None, -1, 0, 10**9, 10**30, 1.5, "x", "", [], {}, [[]], True, "\x1b[2J", float("nan")]
JUNK += [[1, 2], {"a": 1}, "F8_E8M0", "C64", "BOOL", "U8", "F4", "../x.safetensors"]
ADAPTER_NAME = "lora.safetensors"


class Models:
    """A model and an adapter to be changed, on disk."""

    def __init__(self, root: Path):
        self.root = root
        self.whole = tiny_folder(root / "whole")
        self.changed = root / "changed"
        scheduler = self.whole / "scheduler"
        scheduler.mkdir()
        (scheduler / "scheduler_config.json").write_text('{"shift": 5.0}')
        index = {"_class_name": "Kandinsky5T2VPipeline"}
        (self.whole / "model_index.json").write_text(json.dumps(index))
        self.network = random_dit(64, 64)
        tensors = {}
        for name, layer in self.network.named_modules():
            if name.endswith("to_query"):
                tensors[f"{name}.lora_A.weight"] = torch.zeros(4, layer.in_features)
                tensors[f"{name}.lora_B.weight"] = torch.zeros(layer.out_features, 4)
                tensors[f"{name}.alpha"] = torch.tensor(2.0)
        peft = json.dumps({"r": 4, "lora_alpha": 4, "rank_pattern": {"to_query": 4}})
        save_file(tensors, self.whole / ADAPTER_NAME, {"lora_adapter_metadata": peft})

    def case(self, random: Random) -> list[tuple[Callable, Path]]:
        """Change one file of a fresh copy; the calls that are to work with it or refuse it."""
        shutil.rmtree(self.changed, ignore_errors=True)
        shutil.copytree(self.whole, self.changed)
        transformer = self.changed / "transformer"
        vae = self.changed / "vae"
        dit_calls = [(load_dit, transformer), (verify, self.changed), (find, self.changed)]
        vae_calls = [(load_vae, vae), (load_one_vae, vae / WEIGHTS_NAME), (verify, self.changed)]
        file, calls = random.choice(
            [
                (transformer / WEIGHTS_NAME, dit_calls),
                (transformer / CONFIG_NAME, dit_calls),
                (vae / WEIGHTS_NAME, vae_calls),
                (vae / CONFIG_NAME, vae_calls),
                (self.changed / ADAPTER_NAME, [(self.read_adapter, self.changed / ADAPTER_NAME)]),
                (self.changed / "scheduler" / "scheduler_config.json", dit_calls),
                (self.changed / "model_index.json", dit_calls),
                (self.changed / "text_encoder" / CONFIG_NAME, dit_calls),
            ]
        )
        data = file.read_bytes()
        if file.suffix == ".json":
            file.write_text(json.dumps(other_json(json.loads(data), random)))
        else:
            file.write_bytes(other_tensors(data, random))
            if random.random() < 0.3:
                file.with_name(CONFIG_NAME).unlink(missing_ok=True)
        return calls

    def read_adapter(self, path: Path) -> None:
        read_adapter(path, self.network)


def find(path: Path) -> None:
    locate(path)


def load_one_vae(path: Path) -> None:
    load_any_vae(path, torch.float32)


def other_json(value, random: Random):
    """`value` with something in it replaced, removed or renamed."""
    places: list[list] = []

    def walk(one, place):
        places.append(place)
        if isinstance(one, (dict, list)):
            for key, inner in one.items() if isinstance(one, dict) else enumerate(one):
                walk(inner, [*place, key])

    walk(value, [])
    place = random.choice(places)
    if not place:
        return copy.deepcopy(random.choice(JUNK))
    *outer, key = place
    inside = value
    for step in outer:
        inside = inside[step]
    deed = random.random()
    if deed < 0.6:
        inside[key] = copy.deepcopy(random.choice(JUNK))
    elif deed < 0.8 or isinstance(inside, list):
        del inside[key]
    else:
        inside[f"{random.choice(JUNK)}{key}"] = inside.pop(key)
    return value


def other_tensors(data: bytes, random: Random) -> bytes:
    """A safetensors file with another header, other bytes, less or more of them."""
    deed = random.random()
    if deed < 0.6:
        (length,) = struct.unpack("<Q", data[:8])
        header = json.loads(data[8 : 8 + length])
        for _ in range(random.choice([1, 1, 2, 5])):
            header = other_json(header, random)
        text = json.dumps(header).encode()
        return struct.pack("<Q", len(text)) + text + data[8 + length :]
    if deed < 0.8:
        changed = bytearray(data)
        for _ in range(random.choice([1, 3, 20])):
            changed[random.randrange(min(len(changed), 20000))] = random.randrange(256)
        return bytes(changed)
    return data[: random.randrange(len(data))] if deed < 0.9 else data + bytes(7)


def outcome(call: Callable, path: Path) -> str:
    """ "loaded" or "refused"; AssertionError for anything else."""
    start = time.perf_counter()
    result = "loaded"
    try:
        call(path)
    except (ValueError, OSError) as error:
        result = "refused"
        assert str(error).isprintable(), f"unfit for a terminal: {error!r}"
    except Exception:
        raise AssertionError(traceback.format_exc()) from None
    took = time.perf_counter() - start
    assert took < SECONDS, f"took {took:.0f} s"
    return result


def fuzz(first: int, cases: int, seconds: float) -> str:
    """Run cases until they or the time are over; what they came to. AssertionError with the number
    of a case that failed."""
    counts: Counter[str] = Counter()
    end = time.perf_counter() + seconds
    with tempfile.TemporaryDirectory() as folder:
        models = Models(Path(folder))
        for number in range(first, first + cases):
            if time.perf_counter() > end:
                break
            for call, path in models.case(Random(number)):
                try:
                    counts[outcome(call, path)] += 1
                except AssertionError as error:
                    again = f"python -m tests.fuzz.files --first {number} --cases 1"
                    raise AssertionError(f"case {number}, run again by {again}: {error}") from None
            counts["cases"] += 1
    return ", ".join(f"{count} {what}" for what, count in sorted(counts.items()))


def main() -> None:
    parser = argparse.ArgumentParser(description=inspect.getdoc(sys.modules[__name__]))
    parser.add_argument("--minutes", type=float, default=1.0, help="how long, at most")
    parser.add_argument("--cases", type=int, default=1 << 62, help="how many, at most")
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    asked = parser.parse_args()
    logging.getLogger("kandinsky_model").setLevel(logging.ERROR)  # notes about what is loaded
    try:
        print(fuzz(asked.first, asked.cases, 60 * asked.minutes), flush=True)
    except AssertionError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
