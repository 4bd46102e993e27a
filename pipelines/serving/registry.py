"""The model registry: versions by number or alias, addresses, and loading."""

import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import mlflow
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from pipelines.engine.disk import disk_error
from pipelines.tracking.client import needed, reach
from pipelines.tracking.redaction import redact

if TYPE_CHECKING:
    from modules import VisionModule
    from pipelines.serving.model import VisionModel

M = TypeVar("M", bound="VisionModule")


def versions_of(name: str) -> list[ModelVersion]:
    """All versions of a registered model; empty if it does not exist."""
    if '"' in name:  # which `registration.check_name` lets nobody use
        return []
    quote = '"' if "'" in name else "'"
    return list(mlflow.search_model_versions(filter_string=f"name={quote}{name}{quote}"))


def named_versions(name: str) -> dict[str, ModelVersion]:
    """All versions of a registered model by number.

    Raises:
        ValueError: there is no such model.
    """
    with needed():
        reach()
        versions = {str(v.version): v for v in versions_of(name)}
        if not versions:
            known = ", ".join(model.name for model in mlflow.search_registered_models()) or "none"
            raise ValueError(
                f"No model {name!r} is registered in {mlflow.get_registry_uri()}; registered are: {known}."
            )
        return versions


def version_of(name: str, version: str | None) -> ModelVersion:
    """A version by number or alias, which may begin with @; by default, or as ``latest``, the newest."""
    versions = named_versions(name)
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
    found = version_of(name, f"{sign.strip('/')}{version}" or None)
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
    return f"models:/{name}/{version_of(name, f'@{alias}').version}" if at else address


def download(address: str, folder: str) -> str:
    """Downloads a registered model's ``model.safetensors`` and ``architecture.yaml`` to a folder.

    Args:
        address: ``models:/name@alias`` or ``models:/name/version``.
        folder: output folder; it must not exist yet.

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
