# SPDX-License-Identifier: Apache-2.0
"""The drawn clips, their judge, the tiny text encoder, its training in miniature, and the bundled
checkpoint."""

import json
import random
from dataclasses import replace
from operator import attrgetter

import pytest
import torch

from kandinsky_model import pipeline
from kandinsky_model.checkpoints.load import load_dit, load_vae
from kandinsky_model.checkpoints.locate import TINY
from kandinsky_model.config import PRESETS, DiTConfig, VAEConfig
from kandinsky_model.text.tiny import START, UNKNOWN, TinyTextEncoder
from kandinsky_model.tiny import scenes
from kandinsky_model.tiny.check import check_tiny
from kandinsky_model.tiny.judge import judge, marks
from kandinsky_model.tiny.optimizer import Optimizer
from kandinsky_model.tiny.recipe import make_pool, read_log, train_tiny
from kandinsky_model.tiny.train_flow import (
    FlowRecipe,
    Pool,
    new_networks,
    pool_scenes,
    sample_times,
    train_flow,
    vocabulary,
)
from kandinsky_model.tiny.train_vae import VAERecipe, center_latents, crop_batch, fold_time
from kandinsky_model.vae.hunyuan import HunyuanVideoVAE

LARGEST_BUNDLE = 16_000_000
SMALL = replace(
    PRESETS["tiny"],
    dit=DiTConfig(
        in_text_dim=16,
        in_text_dim2=16,
        time_dim=16,
        model_dim=64,
        ff_dim=64,
        num_text_blocks=1,
        num_visual_blocks=1,
        visual_cond=True,
    ),
    vae=VAEConfig(
        block_out_channels=(8, 8, 8, 8),
        layers_per_block=1,
        norm_num_groups=1,
        scaling_factor=1.0,
    ),
)


def clip(color="red", shape="circle", motion="right", background="blue", seed=0):
    combination = scenes.Combination(color, shape, motion, background)
    return scenes.draw(scenes.random_scene(combination, random.Random(seed)))


# ---- data


def test_enough_words_and_nothing_drawn_in_its_own_color():
    assert len(scenes.OBJECT_COLORS) >= 6
    assert len(scenes.SHAPES) >= 4
    assert len(scenes.MOTIONS) >= 5
    assert len(scenes.BACKGROUNDS) >= 4
    combinations = scenes.combinations()
    assert len(set(combinations)) == len(combinations)
    for one in combinations:
        assert one.color != one.background


def test_held_out_is_disjoint_from_training_and_every_pair_of_words_is_seen():
    hidden = set(scenes.held_out())
    seen = set(scenes.training_combinations())
    assert len(hidden) == 48
    assert not hidden & seen
    assert hidden | seen == set(scenes.combinations())
    for first, second in (
        ("color", "shape"),
        ("color", "motion"),
        ("color", "background"),
        ("shape", "motion"),
        ("shape", "background"),
    ):
        pair = attrgetter(first, second)
        pairs_seen = set(map(pair, seen))
        pairs = set(map(pair, scenes.combinations()))
        assert pairs_seen == pairs


def test_training_scenes_never_show_a_held_out_combination():
    generator = random.Random(0)
    drawn = set()
    for _ in range(4000):
        index = generator.randrange(10**6)
        scene = scenes.training_scene(index, generator)
        drawn.add(scene.combination)
    assert not drawn & set(scenes.held_out())
    assert len(drawn) > 400


def test_prompts_name_the_words():
    combination = scenes.Combination("orange", "star", "up", "gray")
    assert scenes.prompt(combination) == "an orange star moving up on a gray background"
    for wording in range(scenes.FULL):
        prompt = scenes.prompt(combination, wording)
        for word in ("orange", "star", "up", "gray"):
            assert word in prompt
    assert "gray" not in scenes.prompt(combination, 4)
    assert "up" not in scenes.prompt(combination, 5)


def test_a_window_is_a_cut_of_the_whole_frame():
    scene = scenes.random_scene(scenes.combinations()[7], random.Random(3))
    frames = (5, 6)
    whole = scenes.draw(scene, frames)
    window = scenes.draw(scene, frames, (40, 48, 64, 96))
    assert torch.equal(window, whole[:, 40:104, 48:144])


# ---- judge


def test_judge_is_right_about_drawn_clips():
    generator = random.Random(1)
    for combination in scenes.combinations()[::19]:
        scene = scenes.random_scene(combination, generator)
        verdict = judge(scenes.draw(scene))
        right = marks(verdict, combination)
        assert all(right.values()), (combination, verdict)


