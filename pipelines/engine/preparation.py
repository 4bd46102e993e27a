"""What is checked, chosen and made before a subcommand starts: its folder, its weights, the data, the trainer."""

import os
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning as L
import torch
from lightning.fabric.utilities.rank_zero import _get_rank
from lightning.pytorch.callbacks import LearningRateFinder, Timer
from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from typing_extensions import override

from datamodules import DetectionDataModule, VisionDataModule
from datamodules.classes import adopt_classes
from modules import BackboneError, VisionModule
from modules.spec import DataSpec
from modules.training_data import settings_of
from modules.warm_start import warm_start
from pipelines.engine import launch
from pipelines.engine.checkpoint import BestCheckpoint, KeptCheckpoints, LastCheckpoint
from pipelines.engine.command import UsageError
from pipelines.engine.disk import LockError, held
from pipelines.engine.evaluation import Weights, take_unseen
from pipelines.engine.folders import RUN_FILE, is_training, new_folder, own_folder, try_to_write
from pipelines.engine.monitors import MonitorCheck
from pipelines.engine.parser import TaskParser
from pipelines.engine.process import importing
from pipelines.engine.progress import ProgressBar, Summary
from pipelines.engine.ranges import check_ranges, check_time
from pipelines.engine.recipes import LOOKS, each_of
from pipelines.engine.splitting import check_settings
from pipelines.engine.terminal import say
from pipelines.engine.trainer import RateFinder
from pipelines.serving.store import lacking_in
from pipelines.tracking.watch import RunCallback

if TYPE_CHECKING:
    from pipelines.engine.start import Start


NEEDED = ("torch._dynamo", "matplotlib.figure")  # by the first step of an optimiser, and by pictures

MEANT = {  # what a property of data says to a user
    "attributes": "attributes of classes",
    "class_weights": "classes",
    "label_names": "names of classes",
    "num_classes": "classes",
    "observation_mean": "observations of an environment",
    "target_mean": "quantities",
    "targets": "targets of several tasks",
}


