"""More than three channels and more than eight bits: what is in the files reaches the network, in training and after it."""

import base64
import io
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import rasterio
import tifffile
import torch
from PIL import Image

from datamodules import DataError, ImageFolder, UnlabelledFolder, YOLODetection
from datamodules.annotated.mixing import Mixing
from datamodules.bands import decoded
from datamodules.images import read_image
from datamodules.loading import collate
from datamodules.options import Preprocessing, Reading
from modules import ClassificationModule, GANModule
from modules.networks import BackboneError
from modules.networks.backbones import create_backbone
from modules.pictures.sheets import as_rgb
from modules.spec import Backbone, DataSpec
from pipelines.serving.model import VisionModel
from pipelines.serving.registration import _example
from pipelines.serving.store import load_model, save_model

TWELVE = np.random.default_rng(0).integers(0, 4096, (12, 10, 5)).astype(np.uint16)
TWELVE[0, 0] = 4095


def stack(pixels: np.ndarray, **options: Any) -> bytes:
    """A TIFF with bands H×W×B."""
    file = io.BytesIO()
    config = {"planarconfig": "contig"} if pixels.shape[2] > 1 else {}
    tifffile.imwrite(file, pixels, photometric="minisblack", **config, **options)
    return file.getvalue()


def folder(place: Path, bands: int = 5, count: int = 8) -> Path:
    """Two classes of images of 12 bits, 16 pixels."""
    generator = np.random.default_rng(0)
    for name in ("a", "b"):
        (place / name).mkdir(parents=True)
        for i in range(count):
            pixels = generator.integers(0, 4000, (16, 16, bands)).astype(np.uint16)
            pixels[0, 0] = 4095
            (place / name / f"{i}.tif").write_bytes(stack(pixels))
    return place


def test_all_ways_of_writing_bands_are_read_alike() -> None:
    planes = np.moveaxis(TWELVE, 2, 0)
    files = {
        "pixels": stack(TWELVE),
        "big": stack(TWELVE, bigtiff=True),
        "zlib": stack(TWELVE, compression="zlib", predictor=True),
    }
    for name, config in (("planes", {"planarconfig": "separate"}), ("pages", {"metadata": None})):
        buffer = io.BytesIO()
        if name == "pages":
            with tifffile.TiffWriter(buffer) as writer:
                for plane in planes:
                    writer.write(plane, photometric="minisblack", contiguous=True)
        else:
            tifffile.imwrite(buffer, planes, photometric="minisblack", **config)
        files[name] = buffer.getvalue()
    with rasterio.MemoryFile() as memory:  # as GDAL writes GeoTIFFs
        how = {
            "driver": "GTiff",
            "height": 12,
            "width": 10,
            "count": 5,
            "dtype": "uint16",
            "compress": "lzw",
            "tiled": True,
        }
        with memory.open(
            **how, blockxsize=16, blockysize=16, transform=rasterio.transform.from_origin(0, 0, 1, 1)
        ) as file:
            file.write(planes)
        files["lzw"] = memory.read()
    for name, data in files.items():
        assert np.array_equal(decoded(data), TWELVE), name
    colours = TWELVE[..., :3]
    _, png = cv2.imencode(".png", colours[..., ::-1])
    assert np.array_equal(decoded(png.tobytes()), colours)
    signed = io.BytesIO()
    tifffile.imwrite(signed, TWELVE[..., 0].astype(np.int16))
    assert np.array_equal(decoded(signed.getvalue())[..., 0], TWELVE[..., 0])


def test_bands_are_chosen_by_number_and_values_keep_their_ratio() -> None:
    data = stack(TWELVE)
    assert np.array_equal(read_image(data, Reading(5, None, 12)), TWELVE.astype(np.float32) / np.float32(4095))
    assert np.array_equal(
        read_image(data, Reading(2, (4, 1), 16)), TWELVE[..., [3, 0]].astype(np.float32) / np.float32(65535)
    )
    assert np.array_equal(read_image(data, Reading(5, None, 8)), (TWELVE >> 4).astype(np.uint8))
    grey = read_image(stack(TWELVE[..., :1]), Reading(3, None, 12))
    assert np.array_equal(grey, np.repeat(TWELVE[..., :1], 3, 2).astype(np.float32) / np.float32(4095))
    lying = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6
    eight = np.random.default_rng(1).integers(0, 256, (4, 7, 4), np.uint8)
    Image.fromarray(eight).save(lying, "PNG", exif=exif)
    assert np.array_equal(read_image(lying.getvalue(), Reading(4)), np.rot90(eight, -1))
    assert read_image(stack(np.full((2, 2, 4), 255, np.uint8)), Reading(4, None, 12)).max() == 1


