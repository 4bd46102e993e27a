"""Augmentation as a list of transforms in the recipe."""

from pathlib import Path
from typing import Any

import albumentations as A
import numpy as np
import pytest
import yaml
from mlflow.tracking import MlflowClient
from numpy.typing import NDArray

from datamodules import DigitMasks, Digits8x8, DigitScenes
from datamodules.annotated.mixing import boxes_of
from datamodules.errors import DataError
from pipelines.classification import classification
from pipelines.tracking.logger import run_id_of


class Speckle(A.ImageOnlyTransform):
    """Some white pixels."""

    def __init__(self, count: int = 5, p: float = 0.5) -> None:
        super().__init__(p)
        self.count = count

    def apply(self, img: NDArray[np.uint8], **params: Any) -> NDArray[np.uint8]:
        rows, columns = (self.random_generator.integers(0, side, self.count) for side in img.shape[:2])
        img = img.copy()
        img[rows, columns] = 255
        return img


class Unseeded(Speckle):
    """Some that no seed repeats."""

    def apply(self, img: NDArray[np.uint8], **params: Any) -> NDArray[np.uint8]:
        self.random_generator = np.random.default_rng()
        return super().apply(img, **params)


class Rolled(A.DualTransform):
    """Moved by two pixels, but not its boxes and masks."""

    def apply(self, img: NDArray[np.uint8], **params: Any) -> NDArray[np.uint8]:
        return np.roll(img, 2, 0)


def digits(augmentation: Any, **settings: Any) -> Digits8x8:
    return Digits8x8(image_size=12, num_workers=0, augmentation=augmentation, **settings)


def scenes(augmentation: Any, **settings: Any) -> DigitScenes:
    options = {"scene_size": 96, "train": 20, "val": 2, "test": 2, "num_workers": 0, "augmentation": augmentation}
    return DigitScenes(**options | settings)


def test_a_list_is_applied_in_its_order_and_by_seed_epoch_and_sample_alone() -> None:
    given = [
        "light",
        {f"{__name__}.Speckle": {"count": 3, "p": 0.9}},
        {"OneOf": {"transforms": ["VerticalFlip", "Blur"]}},
    ]
    dataset, twin = (digits(given).dataset("train", True) for _ in range(2))
    keys = [(i, epoch) for i in range(8) for epoch in range(2)]
    forth, back = [dataset[key]["image"] for key in keys], [twin[key]["image"] for key in reversed(keys)][::-1]
    assert all(map(np.array_equal, forth, back))
    assert not np.array_equal(forth[0], forth[1])
    white = [(digits([{f"{__name__}.Speckle": {"p": 1, "count": 40}}, *more]).dataset("train", True)[0, 0]["image"] == 255)
             for more in ([], [{"Posterize": {"num_bits": 1, "p": 1}}])]  # fmt: skip
    assert white[0].sum() > 10
    assert not white[1].any()


def test_a_strength_in_a_list_is_the_strength_with_the_numbers_that_are_given() -> None:
    plain, listed, still = (
        digits(given, flip=False).dataset("train", True)
        for given in ("standard", ["standard"], [{"standard": {"crop": 1, "shift": 0, "scale": 0, "rotate": 0}}])
    )
    for i in range(8):
        assert np.array_equal(plain[i, 0]["image"], listed[i, 0]["image"])
    affine = next(t for t in still.transform.transforms if isinstance(t, A.Affine))  # type: ignore[union-attr]
    assert affine.rotate == (0, 0)
    assert not np.array_equal(plain[0, 0]["image"], still[0, 0]["image"])


def test_what_cuts_out_the_right_size_itself_is_given_the_picture_as_it_is() -> None:
    crop = {"size": [12, 12], "scale": [0.1, 0.2], "p": 1}
    first, later = (
        digits([*before, {"RandomResizedCrop": crop}]).transform(True).transforms  # type: ignore[union-attr]
        for before in ([], ["HorizontalFlip"])
    )
    assert [type(t).__name__ for t in first] == ["RandomResizedCrop"]
    assert [type(t).__name__ for t in later] == ["SmallestMaxSize", "CenterCrop", "HorizontalFlip", "RandomResizedCrop"]