@pytest.mark.parametrize(
    "word, other",
    [
        ("color", "green"),
        ("shape", "square"),
        ("motion", "left"),
        ("background", "black"),
    ],
)
def test_judge_sees_one_wrong_word(word, other):
    wanted = scenes.Combination("red", "circle", "right", "blue")
    shown = clip(**{word: other})
    found = marks(judge(shown), wanted)
    assert found == {name: name != word for name in found}


def test_judge_finds_nothing_in_noise_emptiness_and_smears():
    flat = torch.full((17, 160, 160, 3), 20, dtype=torch.uint8)
    verdict = judge(flat)
    assert verdict.color == "none"
    assert verdict.background == "black"
    generator = torch.Generator().manual_seed(0)
    noise = torch.randint(0, 256, flat.shape, dtype=torch.uint8, generator=generator)
    assert judge(noise).shape == "none"
    smear = flat.clone()
    smear[:, 72:84, 15:145] = torch.tensor([205, 25, 40], dtype=torch.uint8)
    assert judge(smear).shape == "none"


def test_judge_calls_a_short_path_still_and_a_diagonal_none():
    frames = clip(motion="still")
    assert judge(frames).motion == "still"
    moved = []
    for i, frame in enumerate(frames):
        down_and_right = (2 * i, 2 * i)
        moved.append(frame.roll(down_and_right, (0, 1)))
    diagonal = torch.stack(moved)
    assert judge(diagonal).motion == "none"


def test_judge_rejects_other_layouts():
    with pytest.raises(ValueError, match="uint8"):
        judge(torch.zeros(17, 160, 160, 3))


# ---- text encoder


@pytest.fixture
def encoder():
    torch.manual_seed(0)
    return TinyTextEncoder(
        vocabulary(),
        {"grey": "gray"},
        dim=64,
        pooled_dim=32,
    ).eval()


def test_encode_shapes_and_independence_of_neighbours(encoder):
    both = encoder.encode(["a red circle moving right on a blue background", "star"])
    assert both.embeds.shape == (2, 10, 64)
    assert both.pooled.shape == (2, 32)
    assert both.lengths.tolist() == [10, 2]
    alone = encoder.encode(["star"])
    torch.testing.assert_close(both.embeds[1, :2], alone.embeds[0])
    torch.testing.assert_close(both.pooled[1], alone.pooled[0])
    assert not both.embeds[1, 2:].any()


def test_words_case_aliases_unknown_and_empty(encoder):
    assert encoder.tokens("Grey, STAR!") == encoder.tokens("gray star")
    assert encoder.tokens("") == [START]
    assert encoder.tokens("zebra") == [START, UNKNOWN]
    assert encoder.encode([""]).lengths.tolist() == [1]
    assert len(encoder.tokens("star " * 100)) == encoder.config["max_length"]
    wordings = range(len(scenes.WORDINGS))
    for combination in scenes.combinations():
        for wording in wordings:
            prompt = scenes.prompt(combination, wording)
            assert UNKNOWN not in encoder.tokens(prompt)


def test_encode_errors(encoder):
    with pytest.raises(TypeError, match="list"):
        encoder.encode("a star")
    with pytest.raises(TypeError, match="NoneType"):
        encoder.encode([None])
    with pytest.raises(ValueError, match="empty list"):
        encoder.encode([])


def test_text_encoder_round_trip_and_damage(encoder, tmp_path):
    encoder.save(tmp_path)
    again = TinyTextEncoder.load(tmp_path).encode(["star"])
    torch.testing.assert_close(again.embeds, encoder.encode(["star"]).embeds)
    (tmp_path / "model.safetensors").write_bytes(b"short")
    with pytest.raises(ValueError, match="text encoder"):
        TinyTextEncoder.load(tmp_path)


