# SPDX-License-Identifier: Apache-2.0
"""Training of every kind of checkpoint on random weights, distillation, and what diffusers makes of
an adapter."""

import json
from dataclasses import replace

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from kandinsky_model import pipeline
from kandinsky_model.dit.geometry import Grid
from kandinsky_model.dit.layout import make_layout
from kandinsky_model.sampling.given import model_input, with_frames
from kandinsky_model.training.adapters import attach, switched_off
from kandinsky_model.training.config import LoRAConfig, TrainConfig
from kandinsky_model.training.network import TrainNetwork
from kandinsky_model.training.outputs import save_lora
from kandinsky_model.training.trainer import Trainer, train

from ..dit.test_transformer import CONFIG, SCALE, build, inputs, rel_l2
from ..support import tiny_models
from ..support.diffusers_dit import diffusers_of
from ..support.train_folders import clips

CPU = torch.device("cpu")
NAMES = {
    "t2i": "Kandinsky-5.0-T2I-Lite-Diffusers",
    "i2i": "Kandinsky-5.0-I2I-Lite-Diffusers",
    "i2v": "Kandinsky-5.0-I2V-Lite-5s-Diffusers",
}


@pytest.fixture(scope="module")
def models(tmp_path_factory, text_parts):
    """Folders of whole models by task."""
    root = tmp_path_factory.mktemp("models")
    kinds = {"t2i": "t2i", "i2i": "i2i", "i2v": "t2v"}
    return {
        task: tiny_models.diffusers_folder(root / name, text_parts, kinds[task])
        for task, name in NAMES.items()
    }


@pytest.fixture(scope="module")
def datas(tmp_path_factory):
    """Folders of data by task."""
    root = tmp_path_factory.mktemp("datas")
    for task in ("t2i", "i2i"):
        folder = root / task
        folder.mkdir()
        for i, colour in enumerate(("red", "green")):
            Image.new("RGB", (80, 64), colour).save(folder / f"{i}.png")
            (folder / f"{i}.txt").write_text(f"make it {colour}")
            if task == "i2i":
                Image.new("RGBA", (90, 90), "blue").save(folder / f"{i}.source.png")
    return {"t2i": root / "t2i", "i2i": root / "i2i", "i2v": clips(root / "i2v", 2, 9)}


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def config(models, cache):
    """Gives the settings of a small training of a task."""

    def make(task, **changes):
        lengths = (1,) if task in ("t2i", "i2i") else (9,)
        small = TrainConfig(
            model=str(models[task]),
            lora=LoRAConfig(4),
            sizes=((64, 64),),
            lengths=lengths,
            batch=2,
            passes=1,
            rate=1e-2,
            warmup=0,
            steps=2,
            drop=0.0,
            device="cpu",
            cache=str(cache),
        )
        return replace(small, **changes)

    return make


def begun(data, out, config):
    trainer = Trainer(data, out, config)
    trainer.begin(resume=False)
    return trainer


@pytest.mark.parametrize("task", NAMES)
def test_every_kind_of_checkpoint(models, datas, config, tmp_path, task):
    """What the network is shown, and that what it learned loads."""
    settings = config(task, sample_every=2, samples=1, sample_steps=2)
    trainer = begun(datas[task], tmp_path / "out", settings)
    objective = trainer.objective
    network = trainer.network
    seen = []

    class Watched:
        dit = network.dit

        def __call__(self, *arguments):
            seen.append(arguments)
            return network(*arguments)

    objective.network = Watched()
    objective.network.device = network.device
    batch = trainer.drawn(0)
    losses = objective.losses(batch)
    x = seen[0][0]
    latents = x[..., :16]
    condition = x[..., 16:32]
    mask = x[..., 32:]
    error = (network(*seen[0]).float() - (batch.noise - batch.clean)).square()
    if task == "i2v":  # the first latent frame is shown clean, flagged, and does not count
        assert torch.equal(latents[:, 0], batch.clean[:, 0])
        assert torch.equal(latents[:, 1:], batch.noisy[:, 1:])
        assert mask[:, 0].eq(1).all()
        assert not mask[:, 1:].any()
        assert not condition.any()
        error = error[:, 1:]
    elif task == "i2i":
        assert torch.equal(latents, batch.noisy)
        assert torch.equal(condition, batch.given.source)
        assert batch.given.source.std() > 0
        assert mask.eq(1).all()
    else:
        assert torch.equal(x, batch.noisy)
    torch.testing.assert_close(losses, error.mean((1, 2, 3, 4)))

    objective.network = network
    trainer.advance()
    trainer.advance()
    assert len(list((trainer.out / "samples").iterdir())) == 1
    model = pipeline.load(models[task], device="cpu", parts=("dit",))
    assert model.preset.task == task
    assert len(model.lora.load(trainer.out).modules) == 2 * 10 + 6


