"""Hyperparameter search with Optuna: ``python -m pipelines.sweep RECIPE.yaml SPACE.yaml --trials 20``."""

import json
import math
import tempfile
import time
import warnings
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import mlflow
import optuna
import yaml
from lightning.pytorch.callbacks import ModelCheckpoint
from mlflow.tracking import MlflowClient
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.exc import IntegrityError, OperationalError
from typing_extensions import override

from modules.training_data import settings_of
from pipelines.engine.children import ChildRun, check_title, complaint, new_parent, resolved, running
from pipelines.engine.command import UsageError, command
from pipelines.engine.launch import check_single
from pipelines.engine.recipes import contents, words
from pipelines.engine.task import Task, find_task
from pipelines.engine.terminal import print_table
from pipelines.serving.registration import check_name
from pipelines.serving.store import data_of
from pipelines.tracking.client import stage_of, tracking_client

HEARTBEAT = 15  # seconds; a trial whose process was silent for four times as long was killed, and is taken over
OURS = ("config", "output", "experiment", "register", "ckpt_path")  # what a sweep sets itself


class _JudgedError(Exception):
    """Carries the metric by which a training would be compared."""


class _Ask(L.Callback):
    """Stops a training before it starts, to learn its monitored metric."""

    @override
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        raise _JudgedError(pl_module.monitor, pl_module.mode)