class PreparedCLI(TaskParser):
    """Checks the settings of a subcommand, chooses its output folder, and makes the module, the data and the trainer
    fit each other.

    Args:
        task: its name.
        module_class: what learns.
        default_data: class path of the data that is taken where none is named.
        args: the command line.
        callbacks: the task's own callbacks of the trainer.
        start: the trained network that a new training starts from.
    """

    def __init__(
        self,
        task: str,
        module_class: type[VisionModule],
        default_data: str,
        args: Sequence[str],
        callbacks: Sequence[L.Callback] = (),
        start: "Start | None" = None,
    ) -> None:
        self.callbacks, self.start = callbacks, start
        self.rows: dict[str, str] = {}
        self._hold = ExitStack()
        self._refused: LockError | None = None  # of which the other processes do not know
        self.weights: Weights | None = None  # that are evaluated
        self.training: Path | None = None  # of the weights, where they have a run
        try:
            super().__init__(task, module_class, default_data, args)
        finally:
            self._hold.close()

    @override
    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        super().add_arguments_to_parser(parser)
        parser.link_arguments("data", "model.data", self._spec, apply_on="instantiate")

    def _remedy(self, data: VisionDataModule, lacking: str) -> str:
        """What to give where data lack something that the task learns from."""
        if lacking in ("mask", "masks") and not getattr(data, "masks", True):
            return "--data.masks true reads the outlines of objects, where the data have some."
        if lacking == "target_mean":
            return "--data RegressionTable reads columns of numbers from a table."
        if lacking.startswith("label/"):
            return "--data.label_columns names the columns of a table that the network has learned."
        return f"Give data such as {self.default_data.rpartition('.')[2]}, the default of this task."

    def _spec(self, data: VisionDataModule) -> DataSpec:
        """Describes the data to the module, after class numbers have been aligned with a trained network's."""
        takes = (*self.module_class.takes, *self.module_class.takes_for_training)
        for name in takes:
            if name not in dir(data):  # not `hasattr`, which would try it
                has = MEANT.get(name, name)
                raise UsageError(f"{data.title} does not fit {self.task}: it has no {has}. {self._remedy(data, name)}")
        if "mask" in self.module_class.needs and isinstance(data, DetectionDataModule):
            raise UsageError(
                f"{data.title} has classes of objects, without the background that {self.task} needs: give data of class maps, such as "
                "COCOSegmentation, which reads the same annotations, or DigitMasks."
            )
        weighting = getattr(data, "class_weighting", "none")
        if weighting != "none" and "class_weights" not in takes:
            raise UsageError(
                f"--data.class_weighting {weighting} weights the classes in a loss, and that of {self.task} has no classes: leave it out."
            )
        known = {} if self.weights is None else self.weights.architecture
        if known and getattr(data, "bits", None) == "auto":  # as in the training, whatever these files reach
            vars(data)["bits"] = known.get("bit_depth", 8)
        if self.weights and self.weights.learned and self.subcommand in ("test", "predict"):
            take_unseen(data, self.weights)
        if self.weights and self.weights.classes:
            adopt_classes(data, self.weights.classes)
        if self.subcommand in ("fit", "preview"):
            data.transform(True)  # which says what is wrong with an augmentation
        spec = DataSpec.of(data, takes)
        with importing():  # what comes next needs these, while a mistake so far did not
            for name in ("modules.networks.registered", *(NEEDED if self.subcommand == "fit" else ())):
                import_module(name)
            if self.tracked:
                import_module("pipelines.tracking.logger")
        if not known:
            return spec
        return replace(spec, channel_mean=known.get("channel_mean"), channel_std=known.get("channel_std"))

    def before_instantiate_classes(self) -> None:
        """Checks the ranges of all numbers and the connection to MLflow, and chooses the output folder.

        Raises:
            UsageError: that is not so.
        """
        check_ranges(str(self.subcommand), self.options.as_dict())
        if self.subcommand == "fit":
            check_settings(self.options, self.module_class)
        if self.subcommand == "fit" and self.options.average != "none" and self.options.keep_best < 2:
            raise UsageError(
                f"--average {self.options.average} is of the best checkpoints, and --keep_best {self.options.keep_best} keeps one: "
                "give --keep_best 5, or leave --average out."
            )
        if self.options.tta != "none" and self.subcommand in ("fit", "preview"):
            raise UsageError(
                f"--tta {self.options.tta} is for validate, test and predict: {self.subcommand} looks at images as they are. "
                "Leave it out, and give it to test with the same --output."
            )
        named = each_of(self.options["import"])
        named = [os.path.abspath(name) if name.endswith(".py") else name for name in named]
        self.options["import"] = named or None  # so that the recipe of the training is of use in any folder
        files = [Path(name) for name in named if name.endswith(".py")]
        if self.options.register_code and not files:
            raise UsageError(
                "--register_code true lets the model carry the files of --import, and there are none: name them with their suffix, such "
                "as --import my_code.py, or leave it out."
            )
        if self.options.register_code and self.subcommand == "fit" and not self.options.register:
            raise UsageError(
                "--register_code true lets the registered model carry the files of --import, and none is registered: give --register "
                "NAME, or leave it out."
            )
        self.own_code = files if self.options.register_code else []
        if self.options.register:
            from pipelines.serving.registration import check_name

            check_name(self.options.register)
        self.tracked = self.options.trainer.logger is not False and not self.options.trainer.fast_dev_run
        if self.tracked or "models:/" in str(self.options.model):
            self._reach()
        self._choose_folder()
        if self.subcommand == "fit" and not _get_rank() and os.environ.get("NODE_RANK", "0") == "0":
            try:
                self._hold.enter_context(held(self.output, self._fresh))  # for all processes of the job
            except LockError as error:
                if launch.launcher() is None:
                    raise
                self._refused = error

    def _reach(self) -> None:
        """Checks that a server of MLflow answers. The embedded store always does, and MLflow's import takes longer than to
        tell of a wrong folder.

        Raises:
            TrackingError: it does not.
        """
        stores = (os.environ.get(f"MLFLOW_{name}_URI", "") for name in ("TRACKING", "REGISTRY"))
        if "mlflow" in sys.modules or any(uri.startswith("http") for uri in stores):
            with importing():
                from pipelines.tracking.client import reach

            reach()

    def _choose_folder(self) -> None:
        """Chooses the output folder and the run's name, and checks that the folder can be written to.

        Raises:
            UsageError: it cannot.
        """
        verb, stamp = str(self.subcommand), launch.stamp()
        backbone, data = self.options.model.backbone.name.split("/")[-1], self.options.data.class_path.split(".")[-1]
        name = "-".join([*([verb] if verb != "fit" else []), backbone, data, stamp]).lower()
        self.output, looks = Path(self.options.output or Path("outputs", self.task, name)), verb in LOOKS
        if looks:
            self._find_weights()
            self.output = own_folder(self.output, verb, stamp)
        self._fresh = not looks and not self.output.exists()
        try:
            if not looks and not self.options.output:
                self.output = new_folder(self.output)
                name = self.output.name
            try_to_write(self.output, make=not looks)  # else it is made when all is well
        except OSError as error:
            raise UsageError(
                f"The output folder {self.output.resolve()} cannot be written to ({error.strerror}): "
                "choose another with --output."
            ) from None
        if looks or not self.options.output:
            sys.argv += ["--output", str(self.output)]
        self.run_name = self.options.run_name or name

    def _find_weights(self) -> None:
        """Finds the weights to evaluate and the training that they come from.

        Raises:
            UsageError: there are none.
        """
        given = Path(self.options.ckpt_path or self.output / "best.ckpt")
        if self.subcommand != "preview":
            if not self.options.ckpt_path and not given.exists():
                raise UsageError(
                    "Which weights? Give the folder of a training with --output, or a file with --ckpt_path; "
                    f"{given} is neither."
                )
            self.weights = Weights.read(given)
            sys.argv += ["--ckpt_path", str(given)]
        if is_training(given.parent) and (given.parent / RUN_FILE).exists():
            self.training = given.parent

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        """Adds the tracked run, the checkpoints and the progress bar to the user's trainer settings."""
        config, data = self.options.trainer, self.datamodule
        if self.subcommand != "fit" and data.batch_size == "auto":
            data.batch_size = self.options.data.init_args.batch_size = type(data).batch_size
        if lacking := lacking_in(data, self.model):
            raise UsageError(
                f"{data.title} does not fit {self.task}: its samples have no {lacking}. {self._remedy(data, lacking)}"
            )
        if data.preprocessing.frames and "length" not in self.model.needs:
            raise UsageError(
                f"{data.title} has clips, which python -m pipelines.sequences learns from; {self.task} does not."
            )
        self._choose_monitor()
        if self.subcommand == "fit" and self.options.average != "none" and not self.model.automatic_optimization:
            raise UsageError(
                f"--average {self.options.average} is for one network, and {self.task} trains several against each other: leave it "
                "out; --model.optimization.ema_decay averages the generator's weights."
            )
        given = self._get(self.config_init, "trainer")
        extra: dict[str, Any] = {"default_root_dir": str(self.output), "callbacks": self._callbacks(given.callbacks)}
        start = self._begin()
        if self.tracked:
            from pipelines.tracking.logger import RunLogger

            extra["logger"] = RunLogger(self.output, self.options.experiment, self.run_name, self._tags() | start)
        elif config.fast_dev_run:
            extra["logger"] = False
        if not self.model.automatic_optimization:  # Lightning leaves these to a module with several optimisers
            for name, plain in (("accumulate_grad_batches", 1), ("gradient_clip_val", None)):
                setattr(self.model, name, given[name])
                extra[name] = plain
        if self.subcommand == "fit" and config.enable_checkpointing is False and not config.fast_dev_run:
            raise UsageError(
                "--trainer.enable_checkpointing false: a training keeps its checkpoints, from which it goes on and the best of "
                "which is tested. Leave it out; --trainer.fast_dev_run true tries a recipe without any."
            )
        launcher = launch.launcher()
        if launcher and config.devices == "auto":
            extra["num_nodes"] = launcher.nodes
            if config.accelerator == "cpu" or (config.accelerator == "auto" and not torch.accelerator.is_available()):
                extra["devices"] = launcher.on_this_node
        try:
            trainer = super().instantiate_trainer(**{**given, **extra})
        except (MisconfigurationException, ValueError, TypeError, ModuleNotFoundError, RuntimeError) as error:
            raise UsageError(
                f"The --trainer settings cannot be used: {' '.join(str(error).split())} See python -m pipelines.{self.task} fit --help."
            ) from error
        if launcher and (objection := launcher.objection(trainer.world_size)):
            raise UsageError(objection)
        for callback in settings_of(trainer).callbacks:
            if isinstance(callback, Timer) and self.subcommand == "fit":
                check_time(callback, "The callback Timer")
        return trainer

    def _choose_monitor(self) -> None:
        """Sets the metric that selects the best checkpoint.

        Raises:
            UsageError: it is none of the validation, or one of the two settings lacks.
        """
        monitor, mode = self.options.monitor, self.options.monitor_mode
        if (monitor is None) != (mode is None) or (monitor and not monitor.startswith("val/")):
            raise UsageError(
                "To choose the best checkpoint, name a validation figure and whether lower or higher is better: "
                f"--monitor val/NAME --monitor_mode min or max, not {monitor} and {mode}."
            )
        if monitor:
            self.model.monitor, self.model.mode = monitor, mode

    def _callbacks(self, given: Sequence[L.Callback] | None) -> list[L.Callback]:
        """The trainer's callbacks plus the given ones; the last checkpoint's comes last, so that it saves the state of
        all others."""
        config, fits = self.options.trainer, self.subcommand == "fit" and not self.options.trainer.fast_dev_run
        self.watch = RunCallback()
        callbacks: list[L.Callback] = [self.watch, Summary(), MonitorCheck(self.options.register if fits else None)]
        if config.enable_progress_bar is not False:
            callbacks.append(ProgressBar())
        if fits and config.enable_checkpointing is not False:
            best = BestCheckpoint(self.output, self.model.monitor, self.model.mode, self.options.monitor is not None)
            callbacks.append(best)
            if self.options.keep_best > 1:
                callbacks.append(KeptCheckpoints(self.output, self.options.keep_best, best))
        found_before = self.options.ckpt_path or (self.output / "last.ckpt").exists()  # the learning rate
        for callback in given or []:
            if not (found_before and isinstance(callback, LearningRateFinder)):
                callbacks.append(RateFinder.like(callback) if type(callback) is LearningRateFinder else callback)
        callbacks += self.callbacks
        if fits:
            callbacks.append(LastCheckpoint(self.output / "last.ckpt", self.options.checkpoint_seconds))
        return callbacks

    def _tags(self) -> dict[str, str]:
        """Tags by which the run can be found in MLflow."""
        data, backbone = self.options.data.class_path.split(".")[-1], self.options.model.backbone.name
        recipe = ", ".join(Path(str(file)).stem for file in self.options.config or [] if file)
        tags = {"task": self.task, "backbone": backbone, "data": data, "recipe": recipe}
        if self.training:
            from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID

            from pipelines.tracking.logger import run_id_of

            tags |= {"evaluates": run_id_of(self.training), MLFLOW_PARENT_RUN_ID: run_id_of(self.training)}
        if self.weights:
            tags["weights"] = str(self.weights.file)
        if backbone.startswith("models:/"):
            from pipelines.serving import registry

            tags["source_model"] = registry.pinned(backbone)
            size = sum(p.numel() for p in self.model.backbone.parameters())
            kind = self.model.backbone.recipe["backbone"]
            say(f"Starting from the backbone of {tags['source_model']}: {kind}, {size:,} parameters.")
        return tags

    def _begin(self) -> dict[str, str]:
        """Loads the weights of the network that a new training starts from.

        Returns:
            What the run is to say of it.

        Raises:
            UsageError: it does not fit, or is to be forgotten.
        """
        if self.start is None:
            return {}
        address = self.start.address
        if self.model.transfer == "scratch":
            raise UsageError(
                f"--model.backbone.transfer scratch discards what --start {address} would start from: leave one out."
            )
        try:
            said = warm_start(self.model, self.start.load())
        except BackboneError as error:
            raise UsageError(f"--start {address}: {error}") from None
        say(f"Starting from {address}: {said}")
        licence = {"weights_licence": self.model.licence} if self.model.licence else {}
        return {"source_model": address, **licence}
