"""Masks as tools and people write them: small data sets that are read rightly, or refused in one paragraph."""

import json
import re
import struct
import warnings
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
from faster_coco_eval.core import mask as rle
from numpy.typing import NDArray

from datamodules import COCOSegmentation, DataError, MaskFolder, VOCSegmentation
from datamodules.annotated.segmentation import SegmentationDataModule

SIZE = (20, 28)
COLOURS = np.array([(0, 0, 0), (128, 64, 0), (0, 0, 200)], np.uint8)
Masks = dict[str, NDArray[np.uint8]]


def truth(i: int) -> NDArray[np.uint8]:
    """Three classes in places that depend on the number."""
    mask = np.zeros(SIZE, np.uint8)
    mask[2 + i : 9, 3:12], mask[12:, 14 + i :] = 1, 2
    return mask


def save(file: str, pixels: Any, mode: str | None = None, **options: Any) -> None:
    Path(file).parent.mkdir(parents=True, exist_ok=True)
    picture = pixels if isinstance(pixels, PIL.Image.Image) else PIL.Image.fromarray(pixels)
    (picture.convert(mode) if mode else picture).save(file, **options)


def image(file: str) -> None:
    save(file, np.random.default_rng(zlib.crc32(file.encode())).integers(0, 256, (*SIZE, 3)).astype(np.uint8))


def folder(
    form: Callable[[NDArray[np.uint8]], Any] = lambda mask: mask,
    mask: str = "masks/{}.png",
    picture: str = "images/{}.png",
    names: Sequence[str] = ("p0", "p1", "p2", "p3"),
    **options: Any,
) -> Masks:
    """A folder of images and masks; gives what is meant."""
    for i, name in enumerate(names):
        image(f"data/{picture.format(name)}")
        save(f"data/{mask.format(name)}", form(truth(i)), **options)
    return {name: truth(i) for i, name in enumerate(names)}


def note(file: str, text: str | bytes) -> None:
    Path(file).parent.mkdir(parents=True, exist_ok=True)
    Path(file).write_bytes(text.encode() if isinstance(text, str) else text)


def indexed(mask: NDArray[np.uint8], colours: Any = COLOURS) -> PIL.Image.Image:
    picture = PIL.Image.fromarray(mask, "P")
    picture.putpalette(np.asarray(colours, np.uint8).tobytes())
    return picture


def with_alpha(mask: NDArray[np.uint8], colour: int = 255) -> PIL.Image.Image:
    return PIL.Image.fromarray(np.dstack([np.full((*SIZE, 3), colour, np.uint8), (mask > 0) * np.uint8(255)]))


