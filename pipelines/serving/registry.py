"""The model registry: look up, promote, compare, load."""

import math
import re
import shutil
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import mlflow
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from modules.ranges import Mirroring
from pipelines.engine.disk import disk_error
from pipelines.engine.terminal import table
from pipelines.tracking.client import needed, reach
from pipelines.tracking.redaction import redact

if TYPE_CHECKING:
    from datamodules import VisionDataModule
    from modules import VisionModule
    from pipelines.serving.model import VisionModel

M = TypeVar("M", bound="VisionModule")


def versions_of(name: str) -> list[ModelVersion]:
    """All versions of a registered model; empty if it does not exist."""
    if '"' in name:  # which `registration.check_name` lets nobody use
        return []
    quote = '"' if "'" in name else "'"
    return list(mlflow.search_model_versions(filter_string=f"name={quote}{name}{quote}"))


def _versions(name: str) -> dict[str, ModelVersion]:
    with needed():
        reach()
        versions = {str(v.version): v for v in versions_of(name)}
        if not versions:
            known = ", ".join(model.name for model in mlflow.search_registered_models()) or "none"
            raise ValueError(
                f"No model {name!r} is registered in {mlflow.get_registry_uri()}; registered are: {known}."
            )
        return versions


def _version(name: str, version: str | None) -> ModelVersion:
    """A version by number or alias, which may begin with @; by default, or as ``latest``, the newest."""
    versions = _versions(name)
    aliases = {alias: str(number) for alias, number in MlflowClient().get_registered_model(name).aliases.items()}
    given = str(version or "latest")
    if given.lower().removeprefix("@") == "latest":
        number = max(versions, key=int)
    else:
        number = given if given.isdigit() else aliases.get(given.removeprefix("@"), "")  # `@2` is an alias
    if number not in versions:
        known = ", ".join([*sorted(versions, key=int), *aliases])
        if given.isdigit():
            raise ValueError(f"{name} has no version {given}; it has {known}.")
        alias = given.removeprefix("@")
        way = f"promote one (python -m pipelines.registry promote {name}), or " if alias == "champion" else ""
        raise ValueError(
            f"No version of {name} is called {alias}; it has {known}: {way}ask for the newest, models:/{name}@latest."
        )
    return versions[number]


def _figure(version: ModelVersion) -> tuple[str, float]:
    """Name and value of the monitored metric on the test split, or on the validation split if there was no test."""
    monitor = version.tags.get("monitor", "").replace("/", ".")
    for key in (monitor.replace("val.", "test."), monitor):
        if key in version.tags:
            return key, float(version.tags[key])
    return monitor, float("nan")


def _comparable(one: ModelVersion, other: ModelVersion) -> bool:
    """Whether two versions have the same metric on the same split or the same data, whatever they were trained on."""
    key, whole = _figure(one)[0], [version.tags.get("data_digest", "") for version in (one, other)]
    split = [version.tags.get(f"digest.{key.partition('.')[0]}") for version in (one, other)]
    digests = [own or all_of_it for own, all_of_it in zip(split, whole, strict=True)]
    return key == _figure(other)[0] and (digests[0] == digests[1] or whole[0] == whole[1] != "")


