"""What a ledger holds of a run."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from zo_lightning.ledger.hashing import weights_hash
from zo_lightning.optim import DIRECTIONS, UPDATES, Directions, StepReport, ZerothOrder
from zo_lightning.optim import kernels as triton_kernels

__all__ = ["FINITE", "LedgerError", "Record", "directions_of", "environment_of"]

FINITE, BEGAN_WRITTEN, ENDED_WRITTEN = 1, 2, 4
"""Bits of a step's flags, named as in :class:`~zo_lightning.optim.StepReport`."""

_SETTINGS = ("geometry", "radius", "transposed", "momentum", "weight_decay")


class LedgerError(ValueError):
    """A run that no ledger can hold, a file that is not a sound ledger, or one that does not fit the model."""


@dataclass
class Record:
    """A run: what its directions are a function of, and a few numbers for each step.

    Attributes:
        base: :func:`~zo_lightning.ledger.weights_hash` of the module before the first step.
        buffers: The same of its persistent buffers alone.
        seed: Of the directions.
        directions: Their signature.
        update: Name of the update rule.
        attached: Whether the optimizer was attached to a module, which decides how low-rank updates are written.
        groups: For each parameter group its ``geometry``, ``radius``, ``transposed``, ``momentum``, ``weight_decay``, ``units``
            (None: all one), and ``parameters``: a list of name, dtype and shape.
        environment: What the last bits depend on: see :func:`environment_of`.
        final: ``weights_hash(module, buffers=False)`` after the last step, where the run came to its end.
        rates: For each step the step size of each group.
        slopes: For each step the directional derivative along each direction; zeros for a skipped step.
        flags: For each step the bits ``finite`` (1), ``began_written`` (2) and ``ended_written`` (4).
    """

    base: str
    buffers: str
    seed: int
    directions: str
    update: str
    attached: bool
    groups: list[dict[str, Any]]
    environment: dict[str, str]
    final: str | None = None
    rates: list[list[float]] = field(default_factory=list)
    slopes: list[list[float]] = field(default_factory=list)
    flags: list[int] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.flags)

    # ---- writing it ----------------------------------------------------------------------------------------------------
    @classmethod
    def begin(cls, optimizer: ZerothOrder, module: nn.Module) -> Record:
        """Begin a ledger, before the optimizer's first step.

        Args:
            optimizer: Takes the steps.
            module: Has the optimizer's parameters under the optimizer's names.

        Raises:
            LedgerError: If steps have been taken, or could not be replayed.
        """
        if optimizer.step_index:
            raise LedgerError(
                f"the run has taken {optimizer.step_index} steps that are in no ledger; go on from a checkpoint made with the "
                "Ledger callback, or start anew"
            )
        update, scheme = optimizer.update, optimizer.scheme
        kind = UPDATES.get(update.name)
        if kind is None or type(update) is not kind or vars(update) != vars(kind()) or not kind.replayable:
            raise LedgerError(
                f"a replay cannot make the update rule {update.name!r} of this run from its name; leave the Ledger callback out"
            )
        if optimizer.sampler is not None or scheme.name not in ("differences", "conservative"):
            raise LedgerError(
                "a ledger holds directional derivatives, and the steps of this method depend on more: those of "
                f"{scheme.name if optimizer.sampler is None else optimizer.sampler.name!r}; leave the Ledger callback out"
            )
        directions_of(optimizer.directions.signature(), optimizer.directions)
        theirs = {p: name for name, p in module.named_parameters()}
        for name, parameter in optimizer.named_parameters().items():
            if theirs.get(parameter) != name:
                raise LedgerError(
                    f"the optimizer knows a parameter as {name!r} that the module has as {theirs.get(parameter)!r}; make the "
                    "optimizer from module.named_parameters()"
                )
        return cls(
            base=weights_hash(module),
            buffers=weights_hash(module, parameters=False),
            seed=int(optimizer.param_groups[0]["seed"]),
            directions=optimizer.directions.signature(),
            update=optimizer.update.name,
            attached=optimizer._module is not None,
            groups=_groups_of(optimizer),
            environment=environment_of(optimizer.param_groups[0]["params"][0].device),
        )

    def go_on(self, optimizer: ZerothOrder) -> None:
        """Check that an optimizer whose state was loaded goes on where the ledger ends.

        Raises:
            LedgerError: If it does not.
        """
        if optimizer.step_index != len(self):
            raise LedgerError(
                f"the ledger of the checkpoint ends after {len(self)} steps, its optimizer has taken {optimizer.step_index}"
            )
        if not len(self):
            return
        if self.groups != (groups := _groups_of(optimizer)):
            different = next((i for i, (a, b) in enumerate(zip(self.groups, groups, strict=False)) if a != b), len(groups))
            raise LedgerError(
                f"parameter group {different} is not that of the ledger in the checkpoint; resume with the same settings"
            )
        self._check(optimizer)
        # updates written so far seed the rounding; an optimizer that was detached has lost their number, and its momentum
        applied = getattr(optimizer._path, "_applied", None)
        if applied not in (None, sum(flags & FINITE for flags in self.flags)):
            raise LedgerError(
                "the checkpoint was made after its fit had ended, from where no run goes on as it would have; resume from one "
                "that was made during the fit"
            )
        here = environment_of(optimizer.param_groups[0]["params"][0].device)
        for key, value in self.environment.items():
            if here[key] not in value.split(", "):
                self.environment[key] = f"{value}, {here[key]}"

    def add(self, optimizer: ZerothOrder) -> None:
        """Take in the step that the optimizer has just taken; nothing if it is in already.

        Raises:
            LedgerError: If a step before it is missing, or a setting has changed on which replays depend.
        """
        if optimizer.step_index == len(self):
            return
        report = optimizer.last
        if report is None or report.step != len(self) or optimizer.step_index != len(self) + 1:
            raise LedgerError(
                f"the ledger ends after {len(self)} steps and the optimizer has taken {optimizer.step_index}: one was missed"
            )
        if not len(self):
            self.groups = _groups_of(optimizer)  # the units of length are measured in the first step
        self._check(optimizer)
        if self.slopes and len(report.slopes) != len(self.slopes[0]):
            raise LedgerError(
                f"step {report.step} has {len(report.slopes)} directions, the ones before had {len(self.slopes[0])}"
            )
        self.rates.append([float(rate) for rate in report.rates])
        self.slopes.append([float(slope) if report.finite else 0.0 for slope in report.slopes])
        self.flags.append(report.finite * FINITE + report.began_written * BEGAN_WRITTEN + report.ended_written * ENDED_WRITTEN)
        self.final = None

    def _check(self, optimizer: ZerothOrder) -> None:
        """Settings that others may change between steps; names and shapes are compared once."""
        now = [("seed", self.seed, optimizer.param_groups[0]["seed"])]
        now.append(("the number of parameter groups", len(self.groups), len(optimizer.param_groups)))
        for index, (ours, group) in enumerate(zip(self.groups, optimizer.param_groups, strict=False)):
            now += [(f"{key} of parameter group {index}", ours[key], group[key]) for key in _SETTINGS]
            now.append((f"the size of parameter group {index}", len(ours["parameters"]), len(group["params"])))
        for what, before, after in now:
            if before != after:
                raise LedgerError(
                    f"{what} changed from {before!r} to {after!r} at step {len(self)}; a ledger holds one for the whole run"
                )

    # ---- reading it ----------------------------------------------------------------------------------------------------
    @property
    def signs_suffice(self) -> bool:
        """Whether the sign of each slope decides its step: normalised steps along one direction, without momentum."""
        alone = not self.slopes or len(self.slopes[0]) == 1
        return self.update == "lmo" and alone and not any(group["momentum"] for group in self.groups)

    def reports(self, steps: int | None = None) -> Iterator[StepReport]:
        """The steps for :meth:`~zo_lightning.optim.ZerothOrder.retake`; the first ``steps`` of them, or all."""
        for step in range(len(self) if steps is None else steps):
            flags = self.flags[step]
            yield StepReport(
                step=step,
                loss=float("nan"),
                slopes=self.slopes[step],
                gain=float("nan"),
                finite=bool(flags & FINITE),
                rates=self.rates[step],
                began_written=bool(flags & BEGAN_WRITTEN),
                ended_written=bool(flags & ENDED_WRITTEN),
            )


