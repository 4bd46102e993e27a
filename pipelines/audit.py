"""Finds problems in a data set: ``python -m pipelines.audit models:/NAME@ALIAS --data NAME --data.root FOLDER``."""

import csv
import io
import os
from collections.abc import Sequence
from dataclasses import fields, replace
from html import escape
from itertools import groupby
from pathlib import Path
from typing import Any

from datamodules import ClassificationDataModule, DataError, VisionDataModule
from datamodules.classes import adopt_classes
from modules import ClassificationModule, DetectionModule, MultiLabelModule, SegmentationModule
from modules.pictures.sheets import as_address, as_rgb, resized
from pipelines.engine.command import command
from pipelines.engine.disk import write_text
from pipelines.engine.terminal import print_table
from pipelines.serving.audited import Audited, Finding
from pipelines.serving.model import VisionModel
from pipelines.serving.subject import Subject

TASKS = (ClassificationModule, MultiLabelModule, DetectionModule, SegmentationModule)  # that have classes
LENIENT = {"on_bad_file": "skip_all", "on_bad_box": "drop"}  # what is wrong is listed
SHOWN = 60  # pictures of a kind of finding
SIDE = 112  # of these in pixels
KINDS = {
    "unreadable": "Files that cannot be read, and annotations that cannot be used. They are left out of everything below.",
    "unusual": "Files unlike the others, and files of which only a part is used: the first of several frames, the upper 8 of 16 bits.",
    "exact copy": "The same content more than once. Copies in several splits flatter the test figures; of copies with different labels, "
    "all but one are wrong.",
    "near copy": "Neighbours by the model's features whose thumbnails correlate, mirrored or not: the same image in another size, "
    "compression, brightness or crop, or the next one of a series. The number is the highest correlation with one of the group.",
    "doubtful label": "The most doubtful come first. The number is the probability of the label according to a linear head on the model's "
    "features, fitted to the images of the other four of five folds. A doubt is not a proof.",
    "confused classes": "Pairs of classes that are taken for each other in both directions, with the clearest examples. Their definitions "
    "may overlap.",
}
COPIES = tuple(KINDS)[:4]  # what is found where labels are not judged
STYLE = f"""body{{font:15px/1.5 system-ui,sans-serif;max-width:1120px;margin:2em auto;padding:0 1em;color:#222}}
p{{max-width:52em}}h2{{margin:2em 0 0}}.row{{display:inline-block;vertical-align:top;margin:8px 20px 8px 0;
padding-left:8px;border-left:3px solid #ccc}}.row div{{font-size:13px;color:#b00}}
figure{{display:inline-block;vertical-align:top;margin:0 8px 10px 0;width:{SIDE}px;font-size:12px;line-height:1.35;
overflow-wrap:anywhere}}img{{display:block;width:{SIDE}px;height:{SIDE}px;image-rendering:pixelated}}"""


def audit(
    model: str,
    *,
    data: VisionDataModule | None = None,
    likeness: float = 0.95,
    output: Path | None = None,
    experiment: str | None = None,
    device: str = "auto",
) -> dict[str, float]:
    """Finds duplicates, probably wrong labels, confused classes and unusual files in a data set.

    Writes ``report.html``, with thumbnails, and ``findings.csv``, and logs both in a run of its own that names the model. Labels are
    judged where each image has one class; for other tasks only copies and files are looked at.

    Args:
        model: ``models:/name@alias`` or ``models:/name/version``, trained on the classes of the data.
        data: the data set to audit, all splits; by default the model's training data.
        likeness: correlation from which on two images count as near copies; use more, such as 0.99, where all
            images are much alike.
        output: folder for the report; by default a new one in ``outputs/audit``.
        experiment: MLflow experiment; by default the task's name.
        device: where the model runs, such as ``cuda``; ``auto`` is the GPU if there is one.

    Returns:
        The metrics by name.

    Raises:
        ValueError: there is no such model, or it does not fit the data.
    """
    if not 0 < likeness <= 1:
        raise ValueError(f"--likeness must be above 0 and at most 1, not {likeness}.")
    subject = Subject.find(model)
    asked = VisionModel().load(subject.folder, device)
    clips = asked.preprocessing.frames is not None
    if clips or not isinstance(asked.module, TASKS):
        why = "learns from clips, and only images are audited" if clips else "has no classes to audit data by"
        raise ValueError(
            f"{subject.address} is a {type(asked.module).__name__}, which {why}: give a model of classification, multi_label, "
            "detection, segmentation or instance_segmentation."
        )
    judged = isinstance(asked.module, ClassificationModule)
    data = subject.prepare(data)
    if not hasattr(data, "label_names") or judged != isinstance(data, ClassificationDataModule):
        raise DataError(f"{data.title} is not data of {subject.about['task']}, which {subject.address} has learned.")
    lenient: dict[str, Any] = {one.name: LENIENT[one.name] for one in fields(data) if one.init and one.name in LENIENT}
    data = replace(data, **lenient)
    adopt_classes(data, asked.module.label_names)
    audited = Audited(data, asked)
    copies, groups = audited.copies(likeness)
    found = [Finding("unreadable", path, detail=why) for path, why in data.bad_files.items()]
    found += [*audited.unusual(), *copies]
    figures = {"copies in several splits": float(sum("several splits" in one.detail for one in copies))}
    if judged:
        labels, figures["held-out accuracy"] = audited.doubtful(groups)
        found += labels
    for kind in KINDS if judged else COPIES:
        figures[kind] = float(_count(kind, found))
    with subject.run("audit", data, output, experiment) as logger:
        logger.log_metrics({f"audit/{key.replace(' ', '_')}": value for key, value in figures.items()})
        write_text(logger.output / "report.html", _report(f"{data.title} by {subject.address}", audited, found))
        write_text(logger.output / "findings.csv", _table(found))
        for name in ("report.html", "findings.csv"):
            logger.log_file(logger.output / name, "")
    rows = {key: f"{value:g}" for key, value in figures.items()}
    rows |= {"report": str(logger.output / "report.html"), "run": logger.address()}
    print_table(f"{data.title} by {subject.address}, {len(audited.paths):,} images", rows)
    return figures