class TrialReport(ChildRun):
    """Reports each validation to an Optuna trial and stops the training if the trial is pruned.

    Args:
        trial: the one that is trained.
        parent: the sweep's run.
    """

    def __init__(self, trial: optuna.Trial, parent: str) -> None:
        super().__init__(parent, trial=str(trial.number))
        self.trial = trial
        self.validations, self.pruned = 0, False

    @override
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if self.run_id is not None:
            self.trial.set_user_attr("run_id", self.run_id)

    @override
    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Reports the monitored metric. A pruned training ends in good order, with its checkpoint."""
        value = trainer.callback_metrics.get(str(pl_module.monitor))
        if trainer.state.fn != "fit" or trainer.sanity_checking or value is None:
            return
        if math.isfinite(float(value)):
            self.trial.report(float(value), self.validations)
        self.validations += 1
        if self.trial.should_prune():
            self.pruned = trainer.should_stop = True

    @override
    def state_dict(self) -> dict[str, Any]:
        """Number of validations so far, for a trial that is interrupted and resumed."""
        return {"validations": self.validations}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.validations = state_dict["validations"]


def read_space(file: Path) -> dict[str, BaseDistribution]:
    """Reads a search space: settings by dotted name, each with a list of choices or ``low``, ``high``, ``log``,
    ``step``.

    Raises:
        ValueError: it is none; the setting is named.
    """
    try:
        given = yaml.safe_load(file.read_text())
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"The search space {file} cannot be read: {error}") from None
    if not isinstance(given, dict) or not given:
        raise ValueError(
            f"{file} is no search space: it needs lines such as model.optimization.lr: {{low: 0.001, high: 0.1}}."
        )
    space: dict[str, BaseDistribution] = {}
    for name, values in given.items():
        try:
            space[name] = _distribution(name, values)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{file}: {name}: {error}") from None
    return space


def _distribution(name: str, values: Any) -> BaseDistribution:
    if name in OURS:
        raise ValueError("the sweep sets this itself: remove the line.")
    if isinstance(values, list) and values and all(isinstance(v, str | int | float | None) for v in values):
        return CategoricalDistribution(values)
    if not isinstance(values, dict) or not {"low", "high"} <= values.keys() <= {"low", "high", "log", "step"}:
        raise ValueError("give a list of plain values, or {low: …, high: …} with log: true or step: … if you like.")
    log = values.get("log", False)
    # YAML takes 1e-4, without a point, for text.
    numbers = {key: float(v) if isinstance(v, str) else v for key, v in values.items() if key != "log"}
    if all(isinstance(v, int) for v in numbers.values()):
        return IntDistribution(log=log, **numbers)  # type: ignore[arg-type]
    return FloatDistribution(log=log, **numbers)


@dataclass
class Sweep:
    """An Optuna study and how its trials are trained.

    Args:
        study: Optuna's.
        space: settings and their values.
        task: what is trained.
        args: what all trials have in common.
        folder: each trial has a folder in it.
        parent: the run that has those of the trials as children.
        monitor: the metric, on the validation split.
        mode: whether the least of it is best, ``min``, or the most, ``max``.
    """

    study: optuna.Study
    space: dict[str, BaseDistribution]
    task: Task
    args: list[str]
    folder: Path
    parent: str
    monitor: str
    mode: str

    def output(self, trial: optuna.Trial | FrozenTrial) -> Path:
        """Output folder of a trial, shared with a trial that takes over its work."""
        return self.folder / f"{trial.user_attrs.get('origin', trial.number):04d}"

    def objective(self, trial: optuna.Trial) -> float:
        """Trains a trial and returns the best value of the monitored metric."""
        chosen = {name: _suggest(trial, name, distribution) for name, distribution in self.space.items()}
        report = TrialReport(trial, self.parent)
        try:
            cli = self.task([*self.args, *_options(chosen), "--output", str(self.output(trial))], [report])
            if (cli.model.monitor, cli.model.mode) != (self.monitor, self.mode):
                raise ValueError(
                    f"with these settings, a training chooses its best checkpoint by {cli.model.monitor}, and the sweep compares {self.monitor}"
                )
            scores = [
                c.best_model_score
                for c in settings_of(cli.trainer).callbacks
                if isinstance(c, ModelCheckpoint) and c.monitor == self.monitor
            ]
            if not scores or scores[0] is None or not math.isfinite(scores[0]):
                raise ValueError(f"{self.monitor} has no value")
        except SystemExit as end:
            if end.code in (130, 143):  # Ctrl-C and SIGTERM: the trial goes on when the sweep does
                self.study.tell(trial, state=TrialState.FAIL)
                retry(self.study, self.study.trials[trial.number])
                raise
            error = ValueError("the settings do not go together; see above")
            trial.set_user_attr("error", str(error))
            raise error from None
        except Exception as fault:
            trial.set_user_attr("error", f"{type(fault).__name__}: {fault}"[:2000])
            raise
        trial.set_user_attr("best", float(scores[0]))
        if report.pruned:
            raise optuna.TrialPruned
        return float(scores[0])

    def run(self, trials: int) -> None:
        """Trains until the study has the requested number of trials, counting those of other processes, and waits for
        these."""
        while True:
            optuna.storages.fail_stale_trials(self.study)
            known = self.study.get_trials(deepcopy=False)
            states = Counter(trial.state for trial in known)
            if states[TrialState.WAITING] or len({self.output(trial) for trial in known}) < trials:
                self.study.optimize(self.objective, n_trials=1, catch=(Exception,), callbacks=[_tell])
            elif states[TrialState.RUNNING]:
                time.sleep(1)
            else:
                return

    def register(self, name: str, best: FrozenTrial) -> str:
        """Registers a trial's best checkpoint with its test metrics, once for all processes."""
        key = f"registered.{name}"
        if key in self.study.user_attrs and self.study.user_attrs[key]["trial"] == best.number:
            return f"{name}, of this trial, before"
        self.study.set_user_attr(key, {"trial": best.number})
        try:
            output, run_id = self.output(best), best.user_attrs["run_id"]
            tested = any(key.startswith("test/") for key in MlflowClient().get_run(run_id).data.metrics)
            verb = "test" if tested else "validate"
            cli = self.task(
                [verb, "--config", str(output / "config.yaml"), "--output", str(output), "--trainer.logger=false"]
            )
            version = cli.register(name, run_id)
        except BaseException:
            self.study.set_user_attr(key, {"trial": None})
            raise
        return f"models:/{version.name}/{version.version}"


def _suggest(trial: optuna.Trial, name: str, distribution: BaseDistribution) -> Any:
    if isinstance(distribution, CategoricalDistribution):
        return trial.suggest_categorical(name, distribution.choices)
    suggest: Any = trial.suggest_int if isinstance(distribution, IntDistribution) else trial.suggest_float
    return suggest(name, **distribution._asdict())


def retry(study: optuna.Study, trial: FrozenTrial) -> None:
    """Requeues an interrupted trial, which resumes from its last checkpoint."""
    study.enqueue_trial(trial.params, user_attrs={"origin": trial.user_attrs.get("origin", trial.number)})


