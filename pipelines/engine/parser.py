"""The arguments that all tasks' command lines share."""

import re
import sys
from collections.abc import Sequence
from difflib import get_close_matches
from enum import Enum
from typing import Any, Literal

import yaml
from jsonargparse import ArgumentError
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from typing_extensions import override

from datamodules import VisionDataModule
from modules import VisionModule
from modules.checkpoints import read_checkpoint
from modules.ranges import Mirroring, NonNegative, PositiveInt
from pipelines.engine.averaging import Average
from pipelines.engine.command import UsageError, know_data
from pipelines.engine.launch import launcher
from pipelines.engine.process import importing
from pipelines.engine.recipes import class_of, recipes
from pipelines.engine.settings import read_former_names
from pipelines.engine.task import SUBCOMMANDS
from pipelines.engine.trainer import VisionTrainer

# jsonargparse writes settings as YAML, also defaults such as the interval of Lightning's Timer.
yaml.SafeDumper.add_multi_representer(Enum, lambda dumper, value: dumper.represent_data(value.value))


class TaskParser(LightningCLI):
    """Argument parser of a task's subcommands; Lightning builds the data module, the module and the trainer from them.

    Args:
        task: its name.
        module_class: what learns.
        default_data: class path of the data that is taken where none is named.
        args: the command line.
    """

    def __init__(
        self,
        task: str,
        module_class: type[VisionModule],
        default_data: str,
        args: Sequence[str],
    ) -> None:
        self.task, self.module_class, self.default_data = task, module_class, default_data
        self._named = [name for name in SUBCOMMANDS if name in args] or [*SUBCOMMANDS]
        read_former_names()
        own, sys.argv = sys.argv, [sys.argv[0], *args]  # what Lightning starts the other processes of a node with
        # Only this task's own command can be started once more for each GPU.
        started = getattr(sys.modules["__main__"].__spec__, "name", "").rpartition(".")[2] == task
        usage = "python -m pipelines.%s %s [--config RECIPE.yaml] [--data NAME] [--backbone NAME] [--SETTING VALUE …]"
        try:
            super().__init__(
                module_class,
                VisionDataModule,
                trainer_class=VisionTrainer,
                subclass_mode_data=True,
                save_config_callback=None,
                seed_everything_default=0,
                auto_configure_optimizers=False,
                trainer_defaults={
                    "max_epochs": 12,
                    "use_distributed_sampler": False,
                    "num_sanity_val_steps": 0,
                    "enable_model_summary": False,
                    **({} if started or launcher() else {"devices": 1}),
                },
                parser_kwargs={
                    "exit_on_error": False,
                    "prog": f"python -m pipelines.{task}",
                    **{
                        name: {"usage": usage % (task, name), "description": text, "exit_on_error": False}
                        for name, text in SUBCOMMANDS.items()
                    },
                },
                args=list(args),
            )
        finally:
            sys.argv = own

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """The subcommands, with the trainer-method arguments that are hidden from users."""
        ours = {"model", "datamodule", "dataloaders", "train_dataloaders", "val_dataloaders"}
        return {name: ours | {"ckpt_path", "verbose", "weights_only", "return_predictions"} for name in SUBCOMMANDS}

    @override
    @importing()
    def setup_parser(self, *args: Any, **kwargs: Any) -> None:
        super().setup_parser(*args, **kwargs)

    @override
    @importing()
    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        try:
            super().parse_arguments(parser, args)
        except ArgumentError as error:
            if strange := re.search(r"(?:unrecognized arguments: --|does not accept option ')([\w.]+)", str(error)):
                given: Any = parser
                known = given._subcommands_action.choices[self._named[0]]._option_string_actions
                if near := get_close_matches(f"--{strange[1]}", known, 1, 0.8):
                    raise UsageError(f"{self.task} has no setting --{strange[1]}. Did you mean {near[0]}?") from None
                if "does not accept" in str(error) and (files := recipes(args)):
                    raise UsageError(
                        f"{' or '.join(files)} has the setting {strange[1]}, which {self.task} does not: is it the recipe of another "
                        "task?"
                    ) from None
            raise

    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> LightningArgumentParser:
        """Adds arguments only to the subcommand in use, since jsonargparse takes a good part of a second for each."""
        if subcommand not in self._named:
            return self.init_parser(**kwargs)
        return super()._prepare_subcommand_parser(klass, subcommand, **kwargs)

    def add_core_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Puts the most common settings first in the help."""
        parser.add_lightning_class_args(self._datamodule_class, "data", subclass_mode=True)
        parser.add_lightning_class_args(self._model_class, "model")
        parser.add_lightning_class_args(self.trainer_class, "trainer")
        parser.set_defaults({f"trainer.{key}": value for key, value in self.trainer_defaults.items()})

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Adds the settings of a run, and links the data's properties to the module's arguments."""
        parser.add_argument("--output", type=str | None, default=None,
                            help="folder of the training; an interrupted one is resumed. Default: a new one in outputs/")  # fmt: skip
        parser.add_argument("--experiment", type=str, default=self.task, help="MLflow experiment")
        parser.add_argument("--run_name", type=str | None, default=None, help="name of the run in MLflow")
        parser.add_argument("--register", type=str | None, default=None,
                            help="fit: register the best model under this name in the MLflow registry")  # fmt: skip
        parser.add_argument("--start", type=str | None, default=None,
                            help="fit: start from a trained network, with its architecture and all weights that fit: "
                            "models:/NAME@ALIAS, a folder of `registry load`, or a best.ckpt")  # fmt: skip
        parser.add_argument("--monitor", type=str | None, default=None,
                            help="validation metric that selects the best checkpoint, such as val/f1. Default: the task's")  # fmt: skip
        parser.add_argument("--monitor_mode", type=Literal["min", "max"] | None, default=None,
                            help="whether lower (min) or higher (max) is better")  # fmt: skip
        parser.add_argument("--keep_best", type=PositiveInt, default=1,
                            help="fit: number of best checkpoints to keep: best.ckpt, and from 2 on all of them as kept/STEP.ckpt")  # fmt: skip
        parser.add_argument("--average", type=Average, default="none",
                            help="fit: test and register the average of the kept checkpoints if it validates better: of all of them "
                            "(uniform), or of those that do not lower the metric (greedy)")  # fmt: skip
        parser.add_argument("--tta", type=Mirroring, default="none",
                            help="validate, test, predict: test-time augmentation. Predictions are averaged over the image and its "
                            "mirror image (flip), and also over both upside down (flips)")  # fmt: skip
        parser.add_argument("--import", type=list[str] | str | None, default=None,
                            help="file or module with your own code, such as my_code.py: networks that it registers with timm "
                            "and classes that it defines can be named like Fovea's")  # fmt: skip
        parser.add_argument("--register_code", type=bool, default=False,
                            help="the registered model carries the files of --import, which nothing runs by itself")  # fmt: skip
        parser.add_argument("--ckpt_path", type=str | None, default=None,
                            help="checkpoint to resume or to evaluate. Default: the one in --output")  # fmt: skip
        parser.add_argument("--checkpoint_seconds", type=NonNegative, default=300,
                            help="fit: maximum number of seconds between two checkpoints")  # fmt: skip
        # jsonargparse carries the default values of one class over to the next: those of the class that is asked for
        # have to stand there from the beginning
        parts = {action.dest: action.default for action in parser._actions if action.dest.startswith("model.")}
        defaults = {"data": self.default_data} | {
            option: part["class_path"]
            for option, part in parts.items()
            if isinstance(part, dict) and "class_path" in part
        }
        asked = class_of("data", sys.argv[1:], self.default_data).rpartition(".")[2]
        know_data(*(() if {"-h", "--help"} & {*sys.argv} else (asked,)))
        for option, default in defaults.items():
            try:
                parser.set_defaults({option: {"class_path": class_of(option, sys.argv[1:], default)}})
            except (
                ValueError,
                ImportError,
                AttributeError,
            ):  # no class has that name, as is told when arguments are read
                parser.set_defaults({option: {"class_path": default}})
        parser.link_arguments("seed_everything", "data.init_args.seed")

    def _set_seed(self) -> None:
        """Seeds all random generators.

        Raises:
            UsageError: the seed is none.
        """
        seed = self._get(self.config, "seed_everything")
        if isinstance(seed, bool) or not 0 <= seed < 2**32:
            raise UsageError(f"--seed_everything (or --seed) must be a whole number from 0 to {2**32 - 1}, not {seed}.")
        super()._set_seed()

    def _parse_ckpt_path(self) -> None:
        """Checks that the given checkpoint is readable; the network comes from the recipe, not from the checkpoint."""
        subcommand = self.config.get("subcommand")
        if subcommand and (path := self.config[subcommand].get("ckpt_path")):
            read_checkpoint(path)

    @property
    def options(self) -> Any:
        """Settings of the chosen subcommand."""
        return self.config[self.subcommand]