@pytest.mark.parametrize(
    "given",
    [
        [{"Affine": {"rotate": [-30, 30], "p": 1}}, {"HorizontalFlip": {}}],
        [{"RandomSizedBBoxSafeCrop": {"height": 96, "width": 96, "p": 1}}],
        [{"Affine": {"translate_percent": [0.2, 0.3], "border_mode": 4, "p": 1}}],
        [{"strong": {"rotate": 45}}],
    ],
    ids=["moved", "cropped", "mirrored at the border", "strength"],
)
def test_boxes_and_masks_move_with_their_images(given: Any) -> None:
    dataset = scenes(given, masks=True).dataset("train", True)
    objects = 0
    for i in range(10):
        sample = dataset[i, 0]
        masks = sample["masks"].numpy()
        assert np.array_equal(sample["boxes"].numpy(), boxes_of(list(masks)))
        for label, mask in zip(sample["labels"].tolist(), masks, strict=True):
            assert (sample["mask"][mask.astype(bool)] == label + 1).mean() > 0.9
            objects += 1
    assert objects > 8


def test_class_maps_do_not_count_what_comes_from_outside() -> None:
    data = DigitMasks(
        scene_size=64, train=4, val=2, test=2, num_workers=0, augmentation=[{"Affine": {"rotate": 45, "p": 1}}]
    )
    sample = data.dataset("train", True)[0, 0]
    assert sample["mask"][0, 0] == 255
    assert set(np.unique(sample["mask"])) <= {*range(11), 255}


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("[HorizontalFlipp]", "no transform HorizontalFlipp. Did you mean HorizontalFlip?"),
        ("[{standardd: {rotate: 3}}]", "no transform standardd. Did you mean standard?"),
        ("[{nowhere.Rain: {}}]", "no transform nowhere.Rain."),
        ("[{pathlib.Path: {}}]", "pathlib.Path is no transform of albumentations"),
        ("[{Affine: {rotat: 3}}]", "Affine has no setting rotat, but scale"),
        ("[{Affine: {rotate: far}}]", "Affine cannot be made: rotate 'far'"),
        ("[Resize]", "Resize cannot be made: it needs the setting height."),
        ("[{standard: {rotation: 3}}]", "standard has no number rotation, but crop"),
        ("[{standard: {rotate: 300}}]", "rotate of standard must be a number from 0 to 180, not 300."),
        ("[{HorizontalFlip: 0.5}]", "write NAME or {NAME: {SETTING: VALUE}}"),
        ("[Normalize]", "Normalize makes float32 of uint8 images."),
        ("[{Pad: {padding: 4}}]", "Pad leaves images of 20×20 pixels, where the network takes 12×12"),
        ("[{OneOf: {transforms: [Blurr]}}]", "no transform Blurr. Did you mean Blur?"),
        ("[FDA]", "FDA fails on an image of 12×12"),
        ("[test_augmenting.Unseeded]", "Unseeded makes two images of one with the same seed"),
    ],
)  # fmt: skip
def test_a_list_that_cannot_be_used_is_refused_by_name(given: str, said: str) -> None:
    with pytest.raises(DataError, match=r"--data\.augmentation") as error:
        digits(yaml.safe_load(given)).transform(True)
    assert said in str(error.value)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (lambda: scenes([f"{__name__}.Rolled"]), "moves images, but not their boxes"),
        (lambda: scenes([f"{__name__}.Rolled"], masks=True), "moves images, but not their boxes and masks"),
        (lambda: DigitMasks(augmentation=[f"{__name__}.Rolled"]), "moves images, but not their masks"),
        (lambda: DigitMasks(augmentation=[{"Affine": {"rotate": 45, "mask_interpolation": 1}}]), "Affine mixes the values of masks"),
    ],
)  # fmt: skip
def test_a_transform_that_leaves_boxes_or_masks_behind_is_refused(data: Any, said: str) -> None:
    with pytest.raises(DataError, match=r"--data\.augmentation") as error:
        data().transform(True)
    assert said in str(error.value)


def test_a_list_in_a_recipe_is_kept_with_the_run(capsys: pytest.CaptureFixture[str]) -> None:
    given = [{"standard": {"rotate": 5}}, {"RandomGamma": {"gamma_limit": [80, 120], "p": 0.5}}]
    recipe = {"data": {"class_path": "Digits8x8", "init_args": {"image_size": 12, "augmentation": given}}}
    Path("recipe.yaml").write_text(yaml.safe_dump(recipe | {"model": {"backbone": "lenet5"}}))
    out = classification(["preview", "--config", "recipe.yaml", "--output", "out"]).output
    assert (out / "preview.png").exists()
    kept = yaml.safe_load((out / "config.yaml").read_text())["data"]["init_args"]["augmentation"]
    assert kept == given
    assert "RandomGamma" in MlflowClient().get_run(run_id_of(out)).data.params["data.init_args.augmentation"]
    with pytest.raises(SystemExit) as end:
        classification.main(
            ["fit", "--config", "recipe.yaml", "--data.augmentation", "[RandomGama]", "--output", "other"]
        )
    assert end.value.code == 2
    assert "Did you mean RandomGamma?" in " ".join(capsys.readouterr().err.split())
