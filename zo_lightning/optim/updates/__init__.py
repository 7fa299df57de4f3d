"""Update rules: what a step does with the estimated gradient, and along which unit its probes go."""

from __future__ import annotations

from zo_lightning.optim.updates.adamm import AdaMM
from zo_lightning.optim.updates.base import Update
from zo_lightning.optim.updates.lmo import LMO
from zo_lightning.optim.updates.muon import Muon, newton_schulz
from zo_lightning.optim.updates.sgd import SGD, Standardised, Unit
from zo_lightning.optim.updates.sign import Sign

__all__ = [
    "LMO",
    "SGD",
    "UPDATES",
    "AdaMM",
    "Muon",
    "Sign",
    "Standardised",
    "Unit",
    "Update",
    "make_update",
    "newton_schulz",
]

UPDATES: dict[str, type[Update]] = {rule.name: rule for rule in (LMO, SGD, Unit, Standardised, Sign, Muon, AdaMM)}
"""The update rules by name."""


def make_update(update: str | Update) -> Update:
    """Return the update rule called ``update`` (an instance is returned as it is).

    Raises:
        ValueError: If the name is unknown.
    """
    if isinstance(update, Update):
        return update
    if update not in UPDATES:
        raise ValueError(f"update must be one of {', '.join(sorted(UPDATES))}, got {update!r}")
    return UPDATES[update]()
