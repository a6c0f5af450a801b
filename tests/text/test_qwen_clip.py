# SPDX-License-Identifier: Apache-2.0
"""The released checkpoints' text encoders in miniature: every kind of prompt against diffusers,
lengths, edits, expansion."""

import copy
import logging

import pytest
import torch

from kandinsky_model import pipeline
from kandinsky_model.__main__ import main
from kandinsky_model.sampling.result import load_latents
from kandinsky_model.text.expand import INSTRUCTIONS, continue_greedily, request
from kandinsky_model.text.qwen_clip import END, OFFICIAL_EDIT_CROP, QwenClipEncoder
from kandinsky_model.text.templates import official_negative, official_template
from kandinsky_model.text.vision import PICTURE, positions

from ..support import tiny_models
from ..support.text_peers import Processor, picture, pil, reference_pipeline

TEMPLATE = "<|im_start|>user\n{}<|im_end|>"
FEW_TOKENS = 24


@pytest.fixture
def encoder(text_parts):
    return QwenClipEncoder(tiny_models.encoder_parts(text_parts))


@pytest.fixture
def short(text_parts):
    return QwenClipEncoder(tiny_models.encoder_parts(text_parts), TEMPLATE)


# Parity


@pytest.mark.parametrize(
    "prompt", ["a cat, running", "", "Рыжий кот бежит по снегу", "好 🐈 {braces} <b>"]
)
@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("video", "Kandinsky5T2VPipeline"),
        ("video", "Kandinsky5I2VPipeline"),
        ("image", "Kandinsky5T2IPipeline"),
    ],
)
def test_embeddings_are_those_of_diffusers(encoder, text_parts, kind, name, prompt):
    ours = encoder.encode([prompt], kind)
    reference = reference_pipeline(text_parts, name, official_template(kind), encoder.crop(kind))
    embeds, pooled, ends = reference.encode_prompt(prompt, device=torch.device("cpu"))
    assert ours.lengths.tolist() == [int(ends[-1])]
    assert ours.embeds.shape == embeds.shape
    torch.testing.assert_close(ours.embeds, embeds, rtol=0, atol=1e-6)
    torch.testing.assert_close(ours.pooled, pooled, rtol=0, atol=1e-6)


@pytest.mark.parametrize("prompt", ["make the cat red", ""])
def test_edits_are_those_of_diffusers_with_the_official_text(encoder, text_parts, prompt):
    """diffusers' template lacks two line ends of the official one, so that dropping 55 tokens (54
    since 0.41) takes 5 of the prompt and not the official 3: template and crop are set to the
    official ones here. Everything else, the picture's part included, is theirs."""
    ours = encoder.encode([prompt], "image_edit", [picture()])
    template = official_template("image_edit") + PICTURE + END
    reference = reference_pipeline(
        text_parts, "Kandinsky5I2IPipeline", template, OFFICIAL_EDIT_CROP
    )
    embeds, pooled, ends = reference.encode_prompt(
        prompt, image=[pil(picture())], device=torch.device("cpu")
    )
    assert ours.lengths.tolist() == [int(ends[-1])]
    assert ours.embeds.shape == embeds.shape
    torch.testing.assert_close(ours.embeds, embeds, rtol=0, atol=1e-6)
    torch.testing.assert_close(ours.pooled, pooled, rtol=0, atol=1e-6)


def test_template_and_negative_prompt_are_the_official_ones():
    assert [len(official_template(kind)) for kind in ("video", "image", "image_edit")] == [
        669,
        218,
        266,
    ]
    assert all(
        "You are a promt engineer" in official_template(kind)
        for kind in ("video", "image", "image_edit")
    )
    with pytest.raises(ValueError, match="video or image or image_edit, got 'sound'"):
        official_template("sound")
    assert official_negative().endswith("walking backwards")


# Length


def hidden_states(parts, ids):
    with torch.no_grad():
        return parts[0].model.language_model(input_ids=torch.tensor([ids])).last_hidden_state[0]


@pytest.mark.parametrize("max_length", [256, 512])
def test_a_prompt_of_one_token_less_than_fits_keeps_its_end(text_parts, caplog, max_length):
    """255 tokens of a video's prompt, 511 of an image's: the last one kept is <|im_end|>."""
    encoder = QwenClipEncoder(tiny_models.encoder_parts(text_parts), TEMPLATE, max_length)
    prompt = "abcdefghij" * 60
    whole = hidden_states(
        text_parts, text_parts[1](TEMPLATE.replace("{}", prompt[: max_length - 1]))["input_ids"]
    )
    fits = encoder.encode([prompt[: max_length - 1]])
    assert fits.lengths.tolist() == [max_length]
    assert not caplog.text
    torch.testing.assert_close(fits.embeds[0], whole[6:], rtol=0, atol=1e-6)
    cut = encoder.encode([prompt[: max_length + 3]])
    assert cut.lengths.tolist() == [max_length]
    assert len(caplog.records) == 1
    assert (
        "too long by 4 tokens, which are not read: " + prompt[max_length : max_length + 3]
        in caplog.text
    )
    assert torch.equal(cut.embeds[0, :-1], fits.embeds[0, :-1])
    assert not torch.allclose(cut.embeds[0, -1], fits.embeds[0, -1], atol=0.01)