@pytest.mark.parametrize(
    ("task", "length", "words"),
    [
        ("t2i", 5, "makes pictures, of 1 frame, got lengths of 5"),
        ("i2v", 1, "learns what follows a first frame"),
    ],
)
def test_lengths_that_a_checkpoint_does_not_learn(datas, config, tmp_path, task, length, words):
    with pytest.raises(ValueError, match=words):
        train(datas[task], tmp_path / "out", config(task, lengths=(length,)))


def test_an_image_to_video_model_stays_one(datas, config, tmp_path):
    """A folder of all weights knows its preset, whatever its name is."""
    out = train(datas["i2v"], tmp_path / "anything", config("i2v", lora=None, rate=1e-4))
    model = pipeline.load(out, device="cpu")
    assert model.preset.name == "i2v-lite-5s"
    video = model.generate(
        "it waves",
        image=Image.new("RGB", (64, 64), "red"),
        height=64,
        width=64,
        num_frames=5,
        num_inference_steps=1,
        seed=0,
    )
    assert video.frames.shape == (5, 64, 64, 3)


# Distillation


def test_distillation_fits_dense_attention(datas, config, tmp_path):
    """Without the adapter the student is the checkpoint under NABLA, and its loss the distance to
    the same under dense attention."""
    settings = config(
        "i2v",
        sizes=((192, 192),),
        distill="dense",
        rate=2e-4,
        ema=0.0,
    )
    trainer = begun(datas["i2v"], tmp_path / "out", settings)
    objective = trainer.objective
    batch = trainer.drawn(0)
    trainer.drawn = lambda _: batch
    loss = objective.losses(batch).mean().item()
    assert loss > 0
    for _ in range(6):
        trainer.advance()
    later = objective.losses(batch).mean().item()
    print(f"distance {loss:.4g} before, {later:.4g} after")
    assert later < loss
    dense = objective.layout((3, 24, 24), dense=True)
    objective.layout = lambda *_, **__: dense
    with switched_off(trainer.network.dit):
        assert objective.losses(batch).max() == 0


def test_distillation_of_guidance_needs_one_pass_for_two(datas, config, tmp_path):
    """The student's first loss is the distance between guided and plain velocity; captions are
    never left out; then it falls."""
    settings = config("i2v", distill="guidance", rate=2e-4, ema=0.0, drop=1.0)
    trainer = begun(datas["i2v"], tmp_path / "out", settings)
    dit = trainer.network.dit
    batch = trainer.drawn(0)
    caption = load_file(trainer.passes[0][0][0].text)["embeds"]
    assert torch.equal(batch.cond.embeds[0, : len(caption)], caption)
    assert batch.null.embeds.shape[0] == 2

    x = model_input(dit, with_frames(batch.noisy, batch.given.frames), batch.given)
    layout = trainer.objective.layout(tuple(x.shape[1:4]))
    time = 1000 * batch.times
    with torch.no_grad():
        cond, uncond = (
            dit(x, text.embeds, text.pooled, time, layout, text.lengths)
            for text in (batch.cond, batch.null)
        )
    wanted = (trainer.preset.guidance - 1) * (cond - uncond)
    distance = wanted[:, 1:].square().mean((1, 2, 3, 4))
    loss = trainer.objective.losses(batch)
    assert torch.allclose(loss, distance, rtol=1e-4)
    assert loss.min() > 0

    trainer.drawn = lambda _: batch
    for _ in range(6):
        trainer.advance()
    assert trainer.objective.losses(batch).mean() < loss.mean()
    assert trainer.gallery.sources.preset.guidance == 1
    assert trainer.preset.guidance > 1


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"distill": "guided"}, "distill must be dense or guidance"),
        ({"distill": "dense", "attention": "dense"}, "fits sparse attention"),
    ],
)
def test_impossible_distillations_are_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        TrainConfig(**changes)