def promote(name: str, version: str | None = None, alias: str = "champion", force: bool = False) -> str:
    """Gives a version an alias if it beats the version that holds it.

    Compared is the monitored metric, which only means something where both were measured on the same split, whatever they
    learned from; a version whose figure is not a number is beaten by any that has one. Of two who promote at the same time, the better one wins: each writes its claim before it takes the alias, and looks again after.

    Args:
        name: the registered model.
        version: its version; the newest by default.
        alias: the alias.
        force: promote whatever the metrics are.

    Returns:
        A summary with the reason.

    Raises:
        ValueError: there is no such model, or MLflow keeps no such alias.
    """
    if not re.fullmatch(r"[\w-]{1,255}", alias) or re.fullmatch(r"v?\d+|latest", alias, re.IGNORECASE):
        raise ValueError(
            f"--alias {alias!r} cannot be an alias: use letters, digits, - and _, but neither `latest` nor a number, "
            "which means a version."
        )
    client, claim = MlflowClient(), f"claim.{alias}"
    candidate = _version(name, version)
    key, new = _figure(candidate)
    holder = client.get_registered_model(name).aliases.get(alias)
    why = "there was none before"
    if holder is not None and str(holder) != str(candidate.version):
        champion = _versions(name)[str(holder)]
        old = _figure(champion)[1]
        kept = f"Kept {name} version {champion.version} as {alias}: "
        why = f"{key} {new} against {old} of version {champion.version}"
        if force:
            why = f"forced; {why}"
            client.delete_model_version_tag(name, champion.version, claim)
        elif not _comparable(candidate, champion):
            return f"{kept}version {candidate.version} was measured on other data. To promote it anyway: --force true"
        elif not _is_better(candidate, champion):
            return f"{kept}{why} is not better."
    client.set_model_version_tag(name, candidate.version, claim, why)
    best = candidate
    while True:  # until nobody else's claim is better than the holder's
        client.set_registered_model_alias(name, alias, best.version)
        claims = [v for v in _versions(name).values() if claim in v.tags]
        better = [v for v in claims if _is_better(v, best)]
        if not better or force:
            break
        best = max(better, key=_rank)
    for loser in claims:
        if loser.version != best.version:
            client.delete_model_version_tag(name, loser.version, claim)
    if best.version != candidate.version:
        return f"Kept {name} version {best.version} as {alias}: it was promoted at the same time, and is better."
    client.set_model_version_tag(name, candidate.version, f"promoted.{alias}", why)
    return f"{name} version {candidate.version} is {alias}: {why}."


def _rank(version: ModelVersion) -> float:
    """Sort key, larger is better."""
    value = _figure(version)[1]
    if math.isnan(value):
        return -math.inf
    return value if version.tags.get("mode") == "max" else -value


def _is_better(one: ModelVersion, other: ModelVersion) -> bool:
    return _rank(one) > _rank(other)


def demote(name: str, alias: str = "champion") -> str:
    """Removes an alias.

    Args:
        name: the registered model.
        alias: the alias.

    Returns:
        A summary.

    Raises:
        ValueError: there is no such model, or no version has the alias.
    """
    client = MlflowClient()
    _versions(name)
    holder = client.get_registered_model(name).aliases.get(alias)
    if holder is None:
        raise ValueError(f"No version of {name} is {alias}.")
    client.delete_registered_model_alias(name, alias)
    client.delete_model_version_tag(name, str(holder), f"claim.{alias}")
    return f"{name} version {holder} is no longer {alias}."


def list_models() -> str:
    """Lists the registered models.

    Returns:
        A table: name, task, versions, aliases, and the figure of the newest version.
    """
    rows, known = [], defaultdict[str, list[ModelVersion]](list)
    with needed():
        reach()
        models = mlflow.search_registered_models()  # all of them; the client's own search gives a page
        for version in mlflow.search_model_versions():
            known[version.name].append(version)
    for model in models:
        if versions := known[model.name]:
            newest = max(versions, key=lambda version: int(version.version))
            row = {
                "name": model.name,
                "task": newest.tags.get("task", ""),
                "versions": str(len(versions)),
                "aliases": ", ".join(f"{alias}: {number}" for alias, number in model.aliases.items()),
                "newest": "{} {:.4f}".format(*_figure(newest)),
            }
            rows.append(row)
    return table(rows) or "No model is registered yet."


