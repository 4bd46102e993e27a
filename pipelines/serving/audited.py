"""Data-set findings with the help of a registered model: duplicates, doubtful labels, unusual files."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track

from datamodules import DataError, VisionDataModule
from datamodules.checking import inspect_images
from datamodules.decoded import ImageFiles
from datamodules.digests import digest_of
from datamodules.duplicates import grouped, near_pairs, oddities, thumbnail
from datamodules.labelled.sources import LabelledSource
from datamodules.loading import KeyedDataset, KeyedLoader
from datamodules.paths import Paths
from modules import ClassificationModule
from modules.measures.labels import doubts, held_out_probabilities
from modules.networks.features import extract
from pipelines.serving.model import VisionModel

EXAMPLES = 6  # of each way in which two classes are confused
LEAST = 2  # pictures of each way


@dataclass
class Finding:
    """A finding about one picture or file.

    Args:
        kind: what is found.
        path: the file; or split and number of a picture in memory.
        split: the split that it is in.
        label: its label, where it has one.
        group: which findings belong together, such as copies.
        looks_like: the class that it looks like, where its label is doubted.
        score: likeness of a copy, or probability of the label.
        detail: more, in words.
        place: number of the picture, -1 where there is none to show.
    """

    kind: str
    path: str
    split: str = ""
    label: str = ""
    group: int = 0
    looks_like: str = ""
    score: float | None = None
    detail: str = ""
    place: int = -1


class Audited:
    """The N pictures of a data set and a model's features of them.

    Args:
        data: all their splits are taken.
        model: the model, which has the classes of the data.

    Attributes:
        judged: whether pictures have labels that can be judged: one each, of a class.
        paths: where each is.
        splits: that each is in.
        labels: the number of its class, int64 N; zeros where labels are not judged.
        names: of the classes.
        images: the pictures as they are, an array or `ImageFiles`.
        table: what `inspect_images` says of them.
        features: the backbone's, float32 N×D.
        thumbnails: see `thumbnail`, uint8 N×24×24×C.

    Raises:
        DataError: the pictures are neither files nor in memory.
    """

    def __init__(self, data: VisionDataModule, model: VisionModel) -> None:
        self.judged, self.names = isinstance(model.module, ClassificationModule), model.module.label_names
        self.paths, self.splits = list[str](), list[str]()
        self.images: Any = None
        labels, arrays, found = list[NDArray[np.int64]](), list[NDArray[np.uint8]](), list[Paths]()
        sources: dict[str, Any] = data.sources
        for split, source in sources.items():
            files, images = getattr(source, "paths", None), getattr(source, "images", None)
            if files is not None:
                files = Paths.of(files)
                if not self.judged:  # pieces of one are one
                    files = files[~pd.Index(files.tolist()).duplicated()]
                found.append(files)
                own = files.tolist()
            elif isinstance(images, np.ndarray):
                arrays.append(images)
                own = [f"{split}/{k}" for k in range(len(images))]
            else:
                raise DataError(f"{data.title} generates its images on demand: there is nothing to audit.")
            self.paths += own
            self.splits += [split] * len(own)
            labels.append(source.labels if self.judged else np.zeros(len(own), np.int64))
        self.labels = np.concatenate(labels)
        if arrays:
            self.images = np.concatenate(arrays)
            self.table = pd.DataFrame({"digest": [digest_of(image.tobytes()) for image in self.images]})
            self.table[["height", "width", "bits", "frames"]] = [*self.images.shape[1:3], 8, 1]
        else:
            reading = model.preprocessing.reading
            whole = type(found[0]).joined(found)
            self.table = inspect_images(whole, reading=reading)
            digests, sizes = self.table["digest"].to_numpy(np.str_), self.table[["height", "width"]].to_numpy(np.int64)
            self.images = ImageFiles(whole, digests, sizes, reading)
        self.features, self.thumbnails = self._seen(data, model)

    def _seen(self, data: VisionDataModule, model: VisionModel) -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
        how = model.preprocessing
        if how.fit in ("pad", "native"):  # grey borders would make pictures alike, and those of a batch have one size
            how = replace(how, fit="crop", crop_pct=1.0)
        dataset = KeyedDataset(LabelledSource(self.images, self.labels), how.transform(), 0)
        loader = KeyedLoader(dataset, data.batch_size, training=False, seed=0, num_workers=data.num_workers or 0)
        thumbnails: list[NDArray[np.uint8]] = []

        def batches() -> Iterator[dict[str, Any]]:
            for batch in track(loader, "Looking at the images", len(loader), console=Console(stderr=True)):
                thumbnails.extend(thumbnail(image) for image in batch["image"].permute(0, 2, 3, 1).numpy())
                yield batch

        features, _ = extract(model.module.backbone, batches(), model.module.normalize)
        return features, np.stack(thumbnails)

    def _finding(self, kind: str, place: int, **more: Any) -> Finding:
        label = self.names[self.labels[place]] if self.judged else ""
        return Finding(kind, self.paths[place], self.splits[place], label, place=int(place), **more)

    def unusual(self) -> list[Finding]:
        """Files that differ from all others; see `oddities`."""
        found = enumerate(oddities(self.table, self.thumbnails))
        return [self._finding("unusual", place, detail=why) for place, why in found if why]

    def copies(self, likeness: float) -> tuple[list[Finding], NDArray[np.int64]]:
        """Exact and near duplicates.

        Args:
            likeness: from which on they are nearly the same; see `near_pairs`.

        Returns:
            Findings ``exact copy`` and ``near copy``; those first whose copies have several labels, then those in several splits.
            And the group of copies that each picture is in, int64 N.
        """
        _, first, which = np.unique(self.table["digest"].to_numpy(np.str_), return_index=True, return_inverse=True)
        near, alike = near_pairs(self.features[first], self.thumbnails[first], likeness)
        clusters = grouped(near, len(first))
        best = np.zeros(len(first))
        for side in near.T:
            np.maximum.at(best, side, alike)
        found = self._groups("exact copy", which, np.arange(len(which)), None)
        return found + self._groups("near copy", clusters, first, best), clusters[which]

    def _groups(
        self, kind: str, numbers: NDArray[Any], places: NDArray[Any], scores: NDArray[np.float64] | None
    ) -> list[Finding]:
        """Findings about groups of pictures that share a number."""
        order = numbers.argsort(kind="stable")
        parts = np.split(order, np.flatnonzero(np.diff(numbers[order])) + 1)
        groups = [part for part in parts if len(part) > 1]
        labels = self.labels.tolist()

        def rank(group: NDArray[Any]) -> tuple[bool, bool, float]:
            own = places[group].tolist()
            score = 0.0 if scores is None else float(scores[group].max())
            return len({labels[i] for i in own}) == 1, len({self.splits[i] for i in own}) == 1, -score

        found = []
        for number, group in enumerate(sorted(groups, key=rank), 1):
            one_label, one_split, _ = rank(group)
            said = ", ".join(["several labels"] * (not one_label) + ["several splits"] * (not one_split))
            for k in group:
                score = None if scores is None else float(scores[k])
                found.append(self._finding(kind, places[k], group=number, score=score, detail=said))
        return found

    def doubtful(self, groups: NDArray[np.int64]) -> tuple[list[Finding], float]:
        """Labels that a linear head on the model's features doubts, and pairs of classes that it confuses both ways;
        see `doubts`.

        Args:
            groups: copies of each other are in one, int64 N.

        Returns:
            Findings ``doubtful label`` and, for each pair of classes, some of the pictures as ``confused classes``; and the accuracy of the
            head on held-out pictures.
        """
        likely = held_out_probabilities(self.features, self.labels, groups, len(self.names))
        doubt = doubts(likely, self.labels)

        def told(kind: str, place: int, **more: Any) -> Finding:
            score = float(likely[place, self.labels[place]])
            return self._finding(kind, place, looks_like=self.names[doubt.likely[place]], score=score, **more)

        found = [told("doubtful label", place) for place in doubt.places]
        joint, own = doubt.joint, likely[np.arange(len(likely)), self.labels].argsort(kind="stable")
        ways = [(a, b) for a in range(len(joint)) for b in range(a) if min(joint[a, b], joint[b, a]) >= LEAST]
        ways.sort(key=lambda pair: -min(joint[pair], joint[pair[::-1]]))
        for number, (a, b) in enumerate(ways, 1):
            names = self.names[a], self.names[b]
            said = f"{joint[a, b]} of {names[0]} look like {names[1]}, {joint[b, a]} of {names[1]} like {names[0]}"
            for label, other in ((a, b), (b, a)):
                some = own[(self.labels[own] == label) & (doubt.likely[own] == other)][:EXAMPLES]
                found += [told("confused classes", place, group=number, detail=said) for place in some]
        return found, float((doubt.likely == self.labels).mean())
