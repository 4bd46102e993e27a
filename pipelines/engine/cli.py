"""The command line of a task."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from lightning.pytorch.utilities.exceptions import SIGTERMException

from datamodules import VisionDataModule
from modules import BackboneError, VisionModule
from modules.callbacks.transfer import check_learned, continue_from
from modules.checkpoints import at_size, check_network, read_checkpoint
from modules.training_data import settings_of
from pipelines.engine import launch, resume
from pipelines.engine.averaging import average_best
from pipelines.engine.batch_size import largest_batch
from pipelines.engine.checkpoint import BestCheckpoint, KeptCheckpoints, LastCheckpoint
from pipelines.engine.command import UsageError
from pipelines.engine.disk import disk_error, write_text
from pipelines.engine.evaluation import write_predictions
from pipelines.engine.preparation import PreparedCLI
from pipelines.engine.signals import heard
from pipelines.engine.splitting import SplitStrategy
from pipelines.engine.terminal import say
from pipelines.engine.trainer import VisionTrainer
from pipelines.engine.transfer import better, judge_features
from pipelines.tracking.provenance import surroundings
from pipelines.tracking.redaction import redact_yaml

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion

    from pipelines.tracking.logger import RunLogger


class VisionCLI(PreparedCLI):
    """``fit | validate | test | predict | preview`` with YAML recipes, typed overrides and a tracked run.

    ``fit`` trains, tests the best checkpoint, and registers it if a name is given. With ``--output`` naming the folder
    of a training that was cut off, it goes on where that one stopped, in the same run.
    """

    @contextmanager
    def run(self) -> "Iterator[RunLogger | None]":
        """Context of a tracked run around a subcommand; it ends with the right status."""
        self.output.mkdir(parents=True, exist_ok=True)
        logger = cast("RunLogger | None", self.trainer.logger if self.tracked else None)
        with heard(self.trainer) as ending:
            try:
                with launch.agreed(self.trainer):
                    if self.trainer.is_global_zero and not self.options.trainer.fast_dev_run:
                        write_text(self.output / "config.yaml", self.recipe)
                    if logger:
                        self._begin_run(logger)
                yield logger
            except BaseException as error:
                ending()
                cause = self.watch.error or error
                fault: Exception | None = (
                    disk_error(cause, self.output / "a file") if isinstance(cause, Exception) else None
                )
                fault = fault or launch.lost(cause, self.watch.processes) or launch.without_gradient(cause, self.model)
                if logger:
                    logger.finish(fault or cause)
                if isinstance(cause, KeyboardInterrupt | SIGTERMException):
                    sys.exit(130 if isinstance(cause, KeyboardInterrupt) else 143)
                if fault:
                    raise fault from cause
                raise
            ending()
            if logger:
                logger.finish()
                if self.trainer.is_global_zero:
                    self.rows["run"] = logger.address()

    def _begin_run(self, logger: "RunLogger") -> None:
        """Logs the settings, data and environment of the run."""
        config = self.recipe if self.trainer.is_global_zero else ""
        size = sum(p.numel() for p in self.model.parameters())
        logger.tags |= surroundings(self.trainer) | {"parameters": str(size)}
        logger.log_config(config)
        logger.log_environment()
        if self.subcommand != "preview":
            logger.log_data(self.datamodule)

    @cached_property
    def recipe(self) -> str:
        """All settings of the command as YAML, without credentials."""
        return redact_yaml(self._parser(self.subcommand).dump(self.options, skip_unset=False))

    def fit(self, model: VisionModule, datamodule: VisionDataModule) -> None:
        """Trains, tests the best checkpoint, and registers it."""
        last, ckpt_path, trainer = self.output / "last.ckpt", self.options.ckpt_path, self.trainer
        epochs, every = trainer.max_epochs or -1, trainer.check_val_every_n_epoch or 1
        if self.options.register and (trainer.limit_val_batches == 0 or 0 < epochs < every):
            raise UsageError(
                f"--register {self.options.register} keeps the model of the best validation, and there is none with "
                f"--trainer.max_epochs {epochs}, --trainer.check_val_every_n_epoch {every} and "
                f"--trainer.limit_val_batches {trainer.limit_val_batches}: change these, or give --register null."
            )
        if isinstance(trainer.strategy, SplitStrategy):
            trainer.strategy.check(model)
        if ckpt_path is None and last.exists():
            ckpt_path = str(last)
        with launch.agreed(trainer):
            checkpoint = self._checkpoint(ckpt_path, model)
        self._choose_batch_size(checkpoint, model, datamodule)
        with launch.agreed(trainer):
            self._go_on(str(ckpt_path), checkpoint, model, datamodule)
        judge = next((each for each in settings_of(trainer).callbacks if isinstance(each, BestCheckpoint)), None)
        with self.run() as logger:
            if checkpoint is None and judge is not None:
                judge_features(trainer, model, datamodule, judge)
            self.trainer.fit(model, datamodule=datamodule, ckpt_path=ckpt_path, weights_only=True)
            trained = trainer.global_step > (checkpoint or {"global_step": 0})["global_step"]
            if trained:
                self._tell_kept()
            if judge is not None and (told := better(trainer, model, judge)):
                self.rows["transfer"] = told
            best = self.output / "best.ckpt"
            if not best.exists():
                if last.exists():
                    self.rows["checkpoint"] = f"{last}; nothing was validated, so there is no best one to test"
                    if self.options.average != "none":
                        self.rows["average"] = "no: nothing was validated, so there are no best checkpoints"
                    if self.options.register:
                        self.rows["registered"] = "no: nothing was validated, so there is no best model"
                return
            average = self._averaged(model, datamodule, logger)
            if "test" in datamodule.sources:
                trainer.test(model, datamodule=datamodule, ckpt_path=average or best, verbose=False, weights_only=True)
            elif average is None:
                self._validate_best(best, model, datamodule, known=trained and self.options.average == "none")
            best = average or best
            self._note_metrics()
            size = sum(p.numel() for p in model.parameters())
            self.rows["model"] = f"{self.options.model.backbone.name}, {size:,} parameters"
            minutes, seconds = divmod(round(self.watch.train_seconds), 60)
            epochs = self.trainer.current_epoch
            since = " since it went on" if checkpoint else ""
            self.rows["training"] = f"{minutes} min {seconds} s{since}, {epochs} epoch{'s' if epochs != 1 else ''}"
            if logger and self.trainer.is_global_zero:
                from pipelines.engine.films import make_films
                from pipelines.serving.registration import register_best

                logger.log_file(best, "checkpoints")
                make_films(self.output, model.series, logger)
                if name := self.options.register:
                    self.rows["registered"] = register_best(name, best, logger, self.register)
        self.rows["checkpoint"] = str(best)

    def _tell_kept(self) -> None:
        """Tells of checkpoints that an earlier command of this training kept and that this one, which has trained further,
        does not go on with. They stay: a command may lack ``--keep_best`` by mistake."""
        lapsed = {"kept": self.options.keep_best < 2, "average.ckpt": self.options.average == "none"}
        if stale := [name for name, so in lapsed.items() if so and (self.output / name).exists()]:
            self.rows["of an earlier command"] = (
                f"{' and '.join(stale)}, as they were: this one has no --keep_best or --average"
            )

    def _validate_best(self, best: Path, model: VisionModule, datamodule: VisionDataModule, known: bool) -> None:
        """Loads and validates the best checkpoint; if it is of the training's last validation, whose figures are ``known``, these
        are logged, and nothing is computed again."""
        trainer, limit = self.trainer, self.trainer.limit_val_batches
        figures = {key: value for key, value in trainer.callback_metrics.items() if key.startswith("val/")}
        judge = next((each for each in settings_of(trainer).callbacks if isinstance(each, BestCheckpoint)), None)
        known = known and judge is not None and judge._last_global_step_saved == trainer.global_step
        trainer.limit_val_batches = 0 if known else limit
        trainer.validate(model, datamodule=datamodule, ckpt_path=best, verbose=False, weights_only=True)
        trainer.limit_val_batches = limit
        if known:
            trainer.callback_metrics.update(figures)
            for one in trainer.loggers:
                step = trainer.fit_loop.epoch_loop._batches_that_stepped  # where Lightning logs a validation
                one.log_metrics({key: float(value) for key, value in figures.items()}, step)

    def _averaged(self, model: VisionModule, datamodule: VisionDataModule, logger: "RunLogger | None") -> Path | None:
        """The average of the best checkpoints, validated, if asked for and better than the best one."""
        callbacks = settings_of(self.trainer).callbacks
        kept = next((each for each in callbacks if isinstance(each, KeptCheckpoints)), None)
        if self.options.average == "none" or kept is None:
            return None
        file, said = average_best(self.trainer, model, datamodule, kept, kept.best, self.options.average)
        self.rows["average"] = said
        if logger:
            logger.set_tag("average", said)
        return file

    def register(self, name: str, run_id: str) -> "ModelVersion":
        """Registers the model under a name, with the latest metrics."""
        from pipelines.serving.registration import register

        figures = {key: float(value) for key, value in self.trainer.callback_metrics.items()}
        data = self.options.data.as_dict()
        return register(name, self.model, self.datamodule, data, self.task, run_id, figures, self.own_code)

    def _checkpoint(self, ckpt_path: str | None, model: VisionModule) -> dict[str, Any] | None:
        """The checkpoint to resume from; None for a new training.

        Raises:
            LockError: another training is in the folder.
            UsageError: the checkpoint is torn, or of another network.
        """
        if self._refused:
            raise self._refused
        if ckpt_path is None:
            check_learned(model)
            return None
        try:
            checkpoint = read_checkpoint(ckpt_path)
        except BackboneError as error:
            if self.options.ckpt_path:
                raise
            best = self.output / "best.ckpt"
            other = best.exists() and not best.samefile(ckpt_path)
            way_out = f"continue from the best validation, with --ckpt_path {best}; or " if other else ""
            raise UsageError(
                f"{error} Replace it with an intact copy; or {way_out}start again with another --output."
            ) from None
        check_network(checkpoint["architecture"], model.architecture)
        continue_from(model, checkpoint)
        if (best := self.output / "best.ckpt").exists():  # a torn one is told before the training, not at its end
            read_checkpoint(best)
        elif any(state.get("best_model_path") for state in checkpoint["callbacks"].values()):
            say(f"{best}, the best checkpoint so far, is gone: the best of the validations to come takes its place.")
        return checkpoint

    def _choose_batch_size(
        self, checkpoint: dict[str, Any] | None, model: VisionModule, datamodule: VisionDataModule
    ) -> None:
        """Resolves ``--data.batch_size auto``: the batch size of the training so far, or the largest that fits.

        Raises:
            UsageError: none does.
        """
        if cast(Any, datamodule.batch_size) != "auto":
            return
        with launch.agreed(self.trainer):
            before = resume.batch_size(checkpoint, self.trainer.world_size)
            size = before or largest_batch(self.trainer, model, datamodule)
        size = launch.least(self.trainer, size)
        datamodule.batch_size = self.options.data.init_args.batch_size = size
        sys.argv += ["--data.batch_size", str(size)]  # for the processes of other devices
        most = cast(Any, datamodule.dataset("train", True)).epoch_size
        why = (
            "since there are no images for more"
            if 2 * size * self.trainer.world_size > most
            else "the most that memory has room for"
        )
        say(f"--data.batch_size auto: {size} for each process, {'as before' if before else why}.")

    def _go_on(
        self, ckpt_path: str, checkpoint: dict[str, Any] | None, model: VisionModule, datamodule: VisionDataModule
    ) -> None:
        """Records the training's identity and reports where it resumes.

        Raises:
            UsageError: something is other than before that must not be.
        """
        for callback in settings_of(self.trainer).callbacks:
            if isinstance(callback, LastCheckpoint):
                callback.recipe = resume.identity(self.trainer, model, datamodule, self.recipe)
                if checkpoint is not None:
                    data = self.options.data.class_path
                    plain = partial(resume.is_default, self._parser(self.subcommand), self.options)
                    callback.goes_on = resume.go_on(ckpt_path, checkpoint, callback.recipe, self.trainer, data, plain)

    def _evaluate(self, verb: str, model: VisionModule, datamodule: VisionDataModule) -> Any:
        assert self.weights
        run = getattr(self.trainer, verb)
        options = {} if verb == "predict" else {"verbose": False}
        own = at_size(self.weights.architecture, self.weights.shapes, model)
        check_network(own, model.architecture)
        if own != self.weights.architecture:
            say(
                f"Trained with --data.image_size {self.weights.architecture['image_size']}, evaluated with {own['image_size']}."
            )
        model.views.choose(self.options.tta)
        with self.run():
            result = run(model, datamodule=datamodule, ckpt_path=self.weights.file, weights_only=True, **options)
            self._note_metrics()
        self.rows["folder"] = str(self.output)
        return result

    def validate(self, model: VisionModule, datamodule: VisionDataModule) -> None:
        """Evaluates a checkpoint on the validation split."""
        self._evaluate("validate", model, datamodule)

    def test(self, model: VisionModule, datamodule: VisionDataModule) -> None:
        """Evaluates a checkpoint on the test split."""
        self._evaluate("test", model, datamodule)

    def predict(self, model: VisionModule, datamodule: VisionDataModule) -> None:
        """Predicts every picture of the test split; writes ``predictions.jsonl``, one JSON object per line, to the
        output folder.

        Where the network is shown pieces of pictures, a detector's answers are those for whole pictures, and others say which
        piece they are of: ``window``, its left and top edge, width and height.
        """
        batches = self._evaluate("predict", model, datamodule)
        file = self.output / "predictions.jsonl"
        count = write_predictions(batches, self.trainer, model, datamodule, file)
        self.rows["predictions"] = f"{file} ({count} answers)"

    def preview(self, model: VisionModule, datamodule: VisionDataModule, **options: int) -> None:
        """Draws a sheet of training samples; see `VisionTrainer.preview`."""
        with self.run():
            self.rows["sheet"] = str(cast(VisionTrainer, self.trainer).preview(model, datamodule, **options))

    def _note_metrics(self) -> None:
        for key, value in self.trainer.callback_metrics.items():
            stage, _, name = key.partition("/")
            if stage in ("val", "test") and name and (stage == "test" or self.subcommand != "fit"):
                self.rows[key] = f"{float(value):.4f}"