def _tell(study: optuna.Study, trial: FrozenTrial) -> None:
    figure = f"{trial.user_attrs['best']:.4f}" if "best" in trial.user_attrs else trial.user_attrs.get("error", "")
    settings = ", ".join(f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in trial.params.items())  # fmt: skip
    print(f"trial {trial.number}: {trial.state.name.lower()}, {figure} with {settings}", flush=True)


def _options(chosen: dict[str, Any]) -> list[str]:
    return [f"--{name}={value if isinstance(value, str) else json.dumps(value)}" for name, value in chosen.items()]


def _check(task: Task, args: list[str], space: dict[str, BaseDistribution]) -> dict[str, Any]:
    """Validates all settings before the first training and returns those that all trials share."""
    try:
        settings = resolved(task, args)
    except UsageError as error:
        raise ValueError(f"The recipe or --args cannot be used: {error}") from None
    for name, distribution in space.items():
        bounds: Any = distribution
        choices = isinstance(distribution, CategoricalDistribution)
        for value in bounds.choices if choices else (bounds.low, bounds.high):
            if said := complaint(task, [*args, *_options({name: value})]):
                raise ValueError(f"The search space's {name} cannot be set to {value}: {said}")
    return settings


def _judged(task: Task, args: list[str]) -> tuple[str, str]:
    """The metric by which trainings of the recipe are compared, and ``min`` or ``max``; a module may choose it by its
    settings."""
    quiet = ["--trainer.logger", "false", "--trainer.enable_progress_bar", "false"]
    try:
        with tempfile.TemporaryDirectory() as folder:
            task([*args, "--output", folder, *quiet], [_Ask()])
    except _JudgedError as said:
        return said.args[0], said.args[1]
    except SystemExit as end:
        if end.code in (130, 143):
            raise
        raise ValueError("The recipe or --args cannot be used; see above.") from None
    raise AssertionError("the trainer did not set up its callbacks")


def _study(name: str, storage: str, direction: str, plan: dict[str, Any], experiment: str) -> optuna.Study:
    """The study of a name and its parent run, created by the first of several processes."""
    if storage.startswith("sqlite:///"):
        Path(storage.removeprefix("sqlite:///")).parent.mkdir(parents=True, exist_ok=True)
    for last in (False, False, True):
        try:
            place = optuna.storages.RDBStorage(
                storage, heartbeat_interval=HEARTBEAT, grace_period=4 * HEARTBEAT, heartbeat_stale_trial_callback=retry
            )
            break
        except Exception as error:  # of SQLAlchemy and of each database's driver
            # Of two processes that make the tables at the same moment one is refused, and finds them made.
            if last or not isinstance(error, IntegrityError | OperationalError):
                raise ValueError(f"The storage {storage} cannot be opened: {str(error).splitlines()[0]}") from None
            time.sleep(1)
    how: dict[str, Any] = {
        "study_name": name,
        "storage": place,
        "sampler": optuna.samplers.TPESampler(constant_liar=True),  # so that processes do not try the same
        "pruner": optuna.pruners.MedianPruner(n_startup_trials=5, n_warmup_steps=1),
    }
    try:
        study = optuna.create_study(**how, direction=direction)  # type: ignore[arg-type]
    except optuna.exceptions.DuplicatedStudyError:
        study = optuna.load_study(**how)
        patience = time.monotonic() + 60
        while "parent" not in study.user_attrs and time.monotonic() < patience:
            time.sleep(0.2)
    if "parent" not in study.user_attrs or stage_of(study.user_attrs["parent"]) is None:
        run_id = new_parent(experiment, name, plan, "sweep.json")
        MlflowClient().set_tag(run_id, "study", name)
        study.set_user_attr("plan", plan)
        study.set_user_attr("parent", run_id)
    changed = [key for key, value in plan.items() if study.user_attrs["plan"].get(key, value) != value]
    if changed:
        raise ValueError(
            f"The study {name} was started with another {' and '.join(changed)}; give this one a name with --study."
        )
    return study


