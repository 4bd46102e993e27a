"""Sheets, tints and boxes: what is drawn is what was given."""

import numpy as np
import pytest
import torch

from modules.pictures.boxes import draw_boxes
from modules.pictures.palette import palette, tint
from modules.pictures.sheets import GAP, sheet, stacked

RANDOM = np.random.default_rng(0)


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_images_are_on_a_sheet_as_they_are(channels: int) -> None:
    images = torch.from_numpy(RANDOM.integers(0, 256, (5, channels, 64, 80), np.uint8))
    page = sheet(images, 2)
    shown = images[:, :3].permute(0, 2, 3, 1).expand(-1, -1, -1, 3).numpy()
    for i, image in enumerate(shown):
        top, left = GAP + i // 2 * (64 + GAP), GAP + i % 2 * (80 + GAP)
        assert np.array_equal(page[top : top + 64, left : left + 80], image)
    assert (page[-64 - GAP :, -80 - GAP :] == 255).all(), "there is no sixth image"
    assert np.array_equal(page, sheet([image.permute(1, 2, 0).numpy() for image in images], 2))


def test_text_takes_nothing_from_the_images_and_a_heading_is_never_cut_off() -> None:
    images = torch.from_numpy(RANDOM.integers(0, 256, (4, 3, 64, 64), np.uint8))
    plain = sheet(images, 4)
    headed = sheet(images, 4, heading="a heading " * 20)
    assert headed.shape[1] > plain.shape[1]
    assert np.array_equal(headed[-plain.shape[0] :, : plain.shape[1]], plain)
    captioned = sheet(images, 4, ["one", "two\nlines", "", "longer than the image is wide"])
    assert captioned.shape[1] == plain.shape[1]
    assert np.array_equal(captioned[: 64 + GAP], plain[: 64 + GAP])
    assert stacked([plain, headed]).shape == (plain.shape[0] + headed.shape[0], headed.shape[1], 3)


def test_small_images_are_enlarged_without_blur_and_all_fit_where_a_side_is_given() -> None:
    image = torch.from_numpy(RANDOM.integers(0, 256, (1, 1, 28, 28), np.uint8))
    page = sheet(image)
    assert page.shape == (84, 84, 3)
    assert np.array_equal(page[::3, ::3, 0], image[0, 0].numpy())
    tiles = [np.zeros((10, 30, 3), np.uint8), np.zeros((300, 200), np.uint8)]
    assert sheet(tiles, 2, side=50).shape == (50 + 2 * GAP, 100 + 3 * GAP, 3)


def test_a_tint_leaves_alone_what_is_background_or_does_not_count() -> None:
    image = RANDOM.integers(0, 256, (600, 40, 3), np.uint8)
    mask = RANDOM.choice(np.array([0, 1, 7, 255], np.uint8), (600, 40))
    drawn = tint(image, mask, 0.6)
    plain = (mask == 0) | (mask == 255)
    assert np.array_equal(drawn[plain], image[plain])
    expected = image[~plain] * 0.4 + palette()[mask[~plain]] * 0.6
    assert np.abs(drawn[~plain] - expected).max() <= 1


def test_boxes_end_within_their_last_pixels_and_classes_have_colours_of_their_own() -> None:
    image = np.zeros((200, 300, 3), np.uint8)
    boxes = np.array([[100.0, 50, 300, 200], [20, 80, 60, 120]])
    drawn = draw_boxes(image, boxes, ["", ""], [0, 1])
    assert drawn[199, 299].any(), "the corner of the image is the corner of the box"
    assert drawn[119, 59].any()
    assert not drawn[122:, :90].any()
    assert not drawn[:, 62:90].any()
    assert (drawn[100, 20] != drawn[199, 299]).any()
    assert not image.any()