@pytest.mark.parametrize(
    ("pixels", "reading", "said"),
    [
        (TWELVE, Reading(4), "it has 5 bands, and 4 are asked for"),
        (TWELVE, Reading(1, (6,), 12), "it has 5 bands, and band 6"),
        (TWELVE, Reading(5, None, 10), "its values reach 4095, and images of 10 bits have 1023 at most; .*--data.bits 12"),
        (TWELVE.astype(np.float32), Reading(5, None, 12), "floating-point"),
        (TWELVE.astype(np.int32) - 5000, Reading(5, None, 12), "from -"),
    ],
)  # fmt: skip
def test_a_file_that_does_not_fit_is_named_with_the_way_out(pixels: np.ndarray, reading: Reading, said: str) -> None:
    Path("x.tif").write_bytes(stack(pixels))
    with pytest.raises(DataError, match=rf"x\.tif cannot be read as an image: .*{said}"):
        read_image("x.tif", reading)


def test_bands_and_channels_that_contradict_each_other_are_refused() -> None:
    with pytest.raises(DataError, match=r"\[1, 2\] are 2 channels, and --data.in_chans says 5: leave it out"):
        ImageFolder("data", bands=[1, 2], in_chans=5)
    assert ImageFolder("data", bands=[1, 2], in_chans=2).in_chans == ImageFolder("data", bands=[1, 2]).in_chans == 2


def test_what_all_files_have_in_common_is_told_once_and_skipping_them_is_no_way_out() -> None:
    place = folder(Path("data"))
    with pytest.raises(
        DataError, match=r"None of .* can be read: .*0\.tif .*--data\.in_chans 5, and some by --data\.bands"
    ) as refused:
        _ = ImageFolder(str(place), in_chans=4, image_size=16).sources  # fmt: skip
    assert "1.tif" not in str(refused.value)
    assert "skip" not in str(refused.value)


def test_a_damaged_file_is_found_before_training() -> None:
    place = folder(Path("data"))
    whole = (place / "a" / "0.tif").read_bytes()
    for bad in (whole[:200], whole[:9], b"II*\0" + bytes(40), b"", stack(TWELVE[..., :4])):
        (place / "a" / "0.tif").write_bytes(bad)
        with pytest.raises(DataError, match=r"0\.tif"):
            _ = ImageFolder(str(place), in_chans=5, image_size=16).sources
        with pytest.raises(DataError, match=r"0\.tif"):
            read_image(place / "a" / "0.tif", Reading(5, None, 12))


@pytest.mark.parametrize("cache", ["none", "memory", "disk"])
def test_images_of_12_bits_reach_the_network_unchanged_and_its_answers_are_the_same_later(cache: Any) -> None:
    place = folder(Path("data"))
    data = ImageFolder(
        str(place), in_chans=5, image_size=16, augmentation="none", cache=cache, batch_size=4, num_workers=0
    )
    assert data.reading == Reading(5, None, 12)
    dataset = data.dataset("train", False)
    for _ in range(2):  # the second time from the cache
        for i, path in enumerate(data.sources["train"].paths):
            there = tifffile.imread(path).astype(np.float32) / np.float32(4095)
            assert np.array_equal(dataset[i, 0]["image"], there)
    if cache != "none":
        return
    every = np.concatenate([tifffile.imread(path).reshape(-1, 5) for path in data.sources["train"].paths]) / 4095
    assert data.channel_mean == pytest.approx(every.mean(0).tolist())
    assert data.channel_std == pytest.approx(every.std(0).tolist(), rel=1e-6)
    module = ClassificationModule(DataSpec.of(data, ClassificationModule.takes), Backbone("lenet5")).eval()
    batch = data.samples("test", 2)
    seen = module.normalize(batch["image"])
    assert batch["image"].max() == 1  # which normalising leaves as it was
    assert torch.allclose(seen[:, 0] * data.channel_std[0] + data.channel_mean[0], batch["image"][:, 0], atol=1e-6)
    save_model(Path("model"), module, data.preprocessing, "classification")
    again, preprocessing = load_model(Path("model"))
    assert preprocessing == data.preprocessing
    answering = VisionModel().take(again, preprocessing)
    paths = data.sources["test"].paths[[0, -1]].tolist()
    with torch.inference_mode():
        likely = module(batch["image"]).softmax(1).max(1).values.tolist()
    for image in (paths, [tifffile.imread(path) for path in paths], [Path(path).read_bytes() for path in paths]):
        assert answering.predict(None, image)["probability"].tolist() == pytest.approx(likely, abs=1e-5)
    with pytest.raises(ValueError, match="it has 4 bands, and 5 are asked for"):
        answering.predict(None, [stack(TWELVE[..., :4])])
    with pytest.raises(ValueError, match="uint8 or uint16"):
        answering.predict(None, [np.zeros((16, 16, 5))])
    for shown in (preprocessing, Preprocessing(16, 1, bits=12), Preprocessing(16, 2, bands=[4, 1])):
        assert read_image(base64.b64decode(_example(shown)), shown.reading).shape[2] == shown.in_chans


