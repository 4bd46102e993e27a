"""What the benchmarks say of what they measure, and that the one for GPUs runs, smaller, without one."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch.autograd import DeviceType

from benchmarks import COUNTS, Row, gpu, table, workshop


def clocks(*seconds: float) -> list[Any]:
    """Rounds in which the processor took so long, and twice the time passed; the other way round where time counts."""
    return [np.array([s, 2 * s] if COUNTS == 0 else [2 * s, s]) for s in seconds]


def test_ratios_are_above_one_where_fovea_is_the_faster() -> None:
    head, _, row = table([Row("reading", 100, clocks(1, 2, 1), "a peer 1.0", clocks(2, 2, 4), "≥ 3")]).splitlines()
    assert head.count("|") == row.count("|")
    # 100 and 50 images a second; rounds of 2, 1 and 4 times, each with its neighbour in time
    assert [cell.strip() for cell in row.strip("|").split("|")] == [
        "reading", "a peer 1.0", "100", "50", "**2.00**", "1.00 … 4.00", "2.00", "≥ 3", ""
    ]  # fmt: skip


def test_a_row_without_a_peer_has_no_ratio() -> None:
    *_, row = table([Row("a recipe", 3000, clocks(2), wanted="94 %", note="94.1 %")]).splitlines()
    assert [cell.strip() for cell in row.strip("|").split("|")] == [
        "a recipe",
        "",
        "1,500",
        "",
        "",
        "",
        "",
        "94 %",
        "94.1 %",
    ]


def _fail(folder: Path) -> None:
    assert Path.cwd().samefile(folder)
    assert gpu.os.environ["MLFLOW_TRACKING_URI"] != "kept"
    raise ZeroDivisionError


def test_a_measurement_leaves_the_folder_and_the_settings_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "kept")
    before = Path.cwd()
    with pytest.raises(ZeroDivisionError), workshop() as folder:
        _fail(folder)
    assert Path.cwd() == before
    assert gpu.os.environ["MLFLOW_TRACKING_URI"] == "kept"


def test_a_device_is_busy_while_anything_runs_on_it() -> None:
    kind = DeviceType.CUDA if gpu.CUDA else DeviceType.CPU
    spans = [(0, 10), (5, 8), (6, 20), (30, 40)]  # microseconds; within, across and after each other
    events = [SimpleNamespace(device_type=kind, time_range=SimpleNamespace(start=s, end=e)) for s, e in spans]
    events.append(SimpleNamespace(device_type=DeviceType.IDEEP, time_range=SimpleNamespace(start=50, end=90)))
    assert gpu.busy(SimpleNamespace(events=lambda: events)) == pytest.approx(30e-6)


@pytest.mark.parametrize(("name", "published"), [("resnet18", 1.82), ("convnext_atto", 0.55)])
def test_operations_of_a_step_are_those_that_are_published(name: str, published: float) -> None:
    # timm's 10⁹ multiplications and additions of a forward pass at 224 pixels; the second has depthwise convolutions
    assert gpu.operations(name, 224) == pytest.approx(6e9 * published, rel=0.02)


def test_what_only_a_gpu_can_tell_is_measured_smaller_without_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    given = "--networks lenet5 --side 28 --batch_size 8 --batches 3 --workers 0 --no-compile"
    held, read = gpu.training("lenet5", gpu.arguments(given.split()), tmp_path, 1e9)
    for row in (held, read):
        assert len(row.ours) == len(row.theirs) == 2  # epochs; the first does not count
        assert all((one > 0).all() for one in (*row.ours, *row.theirs))
        idle = float(row.note.split("idle ")[1].split("%")[0]) / 100
        assert 0 <= idle < 1
    assert float(held.note.split("%")[0]) > 0


def test_images_that_lie_on_the_device_are_those_of_the_places() -> None:
    data = gpu.Noise(image_size=12, count=32, batch_size=8, num_workers=0, augmentation="none")
    source = data.sources["train"]
    batch = next(iter(data.loader("train")))
    data.trainer = SimpleNamespace(strategy=SimpleNamespace(root_device=torch.device("cpu")))  # type: ignore[assignment]
    places = batch["place"].numpy()
    got = data.on_after_batch_transfer(dict(batch), 0)
    assert np.array_equal(got["image"].permute(0, 2, 3, 1).numpy(), source.images[places])
    assert np.array_equal(got["label"].numpy(), source.labels[places])
