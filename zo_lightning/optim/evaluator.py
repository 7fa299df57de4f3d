"""Run the closure of a step: one world for all evaluations, several of them at once where the losses allow it."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from zo_lightning.optim.displacement import Displacement, eager
from zo_lightning.optim.shown.base import meetings, unrepeated
from zo_lightning.optim.world import World

__all__ = ["Evaluator", "Stacked", "is_out_of_memory"]

_log = logging.getLogger(__name__)

Closure = Callable[[], Any]
Stacked = Callable[[int], Any]
Show = Callable[[Sequence[Any]], AbstractContextManager[None]]

UNTRIED, TRUSTED, OFF = "untried", "trusted", "off"
_UNRESOLVED_TRIES = 10  # steps whose comparisons see no difference between the points, after which stacking is trusted


class Evaluator:
    """Evaluates a batch's losses at displaced weights.

    Evaluations all see the same random numbers and buffers. ``stacked`` serves if it gives the losses of ``copies`` batches
    one after the other; the first time, it is compared with one evaluation after the other.

    Args:
        closure: Returns the loss of the batch, a scalar or the losses per example.
        stacked: ``stacked(copies)`` returns the losses of that many copies of the batch in one forward; or None.
        module: The module, if known, whose buffers are kept.
        displacement: Knows the layers that may take statistics over the batch, and how the weights were used.
        devices: Devices whose random state is kept.
        state: ``"untried"``, ``"trusted"`` or ``"off"``: whether stacking is used, from the step before.
        unresolved: Steps so far whose comparisons have not resolved the differences between the points.
        insist: Whether it is an error if stacking is not possible.
        count: Called with the number of batch losses that were evaluated.
    """

    def __init__(
        self,
        closure: Closure,
        stacked: Stacked | None,
        module: nn.Module | None,
        displacement: Displacement,
        devices: set[torch.device],
        state: str,
        unresolved: int,
        insist: bool,
        count: Callable[[int], None],
    ) -> None:
        self._closure, self._stacked = closure, stacked
        self._world = World(module, devices, displacement.generators)
        self._module, self._displacement = module, displacement
        self._count, self._insist = count, insist
        self._calls = 0
        self.unresolved, self._counted = unresolved, False
        self.state = UNTRIED if insist and state == OFF else state
        self.given = stacked is not None

    def one(self) -> Tensor:
        """The losses of the batch, shape (n,) or (1,), float32 or wider."""
        losses = self._run(self._closure)
        self._count(1)
        return losses

    def at(self, points: Sequence[Any], show: Show, *, stackable: bool = True) -> list[Tensor]:
        """Losses at several points.

        Args:
            points: The points, as ``show`` takes them.
            show: Context in which a forward sees the weights of the given points, each in its part of the batch.
            stackable: Whether it can show several at once.

        Returns:
            The losses at each point.
        """
        if len(points) == 1 or not self.given or not stackable or self.state == OFF:
            return self._sequential(points, show)
        if self._batch_coupled():
            if self._insist:
                raise _impossible("a layer takes statistics over the batch")
            return self._sequential(points, show)
        if self.state == TRUSTED:
            losses = self._try(points, show)
            return self._sequential(points, show) if losses is None else losses
        losses = self._sequential(points[:-1], show)
        with meetings() as one, eager():
            losses += self._sequential(points[-1:], show)
        if losses[0].numel() == 1:
            self._off("the loss is one number for the whole batch", quiet=True)
        else:
            # the random state stays as one evaluation leaves it
            with self._world.kept(), meetings() as many, eager():
                stacked = self._try(points, show)
            if stacked is not None and (reason := unrepeated(one, many, len(points))) is not None:
                self._off(reason)
            elif stacked is not None:
                self._compare(losses, stacked)
        return losses

    def rewind(self) -> None:
        """Put back the random state and the buffers."""
        self._world.rewind()

    def _sequential(self, points: Sequence[Any], show: Show) -> list[Tensor]:
        result = []
        for point in points:
            with show([point]):
                result.append(self.one())
        return result

    def _try(self, points: Sequence[Any], show: Show) -> list[Tensor] | None:
        """One forward of the stacked batch, or None, with stacking off, where that is not possible."""
        assert self._stacked is not None
        stacked, copies = self._stacked, len(points)
        try:
            with show(points):
                losses = self._run(lambda: stacked(copies))
        except Exception as error:
            if self.state == TRUSTED and not is_out_of_memory(error):
                raise
            reason = "there is not enough memory" if is_out_of_memory(error) else str(error).split("\n")[0]
        else:
            if losses is None:
                self._off("the batch cannot be repeated", quiet=True)
                return None
            self._count(copies)
            if self._world.moved():
                self._off("the forward draws random numbers, which are to be the same for all probes", quiet=True)
                return None
            if losses.numel() % copies == 0:
                return list(losses.reshape(copies, -1))
            reason = f"{copies} copies of the batch gave {losses.numel()} losses"
        # out of the handler, so that the traceback does not keep the failed forward's tensors
        self._off(reason)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return None

    def _compare(self, losses: list[Tensor], stacked: list[Tensor]) -> None:
        """Trust stacking if it gives the same losses, and the same differences between the points where these are resolved."""
        a, b = torch.stack(losses).double(), torch.stack([x.to(losses[0].device) for x in stacked]).double()
        if a.shape != b.shape:
            self._off(f"it gives {b.shape[1]} losses for each copy of the batch in place of {a.shape[1]}")
            return
        noise = 32 * self._resolution() * a.abs().amax()
        spread = (a - a[:1]).abs().amax()
        error = (a - b - (a - b).mean(0)).abs().amax()
        # how far apart the two are is the measure: by it the points' differences are resolved, or they are not
        same, other = (spread > 0) & (error <= spread / 8), (spread > 4 * noise) & (error > spread / 2)
        flags = [(a.isfinite() & b.isfinite()).all(), (a - b).abs().amax() > noise, same, other]
        finite, offset, same, other = torch.stack(flags).tolist()
        if finite and (offset or other):
            self._off("the stacked batch gives other losses than its parts; examples must not depend on each other")
        elif finite and same:
            self.state = TRUSTED
        elif finite and not self._counted:
            self._counted = True
            self.unresolved += 1
            self.state = TRUSTED if self.unresolved >= _UNRESOLVED_TRIES else UNTRIED

    def _resolution(self) -> float:
        dtypes = {torch.float32}
        if self._module is not None:
            dtypes = {p.dtype for p in self._module.parameters() if p.is_floating_point()} or dtypes
        if any(torch.is_autocast_enabled(kind) for kind in ("cpu", "cuda")):
            dtypes.add(torch.bfloat16)
        return max(torch.finfo(dtype).eps for dtype in dtypes)

    def _batch_coupled(self) -> bool:
        """Whether a layer takes statistics over the batch."""
        return any(norm.training or not norm.track_running_stats for norm in self._displacement.batch_norms)

    def _off(self, reason: str, *, quiet: bool = False) -> None:
        if self._insist:
            raise _impossible(reason)
        self.state = OFF
        message = f"probes run one after the other, because {reason}"
        if quiet:
            _log.info(message)
        else:
            warnings.warn(message, UserWarning, stacklevel=6)

    def _run(self, closure: Closure) -> Any:
        if self._calls:
            self._world.rewind()
        self._calls += 1
        try:
            loss = closure()
        finally:
            self._world.restore_buffers()
        if loss is None and closure is not self._closure:
            return None
        if not isinstance(loss, Tensor):
            raise TypeError(f"the closure must return the loss as a tensor, got {type(loss).__name__}")
        return loss.detach().to(torch.promote_types(loss.dtype, torch.float32)).reshape(-1)


def _impossible(reason: str) -> ValueError:
    return ValueError(f"probes='stacked' is not possible, because {reason}; use 'auto'")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether ``error`` is a device's or the host's way to say that memory has run out."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and "DefaultCPUAllocator: can't allocate memory" in str(error)
