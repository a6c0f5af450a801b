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
    "size", [(130, 206), (5, 9), (28, 28), (515, 512), (60, 1000), (333, 77), (1100, 1400)]
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
    mean = torch.tensor(Preprocessor.image_mean)
    std = torch.tensor(Preprocessor.image_std)
    exact = (image.double() / 255 - mean.double()[:, None, None]) / std.double()[:, None, None]
    expected = []
    for y in range(0, 8, 2):
        for x in range(0, 12, 2):
            for row, column in ((y, x), (y, x + 1), (y + 1, x), (y + 1, x + 1)):
                patch = exact[:, row * 14 : row * 14 + 14, column * 14 : column * 14 + 14]
                expected.append(torch.stack([patch, patch], dim=1).flatten())
    torch.testing.assert_close(patches, torch.stack(expected).float(), rtol=0, atol=1e-6)


def test_a_picture_to_edit_is_halved_first():
    image = picture(1024, 1024)
    small = torch.from_numpy(numpy.array(pil(image).resize((512, 512))))
    halved, *grid = Preprocessor().patches(image, shrink=2)
    assert grid == [36, 36]  # 504 pixels: 324 tokens
    assert torch.equal(halved, Preprocessor().patches(small.permute(2, 0, 1))[0])


def test_settings_come_from_the_folder_that_has_them(tmp_path):
    assert Preprocessor.read(tmp_path) == Preprocessor()
    image_processor(
        min_pixels=784,
        max_pixels=7840,
        image_mean=[0.1, 0.2, 0.3],
    ).save_pretrained(tmp_path / "a")
    assert Preprocessor.read(tmp_path, tmp_path / "a") == Preprocessor(
        784, 7840, image_mean=(0.1, 0.2, 0.3)
    )
    (tmp_path / "processor_config.json").write_text(
        '{"image_processor": {"size": {"shortest_edge": 5, "longest_edge": 6}}}'
    )
    assert Preprocessor.read(tmp_path, tmp_path / "a") == Preprocessor(5, 6)
    (tmp_path / "preprocessor_config.json").write_text('{"min_pixels": 7}')
    assert Preprocessor.read(tmp_path) == Preprocessor(7)
    (tmp_path / "preprocessor_config.json").write_text("{")
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
    assert torch.equal(
        look_up(SimpleNamespace(embed_tokens=table, norm=torch.nn.LayerNorm(3)), [4, 0]),
        table.weight[None, [4, 0]],
    )
    assert look_up(
        SimpleNamespace(embed_tokens=table, norm=torch.nn.LayerNorm(3, device="meta")), [4, 0]
    ).is_meta