def deep_png(bands: NDArray[np.uint16]) -> bytes:
    """A PNG with 16 bits in each of three channels, which Pillow can neither write nor read."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    height, width = bands.shape[:2]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in bands)
    head = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


@dataclass
class Case:
    """A data set: what makes it, how it is read, and what comes of it."""

    name: str
    make: Callable[[], Masks | None]
    says: str = ""  # the error
    told: str = ""  # the warning
    classes: tuple[str, ...] = ("0", "1", "2")
    options: dict[str, Any] | None = None
    kind: type[SegmentationDataModule] = MaskFolder


CASES: list[Case] = []


def case(name: str, **rest: Any) -> Callable[[Callable[[], Masks | None]], Callable[[], Masks | None]]:
    def add(make: Callable[[], Masks | None]) -> Callable[[], Masks | None]:
        CASES.append(Case(name, make, **rest))
        return make

    return add


BINARY: dict[str, Any] = {"options": {"binary": True}, "classes": ("background", "foreground")}
NAMED: dict[str, Any] = {"classes": ("ground", "road", "sky")}


def foreground(masks: Masks) -> Masks:
    return {name: (mask > 0).astype(np.uint8) for name, mask in masks.items()}


# Forms of files


case(
    "grey",
)(folder)
case("indexed")(lambda: folder(indexed))
case("grey in three channels")(lambda: folder(lambda m: m[..., None].repeat(3, 2)))
case("grey in three channels and one of alpha, opaque")(lambda: folder(lambda m: np.dstack([m, m, m, m * 0 + 255])))
case("16 bits")(lambda: folder(lambda m: m.astype(np.uint16)))
case("16 bits, TIFF")(lambda: folder(lambda m: m.astype(np.uint16), "masks/{}.tif"))
case("32 bits, TIFF")(lambda: folder(lambda m: m.astype(np.int32), "masks/{}.tiff"))
case("floating point with whole values")(lambda: folder(lambda m: m.astype(np.float32), "masks/{}.tif"))
case("BMP")(lambda: folder(mask="masks/{}.bmp"))
case(
    "lossless WebP",
)(lambda: folder(lambda m: m[..., None].repeat(3, 2), "masks/{}.webp", lossless=True))
case("PGM")(lambda: folder(mask="masks/{}.pgm"))
case("grey GIF")(lambda: folder(mask="masks/{}.gif"))
case("extensions in capitals")(lambda: folder(mask="masks/{}.PNG", picture="images/{}.JPG"))
case("compressed TIFF")(lambda: folder(mask="masks/{}.TIF", compression="tiff_lzw"))


@case("one bit", classes=("0", "1"))
def _() -> Masks:
    return foreground(folder(lambda m: m > 0))


@case("one bit, binary", **BINARY)
def _() -> Masks:
    return foreground(folder(lambda m: m > 0))


@case("16 bits in each of three channels")
def _() -> Masks:
    masks = folder()
    for name, mask in masks.items():
        note(f"data/masks/{name}.png", deep_png(mask[..., None].repeat(3, 2).astype(np.uint16)))
    return masks


for colour in (0, 255):
    case(f"the alpha channel of a picture in one colour, {colour}", **BINARY)(
        lambda colour=colour: foreground(folder(lambda m: with_alpha(m, colour)))
    )
case("alpha channel, not binary", says="values 0 and 255 only.*--data.binary true")(lambda: folder(with_alpha))
case("alpha channel of a grey picture", **BINARY)(lambda: foreground(folder(lambda m: with_alpha(m).convert("LA"))))


@case("painted on a transparent layer", **BINARY)
def _() -> Masks:
    def painted(mask: NDArray[np.uint8]) -> NDArray[np.uint8]:
        rgb = np.full((*SIZE, 3), 90, np.uint8)
        rgb[mask == 1] = 255
        return np.dstack([rgb, (mask == 1) * np.uint8(255)])

    return {name: (mask == 1).astype(np.uint8) for name, mask in folder(painted).items()}


case("a foreground of 255", **BINARY)(lambda: foreground(folder(lambda m: (m > 0) * np.uint8(255))))
case("a foreground in colour", **BINARY)(lambda: foreground(folder(lambda m: COLOURS[m])))
case("a foreground in a JPEG", **BINARY)(
    lambda: foreground(folder(lambda m: (m > 0) * np.uint8(255), "masks/{}.jpg", quality=95, subsampling=0))
)


@case("a palette whose 0 is no black", **BINARY)
def _() -> Masks:
    return foreground(folder(lambda m: indexed(m, [(9, 9, 9), (200, 0, 0), (0, 200, 0)])))


@case("an ordered GIF", **BINARY)
def _() -> Masks:
    return foreground(folder(lambda m: (m > 0) * np.uint8(255), "masks/{}.gif"))


case("GIF in colours", says=r"p0.gif is in colour.*name, r, g, b")(lambda: folder(indexed, "masks/{}.gif"))
case("colours", says=r"p0.png is in colour, .*classes.csv")(lambda: folder(lambda m: COLOURS[m]))
case("a floating-point share", says=r"p0.tif has values that are not class numbers, such as 0.5")(
    lambda: folder(lambda m: m.astype(np.float32) / 2, "masks/{}.tif")
)
case("not a number", says=r"p0.tif has values that are not class numbers, such as nan")(
    lambda: folder(lambda m: np.where(m > 1, np.nan, m).astype(np.float32), "masks/{}.tif")
)
case("negative values", says=r"p0.tif has values that are not class numbers, such as -1")(
    lambda: folder(lambda m: m.astype(np.int32) - 1, "masks/{}.tif")
)


@case("an animation", says=r"p1.gif holds 2 pictures")
def _() -> None:
    folder(mask="masks/{}.gif")
    first = PIL.Image.fromarray(truth(1))
    first.save("data/masks/p1.gif", save_all=True, append_images=[PIL.Image.fromarray(truth(2))])


@case("pages", says=r"p1.tif holds 2 pictures")
def _() -> None:
    folder(mask="masks/{}.tif")
    first = PIL.Image.fromarray(truth(1))
    first.save("data/masks/p1.tif", save_all=True, append_images=[PIL.Image.fromarray(truth(2))])


@case("JPEG", says=r"p0.jpg has \d+ different values, .*it is a JPEG")
def _() -> None:
    noise = np.random.default_rng(0).integers(0, 255, SIZE).astype(np.uint8)
    folder(lambda m: noise, "masks/{}.jpg")


# What values mean


case(
    "values with wide gaps",
    says=r"have the values 0, 128, 255: .*129, 127 of them empty.*name,value; 0,0; 128,128; 255,255",
)(lambda: folder(lambda m: np.array([0, 128, 255], np.uint8)[m]))


@case("values with wide gaps, named", classes=("ground", "road", "sky"))
def _() -> Masks:
    note("data/classes.csv", "name,value\nground,0\nroad,128\nsky,255\n")
    return folder(lambda m: np.array([0, 128, 255], np.uint8)[m])


case("a class that is not there", classes=("0", "1", "2", "3"), told="No pixel to train on in class '2'")(
    lambda: {k: np.array([0, 1, 3], np.uint8)[v] for k, v in folder(lambda m: np.array([0, 1, 3], np.uint8)[m]).items()}
)


@case("borders that do not count", classes=("0", "1"))
def _() -> Masks:
    table = np.array([0, 1, 255], np.uint8)
    return {name: table[mask] for name, mask in folder(lambda m: table[m]).items()}


case("nothing but background", says=r"All pixels of the masks of data have the value 0: there is nothing to learn")(
    lambda: folder(lambda m: m * 0)
)
case("nothing but background, binary", says=r"have no class but 'background'.*nothing to tell apart", **BINARY)(
    lambda: folder(lambda m: m * 0)
)
case("nothing that counts", says=r"have the values 255 only.*--data.binary true")(lambda: folder(lambda m: m * 0 + 255))


@case("one class of a table", says=r"have no class but 'road'")
def _() -> None:
    note("data/classes.csv", "name\nground\nroad\n")
    folder(lambda m: m * 0 + 1)


@case(
    "foregrounds of 1 and of 255", says=r"a foreground of 1, as .*p0.png, others one of 255, as .*p2.png.*binary true"
)
def _() -> None:
    folder(lambda m: (m > 0).astype(np.uint8))
    for name in ("p2", "p3"):
        save(f"data/masks/{name}.png", (truth(0) > 0) * np.uint8(255))


def objects(count: int, first: int = 1, dtype: Any = np.uint8) -> NDArray[Any]:
    """Squares with a number each."""
    mask = np.zeros(SIZE, dtype)
    for k in range(count):
        y, x = divmod(k, 6)
        mask[1 + 4 * y : 4 + 4 * y, 1 + 4 * x : 4 + 4 * x] = first + k
    return mask


for bits, suffix, dtype in ((8, "png", np.uint8), (16, "png", np.uint16), (16, "tif", np.uint16)):

    def numbered(suffix: str = suffix, dtype: Any = dtype) -> Masks:
        found = {}
        for i, count in enumerate((5, 12, 7, 9, 0)):
            image(f"data/images/{i}.png")
            save(f"data/masks/{i}.{suffix}", objects(count, 1, dtype))
            found[str(i)] = (objects(count) > 0).astype(np.uint8)
        return found

    case(
        f"objects' numbers in {bits} bits, {suffix}", says=r"own: they run from 1 to 5 .* and to 12.*--data.binary true"
    )(numbered)
    case(f"objects' numbers in {bits} bits, {suffix}, binary", **BINARY)(numbered)


@case("objects' numbers from one long count", says=r"each object seems to have a number of its own: of 40 numbers")
def _() -> None:
    for i in range(5):
        image(f"data/images/{i}.png")
        save(f"data/masks/{i}.png", objects(8, 20 + 8 * i))


@case("objects' numbers beyond 255", says=r"values up to 1013, more than 255 classes.*binary true")
def _() -> None:
    for i in range(4):
        image(f"data/images/{i}.png")
        save(f"data/masks/{i}.png", objects(14, 1000, np.uint16))


@case("as many classes as objects could be, in all masks", classes=tuple("012345"))
def _() -> Masks:
    found = {}
    for i in range(4):
        image(f"data/images/{i}.png")
        save(f"data/masks/{i}.png", np.roll(objects(5), i, 1))
        found[str(i)] = np.roll(objects(5), i, 1)
    return found


@case("classes in several pieces", classes=tuple("012345"))
def _() -> Masks:
    found = {}
    for i, count in enumerate((3, 4, 5, 5, 5, 5)):
        image(f"data/images/{i}.png")
        found[str(i)] = np.tile(objects(count)[:10], (2, 1))
        save(f"data/masks/{i}.png", found[str(i)])
    return found


@case(
    "palettes that disagree", says=r"The number 1 is \(128, 64, 0\) in the palette of .* and \(0, 0, 200\) in that of"
)
def _() -> None:
    folder(indexed)
    save("data/masks/p2.png", indexed(truth(2), COLOURS[[0, 2, 1]]))


@case("a table of classes of Excel's", told="read as Windows-1252", classes=("Grün", "road", "sky"))
def _() -> Masks:
    note("data/classes.csv", "sep=;\r\nname;value\r\nGrün;0\r\nroad;1\r\nsky;2\r\n".encode("cp1252"))
    return folder()


@case("palettes that disagree, numbers meant", **NAMED)
def _() -> Masks:
    masks = folder(indexed)
    save("data/masks/p2.png", indexed(truth(2), COLOURS[[0, 2, 1]]))
    note("data/classes.csv", "name,value\nground,0\nroad,1\nsky,2\n")
    return masks


@case("palettes that disagree, colours meant", **NAMED)
def _() -> Masks:
    masks = folder(indexed)
    turned = np.array([0, 2, 1], np.uint8)[truth(2)]
    save("data/masks/p2.png", indexed(turned, COLOURS[[0, 2, 1]]))
    note("data/classes.csv", TABLE)
    return masks


TABLE = "name,r,g,b\nground,0,0,0\nroad,128,64,0\nsky,0,0,200\n"
LABELMAP = "# label:color_rgb:parts:actions\nroad:128,64,0::\nbackground:0,0,0::\nsky:0,0,200::\n"
for name, file, text in (
    ("r, g, b", "classes.csv", TABLE),
    ("semicolons", "classes.csv", TABLE.replace(",", ";")),
    ("tabs and CRLF", "classes.csv", TABLE.replace(",", "\t").replace("\n", "\r\n")),
    ("a byte-order mark and capitals", "classes.csv", "\ufeff" + TABLE.replace("name,r,g,b", "Name, R, G, B")),
    ("class_dict.csv", "class_dict.csv", TABLE),
    ("beside the masks", "masks/classes.csv", TABLE),
    ("CamVid's colours", "label_colors.txt", "0 0 0\tground\n128 64 0\troad\n0 0 200\tsky\n"),
):
    case(f"colours, {name}", **NAMED)(
        lambda file=file, text=text: (note(f"data/{file}", text), folder(lambda m: COLOURS[m]))[1]
    )


@case("colours, CVAT's labelmap", classes=("background", "road", "sky"))
def _() -> Masks:
    note("data/labelmap.txt", LABELMAP)
    return folder(lambda m: COLOURS[m])


@case("numbers by the rows of a labelmap", classes=("background", "road", "sky"))
def _() -> Masks:
    note("data/labelmap.txt", "# label:color_rgb:parts:actions\nbackground:0,0,0::\nroad:128,64,0::\nsky:0,0,200::\n")
    return folder()


@case("indexed GIF by colours", **NAMED)
def _() -> Masks:
    note("data/classes.csv", TABLE)
    return folder(indexed, "masks/{}.gif")


@case("two values of one class", classes=("ground", "road"))
def _() -> Masks:
    note("data/classes.csv", "name,value\nground,0\nroad,1\nroad,2\n")
    return foreground(folder())


for name, text, says in (
    ("empty", "", r"classes.csv is not a table of classes"),
    ("bytes", b"\xff\xfe\x00name", r"classes.csv is not a table of classes"),
    ("no name", "value\n0\n1\n", r"classes.csv is not a table of classes: .*not 'value'"),
    ("a value twice", "name,value\na,1\nb,1\n", r"gives two classes the same value, 1"),
    ("a word for a value", "name,value\na,one\n", r"a row is 'a,one'"),
    ("a value between two", "name,value\na,0\nb,0.5\n", r"a row is 'b,0.5'"),
    ("a value too large", "name,r,g,b\na,0,0,256\n", r"a row is 'a,0,0,256'"),
    ("a row cut off", "name,r,g,b\na,0,0\n", r"a row is 'a,0,0'"),
    ("one class", "name\na\n", r"names 1 classes beside those that are ignored"),
    ("a quote that is not closed", 'name,value\n"a,0\nb,1\n', r"classes.csv"),
):
    case(f"table: {name}", says=says)(lambda text=text: (note("data/classes.csv", text), folder())[1])


@case("a labelmap that is none", says=r"labelmap.txt: 'road 1,2' is no class with its colour")
def _() -> None:
    note("data/labelmap.txt", "road 1,2\n")
    folder(lambda m: COLOURS[m])


# Names and folders


for name, mask in (("_mask", "masks/{}_mask.png"), (".seg", "masks/{}.seg.png"), ("mask_", "masks/mask_{}.png")):
    case(f"names with {name}", told=r"named like .* for p0.png")(lambda mask=mask: folder(mask=mask))


@case("names in words of their own", told=r"named like label-10.png for image-10.jpg")
def _() -> Masks:
    found = folder(mask="masks/label-{}.png", picture="images/image-{}.jpg", names=("9", "10", "11", "12"))
    return {f"image-{name}": mask for name, mask in found.items()}


case("names with a suffix that is given", options={"mask_suffix": "_m"})(lambda: folder(mask="masks/{}_m.png"))
case("names with the image's extension")(lambda: folder(mask="masks/{}.png.png"))


@case("two masks for each image", says=r"names end in _a, _b: choose with --data.mask_suffix")
def _() -> None:
    folder(mask="masks/{}_a.png")
    folder(mask="masks/{}_b.png")


@case("names in other case")
def _() -> Masks:
    masks = folder(picture="images/P{}.JPG", mask="masks/p{}.png", names="0123")
    return {f"P{name}": mask for name, mask in masks.items()}


@case(
    "names as Cityscapes has them",
    told=r"named like ulm_0_7_gt_ids.png for ulm_0_7_left.png",
    options={"images": "left", "masks": "gt", "mask_suffix": "_gt_ids"},
)
def _() -> Masks:
    found = {}
    for split, names in (("train", ("ulm_0_7", "ulm_1_9", "ulm_2_8", "ulm_3_0")), ("val", ("bonn_4_4", "bonn_5_1"))):
        city = names[0].split("_")[0]
        for kind in ("colour", "ids"):
            found |= folder(
                mask=f"gt/{split}/{city}/{{}}_gt_{kind}.png", picture=f"left/{split}/{city}/{{}}_left.png", names=names
            )
    return {f"{name}_left": mask for name, mask in found.items()}


@case("names as DRIVE has them", told=r"named like 21_manual1.gif for 21_training.tif", options={"masks": "1st_manual"})
def _() -> Masks:
    found = folder(
        mask="training/1st_manual/{}_manual1.gif",
        picture="training/images/{}_training.tif",
        names=("21", "22", "31", "40"),
    )
    return {f"{name}_training": mask for name, mask in found.items()}


@case("a test split without masks", told=r"Left out: the 2 images of the test split, which has no masks")
def _() -> Masks:
    for name in ("a", "b"):
        image(f"data/test/images/{name}.png")
    return folder(mask="train/masks/{}.png", picture="train/images/{}.png")


@case("images without masks beside the folders")
def _() -> Masks:
    for name in ("test/a", "val/b"):
        image(f"data/{name}.png")
    return folder()


@case("foregrounds of 255 and masks that are all 1", says="nothing to tell apart")
def _() -> None:
    folder(lambda m: (m > 0) * np.uint8(255))
    for name in ("p1", "p3"):
        save(f"data/masks/{name}.png", truth(0) * 0 + 1)


@case("folders in capitals")
def _() -> Masks:
    return folder(mask="Masks/{}.png", picture="Images/{}.png")


@case("sub-folders that mirror the images'")
def _() -> Masks:
    for k, names in (("a", ("p0", "p1")), ("b", ("p0", "p1"))):
        folder(mask=f"masks/{k}/{{}}.png", picture=f"images/{k}/{{}}.png", names=names)
    return {"p0": truth(0), "p1": truth(1)}


case("sub-folders of the images alone")(lambda: folder(picture="images/x/{}.png"))
case("sub-folders of the masks alone")(lambda: folder(mask="masks/x/{}.png"))


@case(
    "two images of one stem", says=r"images/p0.jpg and data/images/p0.png share the mask data/masks/p0.png.*p0.jpg.png"
)
def _() -> None:
    folder()
    image("data/images/p0.jpg")


@case("two images of one stem with masks of their own", told="")
def _() -> Masks:
    masks = folder(mask="masks/{}.png.png")
    image("data/images/p0.jpg")
    save("data/masks/p0.jpg.png", truth(0))
    return masks


@case("two masks of one stem", says=r"p0.png has two masks, data/masks/p0.png and data/masks/p0.tif: keep one")
def _() -> None:
    folder()
    save("data/masks/p0.tif", truth(0))


@case("masks of no image", told=r"2 of 6 masks belong to no image; the first: data/masks/q.png")
def _() -> Masks:
    for name in ("q", "r"):
        save(f"data/masks/{name}.png", truth(0))
    return folder()


@case("an image without a mask", says=r"1 of 4 images have no mask of the same name in masks/: data/images/p1.png")
def _() -> None:
    folder()
    Path("data/masks/p1.png").unlink()


@case("files that a Macintosh leaves")
def _() -> Masks:
    for name in ("images/._p0.png", "masks/._p0.png", "masks/.DS_Store", "masks/__MACOSX/p0.png"):
        note(f"data/{name}", b"\0\5\x16\7")
    return folder()


@case("splits above, in capitals")
def _() -> Masks:
    folder(mask="Val/masks/{}.png", picture="Val/images/{}.png", names=("p9",))
    return folder(mask="Train/masks/{}.png", picture="Train/images/{}.png") | {"p9": truth(0)}


@case("splits below")
def _() -> Masks:
    folder(mask="masks/valid/{}.png", picture="images/valid/{}.png", names=("p9",))
    return folder(mask="masks/train/{}.png", picture="images/train/{}.png") | {"p9": truth(0)}


@case("a validation split below the images to train on")
def _() -> Masks:
    folder(mask="masks/val/{}.png", picture="images/val/{}.png", names=("p9",))
    return folder() | {"p9": truth(0)}


@case("Roboflow's masks beside the images", classes=("background", "road", "sky"))
def _() -> Masks:
    for split in ("train", "valid"):
        note(f"data/{split}/_classes.csv", "Pixel Value, Class\n0, background\n1, road\n2, sky\n")
    folder(mask="valid/{}_mask.png", picture="valid/{}.jpg", names=("p9",))
    return folder(mask="train/{}_mask.png", picture="train/{}.jpg") | {"p9": truth(0)}


@case(
    "a folder of masks that is not there", says=r"no folder .*masks of masks.*--data.masks \(images, labels are there\)"
)
def _() -> None:
    folder(mask="labels/{}.png")


@case("masks in a form that is not read", says=r"4 of 4 images have no mask")
def _() -> None:
    folder()
    for file in Path("data/masks").iterdir():
        file.rename(file.with_suffix(".npy"))


@case("another size", says=r"p0.png has 22×20 pixels, its image data/images/p0.png has 28×20\.$")
def _() -> None:
    folder()
    save("data/masks/p0.png", truth(0)[:, :-6])


@case("on its side, no EXIF", says=r"p0.png has 20×28 pixels.*One of the two lies on its side\.")
def _() -> None:
    folder()
    save("data/masks/p0.png", np.ascontiguousarray(truth(0).T))


@case("turned by EXIF", says=r"p0.png has 28×20 pixels.*EXIF tag, the mask is not\.")
def _() -> None:
    folder()
    exif = PIL.Image.Exif()
    exif[0x0112] = 6
    PIL.Image.open("data/images/p0.png").save("data/images/p0.png", exif=exif)


# Pascal VOC and CVAT


VOC = (*VOCSegmentation.names,)
VOC_COLOURS = np.array([(0, 0, 0), (128, 0, 0), (0, 128, 0)], np.uint8)


def voc(form: Callable[[NDArray[np.uint8]], Any], lists: dict[str, str], picture: str = "{}.jpg") -> Masks:
    for name, text in lists.items():
        note(f"data/ImageSets/Segmentation/{name}.txt", text)
    return folder(form, "SegmentationClass/{}.png", f"JPEGImages/{picture}")


LISTS = {"train": "p0\np1\np2\n", "val": "p3\n"}
for name, form in (
    ("indexed", lambda m: indexed(m, VOC_COLOURS)),
    ("grey", lambda m: m),
    ("in VOC's colours", lambda m: VOC_COLOURS[m]),
):
    case(f"VOC, {name}", kind=VOCSegmentation, classes=VOC, told="No pixel to train on")(
        lambda form=form: voc(form, LISTS)
    )
case("VOC, images as PNG", kind=VOCSegmentation, classes=VOC, told="No pixel")(
    lambda: voc(lambda m: m, LISTS, "{}.png")
)
case("VOC, lists with extensions and folders", kind=VOCSegmentation, classes=VOC, told="No pixel")(
    lambda: voc(lambda m: m, {"Train": "JPEGImages/p0.jpg\r\np1.jpg\r\n\r\np2\r\n", "val": "p3.jpg"})
)
case("VOC, trainval alone", kind=VOCSegmentation, classes=VOC, told="No pixel")(
    lambda: voc(lambda m: m, {"trainval": "p0\np1\np2\np3\n"})
)
case("VOC, no list", kind=VOCSegmentation, says=r"has no ImageSets/Segmentation/train.txt")(
    lambda: voc(lambda m: m, {})
)
case(
    "VOC, a name that is not there",
    kind=VOCSegmentation,
    says=r"1 of 5 images have no mask in SegmentationClass/: .*q.jpg",
)(lambda: voc(lambda m: m, {"train": "p0\np1\np2\nq\n", "val": "p3\n"}))
for name, form in (("in colours", lambda m: COLOURS[m]), ("indexed", indexed)):

    @case(f"CVAT's segmentation masks, {name}", kind=VOCSegmentation, classes=("background", "road", "sky"))
    def _(form: Any = form) -> Masks:
        note("data/labelmap.txt", LABELMAP)
        return voc(form, {"default": "p0\np1\np2\np3\n"}, "{}.png")


# COCO


def coco(outline: Any, kind: type[SegmentationDataModule] = COCOSegmentation, count: int = 2) -> Masks:
    """Four images with two objects; the outline of one of them is the given one."""
    images, entries = [], []
    for i in range(4):
        image(f"data/train/p{i}.png")
        images.append({"id": i, "file_name": f"p{i}.png", "height": SIZE[0], "width": SIZE[1]})
        for k in (1, 2):
            mask = (truth(i) == k).astype(np.uint8)
            code = rle.encode(np.asfortranarray(mask))
            x, y, w, h = rle.toBbox(code).tolist()
            polygon: Any = [[x, y, x + w, y, x + w, y + h, x, y + h]]
            text = code | {"counts": code["counts"].decode()}
            if i == 1 and k == 1 and outline is not None:
                polygon = outline
            entries.append({"id": len(entries) + 1, "image_id": i, "category_id": k, "bbox": [x, y, w, h], "iscrowd": 0,
                            "area": w * h, "segmentation": text if i == 2 else polygon})  # fmt: skip
    categories = [{"id": k, "name": name} for k, name in enumerate(("road", "sky", *map(str, range(count - 2))), 1)]
    note("data/train.json", json.dumps({"images": images, "annotations": entries, "categories": categories}))
    return {f"p{i}": truth(i) for i in range(4)}


X: dict[str, Any] = {"kind": COCOSegmentation, "classes": ("background", "road", "sky")}
case("COCO, polygons and codes", **X)(lambda: coco(None))
case("COCO, an uncompressed code", **X)(
    lambda: coco({"size": list(SIZE), "counts": [63, 6, *[14, 6] * 8, 20 * 28 - 63 - 6 * 9 - 14 * 8]})
)
for name, outline in (
    ("a code of another size", {"size": [5, 5], "counts": [0, 25]}),
    ("a compressed code of another size", {"size": [48, 48], "counts": "0`Q2"}),
    ("a compressed code that says the size and is larger", {"size": list(SIZE), "counts": "0`Q2"}),
    ("a code that is too long", {"size": list(SIZE), "counts": [0, 9999]}),
    ("a code that is too short", {"size": list(SIZE), "counts": [3, 4]}),
    ("a negative code", {"size": list(SIZE), "counts": [-5, 565]}),
    ("garbage in a code", {"size": list(SIZE), "counts": "\u2603~~~"}),
    ("words in a code", {"size": list(SIZE), "counts": ["a"]}),
    ("a code without counts", {"size": list(SIZE)}),
    ("a text", "abc"),
    ("a number", 7),
    ("an empty polygon", [[]]),
    ("a polygon of one point", [[10, 10]]),
    ("a polygon of two points", [[10, 10, 12, 12]]),
    ("an odd number of coordinates", [[1, 1, 9, 1, 9, 9, 1]]),
    ("texts as coordinates", [["a", "b", "c", "d", "e", "f"]]),
    ("no finite coordinates", [[float("nan")] * 6]),
    ("null in a polygon", [None]),
):
    case(f"COCO, {name}", kind=COCOSegmentation, says=r"train.json, annotation 3, image p1.png")(
        lambda o=outline: coco(o)
    )
case(
    "COCO, more classes than fit into a byte",
    kind=COCOSegmentation,
    says=r"has 301 classes; there must be from two to 255",
)(lambda: coco(None, count=300))


def test_looking_at_many_masks_leaves_warnings_as_they_are() -> None:
    folder(PIL.Image.fromarray)
    before = list(warnings.filters)
    for _ in range(20):
        _ = MaskFolder("data", image_size=32).sources
        assert warnings.filters == before


@pytest.mark.parametrize("case", CASES, ids=[one.name for one in CASES])
def test_masks_are_read_rightly_or_refused_in_a_paragraph(case: Case) -> None:
    expected = case.make()
    data = case.kind("data", image_size=32, **(case.options or {}))  # type: ignore[call-arg]
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        if case.says:
            with pytest.raises(DataError) as error:
                _ = data.sources
            assert re.search(case.says, str(error.value)), str(error.value)
            assert "\n" not in str(error.value)
            return
        found = {}
        for source in data.sources.values():
            for i in range(len(source)):
                found[Path(source.paths[i]).stem] = source[i]["mask"]  # type: ignore[attr-defined]
    said = [str(one.message) for one in told]
    assert any(re.search(case.told, text) for text in said) if case.told else not said, said
    assert tuple(data.label_names) == case.classes
    assert expected is not None
    assert found.keys() == expected.keys()
    for name, mask in expected.items():
        assert np.array_equal(found[name], mask), name


def odd_files() -> dict[str, bytes]:
    """Masks in forms that tools write, as bytes, by names of files."""
    found = {}
    mask = truth(0)
    forms: dict[str, Any] = {
        "grey.png": mask, "bits.png": mask > 0, "deep.png": mask.astype(np.uint16), "rgba.png": with_alpha(mask),
        "indexed.png": indexed(mask), "colours.png": COLOURS[mask], "a.gif": mask, "b.gif": indexed(mask), "grey.tif": mask,
        "float.tif": mask.astype(np.float32), "deep.tiff": mask.astype(np.uint16), "a.bmp": mask, "a.pgm": mask, "a.webp": COLOURS[mask],
        "a.jpg": mask * 100,
    }  # fmt: skip
    for name, pixels in forms.items():
        options: dict[str, Any] = {"compression": "tiff_deflate"} if name.startswith("deep.t") else {}
        save(f"forms/{name}", pixels, **options)
        found[name] = Path("forms", name).read_bytes()
    frames = [PIL.Image.fromarray(truth(i)) for i in range(3)]
    frames[0].save("forms/moving.gif", save_all=True, append_images=frames[1:])
    return found | {"moving.gif": Path("forms/moving.gif").read_bytes(), "bands.png": deep_png(COLOURS[mask].astype(np.uint16)),
                    "empty.png": b"", "text.png": b"not an image", "zeros.tif": bytes(500)}  # fmt: skip


def mutated(data: bytes, generator: np.random.Generator) -> bytes:
    """Bytes cut off, changed, left out, or repeated."""
    content, how = bytearray(data), int(generator.integers(4))
    place = int(generator.integers(len(content))) if content else 0
    if how == 0:
        return bytes(content[:place])
    if how == 1:
        for k in generator.integers(0, max(1, len(content)), 1 + int(generator.integers(6))):
            content[k : k + 1] = bytes([int(generator.integers(256))])
        return bytes(content)
    end = place + int(generator.integers(1, 30))
    return bytes(content[:place] + content[end:] if how == 2 else content[:end] + content[place:])


def attempt(**options: Any) -> None:
    """Reads the folder: it is read, or refused in one paragraph."""
    data = MaskFolder("data", image_size=32, **options)
    try:
        for source in data.sources.values():
            for i in range(len(source)):
                mask = source[i]["mask"]
                assert mask.shape == SIZE
                assert set(np.unique(mask).tolist()) <= {*range(len(data.label_names)), 255}
    except DataError as error:
        text = str(error)
        assert "data" in text
        assert len(text) < 900
        assert text.isprintable()


MUTANTS = pytest.mark.parametrize("count", [6, pytest.param(150, marks=pytest.mark.slow)])  # of each form


@MUTANTS
def test_broken_masks_are_read_or_refused_and_nothing_else(count: int) -> None:
    generator = np.random.default_rng(0)
    forms = odd_files()
    folder(names=("p0", "p1", "p2"))
    image("data/images/q.png")
    for name, data in forms.items():
        for k in range(count):
            file = Path("data/masks", f"q{Path(name).suffix if k % 3 else Path(name).suffix.upper()}")
            file.write_bytes(mutated(data, generator) if k else data)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                attempt(binary=k % 2 == 1)
            file.unlink()


@MUTANTS
def test_broken_tables_of_classes_are_read_or_refused_and_nothing_else(count: int) -> None:
    generator = np.random.default_rng(1)
    folder(lambda m: COLOURS[m])
    tables = {
        "classes.csv": TABLE,
        "labelmap.txt": LABELMAP,
        "label_colors.txt": "0 0 0\tground\n128 64 0\troad\n0 0 200\tsky\n",
    }
    for name, text in tables.items():
        for _ in range(count):
            note(f"data/{name}", mutated(text.encode(), generator))
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                attempt()
        Path("data", name).unlink()


def test_there_are_enough_cases() -> None:
    names = [one.name for one in CASES]
    assert len(set(names)) == len(names) >= 40
