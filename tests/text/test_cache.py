# SPDX-License-Identifier: Apache-2.0
"""Embeddings on disk: the same bits again, without the encoders; never another prompt's, never a
damaged one; within bounds."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from kandinsky_model import pipeline
from kandinsky_model.__main__ import main
from kandinsky_model.text.cache import TensorCache, checksum, default_folder, identity
from kandinsky_model.text.qwen_clip import QwenClipEncoder

from ..support import tiny_models

TEMPLATE = "<|im_start|>user\n{}<|im_end|>"


class Work:
    """What a cache is filled with: tensors that tell how often they have been computed."""

    def __init__(self, size=4):
        self.times, self.size = 0, size

    def __call__(self):
        self.times += 1
        return {"x": torch.full((self.size,), float(self.times), dtype=torch.bfloat16)}


def entries(cache):
    return sorted(cache.folder.glob("*"))


def test_what_is_known_is_not_computed_again(tmp_path):
    cache = TensorCache("owner", tmp_path / "a" / "b")
    work = Work()
    first, second = (cache.remember(work, prompt="кот", length=3) for _ in range(2))
    assert work.times == 1
    assert torch.equal(first["x"], second["x"])
    assert second["x"].dtype == torch.bfloat16
    assert (
        TensorCache("owner", tmp_path / "a" / "b").remember(work, length=3, prompt="кот")["x"][0]
        == 1
    )
    assert cache.remember(work, prompt="cat", length=3)["x"][0] == 2
    assert cache.remember(work, prompt="кот", length=4)["x"][0] == 3
    assert (
        TensorCache("another", tmp_path / "a" / "b").remember(work, prompt="кот", length=3)["x"][0]
        == 4
    )
    assert len(entries(cache)) == 4
    assert all("кот".encode() not in path.read_bytes() for path in entries(cache)), (
        "prompts are nobody else's business"
    )


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "foreign", "unsigned"])
def test_a_damaged_entry_is_computed_and_written_again(tmp_path, damage):
    cache = TensorCache("owner", tmp_path)
    work = Work(100)
    cache.remember(work, prompt="a")
    (path,) = entries(cache)
    whole = path.read_bytes()
    bad = {
        "cut": whole[:-1],
        "flipped": whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:],
        "empty": b"",
        "foreign": b"hello, world",
        "unsigned": whole.replace(b"sha256", b"sha257"),
    }
    path.write_bytes(bad[damage])
    assert cache.remember(work, prompt="a")["x"][0] == 2
    assert cache.remember(work, prompt="a")["x"][0] == 2
    assert work.times == 2
    assert entries(cache) == [path]


def test_an_empty_text_is_kept_too(tmp_path):
    cache = TensorCache("owner", tmp_path)
    for _ in range(2):
        assert cache.remember(lambda: {"text": torch.zeros(0, dtype=torch.uint8)}, prompt="a")[
            "text"
        ].shape == (0,)
    with safe_open(entries(cache)[0], framework="pt") as file:
        assert file.metadata()["sha256"] == checksum({"text": torch.zeros(0, dtype=torch.uint8)})


def test_the_least_recently_used_go_first(tmp_path):
    cache = TensorCache("owner", tmp_path)
    work = Work(1000)
    for i, prompt in enumerate("abc"):
        cache.remember(work, prompt=prompt)
        path = max(entries(cache), key=lambda path: path.stat().st_mtime_ns)
        os.utime(path, ns=(i, i))
    cache.remember(work, prompt="a")  # used just now
    cache.limit = 3 * entries(cache)[0].stat().st_size
    cache.remember(work, prompt="d")
    assert len(entries(cache)) == 3
    assert work.times == 4
    for prompt in "acd":
        cache.remember(work, prompt=prompt)
    assert work.times == 4, "b was the oldest"
    cache.limit = 10
    cache.remember(work, prompt="e")
    assert not entries(cache), "nothing larger than the limit stays"


# A folder with other things in it


def entry_path(cache, **key):
    """Where the entry of `key` lies."""
    before = set(cache.folder.glob("*"))
    cache.remember(Work(), **key)
    (path,) = set(cache.folder.glob("*")) - before
    return path


def dangling_link(path):
    path.symlink_to(path.parent / "nowhere")


def link_to_a_file(path):
    (path.parent / "precious").write_text("precious")
    path.symlink_to(path.parent / "precious")


def huge(path):
    path.write_bytes(b"")
    os.truncate(path, 2**40)


def malformed(path):
    path.write_bytes(b"{" * 100)


INTRUDERS = [dangling_link, link_to_a_file, os.mkfifo, huge, malformed]


@pytest.mark.parametrize("intrude", INTRUDERS)
def test_what_lies_in_an_entrys_place_is_neither_read_nor_followed(tmp_path, intrude):
    """Nor does it block, and the entry takes its place."""
    cache = TensorCache("owner", tmp_path)
    path = entry_path(cache, prompt="a")
    path.unlink()
    intrude(path)
    work = Work()
    assert [cache.remember(work, prompt="a")["x"][0] for _ in range(2)] == [1, 1]
    assert path.is_file()
    assert not path.is_symlink()
    if (tmp_path / "precious").exists():
        assert (tmp_path / "precious").read_text() == "precious"


@pytest.mark.parametrize("intrude", INTRUDERS)
def test_eviction_goes_on_whatever_has_the_name_of_an_entry(tmp_path, intrude):
    cache = TensorCache("owner", tmp_path)
    intrude(tmp_path / f"{'0' * 64}.safetensors")
    size = entry_path(cache, prompt="first").stat().st_size
    cache.limit = 3 * size
    for i in range(9):
        cache.remember(Work(), prompt=str(i))
    kept = [path for path in tmp_path.glob("*.safetensors") if path.is_file()]
    assert len(kept) in (2, 3)
    assert sum(path.stat().st_size for path in kept) <= cache.limit


def test_files_of_others_are_neither_counted_nor_touched(tmp_path):
    cache = TensorCache("owner", tmp_path)
    (tmp_path / "notes.txt").write_text("n" * 10**5)
    (tmp_path / "model.safetensors").write_text("m" * 10**5)
    (tmp_path / "folder").mkdir()
    (tmp_path / f"{'1' * 64}.safetensors").mkdir()
    cache.limit = 10**4
    work = Work()
    for _ in range(2):
        cache.remember(work, prompt="a")
    assert work.times == 1, "what is not the cache's leaves no less room for its own"
    cache.limit = 1
    cache.remember(work, prompt="b")
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"notes.txt", "model.safetensors", "folder", f"{'1' * 64}.safetensors"}


def test_entries_dated_in_the_future_go_first(tmp_path):
    cache = TensorCache("owner", tmp_path)
    future = entry_path(cache, prompt="future")
    os.utime(future, (2**32, 2**32))
    size = future.stat().st_size
    cache.limit = 2 * size
    work = Work()
    for prompt in "ab":
        cache.remember(work, prompt=prompt)
    assert not future.exists()
    for prompt in "ab":
        cache.remember(work, prompt=prompt)
    assert work.times == 2


def test_only_its_user_enters_the_folder(tmp_path, monkeypatch):
    before = os.umask(0o000)
    try:
        cache = TensorCache("owner", tmp_path / "cache" / "text")
        cache.remember(Work(), prompt="a")
        assert cache.folder.stat().st_mode & 0o777 == 0o700
        cache.folder.chmod(0o755)  # as earlier versions left it
        cache.remember(Work(), prompt="a")
        assert cache.folder.stat().st_mode & 0o777 == 0o700
    finally:
        os.umask(before)
    work = Work()
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    assert [cache.remember(work, prompt="a")["x"][0] for _ in range(2)] == [1, 2]


def test_what_a_killed_process_was_writing_goes(tmp_path):
    from kandinsky_model.files import replacing

    cache = TensorCache("owner", tmp_path)
    with replacing(tmp_path / f"{'2' * 64}.safetensors") as target:
        target.write_bytes(b"")
        own = target.parent.name
    killed = subprocess.Popen([sys.executable, "-c", ""])
    killed.wait()
    left = tmp_path / own.replace(f"-{os.getpid()}-", f"-{killed.pid}-")
    left.mkdir()
    cache.remember(Work(), prompt="a")
    assert not left.exists()


def test_a_place_that_cannot_be_written_costs_nothing_but_time(tmp_path):
    (tmp_path / "file").write_text("")
    cache = TensorCache("owner", tmp_path / "file")
    work = Work()
    assert [cache.remember(work, prompt="a")["x"][0] for _ in range(2)] == [1, 2]


def test_the_folder_is_that_of_the_users_caches(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_folder() == tmp_path / "kandinsky_model" / "text"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_folder() == tmp_path / ".cache" / "kandinsky_model" / "text"


def test_another_file_is_another_encoder(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"12345")
    known = identity([tmp_path], torch.float32)
    assert (
        identity([tmp_path, tmp_path], torch.float32)
        == known
        != identity([tmp_path], torch.bfloat16)
    )
    (tmp_path / "README.md").write_text("says nothing about the weights")
    assert identity([tmp_path], torch.float32) == known
    os.utime(tmp_path / "model.safetensors", ns=(1, 1))
    touched = identity([tmp_path], torch.float32)
    (tmp_path / "tokenizer.json").write_text("{}")
    assert len({str(known), str(touched), str(identity([tmp_path], torch.float32))}) == 3


def test_every_wish_has_its_own_entry(text_parts, tmp_path, monkeypatch):
    """Whatever changes the embeddings changes the name of the entry."""
    monkeypatch.setattr("kandinsky_model.text.expand.MOST_TOKENS", 4)

    def encoder(template=TEMPLATE, **options):
        return QwenClipEncoder(
            tiny_models.encoder_parts(text_parts),
            template,
            cache=TensorCache("owner", tmp_path),
            **options,
        )

    image = torch.arange(3 * 60 * 60, dtype=torch.int32).reshape(3, 60, 60).byte()
    wishes = [
        (encoder(), ["a"]),
        (encoder(), ["b"]),
        (encoder(), ["a"], "image"),
        (encoder(max_length=200), ["a"]),
        (encoder(template="<|im_start|>user: {}<|im_end|>"), ["a"]),
        (encoder(template=None), ["a"]),
        (encoder(), ["a"], "image_edit", [image]),
        (encoder(), ["a"], "image_edit", [image.flip(0)]),
        (encoder(edit_crop="exact"), ["a"], "image_edit", [image]),
    ]
    for count, (text, *wish) in enumerate(wishes, start=1):
        fresh = text.encode(*wish)
        assert len(list(tmp_path.iterdir())) == count
        text.cache = None
        again = text.encode(*wish)
        assert torch.equal(fresh.embeds, again.embeds)
        assert torch.equal(fresh.pooled, again.pooled)
    expanding = encoder()
    for count, (prompt, shown) in enumerate(
        (("a", None), ("b", None), ("a", image), ("a", image.flip(0))), start=len(wishes) + 1
    ):
        expanding.expand(prompt, image=shown)
        assert len(list(tmp_path.iterdir())) == count


SECOND_RUN = """
import sys
from kandinsky_model import pipeline
model = pipeline.load(sys.argv[1], device="cpu")
small = dict(seed=1, height=64, width=80, num_frames=5, num_inference_steps=2)
sums = [video.latents.sum().item() for video in model.generate(["a cat", "кот"], **small)]
heavy = sorted({"transformers", "diffusers"} & set(sys.modules))
print(heavy, list(model.text.parameters()), *sums)
"""


def test_a_known_prompt_needs_no_encoder(diffusers_folder, tmp_path, monkeypatch):
    """The second process reads no network, imports neither transformers nor diffusers, and makes
    the same videos."""
    monkeypatch.setattr(
        "kandinsky_model.text.cache.default_folder", lambda: tmp_path / "kandinsky_model" / "text"
    )
    model = pipeline.load(diffusers_folder, device="cpu")
    videos = model.generate(["a cat", "кот"], seed=1, **tiny_models.SMALL)
    again = subprocess.run(
        [sys.executable, "-c", SECOND_RUN, str(diffusers_folder)],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
        env={**os.environ, "XDG_CACHE_HOME": str(tmp_path)},
    )
    assert again.returncode == 0, again.stderr
    assert again.stdout.startswith("[] [] ")
    sums = [float(word) for word in again.stdout.split()[2:]]
    assert sums == pytest.approx([video.latents.sum().item() for video in videos], rel=1e-4)


def test_the_same_video_whether_its_prompt_was_known_or_not(diffusers_folder):
    model = pipeline.load(diffusers_folder, device="cpu")
    fresh, known = (model.generate("кот", seed=2, **tiny_models.SMALL) for _ in range(2))
    assert torch.equal(fresh.latents, known.latents)
    assert len(entries(model.text.cache)) == 2, "prompt and negative prompt"


def test_the_cache_can_be_left_alone(diffusers_folder, tmp_path, monkeypatch):
    monkeypatch.setattr("kandinsky_model.text.cache.default_folder", lambda: tmp_path / "cache")
    kept, left = (
        pipeline.load(diffusers_folder, device="cpu", parts=("text",), text_cache=use).text
        for use in (True, False)
    )
    assert left.cache is None
    assert torch.equal(left.encode(["a"]).embeds, left.encode(["a"]).embeds)
    assert not (tmp_path / "cache").exists()
    assert torch.equal(kept.encode(["a"]).embeds, left.encode(["a"]).embeds)
    assert len(entries(kept.cache)) == 1
    for use in (["--no-text-cache"], []):
        assert (
            main(
                [
                    "generate",
                    "a cat",
                    "--model",
                    str(diffusers_folder),
                    *tiny_models.SMALL_ARGS,
                    "--guidance",
                    "1",
                    *use,
                    "-o",
                    str(tmp_path / "a.gif"),
                    "--device",
                    "cpu",
                ]
            )
            == 0
        )
        assert len(entries(kept.cache)) == (1 if use else 2)
