"""Loading is exact: a function of (seed, epoch, index). Settings are checked where they are given."""

import gc
import multiprocessing
import warnings
import weakref
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from datamodules import COCODetection, DataError, Digits8x8, DigitScenes, Glyphs, ImageFolder, Photographs
from datamodules.annotated.mixing import Mixing
from datamodules.cache import Cache
from datamodules.loading import KeyedLoader
from datamodules.options import Preprocessing


def batches(loader):
    return [(batch["image"].clone(), batch["label"].clone()) for batch in loader]


def same(a, b):
    return len(a) == len(b) and all(
        torch.equal(x, y) and torch.equal(i, j) for (x, i), (y, j) in zip(a, b, strict=True)
    )


def test_batches_do_not_depend_on_the_number_of_workers():
    alone, helped = (Digits8x8(batch_size=300, num_workers=n).train_dataloader() for n in (0, 2))
    assert same(batches(alone), batches(helped))


def test_workers_end_with_their_loader_and_with_the_trainers_command() -> None:
    """Those that the garbage collector has to end are waited for, five seconds each."""
    others = len(multiprocessing.active_children())
    data = Digits8x8(batch_size=300, num_workers=1)
    loader = data.train_dataloader()
    assert len(batches(loader)) == len(loader)
    assert len(multiprocessing.active_children()) == others + 1
    data.teardown("fit")
    assert len(multiprocessing.active_children()) == others
    assert len(batches(loader)) == len(loader)
    gone = weakref.ref(loader)
    gc.disable()
    try:
        del loader, data
        assert gone() is None
    finally:
        gc.enable()
    assert len(multiprocessing.active_children()) == others


def test_another_epoch_and_another_seed_give_other_batches():
    loader = Digits8x8(batch_size=300, num_workers=0).train_dataloader()
    first = batches(loader)
    assert same(first, batches(loader))
    loader.set_epoch(1)
    assert not same(first, batches(loader))
    assert not same(first, batches(Digits8x8(batch_size=300, num_workers=0, seed=1).train_dataloader()))


def test_a_loader_goes_on_in_mid_epoch_where_its_state_was_taken():
    loader = Digits8x8(batch_size=100, num_workers=0).train_dataloader()
    loader.set_epoch(3)
    whole = batches(loader)
    iterator = iter(loader)
    for _ in range(5):
        next(iterator)
    state = loader.state_dict()
    resumed = Digits8x8(batch_size=100, num_workers=2).train_dataloader()
    resumed.load_state_dict(state)
    resumed.set_epoch(3)
    assert same(batches(resumed), whole[5:])
    resumed.set_epoch(4)
    assert len(batches(resumed)) == len(whole)


@dataclass(kw_only=True, eq=False, repr=False)
class Uneven(Digits8x8):
    """Digits of three classes, of which there are 100, 25 and 4 to train on."""

    def load(self):
        sources = super().load()
        train = sources["train"]
        kept = [np.flatnonzero(train.labels == k)[:count] for k, count in enumerate((100, 25, 4))]
        return sources | {"train": train.subset(np.concatenate(kept))}


@pytest.mark.parametrize(("sampling", "shares"), [("balanced", [43, 43, 43]), ("sqrt", [76, 38, 15])])
def test_classes_are_drawn_equally_often_or_by_their_roots(sampling, shares):
    data = Uneven(sampling=sampling, batch_size=43, num_workers=0, augmentation="strong")
    loader = data.train_dataloader()
    labels = torch.cat([batch["label"] for batch in loader])
    assert torch.bincount(labels).tolist() == shares
    rare = torch.cat([batch["image"][batch["label"] == 2] for batch in loader])
    assert len(rare.unique(dim=0)) > 4  # one that is seen again is augmented anew
    own = np.concatenate([[index for index, _ in keys] for keys in list(loader.keys())])
    counts = np.bincount(own % 129, minlength=129)
    for label in range(3):
        assert np.ptp(counts[data.sources["train"].labels == label]) <= 1
    assert torch.bincount(torch.cat([batch["label"] for batch in data.plain_loader("train")])).tolist() == [100, 25, 4]