def test_prompts_of_a_batch_do_not_see_each_other(short):
    prompts = ["a {} cat", "a much longer prompt", "b", ""]
    batch = short.encode(prompts)
    # bytes of the prompt and the end-of-turn token
    assert short.crop("video") == 6
    assert batch.lengths.tolist() == [9, 21, 2, 1]
    for i, prompt in enumerate(prompts):
        alone = short.encode([prompt])
        assert torch.equal(batch.embeds[i, : batch.lengths[i]], alone.embeds[0])
        assert not batch.embeds[i, batch.lengths[i] :].any()
        assert torch.equal(batch.pooled[i], alone.pooled[0])


def test_an_edit_of_more_tokens_than_there_are_positions_is_refused(encoder):
    encoder.edit_crop = "exact"
    fits = 1024 - 8 - 3  # the picture's tokens, those around it and the end of the turn
    assert encoder.encode(["a" * fits], "image_edit", [picture()]).lengths.tolist() == [1024]
    with pytest.raises(ValueError, match="may have 1024 tokens, got 1025 of prompt and picture"):
        encoder.encode(["a" * (fits + 1)], "image_edit", [picture()])


@pytest.mark.parametrize(
    ("arguments", "kind", "words"),
    [
        (("a cat",), TypeError, "list of prompts"),
        (([3],), TypeError, "list of prompts"),
        (([],), ValueError, "at least one prompt"),
        ((["a"], "sound"), ValueError, "video or image or image_edit, got 'sound'"),
        ((["a"], "image_edit"), ValueError, "1 prompts and 0 images"),
        ((["a", "b"], "image_edit", [picture()]), ValueError, "2 prompts and 1 images"),
        ((["a"], "video", [picture()]), ValueError, "1 prompts and 1 images for kind video"),
        (
            (["a <|image_pad|>"], "image_edit", [picture()]),
            ValueError,
            "must not contain <|image_pad|>".replace("|", r"\|"),
        ),
    ],
)
def test_what_cannot_be_encoded_is_said(encoder, arguments, kind, words):
    with pytest.raises(kind, match=words) as caught:
        encoder.encode(*arguments)
    assert "\n" not in str(caught.value)


def test_switches_have_the_values_they_may_have(text_parts, encoder):
    with pytest.raises(ValueError, match="exactly one"):
        QwenClipEncoder(tiny_models.encoder_parts(text_parts), "no place for a prompt")
    encoder.edit_crop = "some"
    with pytest.raises(ValueError, match="official or exact, got 'some'"):
        encoder.encode(["a"], "image_edit", [picture()])


# Pictures


def test_the_exact_crop_drops_the_instruction_and_nothing_else(encoder):
    official = encoder.encode(["redder"], "image_edit", [picture()])
    encoder.edit_crop = "exact"
    exact = encoder.encode(["redder"], "image_edit", [picture()])
    assert exact.lengths.tolist() == [len("redder") + 2 * 4 + 3]
    assert OFFICIAL_EDIT_CROP == 55
    instruction = len(
        encoder.parts.tokenizer(official_template("image_edit").removesuffix("{}"))["input_ids"]
    )
    assert torch.equal(official.embeds[0, instruction - OFFICIAL_EDIT_CROP :], exact.embeds[0])


def test_edits_of_a_batch_see_their_own_picture_only(encoder):
    images = [picture(seed=1), picture(90, 90, seed=2)]
    batch = encoder.encode(["a", "bb"], "image_edit", images)
    for i, prompt in enumerate(["a", "bb"]):
        assert torch.equal(
            batch.embeds[i, : batch.lengths[i]],
            encoder.encode([prompt], "image_edit", images[i : i + 1]).embeds[0],
        )
    other = encoder.encode(["a"], "image_edit", [picture(seed=3)]).embeds[0]
    behind = -(2 * 4 + 2)  # of the picture's tokens and the end, nothing before them may change
    assert torch.equal(other[:behind], batch.embeds[0, : len(other)][:behind])
    assert not torch.allclose(other[-1], batch.embeds[0, len(other) - 1], atol=1e-3)


# Expansion


@pytest.fixture(scope="module")
def talkative(text_parts):
    """Weights so large that what comes next depends on all that came before, and does not repeat at
    once."""
    qwen = copy.deepcopy(text_parts[0])
    with torch.no_grad():
        for name, weight in qwen.named_parameters():
            if weight.ndim == 2 and "embed_tokens" not in name:
                weight.mul_(8)
    return qwen, *text_parts[1:]


@pytest.fixture
def few_tokens(monkeypatch):
    """Instead of 256."""
    monkeypatch.setattr("kandinsky_model.text.expand.MOST_TOKENS", FEW_TOKENS)


