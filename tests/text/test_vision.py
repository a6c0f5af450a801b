# SPDX-License-Identifier: Apache-2.0
"""What Qwen2.5-VL is shown of a picture: patches against transformers' own processor and one by
one, settings, positions."""

from types import SimpleNamespace

import numpy
import pytest
import torch

from kandinsky_model.text.vision import Preprocessor, look_up, positions

from ..support.text_peers import image_processor, picture, pil


@pytest.mark.parametrize(
    "size",
    [
        (130, 206),
        (5, 9),
        (28, 28),
        (515, 512),
        (60, 1000),
        (333, 77),
        (1100, 1400),
    ],
)
@pytest.mark.parametrize("limits", [{}, {"min_pixels": 50000, "max_pixels": 200000}])
def test_patches_are_those_of_transformers(size, limits):
    """Law 1 against its processor, which works in numpy, and the same number of rows and
    columns."""
    image = picture(*size)
    patches, rows, columns = Preprocessor(**limits).patches(image)
    theirs = image_processor(**limits)(images=[pil(image)], return_tensors="pt")
    assert theirs["image_grid_thw"].tolist() == [[1, rows, columns]]
    torch.testing.assert_close(patches, theirs["pixel_values"], rtol=0, atol=1e-6)


def test_patches_are_what_their_order_says():
    """Token by token, patch by patch, channel, time, row, column: looked up one by one in a picture
    that needs no resizing."""
    image = picture(112, 168)
    patches, rows, columns = Preprocessor(min_pixels=1).patches(image)
    assert (rows, columns) == (8, 12)
    assert patches.shape == (96, 3 * 2 * 14 * 14)
    mean = torch.tensor(Preprocessor.image_mean).double().view(3, 1, 1)
    std = torch.tensor(Preprocessor.image_std).double().view(3, 1, 1)
    normalised = (image.double() / 255 - mean) / std  # [3, 112, 168]

    def patch(row, column):
        y = row * 14
        x = column * 14
        frame = normalised[:, y : y + 14, x : x + 14]
        return torch.stack([frame, frame], dim=1).flatten()  # [3 * 2 * 14 * 14]

    expected = []
    for row in range(0, 8, 2):
        for column in range(0, 12, 2):
            # the four patches of one token
            expected.append(patch(row, column))
            expected.append(patch(row, column + 1))
            expected.append(patch(row + 1, column))
            expected.append(patch(row + 1, column + 1))
    expected = torch.stack(expected).float()
    torch.testing.assert_close(patches, expected, rtol=0, atol=1e-6)


def test_a_picture_to_edit_is_halved_first():
    image = picture(1024, 1024)
    resized = pil(image).resize((512, 512))
    small = torch.from_numpy(numpy.array(resized)).permute(2, 0, 1)  # [3, 512, 512]
    preprocessor = Preprocessor()
    halved, rows, columns = preprocessor.patches(image, shrink=2)
    # 504 pixels: 324 tokens
    assert rows == 36
    assert columns == 36
    expected, _, _ = preprocessor.patches(small)
    assert torch.equal(halved, expected)


def test_settings_come_from_the_folder_that_has_them(tmp_path):
    assert Preprocessor.read(tmp_path) == Preprocessor()
    saved = image_processor(
        min_pixels=784,
        max_pixels=7840,
        image_mean=[0.1, 0.2, 0.3],
    )
    other = tmp_path / "a"
    saved.save_pretrained(other)
    expected = Preprocessor(784, 7840, image_mean=(0.1, 0.2, 0.3))
    assert Preprocessor.read(tmp_path, other) == expected
    edges = '{"shortest_edge": 5, "longest_edge": 6}'
    config = tmp_path / "processor_config.json"
    config.write_text(f'{{"image_processor": {{"size": {edges}}}}}')
    assert Preprocessor.read(tmp_path, other) == Preprocessor(5, 6)
    config = tmp_path / "preprocessor_config.json"
    config.write_text('{"min_pixels": 7}')
    assert Preprocessor.read(tmp_path) == Preprocessor(7)
    config.write_text("{")
    with pytest.raises(ValueError, match=r"preprocessor_config\.json must be valid JSON"):
        Preprocessor.read(tmp_path)


def test_positions():
    assert positions(3).tolist() == [[[0, 1, 2]]] * 4
    assert positions(2, 2, 3, 2)[:, 0].tolist() == [
        [0, 1, 2, 3, 4, 5, 6, 7, 8, 9],
        [0, 1, 2, 2, 2, 2, 2, 2, 5, 6],
        [0, 1, 2, 2, 2, 3, 3, 3, 5, 6],
        [0, 1, 2, 3, 4, 2, 3, 4, 5, 6],
    ]


def test_the_table_of_tokens_may_stay_on_the_cpu():
    """ "meta" stands for the accelerator that the rest of the model is on."""
    table = torch.nn.Embedding(5, 3)
    tokens = [4, 0]
    norm = torch.nn.LayerNorm(3)
    together = SimpleNamespace(embed_tokens=table, norm=norm)
    expected = table.weight[None, tokens]  # [1, 2, 3]
    assert torch.equal(look_up(together, tokens), expected)
    elsewhere = torch.nn.LayerNorm(3, device="meta")
    apart = SimpleNamespace(embed_tokens=table, norm=elsewhere)
    assert look_up(apart, tokens).is_meta