def show(name: str) -> str:
    """Shows the versions of a registered model.

    Args:
        name: the registered model.

    Returns:
        A table: version, aliases, data, run, metrics.

    Raises:
        ValueError: there is no such model.
    """
    versions = _versions(name)
    aliases = MlflowClient().get_registered_model(name).aliases
    rows = []
    for number in sorted(versions, key=int):
        tags = versions[number].tags
        row = {
            "version": number,
            "aliases": ", ".join(alias for alias, given in aliases.items() if str(given) == number),
            "data": tags.get("data", ""),
            "run": versions[number].run_id,
            "figures": "  ".join(f"{key} {value}" for key, value in sorted(tags.items()) if key.startswith("test.")),
        }
        rows.append(row)
    return table(rows)


def evaluate(
    folder: Path, data: "VisionDataModule | None" = None, tta: Mirroring = "none", **options: Any
) -> dict[str, float]:
    """Evaluates a saved model on the test split of its training data.

    Args:
        folder: a folder that `save_model` wrote.
        data: a data set other than the training data.
        tta: see `modules.views.Views`.
        options: options of Lightning's trainer, such as ``logger``.

    Returns:
        The metrics by name.

    Raises:
        ValueError: the model does not state its training data, or the data are of another task.
    """
    from pipelines.serving.store import learned_from

    data = data or learned_from(folder, folder)
    return measured(fitted_to(folder, data, tta), data, **options)


def fitted_to(folder: Path, data: "VisionDataModule", tta: Mirroring = "none") -> "VisionModule":
    """A saved model to be evaluated on a data set, whose classes it adopts; see `evaluate`."""
    from datamodules.classes import adopt_classes
    from modules.checkpoints import classes_of
    from pipelines.serving.store import lacking_in, load_model

    module, _ = load_model(folder)
    module.views.choose(tta)
    if lacking := lacking_in(data, module):
        raise ValueError(
            f"{data.title} does not fit a {type(module).__name__}: its samples have no {lacking}. Give data of the task that "
            "the model has learned."
        )
    if names := classes_of(module.architecture):
        adopt_classes(data, names)
    return module


def measured(module: "VisionModule", data: "VisionDataModule", **options: Any) -> dict[str, float]:
    """Metrics of a module on the test split; see `evaluate`."""
    import lightning as L

    quiet: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = L.Trainer(**quiet | options, use_distributed_sampler=False)
    (figures,) = trainer.test(module, datamodule=data, verbose=False)
    return dict(figures)


def compare(name: str, first: str, second: str) -> str:
    """Evaluates two versions of a registered model on the test split of the first one's data, preprocessed for each as
    it requires.

    Args:
        name: the registered model.
        first: a version or an alias.
        second: another version or alias.

    Returns:
        A table: metric, first, second, difference.

    Raises:
        ValueError: there is no such version, or the second cannot be evaluated on the data of the first.
    """
    from pipelines.serving.store import learned_from

    numbers = [_version(name, given).version for given in (first, second)]
    folders = [model_folder(f"models:/{name}/{number}") for number in numbers]
    one, two = evaluate(folders[0]), evaluate(folders[1], learned_from(*folders))
    return table(
        {"figure": key, first: one[key], second: two[key], "difference": f"{two[key] - one[key]:+.4f}"}
        for key in one
        if key in two
    )


@needed()
def model_folder(address: str) -> Path:
    """Local copy of a registered model's folder, as `save_model` wrote it.

    Raises:
        ValueError: there is no such model, or it was not registered by Fovea.
    """
    reach()
    try:
        folder = Path(mlflow.artifacts.download_artifacts(address))
    except mlflow.MlflowException as error:
        check(address)
        raise ValueError(
            f"{address} is registered in {redact(mlflow.get_registry_uri())}, but its files cannot be had ({error.message}): restore "
            "the store of artifacts, such as the folder mlruns, or register the model again."
        ) from None
    for file in folder.rglob("architecture.yaml"):
        return file.parent
    raise ValueError(f"{address} was not registered by Fovea: it lacks architecture.yaml.")