def test_the_range_is_that_of_all_files_and_statistics_can_be_given_in_their_values() -> None:
    place = folder(Path("data"))
    given: dict[str, Any] = {"bands": [2, 1], "image_size": 16, "mean": [2000, 1000], "std": [500.0, 250.0]}
    data = ImageFolder(str(place), **given)
    assert (data.in_chans, data.bit_depth) == (2, 12)
    assert data.channel_mean == [2000 / 4095, 1000 / 4095]
    assert data.channel_std == [500 / 4095, 250 / 4095]
    assert ImageFolder(str(place), **given | {"bits": 16}).channel_mean == [2000 / 65535, 1000 / 65535]
    for wrong, said in (
        ({"std": None}, "go together"), ({"mean": [1.0]}, "for each of 2 channels"), ({"std": [1, 0]}, "above 0"),
        ({"bands": [0]}, "counted from 1"),
    ):  # fmt: skip
        with pytest.raises(DataError, match=said):
            ImageFolder(str(place), **given | wrong)


@pytest.mark.parametrize("strength", ["light", "standard", "strong"])
@pytest.mark.parametrize("bands", [2, 4, 13])
def test_every_strength_changes_bands_of_12_bits(strength: Any, bands: int) -> None:
    place = folder(Path("data"), bands, 4)
    data = ImageFolder(str(place), in_chans=bands, image_size=16, augmentation=strength)
    made = [data.dataset("train", True)[i % 4, i]["image"] for i in range(12)]
    assert all(image.shape == (16, 16, bands) and image.dtype == np.float32 for image in made)
    assert np.min(made) >= 0
    assert np.max(made) <= 1
    with pytest.raises(DataError, match=r"HueSaturationValue fails on an image of .*×\d+ \(float32\)"):
        ImageFolder(str(place), in_chans=bands, image_size=16, augmentation=["HueSaturationValue"]).transform(True)


def test_boxes_and_masks_of_bands_are_mixed_and_augmented() -> None:
    images = Path("images")
    images.mkdir()
    Path("labels").mkdir()
    Path("classes.txt").write_text("thing\n")
    for i in range(8):
        (images / f"{i}.tif").write_bytes(
            stack(np.random.default_rng(i).integers(0, 4096, (20, 30, 4)).astype(np.uint16))
        )
        Path("labels", f"{i}.txt").write_text("0 0.5 0.5 0.4 0.5\n")
    mixing = Mixing(mosaic=0.5, mixup=0.5)
    data = YOLODetection(".", in_chans=4, bits=12, image_size=32, augmentation="strong", mixing=mixing, num_workers=0)
    batch = collate([data.dataset("train", True)[i % 5, i] for i in range(12)])
    assert batch["image"].shape == (12, 4, 32, 32)
    assert batch["image"].dtype == torch.float32
    assert batch["image"].min() >= 0
    assert batch["image"].max() <= 1
    padded = data.dataset("train", False)[0, 0]["image"]
    assert np.allclose(padded[25:], 114 / 255)  # as grey as in 8 bits
    assert data.preprocessing.bits == 12


def test_pictures_show_the_first_three_bands_from_dark_to_bright() -> None:
    dark = np.zeros((10, 10, 5), np.float32)
    dark[:5, :, 2] = 0.1
    drawn = as_rgb(dark)
    assert drawn[0, 0].tolist() == [0, 0, 255]
    assert drawn[9, 9].tolist() == [0, 0, 0]
    assert as_rgb(torch.ones(2, 4, 4)).shape == (4, 4, 3)


@pytest.mark.parametrize("name", ["lenet5", "convnet", "resnet10t", "vit_tiny_patch16_224"])
def test_a_first_layer_that_has_learned_sees_more_channels_as_before(name: str) -> None:
    """Equal channels give the same answer as they did, whatever their number; so does timm widen it."""
    torch.manual_seed(0)
    chans = 1 if name in ("lenet5", "convnet") else 3
    side = 28 if chans == 1 else 64
    old = create_backbone(name, in_chans=chans, image_size=side, small_stem=False).eval()
    torch.save(old.state_dict(), "old.pth")
    image = torch.rand(2, 1, side, side)
    for count in (1, 2, 4, 6, 13):
        new = create_backbone("old.pth", architecture=name, in_chans=count, image_size=side, small_stem=False).eval()
        with torch.no_grad():
            wide = new(image.expand(-1, count, -1, -1))
            if count % chans == 0:
                assert torch.allclose(old(image.expand(-1, chans, -1, -1)), wide, atol=1e-4), count
    tail = create_backbone("old.pth", architecture=name, in_chans=4, image_size=side, small_stem=False)
    first = next(p for p in tail.parameters() if p.ndim == 4)
    learned = next(p for p in old.parameters() if p.ndim == 4)
    assert torch.allclose(first[:, 3], learned[:, 3 % chans] * chans / 4, atol=1e-6)


def test_a_task_that_takes_no_bands_says_so() -> None:
    data = UnlabelledFolder(str(folder(Path("data"), 4)), in_chans=4, image_size=16)
    with pytest.raises(BackboneError, match="GAN takes RGB or grey of 8 bits, not 4 channels of 12"):
        GANModule(DataSpec.of(data, GANModule.takes))


def test_old_models_and_plain_images_stay_as_they_were() -> None:
    assert "bit_depth" not in ClassificationModule(DataSpec(1, 28, 10)).architecture
    assert Preprocessing(28, 1).as_data().keys() == {"image_size", "in_chans", "crop_pct"}
    text = base64.b64decode(_example(Preprocessing(28, 3)))
    assert text[1:4] == b"PNG"
