"""The AdaNAGED callback: no learning rate and no smoothing radius to tune."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from zo_lightning.callbacks.refusals import refuse
from zo_lightning.callbacks.step_metrics import log_step
from zo_lightning.callbacks.takeover import TakeOver, give_rule
from zo_lightning.modules import ZOModule, planned_steps
from zo_lightning.optim import Gaussian, GeometryMap, ParameterFree, ZerothOrder
from zo_lightning.optim.groups import GeometrySpec

__all__ = ["AdaNAGED"]

_STATE = "zo_lightning_takeover"  # key of a checkpoint
_SHARES = (0.1, 0.01)  # φ and η
_SHARES_OF_DECISIONS = (0.5, 0.05)  # a single decision of a batch is a few per cent
_DEFAULT_EPOCHS = 1000  # what Lightning sets where neither max_steps nor max_epochs is given


class AdaNAGED(Callback):
    """Sets the step size γ and the smoothing radius τ of each step from what the run itself measures.

    The rule is :class:`~zo_lightning.optim.ParameterFree`; see there for the formulas and where they come from. The callback
    hands the geometry over to a :class:`~zo_lightning.modules.ZOModule` before its optimizer is made, takes the number of
    optimizer steps N from the Trainer, keeps the rule's state in the checkpoint, and logs every ``log_every_n_steps``

    * ``zo/lr`` (γ) and ``zo/smoothing`` (τ), both in the norm of the geometry,
    * ``zo/curvature`` (c̄, loss per squared length) and ``zo/gap`` (Δ, in units of the loss),
    * ``zo/gain``, the cross-validated decrease of the loss per unit of length,
    * ``zo/forwards``, the batch losses evaluated so far, ``zo/skipped``, the steps skipped for a loss that was not finite, and
      ``zo/recalibrations``, how often the loss has exploded.

    A learning-rate scheduler of the module multiplies γ and takes the place of the rule's own decay.

    **Any other LightningModule** with automatic optimization is taken over as it is: its ``training_step`` is evaluated at the
    points of the step, under ``no_grad``, and nothing calls ``backward``. The parameters are those of the optimizer that its
    ``configure_optimizers`` makes, which is never stepped itself; its schedulers, and the Trainer's
    ``accumulate_grad_batches``, work as before. Logs, metrics and running statistics are those of one evaluation of each batch.
    All is undone at the end of the fit. What cannot be served is refused at its start.

    Note:
        Between two evaluations only what :func:`~zo_lightning.callbacks.muting.muted` lists is put back: a ``training_step``
        that writes a file, or counts in an object of a class of its own, does so at every evaluation. In a module that is
        taken over the update may reach the weights some steps late (forwards, ``state_dict`` and checkpoints hold it all the
        same), unless the module or a callback has a hook that runs between two steps: then it is written at once.

    Args:
        f_low: A lower bound of the loss; 0 for cross-entropy.
        attainable: φ, the share of the gap that the run is expected to close until it has shown more; in (0, 1]. None is 0.1,
            or 0.5 for a loss that counts decisions.
        probe_rise: η, the share of the gap by which a probe may raise the loss. None is 0.01, or 0.05 for a loss that counts
            decisions.
        interval: K, steps between measurements of the curvature; each costs one forward.
        schedule: ``"linear"`` decay to zero at N, or ``"constant"``.
        geometry: Overrides of the default map from parameters to geometries; see :class:`~zo_lightning.optim.GeometryMap`.
        total_steps: N, where the Trainer does not know it or is to be overruled.
        optimizer: Makes the :class:`~zo_lightning.optim.ZerothOrder` for a module that is taken over, by default one with its
            own defaults; a ``ZOModule`` has an argument of its own.
        f_high: An upper bound of a loss that counts decisions, such as one less an accuracy, see
            :class:`~zo_lightning.optim.ParameterFree`; None asks a ``ZOModule`` for its ``f_high``.

    Attributes:
        rule: The parameter-free rule.
        optimizer: The optimizer of the run, from ``on_fit_start`` on.

    Raises:
        ValueError: If an argument is out of its range or a geometry does not exist.
    """

    def __init__(
        self,
        f_low: float = 0.0,
        attainable: float | None = None,
        probe_rise: float | None = None,
        interval: int = 10,
        schedule: Literal["linear", "constant"] = "linear",
        geometry: dict[str, Any] | None = None,
        total_steps: int | None = None,
        optimizer: OptimizerCallable | None = None,
        f_high: float | None = None,
    ) -> None:
        self.f_low = f_low
        self.f_high = f_high
        self.attainable = attainable
        self.probe_rise = probe_rise
        self.interval = interval
        self.schedule = schedule
        self.geometry: Mapping[str, GeometrySpec] | None = geometry
        self.total_steps = total_steps
        GeometryMap(geometry, directions=Gaussian())  # names and radii are checked here, patterns once there is a model
        self.rule = self._new_rule(f_high)
        self.optimizer: ZerothOrder | None = None
        self._make_optimizer = optimizer
        self._takeover: TakeOver | None = None
        self._restored: dict[str, Any] | None = None
        self._kept: dict[str, Any] | None = None
        self._skipped = 0
        self._seen = 0

    # ---- set-up --------------------------------------------------------------------------------------------------------
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Hand the geometry over, or take the module over, and refuse early what could not work.

        Raises:
            MisconfigurationException: If there is another such callback, the number of steps is not known, or the module cannot
                be taken over.
        """
        if stage != "fit":
            return
        if sum(isinstance(callback, AdaNAGED) for callback in trainer.callbacks) > 1:  # type: ignore[attr-defined]
            raise MisconfigurationException("there are two AdaNAGED callbacks; keep one")
        if self.total_steps is None and trainer.max_steps == -1 and trainer.max_epochs == _DEFAULT_EPOCHS:
            raise MisconfigurationException(
                "the number of steps is not known: set max_steps (--trainer.max_steps) or max_epochs; "
                "AdaNAGED(total_steps=...) overrides both, and is the way where 1000 epochs (Lightning's default) are meant"
            )
        bound = getattr(pl_module, "f_high", None) if isinstance(pl_module, ZOModule) else None
        self.rule = self._new_rule(bound if self.f_high is None else self.f_high)  # a second fit starts afresh
        self.optimizer = self._restored = self._kept = self._takeover = None
        self._skipped = self._seen = 0
        if not isinstance(pl_module, ZOModule):
            refuse(trainer, pl_module, self)
            self._takeover = TakeOver(trainer, pl_module)
        elif self._make_optimizer is not None:
            raise MisconfigurationException(
                f"AdaNAGED(optimizer=...) is for modules that are taken over; {type(pl_module).__name__} makes its own: give "
                "it the argument"
            )
        elif self.geometry is not None:
            pl_module.geometry = self.geometry

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Attach the rule to the optimizer, whose state is restored after this hook.

        Raises:
            MisconfigurationException: If the optimizer's steps are not normalised or it has a rule of its own.
        """
        if self._takeover is not None:
            self.optimizer = self._takeover.start(self._make_optimizer or ZerothOrder, self.geometry, self.rule, self._restored)
            self._restored = None
        else:
            if getattr(pl_module, "first_order", False):
                raise MisconfigurationException("AdaNAGED takes zeroth-order steps; first_order=True takes none: remove one")
            (self.optimizer,) = trainer.optimizers  # type: ignore[assignment]
            assert isinstance(self.optimizer, ZerothOrder)  # ZOModule.configure_optimizers sees to it
            give_rule(self.optimizer, self.rule)
        if trainer.lr_scheduler_configs:
            self.rule.schedule = "constant"  # the user's schedule takes its place

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take N from the Trainer; only now, since asking it earlier would start the data loader before its restoration."""
        assert self.optimizer is not None
        self._seen = self.optimizer.step_index
        if self.total_steps is None:
            # steps that the Trainer has counted before this optimizer was made (a second `fit`) are not this run's
            steps = planned_steps(trainer) - (trainer.global_step - self.optimizer.step_index)
            self.rule.total_steps = None if steps == float("inf") else max(1, int(steps))

    # ---- each step -----------------------------------------------------------------------------------------------------
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log what the step measured, at the steps whose metrics the loggers write."""
        assert self.optimizer is not None
        if self.optimizer.step_index == self._seen:
            return  # the batch was a part of a step's
        self._seen = self.optimizer.step_index
        report = self.optimizer.last
        assert report is not None
        self._skipped += not report.finite
        every = trainer.log_every_n_steps  # type: ignore[attr-defined]
        if not every or trainer.global_step % every:  # 0: no logging, as in Trainer(barebones=True)
            return  # Lightning spends some half a millisecond on each value
        rule = self.rule
        more = {"curvature": rule.curvature, "gap": rule.gap, "recalibrations": float(rule.recalibrations)}
        log_step(pl_module, report, self.optimizer.forwards, self._skipped, **more)

    # ---- the end -------------------------------------------------------------------------------------------------------
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave a module that was taken over as it was."""
        self._let_go()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """See :meth:`on_fit_end`; for runs that end before."""
        self._let_go()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """See :meth:`on_fit_end`; checkpoints that other callbacks save now hold the state of a run that goes on."""
        if self._takeover is not None and self._takeover.optimizer is not None:
            self._kept = self._takeover.state_dict()
        self._let_go()

    def _let_go(self) -> None:
        if self._takeover is not None:
            self._takeover.undo()

    # ---- state ---------------------------------------------------------------------------------------------------------
    def state_dict(self) -> dict[str, Any]:
        """The rule's state and the number of skipped steps, as plain numbers."""
        return {"rule": self.rule.state_dict(), "skipped": self._skipped}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        self.rule.load_state_dict(state_dict["rule"])
        self._skipped = int(state_dict["skipped"])

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Keep the state of an optimizer that the Trainer does not know of."""
        if self._kept is not None:
            checkpoint[_STATE] = self._kept
        elif self._takeover is not None and self._takeover.optimizer is not None:
            checkpoint[_STATE] = self._takeover.state_dict()

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Put it aside until there is an optimizer.

        Raises:
            MisconfigurationException: If the checkpoint of a module that is taken over has no such state.
        """
        self._restored = checkpoint.get(_STATE)
        if self._takeover is not None and self._restored is None:
            raise MisconfigurationException(
                "the checkpoint holds no state of AdaNAGED, so that the run cannot go on from it; load its weights instead: "
                "Trainer.fit without ckpt_path, on a module from load_from_checkpoint"
            )

    def _new_rule(self, f_high: float | None) -> ParameterFree:
        attainable, probe_rise = _SHARES if f_high is None else _SHARES_OF_DECISIONS
        return ParameterFree(
            self.total_steps,
            f_low=self.f_low,
            f_high=f_high,
            attainable=attainable if self.attainable is None else self.attainable,
            probe_rise=probe_rise if self.probe_rise is None else self.probe_rise,
            interval=self.interval,
            schedule=self.schedule,
        )
