# SPDX-License-Identifier: Apache-2.0
"""Training of every kind of checkpoint on random weights, distillation, and what diffusers makes of
an adapter."""

from dataclasses import replace

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from kandinsky_model import pipeline
from kandinsky_model.dit.geometry import Grid
from kandinsky_model.dit.layout import make_layout
from kandinsky_model.sampling.given import model_input, with_frames
from kandinsky_model.training.adapters import attach, switched_off
from kandinsky_model.training.config import LoRAConfig, TrainConfig
from kandinsky_model.training.network import TrainNetwork
from kandinsky_model.training.outputs import save_lora
from kandinsky_model.training.trainer import Run, train

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
    root = tmp_path_factory.mktemp("models")
    return {
        task: tiny_models.diffusers_folder(
            root / name, text_parts, "t2v" if task == "i2v" else task
        )
        for task, name in NAMES.items()
    }


@pytest.fixture(scope="module")
def datas(tmp_path_factory):
    root = tmp_path_factory.mktemp("datas")
    for task in ("t2i", "i2i"):
        (root / task).mkdir()
        for i, colour in enumerate(("red", "green")):
            Image.new("RGB", (80, 64), colour).save(root / task / f"{i}.png")
            (root / task / f"{i}.txt").write_text(f"make it {colour}")
            if task == "i2i":
                Image.new("RGBA", (90, 90), "blue").save(root / task / f"{i}.source.png")
    return {"t2i": root / "t2i", "i2i": root / "i2i", "i2v": clips(root / "i2v", 2, 9)}


def config(model, task, **changes):
    return replace(
        TrainConfig(
            model=str(model),
            lora=LoRAConfig(4),
            sizes=((64, 64),),
            lengths=(1,) if task[1:] == "2i" else (9,),
            batch=2,
            passes=1,
            rate=1e-2,
            warmup=0,
            steps=2,
            drop=0.0,
            device="cpu",
        ),
        **changes,
    )


@pytest.mark.parametrize("task", NAMES)
def test_every_kind_of_checkpoint(models, datas, tmp_path, task):
    """What the network is shown, and that what it learned loads."""
    run = Run(
        datas[task],
        tmp_path / "out",
        config(models[task], task, sample_every=2, samples=1, sample_steps=2),
    )
    run.begin(resume=False)
    seen, call = [], run.network.__call__
    run.network = lambda *args: seen.append(args) or call(*args)
    run.network.config, run.network.dit = call.__self__.config, call.__self__.dit
    batch = run.drawn(0)
    losses = run._losses(batch)
    x, out = seen[0][0], call(*seen[0]).float()
    error = (out - (batch.noise - batch.clean)).square()
    if task == "i2v":  # the first latent frame is shown clean, flagged, and does not count
        assert torch.equal(x[:, 0, ..., :16], batch.clean[:, 0]) and torch.equal(
            x[:, 1:, ..., :16], batch.noisy[:, 1:]
        )
        assert (
            x[:, 0, ..., 32].eq(1).all() and not x[:, 1:, ..., 32].any() and not x[..., 16:32].any()
        )
        error = error[:, 1:]
    elif task == "i2i":
        assert (
            torch.equal(x[..., 16:32], batch.given.source)
            and x[..., 32].eq(1).all()
            and batch.given.source.std() > 0
        )
        assert torch.equal(x[..., :16], batch.noisy)
    else:
        assert torch.equal(x, batch.noisy)
    torch.testing.assert_close(losses, error.mean((1, 2, 3, 4)))
    run.network = call.__self__
    run.advance()
    run.advance()
    assert len(list((run.out / "samples").iterdir())) == 1
    model = pipeline.load(models[task], device="cpu", parts=("dit",))
    assert model.preset.task == task and len(model.lora.load(run.out).modules) == 2 * 10 + 6


@pytest.mark.parametrize(
    ("task", "length", "words"),
    [
        ("t2i", 5, "makes pictures, of 1 frame, got lengths of 5"),
        ("i2v", 1, "learns what follows a first frame"),
    ],
)
def test_lengths_that_a_checkpoint_does_not_learn(models, datas, tmp_path, task, length, words):
    with pytest.raises(ValueError, match=words):
        train(datas[task], tmp_path / "out", config(models[task], task, lengths=(length,)))


def test_an_image_to_video_model_stays_one(models, datas, tmp_path):
    out = train(
        datas["i2v"], tmp_path / "anything", config(models["i2v"], "i2v", lora=None, rate=1e-4)
    )
    model = pipeline.load(out, device="cpu")
    assert model.preset.name == "i2v-lite-5s"
    picture = Image.new("RGB", (64, 64), "red")
    video = model.generate(
        "it waves", image=picture, height=64, width=64, num_frames=5, num_inference_steps=1, seed=0
    )
    assert video.frames.shape == (5, 64, 64, 3)


def test_distillation_fits_dense_attention(models, datas, tmp_path):
    """Without the adapter the student is the checkpoint under NABLA, and its loss the distance to
    the same under dense attention."""
    run = Run(
        datas["i2v"],
        tmp_path / "out",
        config(models["i2v"], "i2v", sizes=((192, 192),), distill="dense", rate=2e-4, ema=0.0),
    )
    run.begin(resume=False)
    batch = run.drawn(0)
    run.drawn = lambda _: batch
    loss = run._losses(batch).mean().item()
    assert loss > 0
    for _ in range(6):
        run.advance()
    later = run._losses(batch).mean().item()
    print(f"distance {loss:.4g} before, {later:.4g} after")
    assert later < loss
    dense = run.layout((3, 24, 24), dense=True)
    run.layout = lambda *_, **__: dense
    with switched_off(run.network.dit):
        assert run._losses(batch).max() == 0