def test_distillation_of_all_weights_keeps_the_teacher(datas, config, tmp_path):
    settings = config("i2v", lora=None, distill="dense", rate=1e-3)
    trainer = begun(datas["i2v"], tmp_path / "out", settings)
    teacher = trainer.objective.teacher.dit.state_dict()
    before = {name: tensor.clone() for name, tensor in teacher.items()}
    trainer.advance()
    assert all(torch.equal(tensor, before[name]) for name, tensor in teacher.items())
    student = trainer.network.dit.state_dict()
    assert any(not torch.equal(tensor, before[name]) for name, tensor in student.items())


# diffusers


def saved_adapter(folder, alpha):
    """Write an adapter with random numbers as training writes it; the network with it."""
    network = TrainNetwork(build().prepare(), CPU)
    lora = LoRAConfig(4, alpha)
    parameters = attach(network.dit, lora, 0, CPU)
    generator = torch.Generator().manual_seed(1)
    for parameter in parameters.values():
        parameter.data = torch.randn(parameter.shape, generator=generator) / 12
    folder.mkdir()
    save_lora(folder, parameters, lora, torch.float32, "a model")
    return network


@pytest.mark.parametrize("alpha", [None, 7.0])
def test_diffusers_loads_the_adapter(tmp_path, monkeypatch, alpha):
    pytest.importorskip("peft")
    ours = saved_adapter(tmp_path / "lora", alpha)
    theirs = diffusers_of(build(), True, monkeypatch)
    grid = Grid(2, 8, 8)
    x, text, pooled, time = read = inputs(CONFIG, grid)
    call = {
        "hidden_states": x,
        "encoder_hidden_states": text,
        "pooled_projections": pooled,
        "timestep": time,
        "scale_factor": SCALE,
        "visual_rope_pos": [torch.arange(n) for n in (grid.T, grid.Y, grid.X)],
        "text_rope_pos": torch.arange(text.shape[1]),
        "sparse_params": None,
        "return_dict": False,
    }
    with torch.no_grad():
        before = theirs(**call)[0]
        weights = {"weight_name": "lora.safetensors", "prefix": None}
        theirs.load_lora_adapter(str(tmp_path / "lora"), **weights)
        after = theirs(**call)[0]
        wanted = ours(*read, make_layout(CONFIG, grid, SCALE))
    change = rel_l2(before, wanted)
    print(f"with the adapter: rel_l2 {rel_l2(after, wanted):.2g}; it changes {change:.2g}")
    assert rel_l2(after, wanted) <= 1e-5
    assert change > 1e-2


def test_diffusers_takes_the_names(tmp_path):
    """What its loader asks of a state dict in PEFT's form: every key is one, and names a linear
    layer of its transformer. Of the header diffusers 0.37 asks that it has a pattern of ranks."""
    module = pytest.importorskip("diffusers.models.transformers.transformer_kandinsky")
    saved_adapter(tmp_path / "lora", None)
    known = [field for field in CONFIG.__dataclass_fields__ if field != "instruct_type"]
    with torch.device("meta"):
        theirs = module.Kandinsky5Transformer3DModel(**{key: getattr(CONFIG, key) for key in known})
    linear = {name for name, layer in theirs.named_modules() if isinstance(layer, torch.nn.Linear)}
    with safe_open(tmp_path / "lora" / "lora.safetensors", "pt") as file:
        names = list(file.keys())
        assert json.loads(file.metadata()["lora_adapter_metadata"])["rank_pattern"] == {}
    assert names
    for name in names:
        assert name.endswith((".lora_A.weight", ".lora_B.weight"))
        assert name.rsplit(".lora_", 1)[0] in linear
