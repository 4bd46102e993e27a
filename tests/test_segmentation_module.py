"""Class maps: metrics, losses, decoders, windows, and what a registered model answers."""

import contextlib
import io
import json
import resource
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
import torch.nn.functional as F
from conftest import built, start
from faster_coco_eval.core import mask as rle
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from scipy.ndimage import distance_transform_cdt
from sklearn.metrics import confusion_matrix, f1_score, jaccard_score
from torch import Tensor, nn

from datamodules import COCOSegmentation
from datamodules.options import Preprocessing
from modules import InstanceSegmentationModule, SegmentationModule
from modules.instance_segmentation import MaskMetric, MaskRCNN, panoptic_map
from modules.networks import BackboneError
from modules.segmentation import FPN, CrossEntropy, DeepLabV3Plus, Dice, Focal, Lovasz, Mixture, SegFormer, UNet
from modules.segmentation.metrics import SegmentationMetric, boundary_counts, edges
from modules.segmentation.windows import strips, window_starts
from modules.spec import Backbone, DataSpec
from pipelines import export
from pipelines.classification import classification
from pipelines.predict import predict
from pipelines.serving import store as storage

K = 4


def blobs(count: int, size: int = 24, seed: int = 0) -> Tensor:
    """Class maps with areas of a few pixels, without class 2 in the first half."""
    generator = torch.Generator().manual_seed(seed)
    maps = torch.randint(K, (count, size // 4, size // 4), generator=generator)
    return maps.repeat_interleave(4, 1).repeat_interleave(4, 2)


def test_figures_agree_with_scikit_learn_whatever_the_batches() -> None:
    truth, found = blobs(10, seed=1), blobs(10, seed=2)
    found[:6] = truth[:6]
    truth[torch.rand(truth.shape, generator=torch.Generator().manual_seed(3)) < 0.2] = 255
    whole, pieces, other = (SegmentationMetric(K + 1) for _ in range(3))  # the last class is nowhere
    whole.update(found, truth)
    for i, one in enumerate((pieces, other, pieces)):
        part = slice(*((0, 3), (3, 4), (4, 10))[i])
        one.update(found[part], truth[part])
    for name in ("confusion", "boundary"):  # what torchmetrics sums over processes
        assert torch.equal(getattr(whole, name), getattr(pieces, name) + getattr(other, name))
    seen = truth != 255
    true, ours, values = truth[seen].numpy(), found[seen].numpy(), whole.compute()
    assert np.array_equal(values["confusion"][:K, :K], confusion_matrix(true, ours))
    assert values["iou_per_class"][:K].tolist() == pytest.approx(jaccard_score(true, ours, average=None).tolist())
    assert values["miou"] == pytest.approx(jaccard_score(true, ours, average="macro"))
    assert values["dice"] == pytest.approx(f1_score(true, ours, average="macro"))
    assert values["accuracy"] == pytest.approx((true == ours).mean())
    assert values["iou_per_class"][K].isnan()


def test_what_there_is_nothing_to_count_for_has_no_figure() -> None:
    metric = SegmentationMetric(3)
    metric.update(torch.zeros(1, 8, 8).long(), torch.zeros(1, 8, 8).long())  # neither objects nor boundaries
    values = metric.compute()
    assert {key: value for key, value in values.items() if isinstance(value, float)} == {
        "miou": 1,
        "dice": 1,
        "accuracy": 1,
    }
    metric.reset()
    metric.update(torch.zeros(1, 8, 8).long(), torch.full((1, 8, 8), 255))
    assert not [value for value in metric.compute().values() if isinstance(value, float)]
    masks = MaskMetric(2)
    nothing = {"masks": torch.zeros(0, 8, 8).bool(), "labels": torch.zeros(0).long(), "scores": torch.zeros(0)}
    masks.update(
        nothing, nothing | {"masks": torch.zeros(0, 8, 8).to(torch.uint8), "ignore": torch.zeros(0).bool()}, 0.5
    )
    assert masks.compute() == {"panoptic_quality": 1}


def test_boundary_pixels_are_those_near_enough_to_the_others() -> None:
    truth, found = blobs(3, 64, 1), blobs(3, 64, 2)
    found[0] = truth[0].roll(1, 1)
    truth[1, :20] = 255
    counts = boundary_counts(found, truth, K, tolerance=0.03)  # 2.7, so 3 pixels
    masked = found.where(truth != 255, 255)
    expected = np.zeros((4, K), int)
    for k in range(K):
        for i in range(3):
            ours, true = ((edges(m[None])[0] & (m == k)).numpy() for m in (masked[i], truth[i]))
            to_ours, to_true = (distance_transform_cdt(~b, "chessboard") if b.any() else np.full(b.shape, 99) for b in (ours, true))  # fmt: skip
            expected[:, k] += [(ours & (to_true <= 3)).sum(), ours.sum(), (true & (to_ours <= 3)).sum(), true.sum()]
    assert np.array_equal(counts.numpy(), expected)
    square = torch.zeros(1, 9, 9, dtype=torch.int64)
    square[0, 3:6, 3:6] = 1
    assert int((edges(square) & (square == 1)).sum()) == 8
    assert int((edges(square) & (square == 0)).sum()) == 12


def softmax_by_pixel(logits: Tensor, mask: Tensor) -> list[tuple[int, list[float]]]:
    """The class and the probabilities of each pixel that counts."""
    likely = logits.softmax(1).permute(0, 2, 3, 1).reshape(-1, logits.shape[1]).tolist()
    return [(t, p) for t, p in zip(mask.flatten().tolist(), likely, strict=True) if t != 255]


@pytest.fixture
def pixels() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    mask = torch.randint(3, (2, 4, 5), generator=generator)
    mask[0, 0] = 255
    return torch.randn(2, 3, 4, 5, generator=generator), mask


@pytest.mark.parametrize("weights", [None, [0.5, 2.0, 1.0]])
def test_losses_are_what_a_loop_over_the_pixels_gives(
    pixels: tuple[Tensor, Tensor], weights: list[float] | None
) -> None:
    rows, share = softmax_by_pixel(*pixels), weights or [1.0] * 3
    total = sum(share[t] for t, _ in rows)
    entropy = sum(share[t] * -np.log(p[t]) for t, p in rows) / total
    focal = sum(share[t] * (1 - p[t]) ** 2 * -np.log(p[t]) for t, p in rows) / total
    scores = [
        (2 * sum(p[k] for t, p in rows if t == k) + 1) / (sum(p[k] + (t == k) for t, p in rows) + 1) for k in range(3)
    ]
    dice = sum(s * (1 - score) for s, score in zip(share, scores, strict=True)) / sum(share)
    given = None if weights is None else torch.tensor(weights)
    assert float(CrossEntropy()(*pixels, given)) == pytest.approx(entropy, rel=1e-5)
    assert float(Focal(2)(*pixels, given)) == pytest.approx(focal, rel=1e-5)
    assert float(Focal(0)(*pixels, given)) == pytest.approx(entropy, rel=1e-5)
    assert float(Dice()(*pixels, given)) == pytest.approx(dice, rel=1e-5)
    mixed = Mixture([CrossEntropy(), Dice()], [1, 0.5])(*pixels, given)
    assert float(mixed) == pytest.approx(entropy + 0.5 * dice, rel=1e-5)


def test_lovasz_is_one_minus_iou_for_sure_answers(pixels: tuple[Tensor, Tensor]) -> None:
    mask = pixels[1]
    guess = mask.where(mask != 255, 0).roll(1, 2)
    seen = (mask != 255).flatten()
    expected = 1 - jaccard_score(mask.flatten()[seen], guess.flatten()[seen], average="macro")
    logits = 200.0 * F.one_hot(guess, 3).permute(0, 3, 1, 2)
    assert float(Lovasz()(logits, mask)) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("loss", [CrossEntropy(), Focal(), Dice(), Lovasz()])
def test_pixels_that_do_not_count_teach_nothing(loss: nn.Module) -> None:
    logits = torch.randn(2, 3, 4, 4, requires_grad=True)
    mask = torch.randint(3, (2, 4, 4))
    mask[1] = 255
    loss(logits, mask).backward()
    assert logits.grad is not None
    assert logits.grad[0].any()
    assert not logits.grad[1].any()
    assert torch.isfinite(loss(logits, torch.full_like(mask, 255)))


def test_windows_cover_a_length_with_the_overlap_asked_for() -> None:
    for length in (1, 31, 32, 33, 48, 100, 1000):
        begin = window_starts(length, 32, 0.5)
        assert begin[0] == 0
        assert begin[-1] == max(0, length - 32)
        assert all(0 < b - a <= 17 for a, b in pairwise(begin))


def test_windows_give_what_the_whole_picture_gives() -> None:
    torch.manual_seed(0)
    pixelwise, image = nn.Conv2d(3, K, 1), torch.randint(256, (3, 70, 101), dtype=torch.uint8)
    seeing = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, K, 3, padding=1))

    def network(layers: nn.Module, x: Tensor) -> Tensor:
        return layers(x.float() / 64)

    for layers, reach, window in ((pixelwise, 0, (32, 48)), (seeing, 2, (32, 32)), (seeing, 2, (32, 64))):
        with torch.no_grad():
            whole = network(layers, image[None])[0].softmax(0)
        pieces = list(strips(partial(network, layers), image, window, torch.device("cpu")))
        tiled = torch.cat(pieces, 1)
        assert tiled.shape == whole.shape
        assert max(piece.shape[1] for piece in pieces) <= 32
        assert tiled.sum(0).numpy() == pytest.approx(1, abs=1e-5)
        if not reach:
            assert torch.allclose(tiled, whole, atol=1e-5)
        # A window's outermost pixels lack neighbours, but count next to nothing.
        assert (tiled - whole).abs().max() < 0.15
        assert (tiled - whole).abs().mean() < 0.002