def test_distillation_of_guidance_needs_one_pass_for_two(models, datas, tmp_path):
    """The student's first loss is the distance between guided and plain velocity; captions are
    never left out; then it falls."""
    run = Run(
        datas["i2v"],
        tmp_path / "out",
        config(models["i2v"], "i2v", distill="guidance", rate=2e-4, ema=0.0, drop=1.0),
    )
    run.begin(resume=False)
    batch = run.drawn(0)
    told = load_file(run.passes[0][0][0].text)["embeds"]
    assert torch.equal(batch.cond.embeds[0, : len(told)], told) and batch.null.embeds.shape[0] == 2
    x = model_input(run.network.dit, with_frames(batch.noisy, batch.given.frames), batch.given)
    plan = run.layout(tuple(x.shape[1:4]))
    with torch.no_grad():
        told, untold = (
            run.network.dit(x, text.embeds, text.pooled, 1000 * batch.times, plan, text.lengths)
            for text in (batch.cond, batch.null)
        )
    wanted = (run.preset.guidance - 1) * (told - untold)
    loss = run._losses(batch)
    assert (
        torch.allclose(loss, wanted[:, 1:].square().mean((1, 2, 3, 4)), rtol=1e-4)
        and loss.min() > 0
    )
    run.drawn = lambda _: batch
    for _ in range(6):
        run.advance()
    assert run._losses(batch).mean() < loss.mean()
    assert run.gallery.sources.preset.guidance == 1 and run.preset.guidance > 1


@pytest.mark.parametrize(
    "changes, words",
    [
        (dict(distill="guided"), "distill must be dense or guidance"),
        (dict(distill="dense", attention="dense"), "fits sparse attention"),
    ],
)
def test_impossible_distillations_are_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        TrainConfig(**changes)


def test_distillation_of_all_weights_keeps_the_teacher(models, datas, tmp_path):
    run = Run(
        datas["i2v"],
        tmp_path / "out",
        config(models["i2v"], "i2v", lora=None, distill="dense", rate=1e-3),
    )
    run.begin(resume=False)
    before = {name: tensor.clone() for name, tensor in run.teacher.dit.state_dict().items()}
    run.advance()
    assert all(
        torch.equal(tensor, before[name]) for name, tensor in run.teacher.dit.state_dict().items()
    )
    assert any(
        not torch.equal(tensor, before[name])
        for name, tensor in run.network.dit.state_dict().items()
    )


def adapter(folder, alpha):
    """An adapter with numbers in it, written as training writes it, and the network with it."""
    network, how = TrainNetwork(build().prepare(), CPU), LoRAConfig(4, alpha)
    parameters, g = attach(network.dit, how, 0, CPU), torch.Generator().manual_seed(1)
    for parameter in parameters.values():
        parameter.data = torch.randn(parameter.shape, generator=g) / 12
    folder.mkdir()
    save_lora(folder, parameters, how, torch.float32, "a model")
    return network


@pytest.mark.parametrize("alpha", [None, 7.0])
def test_diffusers_loads_the_adapter(tmp_path, monkeypatch, alpha):
    pytest.importorskip("peft")
    ours = adapter(tmp_path / "lora", alpha)
    theirs = diffusers_of(build(), True, monkeypatch)
    grid, read = Grid(2, 8, 8), inputs(CONFIG, Grid(2, 8, 8))
    x, text, pooled, time = read
    call = dict(
        hidden_states=x,
        encoder_hidden_states=text,
        pooled_projections=pooled,
        timestep=time,
        scale_factor=SCALE,
        visual_rope_pos=[torch.arange(n) for n in (grid.T, grid.Y, grid.X)],
        text_rope_pos=torch.arange(text.shape[1]),
        sparse_params=None,
        return_dict=False,
    )
    with torch.no_grad():
        before = theirs(**call)[0]
        theirs.load_lora_adapter(
            str(tmp_path / "lora"), weight_name="lora.safetensors", prefix=None
        )
        after, wanted = theirs(**call)[0], ours(*read, make_layout(CONFIG, grid, SCALE))
    print(
        f"with the adapter: rel_l2 {rel_l2(after, wanted):.2g}; it changes "
        f"{rel_l2(before, wanted):.2g}"
    )
    assert rel_l2(after, wanted) <= 1e-5 and rel_l2(before, wanted) > 1e-2


def test_diffusers_takes_the_names(tmp_path):
    """What its loader asks of a state dict in PEFT's form: every key is one, and names a linear
    layer of its transformer."""
    module = pytest.importorskip("diffusers.models.transformers.transformer_kandinsky")
    adapter(tmp_path / "lora", None)
    with torch.device("meta"):
        layers = {
            name
            for name, layer in module.Kandinsky5Transformer3DModel(
                **{
                    key: getattr(CONFIG, key)
                    for key in CONFIG.__dataclass_fields__
                    if key != "instruct_type"
                }
            ).named_modules()
            if isinstance(layer, torch.nn.Linear)
        }
    names = load_file(tmp_path / "lora" / "lora.safetensors")
    assert names and all(
        name.endswith((".lora_A.weight", ".lora_B.weight"))
        and name.rsplit(".lora_", 1)[0] in layers
        for name in names
    )
