"""The command line: ``zo-lightning {fit,validate,test,predict} --config configs/<something>.yaml``, ``export``, ``replay``."""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from typing import Any, NoReturn

from jsonargparse import Namespace, auto_cli
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, ProgressBar
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.exceptions import SIGTERMException

import zo_lightning.data
import zo_lightning.modules
import zo_lightning.optim.methods  # noqa: F401  (all imported so that their classes are found by their bare names)
from zo_lightning.callbacks import (
    Forecast,
    MetricsTable,
    PredictionWriter,
    ResumeCheckpoint,
    SpacedValidation,
    StepMetrics,
    ZOProgressBar,
)
from zo_lightning.commands import COMMANDS, command
from zo_lightning.console import one_line_errors, quiet
from zo_lightning.loggers import ResumableCSVLogger

__all__ = ["ZOCLI", "cli", "main"]


class ZOParser(LightningArgumentParser):
    """Lightning's parser, with errors that are not buried under a hundred lines of usage."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Say what is wrong with the arguments, and exit with code 2."""
        message = " ".join(message.split())
        if "is not accepted" in message:
            message += (
                "; the class in use has no such option, or has to be named before it: --model.optimizer ZerothOrder "
                "--model.optimizer.rank 4"
            )
        print(f"zo-lightning: error: {message} (--help lists the options)", file=sys.stderr)  # noqa: T201
        raise SystemExit(2) from None


