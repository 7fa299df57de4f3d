"""The AdaNAGED callback: no learning rate and no smoothing radius to tune."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from zo_lightning.modules import ZOModule
from zo_lightning.optim import Gaussian, GeometryMap, ParameterFree, ZerothOrder
from zo_lightning.optim.groups import GeometrySpec

__all__ = ["AdaNAGED"]

_DEFAULT_EPOCHS = 1000  # what Lightning sets where neither max_steps nor max_epochs is given


class AdaNAGED(Callback):
    """Sets the step size γ and the smoothing radius τ of each step from what the run itself measures.

    The rule is :class:`~zo_lightning.optim.ParameterFree`; see there for the formulas and where they come from. The callback
    hands the geometry over to a :class:`~zo_lightning.modules.ZOModule` before its optimizer is made, takes the number of
    optimizer steps N from the Trainer, keeps the rule's state in the checkpoint, and logs every ``log_every_n_steps``

    * ``zo/lr`` (γ) and ``zo/smoothing`` (τ), both in the norm of the geometry,
    * ``zo/curvature`` (c̄, loss per squared length) and ``zo/gap`` (Δ, in units of the loss),
    * ``zo/gain``, the cross-validated decrease of the loss per unit of length,
    * ``zo/forwards``, the batch losses evaluated so far, and ``zo/skipped``, the steps skipped for a loss that was not finite.

    A learning-rate scheduler of the module multiplies γ and takes the place of the rule's own decay.

    Args:
        f_low: A lower bound of the loss; 0 for cross-entropy.
        attainable: φ, the share of the gap that the run is expected to close until it has shown more; in (0, 1].
        probe_rise: η, the share of the gap by which a probe may raise the loss.
        interval: K, steps between measurements of the curvature; each costs one forward.
        schedule: ``"linear"`` decay to zero at N, or ``"constant"``.
        geometry: Overrides of the default map from parameters to geometries; see :class:`~zo_lightning.optim.GeometryMap`.
        total_steps: N, where the Trainer does not know it or is to be overruled.

    Raises:
        ValueError: If an argument is out of its range or a geometry does not exist.
    """

    def __init__(
        self,
        f_low: float = 0.0,
        attainable: float = 0.1,
        probe_rise: float = 0.01,
        interval: int = 10,
        schedule: Literal["linear", "constant"] = "linear",
        geometry: dict[str, Any] | None = None,
        total_steps: int | None = None,
    ) -> None:
        self.f_low = f_low
        self.attainable = attainable
        self.probe_rise = probe_rise
        self.interval = interval
        self.schedule = schedule
        self.geometry: Mapping[str, GeometrySpec] | None = geometry
        self.total_steps = total_steps
        GeometryMap(geometry, directions=Gaussian())  # names and radii are checked here, patterns once there is a model
        self.rule = self._new_rule()
        self._skipped = 0

    # ---- set-up --------------------------------------------------------------------------------------------------------
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Hand the geometry over, and refuse early what could not work.

        Raises:
            MisconfigurationException: If the module is not a :class:`ZOModule`, there is another such callback, or the number
                of steps is not known.
        """
        if stage != "fit":
            return
        if not isinstance(pl_module, ZOModule):
            raise MisconfigurationException(
                f"AdaNAGED works with subclasses of zo_lightning.modules.ZOModule, which {type(pl_module).__name__} is not; "
                "other modules are not supported yet"
            )
        if sum(isinstance(callback, AdaNAGED) for callback in trainer.callbacks) > 1:  # type: ignore[attr-defined]
            raise MisconfigurationException("there are two AdaNAGED callbacks; keep one")
        if self.total_steps is None and trainer.max_steps == -1 and trainer.max_epochs == _DEFAULT_EPOCHS:
            raise MisconfigurationException(
                "the number of steps is not known: set max_steps (--trainer.max_steps) or max_epochs; "
                "AdaNAGED(total_steps=...) overrides both"
            )
        self.rule = self._new_rule()  # a second fit starts afresh
        self._skipped = 0
        if self.geometry is not None:
            pl_module.geometry = self.geometry

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Attach the rule to the optimizer, whose state is restored after this hook.

        Raises:
            MisconfigurationException: If the optimizer's steps are not normalised or it has a rule of its own.
        """
        optimizer = _optimizer_of(trainer)
        if not optimizer.update.normalised:
            raise MisconfigurationException(
                f"AdaNAGED needs steps of unit norm, which update={optimizer.update.name!r} does not take; use update='lmo'"
            )
        if optimizer.step_rule is not None:
            raise MisconfigurationException("the optimizer has a step_rule of its own; leave it or AdaNAGED out")
        optimizer.step_rule = self.rule
        if trainer.lr_scheduler_configs:
            self.rule.schedule = "constant"  # the user's schedule takes its place

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take N from the Trainer; only now, since asking it earlier would start the data loader before its restoration."""
        if self.total_steps is None:
            steps = trainer.estimated_stepping_batches
            self.rule.total_steps = None if steps == float("inf") else int(steps)

    # ---- each step -----------------------------------------------------------------------------------------------------
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log what the step measured, at the steps whose metrics the loggers write."""
        optimizer = _optimizer_of(trainer)
        report = optimizer.last
        assert report is not None
        self._skipped += not report.finite
        if trainer.global_step % trainer.log_every_n_steps:  # type: ignore[attr-defined]
            return  # Lightning spends some half a millisecond on each value
        pl_module.log_dict({"zo/lr": report.lr, "zo/smoothing": report.smoothing}, prog_bar=True)
        pl_module.log_dict(
            {
                "zo/curvature": self.rule.curvature,
                "zo/gap": self.rule.gap,
                "zo/gain": report.gain,
                "zo/forwards": float(optimizer.forwards),
                "zo/skipped": float(self._skipped),
            }
        )

    # ---- state ---------------------------------------------------------------------------------------------------------
    def state_dict(self) -> dict[str, Any]:
        """The rule's state and the number of skipped steps, as plain numbers."""
        return {"rule": self.rule.state_dict(), "skipped": self._skipped}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        self.rule.load_state_dict(state_dict["rule"])
        self._skipped = int(state_dict["skipped"])

    def _new_rule(self) -> ParameterFree:
        return ParameterFree(
            self.total_steps,
            f_low=self.f_low,
            attainable=self.attainable,
            probe_rise=self.probe_rise,
            interval=self.interval,
            schedule=self.schedule,
        )


def _optimizer_of(trainer: Trainer) -> ZerothOrder:
    optimizer = trainer.optimizers[0]
    assert isinstance(optimizer, ZerothOrder)  # ZOModule.configure_optimizers sees to it
    return optimizer