def sweep(
    recipe: Path,
    space: Path,
    trials: int = 20,
    task: str = "classification",
    study: str | None = None,
    storage: str = "sqlite:///outputs/sweeps/studies.db",
    register: str | None = None,
    experiment: str | None = None,
    args: str = "",
) -> int:
    """Trains a recipe with settings that Optuna proposes, and reports the best by the validation metric.

    Each trial is a training as the task's own command line does it, on one device, and a child of the sweep's run in
    MLflow. From the sixth on, a trial that is worse than the median of the others after as many validations ends early.
    The same command again goes on where a sweep was cut off, within the trial; the same command at the same time, on
    another device, shares the work.

    Args:
        recipe: YAML file with data, module and trainer.
        space: YAML file of settings by their dotted name, with a list of choices or bounds:
            ``data.augmentation: [light, standard]``, ``data.batch_size: {low: 16, high: 64, step: 16}``,
            ``model.optimization.lr: {low: 0.001, high: 0.1, log: true}``.
        trials: total number of trials, including earlier ones.
        task: the task.
        study: name of the sweep. Default: from the names of the recipe and the space.
        storage: URL of Optuna's database, in SQLAlchemy's form.
        register: register the best trial's checkpoint under this name.
        experiment: MLflow experiment. Default: the task's.
        args: further settings of the command line for all trials, such as ``"--trainer.max_epochs 5"``.

    Returns:
        The exit code: 0, or 1 if no trial produced a metric.

    Raises:
        ValueError: a file cannot be read, a setting is unknown, or the name belongs to another study.
    """
    if trials < 1:
        raise ValueError(f"--trials must be at least 1, not {trials}.")
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    name = study or f"{recipe.stem}-{space.stem}"
    check_title("--study", name)
    trained = find_task(task)
    found = read_space(space)
    if register:
        check_name(register)
    tracking_client()  # soon says if MLflow does not answer
    experiment = experiment or task
    common = ["fit", "--config", str(recipe), "--trainer.devices=1", *words(args), "--experiment", experiment]
    settings = _check(trained, common, found)
    check_single("sweep", settings["trainer"]["devices"])
    plan = {"task": task, "recipe": yaml.safe_load(recipe.read_text()), "args": args, "space": yaml.safe_load(space.read_text())}  # fmt: skip
    plan |= {"recipes in --args": more} if (more := contents(words(args))) else {}
    if not {"data", "data.root", "data.file"} & found.keys():  # figures of other images would not compare
        splits = data_of(settings["data"]).identity()["splits"]
        plan["data"] = {split: content["digest"] for split, content in splits.items()}
    monitor, mode = _judged(trained, common)
    shared = _study(name, storage, f"{mode}imize", plan, experiment)
    parent = shared.user_attrs["parent"]
    work = Sweep(shared, found, trained, common, Path("outputs", "sweeps", name), parent, monitor, mode)
    with running(parent):
        work.run(trials)
        rows = _report(work, register)
    MlflowClient().set_terminated(parent, "FINISHED" if "trial" in rows else "FAILED")
    print_table(name, rows)
    return 0 if "trial" in rows else 1


def _report(work: Sweep, register: str | None) -> dict[str, str]:
    """Summarises the sweep for the terminal and the parent run."""
    client, known = MlflowClient(), work.study.get_trials(deepcopy=False)
    states = Counter(t.state for t in {work.output(t): t for t in known}.values())  # of a trial that went on, the last
    rows = {"trials": ", ".join(f"{count} {state.name.lower()}" for state, count in states.items())}
    columns = ["trial", "state", work.monitor, *work.space, "run"]
    table = [
        [t.number, t.state.name.lower(), t.user_attrs.get("best"), *(t.params.get(key) for key in work.space), t.user_attrs.get("run_id")]
        for t in known
    ]  # fmt: skip
    client.log_dict(work.parent, {"columns": columns, "data": table}, "trials.json")
    if not states[TrialState.COMPLETE]:
        errors = [t.user_attrs["error"] for t in known if "error" in t.user_attrs]
        return rows | {"error": errors[-1] if errors else "no trial finished"}
    best = work.study.best_trial
    client.log_metric(work.parent, work.monitor, float(best.value or 0.0))
    client.set_tag(work.parent, "best_run", best.user_attrs["run_id"])
    rows |= {"trial": str(best.number), work.monitor: f"{best.value:.4f}"}
    rows |= {key: f"{value:.6g}" if isinstance(value, float) else str(value) for key, value in best.params.items()}
    rows |= {"run": f"{best.user_attrs['run_id']} in {mlflow.get_tracking_uri()}", "folder": str(work.output(best))}
    if register:
        rows["registered"] = work.register(register, best)
    return rows


if __name__ == "__main__":
    command(sweep)
