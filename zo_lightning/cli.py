"""The command line: ``zo-lightning {fit,validate,test,predict} --config configs/<something>.yaml``, ``export``, ``replay``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, NoReturn

from jsonargparse import Namespace, auto_cli
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, ProgressBar
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

import zo_lightning.data
import zo_lightning.modules  # noqa: F401  (both imported so that their classes are found by their bare names)
from zo_lightning.callbacks import Forecast, MetricsTable, PredictionWriter, SpacedValidation, ZOProgressBar
from zo_lightning.commands import COMMANDS, command
from zo_lightning.console import one_line_errors, quiet

__all__ = ["ZOCLI", "cli", "main"]


class ZOParser(LightningArgumentParser):
    """Lightning's parser, with errors that are not buried under a hundred lines of usage."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Say what is wrong with the arguments, and exit with code 2."""
        message = " ".join(message.split())
        print(f"zo-lightning: error: {message} (--help lists the options)", file=sys.stderr)  # noqa: T201
        raise SystemExit(2) from None


class ZOCLI(LightningCLI):
    """Lightning's CLI with this package's defaults.

    Besides what the configuration lists under ``trainer.callbacks`` each run has a checkpoint of the best validation loss
    (``--checkpoint.*``), validations spaced over the run (``--validation.times``), a progress bar, a forecast, a final table,
    and a ``metrics.csv`` under ``--trainer.default_root_dir``.
    """

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
        parser.add_class_arguments(SpacedValidation, "validation")
        parser.add_argument("--tensorboard", type=bool, default=False, help="Log for TensorBoard too.")

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parse, and set the checkpoint aside: Lightning lets its arguments overrule those given here."""
        super().parse_arguments(parser, args)
        self._checkpoint = self._options.pop("ckpt_path", None)

    def before_instantiate_classes(self) -> None:
        """Find the checkpoint that ``--ckpt_path best`` means: the newest kept under the root folder."""
        if self._checkpoint == "best":
            root = Path(self._options["trainer"]["default_root_dir"] or Path.cwd())
            folders = ("checkpoints", "lightning_logs/*/checkpoints")  # without and with a logger
            found = [path for folder in folders for path in root.glob(f"{folder}/best.ckpt")]
            if not found:
                raise FileNotFoundError(f"--ckpt_path best: no checkpoints/best.ckpt under {str(root)!r}; run fit first")
            self._checkpoint = str(max(found, key=lambda path: path.stat().st_mtime))
        if self.subcommand is not None:
            self._options["ckpt_path"] = self._checkpoint

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
        callbacks += [config["validation"], Forecast(), MetricsTable(), PredictionWriter()]
        if trainer["enable_checkpointing"] is not False:
            callbacks.append(config["checkpoint"])
        if trainer["enable_progress_bar"] is not False and not any(isinstance(callback, ProgressBar) for callback in callbacks):
            callbacks.append(ZOProgressBar())
        if trainer["logger"] in (None, True):
            root = trainer["default_root_dir"] or Path.cwd()
            kwargs["logger"] = [CSVLogger(root)]
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
            cli(args)