def check(address: str) -> None:
    """Checks that an address is that of a registered model.

    Raises:
        ValueError: there is no such model, alias or version, or it is written in another way.
    """
    if address[:1] in "/." or not address.removeprefix("models:/"):
        raise ValueError(
            f"{address!r} is not the address of a registered model: give models:/NAME@ALIAS or models:/NAME/VERSION."
        )
    parts = re.fullmatch(r"(?:models:/)?([^/@]*)([/@]?)(.*)", address, re.DOTALL)
    assert parts
    name, sign, version = parts.groups()
    found = _version(name, f"{sign.strip('/')}{version}" or None)
    if not (address.startswith("models:/") and version):
        raise ValueError(
            f"{address} is not the address of a registered model: give models:/{name}/{found.version}, or "
            f"models:/{name}@ALIAS."
        )


def pinned(address: str) -> str:
    """Resolves an alias or ``latest`` to ``models:/name/version``; other addresses are returned unchanged.

    Raises:
        ValueError: there is no such model or alias.
    """
    if address.lower().endswith("/latest"):
        address = f"{address[: -len('/latest')]}@latest"
    name, at, alias = address.removeprefix("models:/").rpartition("@")
    return f"models:/{name}/{_version(name, f'@{alias}').version}" if at else address


def download(address: str, folder: str) -> str:
    """Downloads a registered model's ``model.safetensors`` and ``architecture.yaml`` to a folder.

    Args:
        address: ``models:/name@alias`` or ``models:/name/version``.
        folder: output folder; it must not exist yet.

    Returns:
        A summary.

    Raises:
        ValueError: there is no such model, or the folder exists.
    """
    if Path(folder).exists():
        raise ValueError(f"{Path(folder).resolve()} already exists: name a new folder.")
    source = model_folder(address)
    try:
        shutil.copytree(source, folder)
    except OSError as error:
        shutil.rmtree(folder, ignore_errors=True)  # rather none than a part
        raise ValueError(str(disk_error(error, folder) or error)) from None
    return f"{pinned(address)} is in {folder}; --start {folder} starts another training from it."


def add_files(address: str, files: Sequence[Path], folder: str) -> str:
    """Adds files to the run that trained a registered model.

    Args:
        address: ``models:/name@alias`` or ``models:/name/version``.
        files: paths; those that exist are added.
        folder: folder among the run's artifacts.

    Returns:
        Where they are, or why they could not be added; results are not lost with the tracking server.
    """
    try:
        run_id = mlflow.models.get_model_info(address).run_id
        for file in files:
            if file.exists():
                MlflowClient().log_artifact(run_id, str(file), folder)
    except (MlflowException, OSError) as error:
        return f"the files could not be added to the model's run: {error}"
    return f"they are in run {run_id} too, folder {folder}"


def load(address: str, device: str = "cpu") -> Any:
    """Loads a registered model from its data alone.

    Unlike ``mlflow.pyfunc.load_model``, it runs none of the code that a registered model carries, and reads no pickle.

    Args:
        address: ``models:/name@alias`` or ``models:/name/version``.
        device: where it runs; ``auto`` is the GPU if there is one.

    Returns:
        Its `pipelines.serving.model.VisionModel`, whose ``predict(None, images)`` takes paths, bytes, arrays and pictures.

    Raises:
        ValueError: there is no such model or device.
    """
    from pipelines.serving.model import VisionModel

    return VisionModel().load(model_folder(address), device)


def load_as(kind: type[M], address: str, otherwise: str, device: str = "cpu") -> "tuple[VisionModel, M]":
    """Loads a registered model of a given kind; see `load`.

    Args:
        kind: class of its module.
        address: ``models:/name@alias`` or ``models:/name/version``.
        otherwise: end of the message about a model of another kind, such as ``, which embeds no faces.``
        device: where it runs; ``auto`` is the GPU if there is one.

    Returns:
        The model and its module.

    Raises:
        ValueError: there is no such model or device, or it is of another kind.
    """
    answering = load(address, device)
    if not isinstance(answering.module, kind):
        raise ValueError(f"{address} is a {type(answering.module).__name__}{otherwise}")
    return answering, answering.module
