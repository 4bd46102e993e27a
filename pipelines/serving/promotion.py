"""Versions of registered models side by side: listing, promotion, comparison."""

import math
import re
from collections import defaultdict

import mlflow
from mlflow.entities.model_registry import ModelVersion
from mlflow.tracking import MlflowClient

from pipelines.engine.terminal import say, table
from pipelines.serving.evaluation import evaluate
from pipelines.serving.registry import model_folder, named_versions, version_of
from pipelines.tracking.client import needed, reach


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
    candidate = version_of(name, version)
    key, new = _figure(candidate)
    holder = client.get_registered_model(name).aliases.get(alias)
    why = "there was none before"
    if holder is not None and str(holder) != str(candidate.version):
        champion = named_versions(name)[str(holder)]
        old = _figure(champion)[1]
        kept = f"Kept {name} version {champion.version} as {alias}: "
        why = f"{key} {new} against {old} of version {champion.version}"
        if force:
            why = f"forced; {why}"
            client.delete_model_version_tag(name, champion.version, claim)
        elif not _comparable(candidate, champion):
            return (
                f"{kept}version {candidate.version} was measured on other data, as where pictures were added since. To measure both on "
                f"the same: python -m pipelines.registry compare {name} {champion.version} {candidate.version}. To promote it anyway: "
                "--force true"
            )
        elif not _is_better(candidate, champion):
            return f"{kept}{why} is not better."
    client.set_model_version_tag(name, candidate.version, claim, why)
    best = candidate
    while True:  # until nobody else's claim is better than the holder's
        client.set_registered_model_alias(name, alias, best.version)
        claims = [v for v in named_versions(name).values() if claim in v.tags]
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

    Raises:
        ValueError: there is no such model, or no version has the alias.
    """
    client = MlflowClient()
    named_versions(name)
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
    versions = named_versions(name)
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

    versions = [version_of(name, given) for given in (first, second)]
    numbers = [version.version for version in versions]
    if len({version.tags.get("digest.test") for version in versions}) > 1:
        say(
            f"Version {numbers[1]} has another test split than version {numbers[0]}: it may have been trained on images that both are "
            "measured on here, which flatters its figures."
        )
    folders = [model_folder(f"models:/{name}/{number}") for number in numbers]
    one, two = evaluate(folders[0]), evaluate(folders[1], learned_from(*folders))
    return table(
        {"figure": key, first: one[key], second: two[key], "difference": f"{two[key] - one[key]:+.4f}"}
        for key in one
        if key in two
    )