def directions_of(signature: str, like: Directions | None = None) -> Directions:
    """Make directions from their signature, for example ``low_rank(rank=1, interval=50)``.

    Args:
        signature: See :meth:`~zo_lightning.optim.Directions.signature`.
        like: What they have to be equal to.

    Raises:
        LedgerError: If this version has no such family, or it has other settings.
    """
    match = re.fullmatch(r"(\w+)(?:\(((?:\w+=\d+(?:, )?)*)\))?", signature)
    made = None
    if match is not None and match[1] in DIRECTIONS:
        settings = dict(part.split("=") for part in (match[2] or "").split(", ") if part)
        try:
            made = DIRECTIONS[match[1]](**{key: int(value) for key, value in settings.items()})
        except TypeError:  # settings that it does not have
            made = None
    if made is None or made.signature() != signature or (like is not None and type(like) is not type(made)):
        raise LedgerError(
            f"a replay cannot make the directions {signature!r} from their signature; leave the Ledger callback out, or use "
            "low_rank, gaussian, rademacher, sphere, subspace or subzero"
        )
    return made


def environment_of(device: torch.device) -> dict[str, str]:
    """What the last bits of directions and updates depend on, besides the ledger.

    Args:
        device: Of the parameters.

    Returns:
        Version of ``torch``, type of the ``device``, its name under ``accelerator``, vector instructions of the ``cpu``
        (low-rank directions are always drawn there), ``threads`` (a sum's order depends on them), precision of ``matmul``, and
        whether Triton's ``kernels`` draw dense directions, which makes them other numbers.
    """
    return {
        "torch": str(torch.__version__),
        "device": device.type,
        "accelerator": torch.cuda.get_device_name(device) if device.type == "cuda" else "none",
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "threads": str(torch.get_num_threads()),
        "matmul": torch.get_float32_matmul_precision(),
        "kernels": "yes" if triton_kernels.available(device) else "no",
    }


def _groups_of(optimizer: ZerothOrder) -> list[dict[str, Any]]:
    groups = []
    for group in optimizer.param_groups:
        units = group["units"]
        parameters = [
            [name, str(p.dtype).removeprefix("torch."), list(p.shape)]
            for name, p in zip(group["param_names"], group["params"], strict=True)
        ]
        groups.append(
            {
                **{key: group[key] for key in _SETTINGS},
                "units": None if units is None or all(unit == 1 for unit in units) else list(units),
                "parameters": parameters,
            }
        )
    return groups
