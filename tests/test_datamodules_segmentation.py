"""Class maps as people keep them, and what is said about those that cannot be used."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
from faster_coco_eval.core import mask as rle
from numpy.typing import NDArray
from scipy.ndimage import maximum_filter, minimum_filter

from datamodules import COCOSegmentation, DataError, DigitMasks, DigitScenes, MaskFolder, VOCSegmentation
from datamodules.loading import KeyedLoader

COLOURS = {(0, 0, 0): 0, (128, 64, 0): 1, (0, 0, 200): 2}


def mask_of(index: int, height: int = 40, width: int = 56) -> NDArray[np.uint8]:
    """Three classes in places that depend on the index; 3 and 4 have nothing in them."""
    mask = np.zeros((height, width), np.uint8)
    if index not in (3, 4):
        mask[5 + index : 20, 10:30], mask[25:, 30 + index :] = 1, 2
    return mask


def picture_of(mask: NDArray[np.uint8], index: int) -> NDArray[np.uint8]:
    noise = np.random.default_rng(index).integers(0, 30, (*mask.shape, 3))
    return (mask[..., None] * 80 + noise).astype(np.uint8)


def write(folder: Path, count: int = 8, form: str = "L", suffix: str = "png") -> None:
    """A folder of images and masks."""
    for name in ("images", "masks"):
        (folder / name).mkdir(parents=True)
    for i in range(count):
        mask = mask_of(i)
        PIL.Image.fromarray(picture_of(mask, i)).save(folder / "images" / f"p{i}.png")
        if form == "RGB":
            table = np.array(list(COLOURS), np.uint8)
            picture = PIL.Image.fromarray(table[mask])
        elif form == "I;16":
            picture = PIL.Image.fromarray(mask.astype(np.uint16))
        else:
            picture = PIL.Image.fromarray(mask)
        if form == "P":
            picture = PIL.Image.fromarray(mask, "P")
            picture.putpalette([7, 7, 7, 200, 0, 0, 0, 200, 0])
        picture.save(folder / "masks" / f"p{i}.{suffix}")


def masks_by_name(data: MaskFolder | VOCSegmentation | COCOSegmentation) -> dict[str, NDArray[np.uint8]]:
    found = {}
    for source in data.sources.values():
        for i in range(len(source)):
            found[Path(source.paths[i]).stem] = source[i]["mask"]  # type: ignore[attr-defined]
    return found


@pytest.mark.parametrize(
    ("form", "suffix"), [("L", "png"), ("P", "png"), ("RGB", "png"), ("L", "tif"), ("I;16", "tif")]
)
def test_a_folder_of_masks_in_any_lossless_form_gives_the_same_classes(form: str, suffix: str) -> None:
    write(Path("data"), form=form, suffix=suffix)
    if form == "RGB":
        rows = [f"{name},{r},{g},{b}" for name, (r, g, b) in zip(("ground", "road", "sky"), COLOURS, strict=True)]
        Path("data/classes.csv").write_text("\n".join(["name,r,g,b", *rows]))
    data = MaskFolder("data", image_size=64)
    assert {name: len(source) for name, source in data.sources.items()} == {"train": 6, "val": 1, "test": 1}
    assert data.label_names == (["ground", "road", "sky"] if form == "RGB" else ["0", "1", "2"])
    found = masks_by_name(data)
    assert len(found) == 8
    for i in range(8):  # those with nothing in them are kept
        assert np.array_equal(found[f"p{i}"], mask_of(i))
    kept, plain = replace(data, cache="memory").dataset("val", False), data.dataset("val", False)
    for _ in range(2):
        assert np.array_equal(kept[0, 0]["image"], plain[0, 0]["image"])
    data.take_whole()
    assert {name: len(source) for name, source in data.sources.items()} == {"test": 8}


def test_classes_by_value_and_what_does_not_count() -> None:
    write(Path("data"))
    Path("data/classes.csv").write_text("name,value\nvoid,1\nground,0\ntree,2\n")
    data = MaskFolder("data", image_size=64)
    assert data.label_names == ["ground", "tree"]
    expected = np.array([0, 255, 1], np.uint8)[mask_of(2)]
    assert np.array_equal(masks_by_name(data)["p2"], expected)
    assert data.identity()["splits"]["train"]["pixels"]["tree"] > 0


def test_objects_with_numbers_of_their_own_become_one_class() -> None:
    write(Path("data"), 4)
    numbers = np.arange(40 * 56).reshape(40, 56).astype(np.uint16)
    PIL.Image.fromarray(numbers).save("data/masks/p0.png")
    with pytest.raises(DataError, match="binary true"):
        _ = MaskFolder("data").sources
    data = MaskFolder("data", binary=True, image_size=64)
    assert data.label_names == ["background", "foreground"]
    assert masks_by_name(data)["p0"].sum() == 40 * 56 - 1


def test_splits_in_folders_and_names_with_a_suffix() -> None:
    for split in ("train", "valid"):
        write(Path("data", split), 3)
        for file in Path("data", split, "masks").iterdir():
            file.rename(file.with_stem(f"{file.stem}_gt"))
    data = MaskFolder("data", mask_suffix="_gt", image_size=64)
    assert {name: len(source) for name, source in data.sources.items()} == {"train": 3, "val": 3}
    with pytest.warns(UserWarning, match=r"named like p0_gt.png for p0.png"):
        assert masks_by_name(MaskFolder("data")).keys() == masks_by_name(data).keys()


def spoil(what: str) -> None:
    """Does one thing to the mask of p0."""
    file, mask = Path("data/masks/p0.png"), mask_of(0)
    if what == "missing":
        file.unlink()
    elif what == "size":
        PIL.Image.fromarray(mask[:, :-6]).save(file)
    elif what == "unknown":
        PIL.Image.fromarray(mask * 3).save(file)
    elif what == "jpeg":
        file.unlink()
        photograph = np.random.default_rng(0).integers(0, 256, (40, 56)).astype(np.uint8)
        PIL.Image.fromarray(photograph).save("data/masks/p0.jpg", quality=60)
    elif what == "colours":
        PIL.Image.fromarray(picture_of(mask, 0)).save(file)
    elif what == "unreadable":
        file.write_bytes(file.read_bytes()[:60])
    elif what == "turned":
        exif = PIL.Image.Exif()
        exif[0x0112] = 6
        PIL.Image.open("data/images/p0.png").save("data/images/p0.png", exif=exif)


@pytest.mark.parametrize(
    ("what", "says"),
    [
        ("missing", r"1 of 8 images have no mask .*: data/images/p0.png"),
        ("size", r"data/masks/p0.png has 50×40 pixels, its image data/images/p0.png has 56×40"),
        ("unknown", r"data/masks/p0.png has values that stand for no class: 3, 6 \(.*%.*\). Known are 0 ground"),
        ("jpeg", r"data/masks/p0.jpg has \d+ different values.*it is a JPEG.*PNG or TIFF"),
        ("colours", r"data/masks/p0.png is in colour, .*classes.csv"),
        ("unreadable", r"data/masks/p0.png cannot be read as a mask"),
        ("turned", r"EXIF"),
    ],
)
def test_a_mask_that_cannot_be_used_is_named(what: str, says: str) -> None:
    write(Path("data"))
    Path("data/classes.csv").write_text("name\nground\nroad\nsky\n")
    assert len(MaskFolder("data").sources) == 3
    spoil(what)
    with pytest.raises(DataError, match=says):
        _ = MaskFolder("data").sources


def test_a_foreground_of_255_is_asked_about() -> None:
    write(Path("data"), 4)
    for i in range(4):
        PIL.Image.fromarray((mask_of(i) > 0).astype(np.uint8) * 255).save(f"data/masks/p{i}.png")
    with pytest.raises(DataError, match=r"--data.binary true"):
        _ = MaskFolder("data").sources
    assert MaskFolder("data", binary=True).num_classes == 2


def test_coco_polygons_and_run_length_codes_are_the_same_mask() -> None:
    Path("images").mkdir()
    images, entries = [], []
    for i in range(6):
        PIL.Image.fromarray(np.full((40, 56, 3), i, np.uint8)).save(f"images/{i}.png")
        images.append({"id": i, "file_name": f"{i}.png", "height": 40, "width": 56})
        mask = np.zeros((40, 56), np.uint8)
        mask[10:20, 5:25] = 1
        code = rle.encode(np.asfortranarray(mask))
        outline = [[5, 10, 25, 10, 25, 20, 5, 20]] if i % 2 else {"size": [40, 56], "counts": code["counts"].decode()}
        entries.append(
            {"id": i, "image_id": i, "category_id": 9, "bbox": [5, 10, 20, 10], "segmentation": outline, "iscrowd": 0}
        )
        entries.append({"id": 90 + i, "image_id": i, "category_id": 4, "bbox": [30, 0, 8, 8], "iscrowd": int(i == 5),
                        "segmentation": [[30, 0, 38, 0, 38, 8, 30, 8]]})  # fmt: skip
    categories = [{"id": 9, "name": "nine"}, {"id": 4, "name": "four"}]
    Path("all.json").write_text(json.dumps({"images": images, "annotations": entries, "categories": categories}))
    data = COCOSegmentation("all.json", image_size=64)
    assert data.label_names == ["background", "four", "nine"]
    found = masks_by_name(data)
    assert len(found) == 6
    for i, mask in ((int(name), mask) for name, mask in found.items()):
        expected = np.zeros((40, 56), np.uint8)
        expected[10:20, 5:25], expected[0:8, 30:38] = 2, 255 if i == 5 else 1
        assert np.array_equal(mask, expected), i
    data.take_whole()
    assert {name: len(source.pictures) for name, source in data.sources.items()} == {"test": 6}


def test_voc_reads_its_lists_and_leaves_borders_out() -> None:
    for name in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        Path("VOC", name).mkdir(parents=True)
    for i in range(4):
        mask = mask_of(i)
        mask[0] = 255
        PIL.Image.fromarray(picture_of(mask_of(i), i)).save(f"VOC/JPEGImages/{i}.jpg")
        indexed = PIL.Image.fromarray(mask, "P")
        indexed.putpalette(bytes(range(256)) * 3)
        indexed.save(f"VOC/SegmentationClass/{i}.png")
    Path("VOC/ImageSets/Segmentation/train.txt").write_text("0\n1\n2\n")
    Path("VOC/ImageSets/Segmentation/val.txt").write_text("3\n")
    data = VOCSegmentation("VOC", image_size=64)
    assert {name: len(source) for name, source in data.sources.items()} == {"train": 3, "val": 1}
    assert data.num_classes == 21
    found = masks_by_name(data)["1"]
    assert (found[0] == 255).all()
    assert np.array_equal(found[1:], mask_of(1)[1:])
    Path("VOC/SegmentationClass/2.png").unlink()
    with pytest.raises(DataError, match=r"1 of 4 images have no mask in SegmentationClass/: VOC/JPEGImages/2.jpg"):
        _ = VOCSegmentation("VOC").sources


@pytest.mark.parametrize("size", [16, "16x24"])
def test_each_pixel_counts_in_one_window_and_training_windows_move(size: int | str) -> None:
    write(Path("data"), 5)
    data = MaskFolder("data", image_size=size, augmentation="none")
    source = data.sources["train"]
    seen = np.zeros(3, int)
    for i in range(len(source)):
        sample = data.dataset("train", False)[i, 0]
        assert sample["image"].shape == (*data.size, 3)
        seen += np.bincount(sample["mask"].ravel(), minlength=256)[:3]
    assert seen.sum() == len(source.pictures) * 40 * 56  # type: ignore[attr-defined]
    assert seen.tolist() == source.counts[:3].tolist()  # type: ignore[attr-defined]
    moved = data.dataset("train", True)
    assert not np.array_equal(moved[0, 0]["image"], moved[0, 1]["image"])
    assert np.array_equal(moved[0, 1]["image"], moved[0, 1]["image"])
    shares = source.counts[:3] / seen.sum()  # type: ignore[attr-defined]
    weights = MaskFolder("data", image_size=16, class_weighting="median").class_weights
    assert weights == pytest.approx((np.median(shares) / shares).tolist())
    for strength in ("light", "standard", "strong"):
        augmented = MaskFolder("data", image_size=size, augmentation=strength).dataset("train", True)
        assert all(augmented[i, 0]["mask"].shape == data.size for i in range(4))


@pytest.mark.parametrize("settings", [{"image_size": "8x64"}, {"image_size": "32x64", "turn": True}])
def test_a_window_that_cannot_be_is_refused(settings: Any) -> None:
    with pytest.raises(DataError, match=r"--data\.image_size"):
        MaskFolder("data", **settings)


def test_a_small_picture_is_filled_up_with_what_does_not_count() -> None:
    write(Path("data"), 4)
    data = MaskFolder("data", image_size=64)
    batch = next(iter(data.val_dataloader()))
    assert batch["image"].shape[2:] == batch["mask"].shape[1:] == (64, 64)
    assert batch["size"].tolist() == [[40, 56]]
    assert (batch["mask"][0, 40:] == 255).all()
    assert (batch["mask"][0, :, 56:] == 255).all()
    assert (batch["mask"][0, :40, :56] != 255).all()
    whole = next(iter(data.predict_dataloader()))
    assert whole["image"].shape == (1, 3, 40, 56)


def test_whole_pictures_of_different_sizes_are_shared_by_processes() -> None:
    write(Path("data"), 20)  # three for the test: one process takes two at once, so that both take as many batches
    sizes = [(40 + i, 60 - i) for i in range(20)]
    for i, size in enumerate(sizes):
        PIL.Image.fromarray(mask_of(i, *size)).save(f"data/masks/p{i}.png")
        PIL.Image.fromarray(picture_of(mask_of(i, *size), i)).save(f"data/images/p{i}.png")
    dataset = MaskFolder("data").predict_dataloader().dataset
    found = {}
    for rank in range(2):
        (batch,) = KeyedLoader(dataset, 1, False, 0, rank, 2)
        for image, (height, width) in zip(batch["image"], batch["size"].tolist(), strict=True):
            assert not image[:, height:].any()
            assert not image[:, :, width:].any()
            found[height, width] = image[:, :height, :width].numpy()
    assert len(found) == 3
    for (height, width), image in found.items():
        i = sizes.index((height, width))
        assert np.array_equal(image, picture_of(mask_of(i, height, width), i).transpose(2, 0, 1))


@pytest.mark.parametrize("strength", ["light", "standard", "strong"])
@pytest.mark.parametrize("turn", [False, True])
def test_masks_move_with_their_images_and_are_never_interpolated(strength: str, turn: bool) -> None:
    mask = np.zeros((64, 64), np.uint8)
    mask[8:30, 10:50], mask[36:60, 5:28], mask[36:60, 36:60] = 100, 200, 7
    image = mask[..., None].repeat(3, 2)
    transform = MaskFolder("data", image_size=64, augmentation=strength, turn=turn).transform(True)
    assert transform is not None
    geometry = [
        t for t in transform.transforms if type(t).__name__ in ("D4", "HorizontalFlip", "Affine", "PadIfNeeded")
    ]
    transform.transforms = geometry
    moved = 0
    for seed in range(20):
        transform.set_random_seed(seed)
        result = transform(image=image, mask=mask)
        new = result["mask"]
        assert set(np.unique(new)) <= {0, 7, 100, 200, 255}
        # Away from edges, where the image is interpolated.
        inner = (minimum_filter(new, 5) == maximum_filter(new, 5, mode="constant", cval=255)) & (new != 255)
        assert inner.sum() > 200
        assert np.abs(result["image"][inner][:, 0].astype(int) - new[inner]).max() <= 1
        moved += not np.array_equal(new, mask)
    assert moved > 10


def test_digit_scenes_have_the_classes_of_their_objects() -> None:
    options = {"scene_size": 64, "train": 6, "val": 3, "test": 3}
    data, scenes = DigitMasks(**options), DigitScenes(**options, masks=True)  # type: ignore[arg-type]
    for i in range(3):
        sample, scene = data.sources["test"][i], scenes.sources["test"][i]
        assert np.array_equal(sample["image"], scene["image"])
        expected = np.zeros((64, 64), np.uint8)
        for mask, label in zip(scene["masks"], scene["labels"], strict=True):
            expected[mask.astype(bool)] = label + 1
        assert np.array_equal(sample["mask"], expected)
    assert data.num_classes == 11
    assert data.sources["test"].digest == DigitMasks(**options).sources["test"].digest  # type: ignore[arg-type]