def _count(kind: str, found: Sequence[Finding]) -> int:
    """Number of findings of a kind; for confused classes, the number of pairs."""
    own = [one.group for one in found if one.kind == kind]
    return len(set(own)) if kind == "confused classes" else len(own)


def _table(found: Sequence[Finding]) -> str:
    """All findings as CSV."""
    columns = [field.name for field in fields(Finding) if field.name != "place"]
    writer = csv.writer(text := io.StringIO(), lineterminator="\n")
    writer.writerows([columns, *([getattr(one, name) for name in columns] for one in found)])
    return _text(text.getvalue())


def _text(text: str) -> str:
    """Replaces whatever is not valid UTF-8, which file names may contain."""
    return os.fsencode(text).decode(errors="replace")


def _report(title: str, audited: Audited, found: Sequence[Finding]) -> str:
    """The findings as one self-contained HTML page."""
    splits = ", ".join(f"{audited.splits.count(split):,} {split}" for split in dict.fromkeys(audited.splits))
    judged = "Labels were judged too." if audited.judged else (
        "Only copies and files were looked at. Labels, boxes and masks are not judged, except where each image has one class."
    )  # fmt: skip
    page = [f"<!doctype html><meta charset=utf-8><title>{escape(title)}</title><style>{STYLE}</style>"]
    page.append(f"<h1>{escape(title)}</h1><p>{len(audited.paths):,} images ({splits}). {judged}</p>")
    for kind in KINDS if audited.judged else COPIES:
        own = [one for one in found if one.kind == kind]
        page.append(f"<h2>{kind.capitalize()}: {_count(kind, found):,}</h2><p>{KINDS[kind]}</p><div>")
        for _, group in groupby(own[:SHOWN], key=lambda one: one.group):
            some = list(group)
            shared = some[0].detail if some[0].group else ""
            figures = "".join(_figure(one, audited) for one in some)
            page.append(f'<div class="row"><div>{escape(shared)}</div>{figures}</div>' if some[0].group else figures)
        page.append("</div>" + f"<p>The first {SHOWN} are shown; findings.csv has all.</p>" * (len(own) > SHOWN))
    return _text("".join(page))


def _figure(one: Finding, audited: Audited) -> str:
    """A finding with its picture."""
    image = "" if one.place < 0 else as_address(resized(as_rgb(audited.images[one.place]), SIDE, SIDE), "webp")
    words = [", ".join(filter(None, (one.label, one.split))), one.looks_like and f"looks like {one.looks_like}"]
    words += ["" if one.score is None else f"{one.score:.2f}", "" if one.group else one.detail]
    lines = "".join(f"{escape(word)}<br>" for word in words if word)
    path, name = Path(one.path), escape(Path(one.path).name)
    link = f'<a href="{path.absolute().as_uri()}" title="{escape(one.path)}">{name}</a>' if path.exists() else name
    return f"<figure>{image and f'<img src={image}>'}{lines}{link}</figure>"


if __name__ == "__main__":
    command(audit)