class ZOCLI(LightningCLI):
    """Lightning's CLI with this package's defaults.

    Besides what the configuration lists under ``trainer.callbacks`` each run has a checkpoint of the best validation loss
    (``--checkpoint.*``) and one to go on from (``--resume.*``), validations spaced over the run (``--validation.times``), a
    progress bar, a forecast, a final table, and a ``metrics.csv`` under ``--trainer.default_root_dir``.

    ``--ckpt_path best`` and ``--ckpt_path last`` are the newest of these checkpoints under the root folder. ``fit --ckpt_path
    last`` goes on in the folder of that run, and starts a new one where there is none: the same command can be given until the
    run is done. Any other checkpoint starts a run in a folder of its own.
    """

    _checkpoint: str | None = None
    _version: int | None = None  # of the log folder to go on in

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the options that are not Lightning's."""
        parser.add_class_arguments(ModelCheckpoint, "checkpoint")
        parser.set_defaults(
            {
                "checkpoint.monitor": "val/loss",
                "checkpoint.filename": "best",
                "checkpoint.enable_version_counter": False,  # a better one takes the place of the best
            }
        )
        parser.add_class_arguments(ResumeCheckpoint, "resume")
        parser.add_class_arguments(SpacedValidation, "validation")
        parser.add_argument("--tensorboard", type=bool, default=False, help="Log for TensorBoard too.")

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parse, and set the checkpoint aside: Lightning lets its arguments overrule those given here."""
        super().parse_arguments(parser, args)
        self._checkpoint = self._options.pop("ckpt_path", None)

    def before_instantiate_classes(self) -> None:
        """Find the checkpoint that ``--ckpt_path best`` or ``last`` means: the newest kept under the root folder.

        Raises:
            FileNotFoundError: If there is none, unless it is to go on from.
        """
        if self._checkpoint in ("best", "last"):
            name = self._checkpoint
            found = self._newest(name)
            if found is None and (name == "best" or self.subcommand != "fit"):
                raise FileNotFoundError(
                    f"--ckpt_path {name}: no checkpoints/{name}.ckpt under {str(self._root)!r}; run fit first"
                )
            if found is None:
                rank_zero_info(f"--ckpt_path last: there is none under {str(self._root)!r}, so the run starts afresh")
            elif name == "last" and self.subcommand == "fit":
                _, _, version = found.parent.parent.name.partition("version_")
                self._version = int(version) if version.isdigit() else None
            self._checkpoint = None if found is None else str(found)
        if self.subcommand is not None:
            self._options["ckpt_path"] = self._checkpoint

    def _newest(self, name: str) -> Path | None:
        """The newest checkpoint of that name, in the folder given for it or in those of all runs."""
        options = self._options["checkpoint"] if name == "best" else self._resume
        folders = [self._root / "checkpoints", *self._root.glob("lightning_logs/*/checkpoints")]  # without and with a logger
        if options["dirpath"]:
            folders.append(Path(options["dirpath"]))
        file = f"{name if name == 'best' else options['filename']}.ckpt"
        found = [folder / file for folder in folders if (folder / file).is_file()]
        return max(found, key=lambda path: path.stat().st_mtime, default=None)

    @property
    def _resume(self) -> Namespace:
        """The arguments of the ResumeCheckpoint among the configuration's callbacks, which takes the place of ``--resume``."""
        given = self._options["trainer"]["callbacks"] or []
        for callback in given if isinstance(given, list) else [given]:
            if str(callback.get("class_path")).rpartition(".")[2] == ResumeCheckpoint.__name__:
                return callback["init_args"]
        return self._options["resume"]

    @property
    def _root(self) -> Path:
        return Path(self._options["trainer"]["default_root_dir"] or Path.cwd())

    @property
    def _options(self) -> Namespace:
        """The configuration, of the subcommand if there is one."""
        return self.config[self.config["subcommand"]] if "subcommand" in self.config else self.config

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Add the callbacks and the loggers that every run has."""
        config = self.config_init if self.subcommand is None else self.config_init[self.subcommand]
        trainer = config["trainer"]
        given = trainer["callbacks"] or []
        callbacks = list(given) if isinstance(given, list) else [given]
        callbacks += [config["validation"], Forecast(), StepMetrics(), MetricsTable(), PredictionWriter()]
        if trainer["enable_checkpointing"] is not False:
            callbacks.append(config["checkpoint"])
            if not any(isinstance(callback, ResumeCheckpoint) for callback in callbacks):
                callbacks.insert(0, config["resume"])
        if trainer["enable_progress_bar"] is not False and not any(isinstance(callback, ProgressBar) for callback in callbacks):
            callbacks.append(ZOProgressBar())
        if trainer["logger"] in (None, True):
            root = trainer["default_root_dir"] or Path.cwd()
            kwargs["logger"] = [ResumableCSVLogger(root, version=self._version)]
            if config["tensorboard"]:
                kwargs["logger"].append(TensorBoardLogger(root, version=kwargs["logger"][0].version))
        return super().instantiate_trainer(callbacks=callbacks, **kwargs)


def cli(args: ArgsType = None, run: bool = True) -> ZOCLI:
    """Make the command line; ``run=False`` only parses and instantiates, and takes no subcommand."""
    return ZOCLI(
        model_class=LightningModule,
        datamodule_class=LightningDataModule,
        parser_class=ZOParser,
        subclass_mode_model=True,
        subclass_mode_data=True,
        seed_everything_default=0,
        auto_configure_optimizers=False,
        # the configuration says what the model is; a checkpoint holds weights and state
        load_from_checkpoint_support=False,
        save_config_kwargs={"overwrite": True},
        trainer_defaults={
            "devices": 1,
            "enable_model_summary": False,  # the forecast says what is worth knowing
            "log_every_n_steps": 10,
            "num_sanity_val_steps": -1,  # a whole validation before the first step
        },
        parser_kwargs={"epilog": "; ".join(f"zo-lightning {name}: {what}" for name, what in COMMANDS.items())},
        args=args,
        run=run,
    )


def main(args: ArgsType = None) -> None:
    """Run the command line; a mistake of the user ends in one line and exit code 2.

    Args:
        args: Arguments; those of the process by default.
    """
    words = sys.argv[1:] if args is None else args
    with one_line_errors(), quiet():
        if isinstance(words, list) and words and words[0] in COMMANDS:
            name, *options = words
            told = {"prog": f"zo-lightning {name}", "description": f"{COMMANDS[name][0].upper()}{COMMANDS[name][1:]}."}
            auto_cli(command(name), args=options, parser_class=ZOParser, as_positional=False, **told)
        else:
            try:
                cli(args)
            except SIGTERMException:  # whose exit code is 0, as if the run were done
                raise SystemExit(128 + signal.SIGTERM) from None


if __name__ == "__main__":
    main()