def test_the_module_answers_a_tiled_picture_as_the_whole_one() -> None:
    torch.manual_seed(0)
    module = small(decoder=partial(UNet, widths=[8, 8, 8, 8, 8])).eval()
    module.multiple = 32
    image = torch.randint(256, (3, 96, 128), dtype=torch.uint8)
    mask = module.class_map(image)
    with torch.no_grad():
        whole = module(image[None])[0].argmax(0)
    assert (mask[16:-16, 16:-16] == whole[16:-16, 16:-16]).float().mean() > 0.9


def _answer_a_large_picture(args: list[str]) -> None:
    side = int(args[0])
    module = small(classes=3, decoder=partial(FPN, width=64), image_size=512).eval()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    image = torch.randint(256, (3, side // 8, side // 8), dtype=torch.uint8).repeat(1, 8, 8)
    mask = module.class_map(image)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    Path("large.json").write_text(json.dumps({"shape": list(mask.shape), "mb": grown}))


@pytest.mark.slow
def test_a_picture_of_10000_pixels_square_needs_little_more_than_itself() -> None:
    assert start(_answer_a_large_picture, ["10000"]) == [0]
    seen = json.loads(Path("large.json").read_text())
    assert seen["shape"] == [10000, 10000]
    assert seen["mb"] < 300 + 100 + 700  # the picture, the class map, a strip


def small(classes: int = K, **options: object) -> SegmentationModule:
    given = {"image_size": 64, "backbone": "test_resnet", "backbone_options": {"small_stem": False}, **options}
    return built(
        SegmentationModule,
        num_classes=classes,
        label_names=["background", *"abcdefg"[: classes - 1]],
        **given,
    )  # type: ignore[arg-type]


@pytest.mark.parametrize("decoder", [UNet, partial(FPN, width=64), partial(DeepLabV3Plus, width=32), partial(SegFormer, width=32)])  # fmt: skip
@pytest.mark.parametrize("backbone", ["test_resnet", "test_vit", "test_convnext", "test_efficientnet", "airbench"])
def test_every_decoder_works_on_every_kind_of_backbone(decoder: object, backbone: str) -> None:
    module = small(backbone=backbone, decoder=decoder)
    sizes = [(64, 64)] if backbone == "test_vit" else [(64, 64), (50, 71)]
    for size in sizes:
        logits = module(torch.randint(256, (2, 3, *size), dtype=torch.uint8))
        assert logits.shape == (2, K, *size)
    module.loss(logits, torch.randint(K, (2, *sizes[-1]))).backward()
    assert all(p.grad is not None for p in module.decoder.parameters())
    twin = SegmentationModule.from_architecture(json.loads(json.dumps(module.architecture)))
    twin.load_state_dict(module.state_dict())
    image = torch.randint(256, (1, 3, 64, 64), dtype=torch.uint8)
    with torch.no_grad():
        assert torch.equal(twin.eval()(image), module.eval()(image))


@pytest.mark.parametrize("stride", [8, 16])
def test_deeplab_reads_a_last_stage_that_keeps_its_stride(stride: int) -> None:
    options = {"small_stem": False, "output_stride": stride}
    module = small(backbone_options=options, decoder=partial(DeepLabV3Plus, width=32, strides=(4, stride)))
    logits = module(torch.randint(256, (2, 3, 64, 64), dtype=torch.uint8))
    assert logits.shape == (2, K, 64, 64)
    logits.sum().backward()
    assert all(p.grad is not None for p in module.parameters()), "the last stage learns, too"
    twin = SegmentationModule.from_architecture(json.loads(json.dumps(module.architecture)))
    twin.load_state_dict(module.state_dict())


def test_what_does_not_fit_the_backbone_is_refused() -> None:
    with pytest.raises(BackboneError, match=r"\[4, 16\] as published.*not \[4, 32\]"):
        small(decoder=partial(DeepLabV3Plus, strides=(4, 32)))
    with pytest.raises(BackboneError, match="mlp has no feature maps"):
        small(backbone="mlp")
    with pytest.raises(BackboneError, match="a number for each stride"):
        small(decoder=partial(UNet, widths=[8, 8]))
    with pytest.raises(BackboneError, match="powers of two"):
        small(backbone="test_vit", image_size=70, backbone_options={"patch_size": 14, "img_size": 70})


def test_an_encoder_from_the_registry_keeps_its_weights() -> None:
    cli = classification(["fit", "--data", "Digits8x8", "--data.image_size", "32", "--model.backbone", "test_resnet",
                          "--trainer.limit_train_batches", "2", "--trainer.limit_val_batches", "1", "--register", "encoder",
                          "--trainer.limit_test_batches", "1", "--trainer.max_epochs", "1", "--output", "out",
                          "--model.backbone.options.small_stem", "false", "--trainer.enable_progress_bar", "false"])  # fmt: skip
    module = small(backbone="models:/encoder/1", in_chans=1, backbone_options={})
    assert cli.rows["registered"] == "models:/encoder/1"
    learned = dict(cli.model.backbone.named_parameters())
    mine = dict(module.backbone.named_parameters())
    assert len(mine) > 10
    for name, value in mine.items():
        assert torch.equal(value, learned[name]), name


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved net whose answers are of several classes."""
    torch.manual_seed(0)
    module = small(decoder=partial(UNet, widths=[16, 16, 16, 16, 16]))
    with torch.no_grad():
        for _ in range(3):
            module(torch.randint(256, (8, 3, 64, 64), dtype=torch.uint8))
    folder = tmp_path_factory.mktemp("segmentation") / "saved"
    storage.save_model(folder, module, Preprocessing(64, 3, "native"), "segmentation")
    return folder


def test_predict_writes_masks_and_coco_of_each_pictures_own_size(saved: Path) -> None:
    generator = np.random.default_rng(0)
    Path("pictures").mkdir()
    for name, size in {"a.png": (40, 90), "b.jpg": (130, 75), "c.tif": (64, 64)}.items():
        PIL.Image.fromarray(generator.integers(0, 256, (*size, 3)).astype(np.uint8)).save(f"pictures/{name}")
    assert predict(str(saved), ["pictures"], "out", json=True) == 0
    module, _ = storage.load_model(saved)
    rows = [json.loads(line) for line in Path("out/predictions.jsonl").read_text().splitlines()]
    coco = json.loads(Path("out/coco.json").read_text())
    assert [image["file_name"] for image in coco["images"]] == [
        f"../pictures/{name}" for name in ("a.png", "b.jpg", "c.tif")
    ]
    for row, image in zip(rows, coco["images"], strict=True):
        stem = Path(row["path"]).stem
        picture = np.asarray(PIL.Image.open(row["path"]))
        with PIL.Image.open(f"out/{stem}.mask.png") as file:
            mask = np.asarray(file)
            assert file.mode == "P"
            colours = np.array(file.getpalette()).reshape(-1, 3)[: K + 1]
            assert not colours[0].any()
            assert len(np.unique(colours[:K], axis=0)) == K
        assert mask.shape == picture.shape[:2] == (image["height"], image["width"])
        expected = module.class_map(torch.from_numpy(picture.copy()).permute(2, 0, 1))  # type: ignore[operator]
        if not row["path"].endswith("jpg"):
            assert np.array_equal(mask, expected)
        assert sum(row["shares"].values()) == pytest.approx(1, abs=1e-5)
        for one in (a for a in coco["annotations"] if a["image_id"] == image["id"]):
            assert np.array_equal(rle.decode(one["segmentation"]), mask == one["category_id"])
            assert one["area"] == (mask == one["category_id"]).sum()
        assert PIL.Image.open(f"out/{Path(row['path']).name}").size == (image["width"], image["height"])
    assert {c["name"] for c in coco["categories"]} == {"a", "b", "c"}
    assert len({a["category_id"] for a in coco["annotations"]}) > 1


def test_what_predict_wrote_is_data_to_learn_from(saved: Path) -> None:
    Path("pictures").mkdir()
    for i in range(4):
        pixels = np.random.default_rng(i).integers(0, 256, (64, 64, 3)).astype(np.uint8)
        PIL.Image.fromarray(pixels).save(f"pictures/{i}.png")
    predict(str(saved), ["pictures"], "out", json=True)
    data = COCOSegmentation("out/coco.json", image_size=64)
    assert data.label_names == ["background", "a", "b", "c"]
    source = data.sources["train"]
    sample, name = source[0], Path(str(source.paths[0])).stem  # type: ignore[attr-defined]
    assert np.array_equal(sample["image"], np.asarray(PIL.Image.open(f"pictures/{name}.png"))), "not the drawing"
    assert np.array_equal(sample["mask"], np.asarray(PIL.Image.open(f"out/{name}.mask.png")))


@pytest.mark.parametrize("preprocessing", [True, False])
def test_onnx_gives_the_probabilities_of_each_pixel(saved: Path, preprocessing: bool) -> None:
    import onnxruntime

    said = export.export(str(saved), Path("net.onnx"), preprocessing=preprocessing)
    assert float(said.split()[-1].rstrip(".")) <= 1e-4
    module, _ = storage.load_model(saved)
    image = torch.randint(256, (5, 3, 64, 64), dtype=torch.uint8)
    given = image if preprocessing else module.normalize(image).contiguous()
    answer = onnxruntime.InferenceSession("net.onnx").run(None, {"image": given.numpy()})[0]
    with torch.no_grad():
        expected = module(image).softmax(1) if preprocessing else module(image)
    assert answer.shape == (5, K, 64, 64)
    assert np.abs(answer - expected.numpy()).max() < 1e-4


def test_a_panoptic_map_has_the_most_certain_in_front_and_no_hidden_objects() -> None:
    masks = torch.zeros(3, 6, 6, dtype=torch.bool)
    masks[0, :3], masks[1, 2:5], masks[2, :2] = True, True, True
    panoptic = panoptic_map(masks, torch.tensor([7, 8, 9]), 10)
    assert panoptic[:3, :, 0].eq(7).all()
    assert panoptic[3:5, :, 0].eq(8).all()
    assert panoptic[5, :, 0].eq(10).all()
    assert panoptic[:3, :, 1].unique().tolist() == [1]


def mask_images(count: int, seed: int = 0) -> list[tuple[dict[str, Tensor], dict[str, Tensor]]]:
    """Rectangles as masks, and as detections the same ones moved a little."""
    generator = torch.Generator().manual_seed(seed)
    result = []
    for _ in range(count):
        number = int(torch.randint(1, 5, (), generator=generator))
        masks = torch.zeros(number, 40, 40, dtype=torch.uint8)
        for mask in masks:
            y, x, height, width = torch.randint(3, 20, (4,), generator=generator).tolist()
            mask[y : y + height, x : x + width] = 1
        moves = torch.randint(-2, 3, (number, 2), generator=generator).tolist()
        found = torch.stack([mask.bool().roll(move, (0, 1)) for mask, move in zip(masks, moves, strict=True)])
        labels, scores = torch.arange(number) % 2, torch.rand(number, generator=generator).sort(descending=True).values
        truth = {"masks": masks, "labels": labels, "ignore": torch.zeros(number, dtype=torch.bool)}
        result.append(({"masks": found, "labels": labels, "scores": scores}, truth))
    return result


def _measure_a_share(args: list[str]) -> None:
    torch.distributed.init_process_group("gloo")
    rank, metric = torch.distributed.get_rank(), MaskMetric(2)
    for found, truth in mask_images(7)[rank::2]:
        metric.update(found, truth, 0.5)
    Path(f"{rank}.json").write_text(json.dumps(metric.compute()))


def test_masks_of_processes_with_unequal_shares_are_measured_as_those_of_one() -> None:
    metric = MaskMetric(2)
    for found, truth in mask_images(7):
        metric.update(found, truth, 0.5)
    assert start(_measure_a_share, [], world_size=2) == [0, 0]
    for rank in range(2):
        assert json.loads(Path(f"{rank}.json").read_text()) == pytest.approx(metric.compute(), abs=1e-6)


def test_average_precision_of_masks_is_that_of_pycocotools() -> None:
    metric, images = MaskMetric(2), mask_images(12, seed=1)
    truths, answers = [], []
    for number, (found, truth) in enumerate(images):
        metric.update(found, truth, 0.5)
        for part, entries in ((truth, truths), (found, answers)):
            for k, mask in enumerate(part["masks"]):
                code = rle.encode(np.asfortranarray(mask.numpy(), np.uint8))
                score = {"score": float(part["scores"][k])} if "scores" in part else {}
                entries.append({"id": len(entries) + 1, "image_id": number, "category_id": int(part["labels"][k]), "iscrowd": 0,
                                "segmentation": code, "area": int(mask.sum())} | score)  # fmt: skip
    coco = COCO()
    coco.dataset = {
        "images": [{"id": k, "height": 40, "width": 40} for k in range(12)],
        "categories": [{"id": 0}, {"id": 1}],
        "annotations": truths,
    }
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
        measure = COCOeval(coco, coco.loadRes(answers), "segm")
        for act in (measure.evaluate, measure.accumulate, measure.summarize):
            act()
    values = [metric.compute()[key] for key in ("mask_ap", "mask_ap50", "mask_ap75")]
    assert values == pytest.approx(measure.stats[:3].tolist(), abs=1e-6)
    assert 0.1 < values[0] < 0.9


def test_panoptic_quality_is_what_one_works_out_by_hand() -> None:
    metric = MaskMetric(2)
    truth = torch.zeros(2, 16, 16, dtype=torch.uint8)
    truth[0, 2:8, 2:8], truth[1, 9:15, 9:15] = 1, 1
    found = truth.clone().bool()
    found[1] = found[1].roll(2, 0)  # overlap 4/8
    labels, scores, ignore = torch.tensor([0, 1]), torch.tensor([0.9, 0.8]), torch.zeros(2, dtype=torch.bool)
    metric.update(
        {"masks": found, "labels": labels, "scores": scores}, {"masks": truth, "labels": labels, "ignore": ignore}, 0.5
    )
    values = metric.compute()
    # Class 0 is hit exactly; class 1 at 0.5, which is no hit; of the background 256 - 36 - 36 pixels 12 are taken, 12 given.
    assert values["panoptic_quality"] == pytest.approx((1 + 0 + (184 - 12) / (184 + 12)) / 3, abs=1e-6)


def test_mask_rcnn_learns_rebuilds_and_answers_in_the_pictures_pixels() -> None:
    torch.manual_seed(0)
    detector = partial(MaskRCNN, width=32, hidden=32, mask_width=32, strides=[4, 8])
    module = InstanceSegmentationModule(
        DataSpec(num_classes=2, label_names=["a", "b"], image_size=64), Backbone("test_resnet"), detector=detector
    )
    masks = torch.zeros(2, 64, 64, dtype=torch.uint8)
    masks[0, 10:30, 8:24], masks[1, 36:60, 30:58] = 1, 1
    image = torch.full((3, 64, 64), 200, dtype=torch.uint8)
    image[:, masks.bool().any(0)] = 20
    boxes = torch.tensor([[8.0, 10, 24, 30], [30, 36, 58, 60]])
    batch = {"image": image[None], "boxes": [boxes], "labels": [torch.tensor([0, 1])], "masks": [masks],
             "ignore": [torch.zeros(2, dtype=torch.bool)], "size": torch.tensor([[32, 64]])}  # fmt: skip
    module.train()
    optimizer, losses = torch.optim.AdamW(module.parameters(), 3e-3), []
    for _ in range(40):
        parts, _ = module.detector.losses(module(batch["image"]), batch)
        assert {"mask", "box", "class", "region"} <= set(parts)
        loss = torch.stack(list(parts.values())).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(parts["mask"].detach()))
    assert losses[-1] < 0.3 * losses[0]
    module.eval().threshold.fill_(0.05)
    twin = InstanceSegmentationModule.from_architecture(json.loads(json.dumps(module.architecture))).eval()
    twin.load_state_dict(module.state_dict())
    answer = twin.predict(batch)[0]
    assert answer == module.predict(batch)[0]
    assert answer["masks"]
    assert answer["masks"][0]["size"] == [32, 64]
    drawing = module.answers.draw(np.zeros((32, 64, 3), np.uint8), answer)
    assert drawing.any()
    assert module.answers.annotations(answer)[0]["category_id"] in (1, 2)