def test_a_balanced_epoch_goes_on_in_its_middle_and_is_shared_by_processes():
    data = Uneven(sampling="balanced", batch_size=10, num_workers=0, augmentation="light")
    loader = data.train_dataloader()
    loader.set_epoch(2)
    whole = batches(loader)
    resumed = Uneven(sampling="balanced", batch_size=10, num_workers=0, augmentation="light").train_dataloader()
    resumed.load_state_dict({"epoch": 2, "batches_done": 7})
    assert same(batches(resumed), whole[7:])
    halves = [list(KeyedLoader(loader.dataset, 5, True, 0, rank, 2).keys()) for rank in range(2)]
    loader.set_epoch(0)
    for one, left, right in zip(loader.keys(), *halves, strict=True):
        assert (one[::2], one[1::2]) == (left, right)


@pytest.mark.parametrize(
    ("weighting", "weights"),
    [("none", None), ("balanced", [43 / 100, 43 / 25, 43 / 4]), ([3.0, 1, 0] + 7 * [1], [3.0, 1, 0] + 7 * [1])],
)
def test_weights_of_classes_go_by_their_numbers_or_are_given(weighting, weights):
    found = Uneven(class_weighting=weighting).class_weights
    assert found is None if weights is None else found[: len(weights)] == pytest.approx(weights)
    root = Uneven(class_weighting="sqrt").class_weights
    assert root[0] * 10 == pytest.approx(root[1] * 5) == pytest.approx(root[2] * 2)
    assert np.dot(root[:3], [100, 25, 4]) == pytest.approx(129)


def test_a_rare_class_is_told_with_what_helps_unless_that_is_set():
    with pytest.warns(
        UserWarning, match=r"Class '2' has 4 images to train on, '0' has 100: .* --data.sampling balanced"
    ):
        Uneven().setup("fit")
    for data in (Uneven(sampling="sqrt"), Uneven(class_weighting="sqrt"), Digits8x8()):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            data.setup("fit")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"class_weighting": [1.0, 2.0]}, r"must have 10 numbers, .* in this order: 0, 1, 2"),
        ({"class_weighting": [-1.0] * 10}, r"0 or more each"),
        ({"class_weighting": "sqrt", "sampling": "balanced"}, "twice: choose one"),
    ],
)
def test_weights_and_sampling_that_cannot_be_are_refused(options, said):
    with pytest.raises(DataError, match=said):
        _ = Digits8x8(**options).class_weights


def test_null_takes_the_classs_own_value_as_recipes_and_models_of_before_say():
    data = Digits8x8(image_size=None, flip=None, crop_pct=None, num_workers=None)
    assert (data.image_size, data.flip, data.crop_pct) == (8, False, 1.0)
    assert data.num_workers >= 0
    assert ImageFolder("x", image_size=None, crop_pct=None).crop_pct == 0.875
    assert DigitScenes(scene_size=96, mixing=None).image_size == 96
    assert COCODetection("x", tile=48, mixing={"mosaic": 0.5}).image_size == 48


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (lambda: Digits8x8(batch_size=0), "--data.batch_size must be at least 1, not 0"),
        (lambda: Digits8x8(crop_pct=0.0), "--data.crop_pct must be above 0, not 0.0"),
        (lambda: Glyphs(pictures_per_person=1), "--data.pictures_per_person must be at least 2, not 1"),
        (lambda: DigitScenes(scene_size=16), "--data.scene_size must be at least 32, not 16"),
        (lambda: Mixing(mosaic=2), "--data.mixing.mosaic must be at most 1, not 2"),
    ],
)
def test_a_number_out_of_its_range_is_refused_where_it_is_given(wrong, said):
    with pytest.raises(DataError, match=said):
        wrong()


def test_how_pictures_are_prepared_is_written_as_models_of_before_have_it():
    forms = {
        Digits8x8(): {"image_size": 8, "in_chans": 1, "crop_pct": 1.0},
        Glyphs(fit="extend"): {"image_size": 32, "in_chans": 1, "fit": "extend", "crop_pct": 1.0},
        COCODetection("x", tile=64): {"image_size": 64, "in_chans": 3, "fit": "pad", "tile": 64},
        Photographs(): {"image_size": 96, "in_chans": 3, "fit": "native"},
    }
    for data, form in forms.items():
        assert data.preprocessing.as_data() == form
        assert Preprocessing(**form) == data.preprocessing


def test_a_cache_keeps_what_fits_and_lets_the_oldest_go():
    made = []

    def make(number):
        made.append(number)
        return {"image": np.zeros(100, np.uint8)}

    cache = Cache(250)
    for number in (1, 2, 1, 2, 3, 3, 2, 1):
        cache.get(number, make)
    assert made == [1, 2, 3, 1]