def test_text_encoder_is_written_whole_or_not_at_all(encoder, tmp_path, monkeypatch):
    encoder.save(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def fail(_, target):
        target.write_bytes(b"half")
        raise OSError("the disk is full")

    monkeypatch.setattr("kandinsky_model.text.tiny.save_file", fail)
    with pytest.raises(OSError, match="full"):
        encoder.save(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


# ---- training


def test_optimizer_moves_every_direction_of_a_kernel_alike():
    """A convolution's kernel is a matrix, a bias is not: AdamW's first step is one of its rate."""
    torch.manual_seed(0)
    layer = torch.nn.Conv3d(8, 24, 2)
    weight = layer.weight.detach().clone()
    bias = layer.bias.detach().clone()
    x = torch.randn(4, 8, 4, 4, 4)
    rate = 0.01
    boost = 2.0
    optimizer = Optimizer(layer, decay=0.0, boost=boost)
    loss = (layer(x) - 1).square().mean()
    optimizer.step(loss, rate)
    moved = layer.weight.detach() - weight
    change = moved.flatten(1) / (boost * rate)  # [24, 64]
    values = torch.linalg.svdvals(change) / (0.2 * 64**0.5)
    assert values.min() > 0.5
    assert values.max() < 1.4
    root_mean_square = change.square().mean().sqrt()
    assert root_mean_square == pytest.approx(0.2, rel=0.25)
    moved = (layer.bias.detach() - bias).abs()
    torch.testing.assert_close(moved, torch.full((24,), rate))


def test_optimizer_moves_matrices_and_vectors_downhill():
    torch.manual_seed(0)
    layer = torch.nn.Linear(8, 8)
    x = torch.randn(64, 8)
    optimizer = Optimizer(layer)
    losses = []
    for _ in range(60):
        loss = (layer(x) - x.flip(1) - 1).square().mean()
        losses.append(loss.item())
        optimizer.step(loss, 0.05)
    assert losses[-1] < 0.1 * losses[0]


def test_optimizer_decays_at_the_rate_of_the_others():
    """The longer steps of `boost` do not make weights decay faster."""
    layer = torch.nn.Linear(8, 8)
    before = layer.weight.detach().clone()
    rate = 0.5
    decay = 0.1
    optimizer = Optimizer(layer, decay=decay, boost=2.5)
    without_gradient = 0 * layer(torch.ones(1, 8)).sum()
    optimizer.step(without_gradient, rate)
    after = layer.weight.detach()
    torch.testing.assert_close(after, before * (1 - rate * decay))


def test_centred_latents_decode_to_the_same_picture():
    torch.manual_seed(0)
    vae = HunyuanVideoVAE(SMALL.vae).eval()
    video = crop_batch(1, 5, 64, random.Random(0))
    with torch.no_grad():
        before = vae.decode(vae.encode(video)[0])
        center_latents(vae, random.Random(0), clips=1)
        after = vae.decode(vae.encode(video)[0])
    torch.testing.assert_close(after, before, rtol=1e-3, atol=1e-4)


def test_folding_time_keeps_stills_and_undoes_delay():
    torch.manual_seed(0)
    vae = HunyuanVideoVAE(SMALL.vae).eval()
    still = crop_batch(1, 1, 64, random.Random(0))
    with torch.no_grad():
        before = vae.encode(still)[0]
        fold_time(vae)
        after = vae.encode(still)[0]
        torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-5)
        video = crop_batch(1, 5, 64, random.Random(1))
        conv = vae.encoder.conv_in
        within = conv(video)[:, :, 3]
        alone = conv(video[:, :, 3:4])[:, :, 0]
    torch.testing.assert_close(within, alone, rtol=1e-4, atol=1e-5)


def test_stars_are_shown_as_often_as_asked():
    pool = pool_scenes(1, 0)
    # each value says which clip it is of
    rows = torch.arange(len(pool) * 2.0).view(-1, 2, 1, 1, 1)
    starry = sum(scene.combination.shape == "star" for scene in pool)
    others = len(pool) - starry
    for stars in (1.0, 3.0):
        latents, shown = Pool(rows, pool).batch(3000, 1, random.Random(0), stars)
        clips = [int(row) // 2 for row in latents.flatten()]
        assert [pool[i].combination for i in clips] == shown
        shapes = [combination.shape for combination in shown]
        share = shapes.count("star") / len(shapes)
        weighted = stars * starry
        wanted = weighted / (weighted + others)
        assert abs(share - wanted) < 0.03


def test_sample_times_cover_the_schedule():
    times = sample_times(64, 3.0)
    assert times.min() > 0
    assert times.max() < 1
    assert abs(times.median() - 0.75) < 0.05


def test_training_in_miniature(tmp_path, monkeypatch):
    monkeypatch.setitem(PRESETS, "tiny", SMALL)
    monkeypatch.setattr(scenes, "training_combinations", lambda: scenes.combinations()[:4])
    monkeypatch.setattr(scenes, "HEIGHT", 64)
    monkeypatch.setattr(scenes, "WIDTH", 64)
    vae_recipe = VAERecipe(phases=((12, 2, 1, 32), (1, 1, 5, 32)))
    phases = ((12, 4, 1, False), (2, 2, 5, False), (1, 1, 5, True))
    flow_recipe = FlowRecipe(phases=phases, copies=1, compile=False)
    train_tiny(tmp_path, 1, vae_recipe, flow_recipe)
    more = replace(flow_recipe, phases=((2, 1, 1, False),))
    train_tiny(tmp_path, 1, None, more, resume=True)

    stages = json.loads((tmp_path / "training.json").read_text())["stages"]
    assert [stage["stage"] for stage in stages] == ["vae", "flow", "flow"]
    assert [stage["continued"] for stage in stages] == [False, False, True]
    assert [stage["seed"] for stage in stages] == [1, 1, 2]
    assert stages[0]["losses"]
    assert stages[1]["steps"] == 15
    assert stages[2]["steps"] == 2
    assert load_dit(tmp_path / "transformer").config == SMALL.dit
    assert load_vae(tmp_path / "vae").config == SMALL.vae
    text = TinyTextEncoder.load(tmp_path / "text_encoder").encode(["a star"])
    assert text.embeds.shape == (1, 3, 16)


def test_a_pool_belongs_to_its_scenes(tmp_path, monkeypatch):
    """As many clips of another seed show other scenes; a damaged file shows none."""
    made = []

    def encode(vae, scenes):
        made.append(scenes)
        shape = (len(scenes), 1, 1, 1, 16)
        latents = torch.full(shape, float(len(made)))
        return Pool(latents.half(), scenes)

    monkeypatch.setattr("kandinsky_model.tiny.recipe.encode_pool", encode)
    monkeypatch.setattr("kandinsky_model.tiny.recipe.load_vae", lambda *_, **__: None)

    def pool(seed):
        return make_pool(tmp_path, 1, seed, "cpu")

    first = pool(1)
    again = pool(1)
    other = pool(2)
    assert torch.equal(first.latents, again.latents)
    assert len(made) == 2
    assert other.scenes == pool_scenes(1, 2)
    (tmp_path / "pool.safetensors").write_bytes(b"damaged")
    third = torch.full_like(first.latents, 3.0)
    assert torch.equal(pool(2).latents, third)


@pytest.mark.parametrize("text", ["[1]", '{"stages": [1]}', '{"stages": [{"stage": "vae"}]}', "{}"])
def test_a_log_of_another_kind_is_refused(tmp_path, text):
    (tmp_path / "training.json").write_text(text)
    with pytest.raises(ValueError, match="must (list the stages|hold a JSON object)"):
        read_log(tmp_path)


def test_flow_training_learns():
    torch.manual_seed(0)
    networks = new_networks(SMALL.dit, 0)
    colours = torch.randn(2, 1, 1, 1, 16).half()
    latents = colours.expand(2, 1, 4, 4, 16)
    pool = Pool(latents, pool_scenes(1, 0)[:2])
    recipe = FlowRecipe(
        rate=1e-2,
        boost=1.0,
        phases=((120, 16, 1, False),),
        compile=False,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scenes, "HEIGHT", 32)
        patch.setattr(scenes, "WIDTH", 32)
        _, losses = train_flow(networks, pool, recipe, SMALL, 0)
    assert losses[-1]["loss"] < 0.6 * losses[0]["loss"], losses


# ---- the bundle


def test_bundle_is_small_and_says_where_it_came_from():
    files = [path for path in TINY.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= LARGEST_BUNDLE
    assert {path.suffix for path in files} <= {".json", ".safetensors"}
    log = json.loads((TINY / "training.json").read_text())
    stages = log["stages"]
    assert {stage["stage"] for stage in stages} == {"vae", "flow"}
    for stage in stages:
        assert {"seed", "machine", "plan", "seconds", "losses"} <= set(stage)


def test_bundle_loads_strictly_and_equals_the_preset():
    preset = PRESETS["tiny"]
    assert load_dit(TINY / "transformer").config == preset.dit
    assert load_vae(TINY / "vae").config == preset.vae
    TinyTextEncoder.load(TINY / "text_encoder")


def test_bundle_draws_a_held_out_prompt():
    report = check_tiny(steps=8, combinations=scenes.held_out()[:1])
    assert report["color_and_background"] == 1, report


def test_bundled_adapter_stands_for_guidance():
    """One pass with it ends nearer to what guidance makes in two than one pass without it, from the
    same noise."""
    model = pipeline.load(TINY, device="cpu", parts=("text", "dit"))
    prompt = scenes.prompt(scenes.held_out()[1])

    def latents(guidance):
        video = model.generate(
            prompt,
            guidance_scale=guidance,
            num_inference_steps=6,
            seed=3,
        )
        return video.latents

    guided = latents(3.0)
    plain = latents(1.0)
    model.lora.load(TINY / "nocfg")
    adapted = latents(1.0)
    distance = (adapted - guided).norm().item()
    without = (plain - guided).norm().item()
    assert distance < 0.8 * without, (distance, without)
