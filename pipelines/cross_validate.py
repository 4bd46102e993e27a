"""k-fold cross-validation of a recipe: ``python -m pipelines.cross_validate RECIPE.yaml --folds 5``."""

import json
import math
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import yaml
from mlflow.tracking import MlflowClient

from pipelines.engine.children import ChildRun, check_title, new_parent, resolved, running
from pipelines.engine.command import UsageError, command
from pipelines.engine.disk import LockError, held, write_text
from pipelines.engine.launch import check_single
from pipelines.engine.recipes import contents, words
from pipelines.engine.task import Task, find_task
from pipelines.engine.terminal import print_table, say
from pipelines.serving.store import data_of
from pipelines.tracking.client import stage_of, tracking_client


def cross_validate(
    recipe: Path,
    folds: int = 5,
    task: str = "classification",
    name: str | None = None,
    experiment: str | None = None,
    args: str = "",
) -> None:
    """Trains a recipe once for each fold and reports the test metrics over all folds: mean ± standard deviation.

    The data are files without splits of their own, such as ImageFolder and tables. Each fold is the test split of one training
    (see ``--data.folds``), which is as the task's own command line does it, on one device, and a child of the command's run in
    MLflow. An interrupted command can be given again and continues within the fold.

    Args:
        recipe: YAML file with data, module and trainer.
        folds: number of folds.
        task: the task.
        name: name of the run and of the folder in outputs/cross_validation. Default: the recipe's name.
        experiment: MLflow experiment. Default: the task's.
        args: further settings of the command line, such as ``"--data.root FOLDER --trainer.max_epochs 5"``.

    Raises:
        ValueError: a file cannot be read, a setting cannot be used, or the folder belongs to another cross-validation.
    """
    if folds < 2:
        raise ValueError(f"--folds must be at least 2, not {folds}.")
    name, experiment = name or recipe.stem, experiment or task
    check_title("--name", name)
    trained = find_task(task)
    tracking_client()  # soon says if MLflow does not answer
    common = ["fit", "--config", str(recipe), "--trainer.devices=1", *words(args), "--experiment", experiment,
              "--register=null", f"--data.folds={folds}"]  # fmt: skip
    try:
        settings = resolved(trained, [*common, "--data.fold=0"])
    except UsageError as error:
        raise ValueError(f"The recipe or --args cannot be used for cross-validation: {error}") from None
    check_single("cross_validate", settings["trainer"]["devices"])
    plan = {"task": task, "recipe": yaml.safe_load(recipe.read_text()), "args": args, "folds": folds}
    plan |= {"recipes in --args": more} if (more := contents(words(args))) else {}
    folder = Path("outputs", "cross_validation", name)
    try:
        with held(folder):
            _train(trained, common, folder, plan, experiment, settings["data"])
    except LockError:
        raise ValueError(
            f"{folder.resolve()} is in use by the same command: wait until that has ended, or give this one a --name."
        ) from None


def _train(
    task: Task, common: list[str], folder: Path, plan: dict[str, Any], experiment: str, data: dict[str, Any]
) -> None:
    """Trains the folds that are not finished yet and returns the results of all."""
    content = _content(data)
    file = folder / "folds.json"
    if file.exists():
        state = json.loads(file.read_text())
        changed = [key for key, value in plan.items() if state["plan"].get(key) != value]
        if changed and (state["done"] or any(folder.glob("*/last.ckpt"))):
            raise ValueError(
                f"{folder} was started with other {' and '.join(changed)}: give the same again, or give this "
                "cross-validation a name of its own with --name."
            )
    else:
        state, changed = {"done": {}}, [*plan]
    if changed or stage_of(state["parent"]) is None:  # also where the store was removed
        state |= {"plan": plan, "parent": new_parent(experiment, folder.name, plan, "cross_validation.json")}
    if changed or "content" not in state:
        state["content"] = content
    write_text(file, json.dumps(state))
    parent, done = state["parent"], state["done"]
    with running(parent):
        for fold in range(plan["folds"]):
            if _content(data) != state["content"]:
                raise ValueError(
                    f"The images, their labels or their groups are not those with which {folder} was started, and folds of different data "
                    "have no mean: restore them, or give this cross-validation a name of its own with --name."
                )
            if str(fold) in done:
                continue
            say(f"Fold {fold} of {plan['folds']}, counted from 0.")
            child = ChildRun(parent, fold=str(fold))
            cli = task([*common, f"--data.fold={fold}", "--output", str(folder / str(fold))], [child])
            figures = {key: float(value) for key, value in cli.trainer.callback_metrics.items()}
            figures = {key: value for key, value in figures.items() if key.startswith("test/") and math.isfinite(value)}
            if not figures:
                raise ValueError(
                    f"Fold {fold} was not tested, so there is nothing to take the mean of: leave "
                    "--trainer.fast_dev_run and --trainer.limit_test_batches out."
                )
            done[str(fold)] = {"run": child.run_id, "figures": figures}
            write_text(file, json.dumps(state))
        rows = _report(parent, [done[str(fold)] for fold in range(plan["folds"])])
    MlflowClient().set_terminated(parent, "FINISHED")
    print_table(folder.name, rows | {"folder": str(folder)})


def _content(data: dict[str, Any]) -> str:
    """Digest of all images and their labels."""
    files: Any = data_of(data)
    assert files.sources  # which looks at them
    return str(files.content)


def _report(parent: str, folds: list[dict[str, Any]]) -> dict[str, str]:
    """Summarises the folds for the terminal and the parent run."""
    client = MlflowClient()
    keys = [key for key in folds[0]["figures"] if all(key in fold["figures"] for fold in folds)]
    table = [[k, *(fold["figures"][key] for key in keys), fold["run"]] for k, fold in enumerate(folds)]
    client.log_dict(parent, {"columns": ["fold", *keys, "run"], "data": table}, "folds.json")
    rows = {"folds": f"{len(folds)}; mean ± standard deviation (each fold)"}
    for key in keys:
        values = np.array([fold["figures"][key] for fold in folds])
        mean, spread = float(values.mean()), float(values.std(ddof=1))
        client.log_metric(parent, key, mean)
        client.log_metric(parent, f"{key}_std", spread)
        rows[key] = f"{mean:.4f} ± {spread:.4f} ({', '.join(f'{value:.4f}' for value in values)})"
    return rows | {"run": f"{parent} in {mlflow.get_tracking_uri()}"}


if __name__ == "__main__":
    command(cross_validate)
