"""A ledger as a safetensors file: three tensors with a row for each step, and one text that says what they belong to."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from zo_lightning.ledger.hashing import update_hash
from zo_lightning.ledger.record import LedgerError, Record

__all__ = ["VERSION", "pack", "read", "unpack", "write"]

VERSION = 1
_KEY = "zo_lightning.ledger"  # one text: the order in which safetensors writes several is random
_FIELDS = ("seed", "directions", "update", "attached", "base", "buffers", "final", "environment", "groups")


def pack(record: Record) -> tuple[dict[str, Tensor], str]:
    """A ledger as tensors and a text (JSON, with the checksum of both); equal for equal ledgers.

    Returns:
        ``rates`` (steps, 1) float64, or (steps, groups) where groups differ; ``signs`` (steps,) int8, or ``slopes``
        (steps, directions) float64 where the sizes matter; ``flags`` (steps,) uint8. And the text.
    """
    per_group = any(rate != rates[0] for rates in record.rates for rate in rates)
    columns = len(record.groups) if per_group else 1
    count = len(record.slopes[0]) if record.slopes else 1
    rates = torch.tensor([rates[:columns] for rates in record.rates], dtype=torch.float64).view(-1, columns)
    slopes = torch.tensor(record.slopes, dtype=torch.float64).view(-1, count)
    tensors = {"rates": rates, "flags": torch.tensor(record.flags, dtype=torch.uint8)}
    if record.signs_suffice:
        tensors["signs"] = slopes[:, 0].sign().to(torch.int8)
    else:
        tensors["slopes"] = slopes
    content: dict[str, Any] = {
        "format": "zo-lightning ledger",
        "version": VERSION,
        "first_step": 0,
        "steps": len(record),
        "directions_per_step": count,
    }
    content.update({name: getattr(record, name) for name in _FIELDS})
    content["checksum"] = _checksum(tensors, content)
    return tensors, _text(content)


def unpack(tensors: dict[str, Tensor], text: str, source: str = "the ledger") -> Record:
    """The ledger that :func:`pack` was given, but for sizes of slopes that it does not need.

    Args:
        tensors: See :func:`pack`.
        text: See :func:`pack`.
        source: What to call it in messages.

    Raises:
        LedgerError: If it is not one of this version, or anything of it was lost or changed.
    """
    content = _parse(text, source)
    steps, count = content.get("steps"), content.get("directions_per_step")
    missing = {"rates", "flags"} - tensors.keys() or ({"signs"} if not {"signs", "slopes"} & tensors.keys() else set())
    if missing:
        raise LedgerError(f"{source} lacks the tensor {sorted(missing)[0]!r}")
    forms: dict[str, tuple[torch.dtype, list[Any]]] = {
        "rates": (torch.float64, [(steps, 1), (steps, len(content.get("groups") or [()]))]),
        "flags": (torch.uint8, [(steps,)]),
        "signs": (torch.int8, [(steps,)]),
        "slopes": (torch.float64, [(steps, count)]),
    }
    for name, tensor in tensors.items():
        if name not in forms:
            raise LedgerError(f"{source} has a tensor {name!r} that no ledger has")
        dtype, shapes = forms[name]
        if tensor.dtype != dtype or tuple(tensor.shape) not in shapes:
            raise LedgerError(
                f"{source} is of {steps} steps, and its {name!r} is {tensor.dtype} of shape {tuple(tensor.shape)}"
            )
    given = content.pop("checksum", None)
    found = _checksum(tensors, content)
    if given != found:
        raise LedgerError(f"{source} is damaged: its content has the sha256 {found}, and should have {given}")
    absent = [name for name in _FIELDS if name not in content]
    if absent:
        raise LedgerError(f"{source} does not say its {absent[0]!r}")
    if content["first_step"] != 0:
        raise LedgerError(f"{source} begins at step {content['first_step']}; a replay needs the steps from 0 on")
    slopes = tensors["slopes"] if "slopes" in tensors else tensors["signs"].double().unsqueeze(1)
    return Record(
        **{name: content[name] for name in _FIELDS},
        rates=tensors["rates"].expand(-1, len(content["groups"])).tolist(),
        slopes=slopes.tolist(),
        flags=tensors["flags"].tolist(),
    )


def write(record: Record, path: str | Path) -> None:
    """Write a ledger; whoever reads at the same time, or after a crash, finds the old file or the new one.

    Args:
        record: The ledger.
        path: The file; its folder is made.

    Raises:
        OSError: If it cannot be written.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors, text = pack(record)
    new = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with new.open("wb") as file:
            file.write(save(tensors, metadata={_KEY: text}))
            file.flush()
            os.fsync(file.fileno())
        os.replace(new, path)
    finally:
        new.unlink(missing_ok=True)


def read(path: str | Path) -> Record:
    """Read a ledger.

    Args:
        path: The file.

    Raises:
        FileNotFoundError: If there is none.
        LedgerError: If it is not a ledger, of a newer version, cut short, or changed.
    """
    source = f"the ledger {str(path)!r}"
    if not Path(path).is_file():
        raise FileNotFoundError(f"{source} does not exist")
    if not Path(path).stat().st_size:
        raise LedgerError(f"{source} is empty")
    try:
        with safe_open(path, "pt") as file:
            text = (file.metadata() or {}).get(_KEY)
            if text is None:
                raise LedgerError(f"{source} is a safetensors file of something else: its header has no {_KEY!r}")
            _parse(text, source)  # before tensors are read that may be of anything
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except (SafetensorError, OSError, UnicodeDecodeError) as error:
        raise LedgerError(f"{source} is not a safetensors file, damaged, or cut short: {error}") from error
    return unpack(tensors, text, source)


def _parse(text: str, source: str) -> dict[str, Any]:
    try:
        content = json.loads(text)
    except ValueError as error:
        raise LedgerError(f"{source} is damaged: {error}") from error
    if not isinstance(content, dict) or content.get("format") != "zo-lightning ledger":
        kind = content.get("format") if isinstance(content, dict) else type(content).__name__
        raise LedgerError(f"{source} is no ledger of zo-lightning: its format is {kind!r}")
    if content.get("version") != VERSION:
        raise LedgerError(
            f"{source} has version {content.get('version')!r} of the format, this zo-lightning reads {VERSION}; update it"
        )
    if _text(content) != text:
        raise LedgerError(f"{source} is damaged: its text is not as a ledger's is written")
    return content


def _text(content: dict[str, Any]) -> str:
    return json.dumps(content, separators=(",", ":"), allow_nan=False)


def _checksum(tensors: dict[str, Tensor], content: dict[str, Any]) -> str:
    digest = hashlib.sha256(_text(content).encode())
    for name in sorted(tensors):
        update_hash(digest, name, tensors[name])
    return digest.hexdigest()