def generated(parts, text, image, shrink):
    """What transformers' own greedy generation goes on with."""
    images = None
    if image is not None:
        images = [pil(image).resize((image.shape[2] // shrink, image.shape[1] // shrink))]
    inputs = Processor(*parts[:2])(
        text=[text],
        images=images,
        return_tensors="pt",
    )
    with torch.no_grad():
        ids = parts[0].generate(
            **inputs,
            do_sample=False,
            max_new_tokens=FEW_TOKENS,
            eos_token_id=[256, 258],
            pad_token_id=256,
        )
    return parts[1].decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()


@pytest.mark.parametrize(
    ("kind", "image"),
    [
        ("video", None),
        ("image", None),
        ("video", picture(120, 90)),
        ("image_edit", picture(300, 500)),
    ],
)
def test_expansion_is_greedy_generation(talkative, few_tokens, caplog, kind, image):
    encoder = QwenClipEncoder(tiny_models.encoder_parts(talkative))
    text, shrink = request("Кот", kind, image)
    assert text.count("Кот") == 1
    assert text.count(PICTURE) == (image is not None)
    assert "{}" not in text
    assert shrink == (4 if kind == "image_edit" else 1)
    with caplog.at_level(logging.INFO, "kandinsky_model.text.qwen_clip"):
        written = encoder.expand("Кот", kind, image)
    assert written == generated(talkative, text, image, shrink) != ""
    assert f"expanded prompt: {written}" in caplog.text
    assert encoder.expand("Кот", kind, image) == written


def test_expansion_ends_where_the_model_ends_it(encoder, few_tokens, monkeypatch):
    language = encoder.parts.language
    head = encoder.parts.head
    start = torch.randn(1, 5, 64), positions(5)
    with torch.no_grad():
        whole = continue_greedily(language, head, *start, ())
        assert len(whole) == FEW_TOKENS
        stop = whole[7]
        assert continue_greedily(language, head, *start, {stop}) == whole[: whole.index(stop)]
    picture_token, letter = encoder.parts.tokenizer.convert_tokens_to_ids(["<|image_pad|>", "b"])
    for tokens, written in (([picture_token, letter, stop, picture_token], None), ([], "a cat")):
        monkeypatch.setattr(
            "kandinsky_model.text.qwen_clip.continue_greedily", lambda *_, tokens=tokens: tokens
        )
        assert encoder.expand("a cat") == (
            written or encoder.parts.tokenizer.decode([letter, stop]).strip()
        )


def test_instructions_ask_for_what_was_published():
    """Facts of the published instructions, whose words are not kept here: language, length, upper
    case of text in pictures, motion."""
    assert all("English" in text and text.count("{}") == 1 for text in INSTRUCTIONS.values())
    assert "70 to 110 words" in INSTRUCTIONS["video", False]
    assert '"FRESH BREAD"' in INSTRUCTIONS["image", False]
    assert "motion" in INSTRUCTIONS["video", True]
    assert all(
        word in INSTRUCTIONS["image_edit", True]
        for word in ("what changes", "what stays", "camera")
    )
    for kind, image in (("sound", None), ("image_edit", None), ("image", picture())):
        with pytest.raises(ValueError, match="a prompt is expanded for"):
            request("a", kind, image)


def test_a_video_is_made_from_the_expanded_prompt(diffusers_folder, few_tokens, monkeypatch):
    """Settings keep both prompts; the triggers of adapters come before what the language model
    wrote."""
    model = pipeline.load(diffusers_folder, device="cpu")
    written = model.text.expand("a cat")
    video = model.generate("a cat", seed=1, expand_prompt=True, **tiny_models.SMALL)
    assert (video.settings.prompt, video.settings.expanded_prompt) == (
        "a cat",
        written,
    )
    assert written != "a cat"
    plain = model.generate(written, seed=1, **tiny_models.SMALL)
    assert torch.equal(video.latents, plain.latents)
    assert plain.settings.expanded_prompt == ""
    read = []
    encode = model.text.encode
    monkeypatch.setattr(
        model.text, "encode", lambda prompts, kind: read.append(prompts) or encode(prompts, kind)
    )
    monkeypatch.setattr(model.lora, "prompt", lambda prompt: f"trigger {prompt}")
    model.generate(
        ["a cat", "b"],
        "",
        seed=1,
        expand_prompt=True,
        **tiny_models.SMALL,
    )
    assert read == [[f"trigger {written}", f"trigger {model.text.expand('b')}"], [""]]


def test_the_command_line_expands_and_says_how(
    diffusers_folder, few_tokens, tmp_path, capsys, caplog
):
    arguments = [
        "generate",
        "a cat",
        *tiny_models.SMALL_ARGS,
        "--device",
        "cpu",
        "--seed",
        "1",
        "-o",
        str(tmp_path / "a.gif"),
        "--expand",
    ]
    assert main([*arguments, "--model", str(diffusers_folder), "--no-text-cache"]) == 0
    settings = load_latents(tmp_path / "a.latents.safetensors")[1]
    assert settings.prompt == "a cat"
    assert f"expanded prompt: {settings.expanded_prompt}" in caplog.text
    assert main([*arguments, "--model", "tiny"]) == 2
    assert "tiny lacks; leave expand_prompt out" in capsys.readouterr().err
