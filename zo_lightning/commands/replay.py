"""Rebuild fine-tuned weights from the base model and a ledger."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from zo_lightning.assets import resolve
from zo_lightning.commands.folder import check_out, make_room
from zo_lightning.ledger import LedgerError, read, under_ledger_names
from zo_lightning.ledger import replay as take_steps
from zo_lightning.ledger.replaying import differences
from zo_lightning.modules.pretrained import load_causal_lm

__all__ = ["replay"]

# what an earlier model in the folder may have left, and transformers would load with the new one
_WEIGHTS = ("model*.safetensors", "model.safetensors.index.json", "pytorch_model*.bin", "pytorch_model.bin.index.json")


def replay(
    base: str,
    ledger: str,
    out: str,
    overwrite: bool = False,
    steps: int | None = None,
    device: str | None = None,
    allow_mismatch: bool = False,
    trust_remote_code: bool = False,
) -> None:
    """Write the model of a run as a folder that transformers loads, without its data and without a forward pass.

    Args:
        base: The model that the run began with: a folder or a name on the Hugging Face hub.
        ledger: The file that the run's Ledger callback wrote.
        out: The folder to write.
        overwrite: Whether a folder that is not empty may be written into.
        steps: Stop after this many steps, for the weights of a checkpoint made then.
        device: Where to compute; by default on a device of the type that the run had.
        allow_mismatch: Whether weights that are not those at the end of the run, bit for bit, are written all the same.
        trust_remote_code: Whether code that comes with the model may run.

    Raises:
        LedgerError: If the ledger is damaged or is not one of this base model, or the weights come out otherwise.
        ModelError: If the base model cannot be loaded.
        FileExistsError: If the folder is not empty.
    """
    folder, source = check_out(out, overwrite), resolve(base)
    if folder.resolve() == Path(source).resolve():
        raise FileExistsError(f"--out {out!r} is the base model's own folder; give another one")
    record = read(ledger)
    try:
        place = torch.device(device or record.environment["device"].split(",")[0])
    except RuntimeError as error:
        raise LedgerError(f"--device {device!r} is not a device; say cpu or cuda") from error
    if place.type == "cuda" and not torch.cuda.is_available():
        asked = "the run was on a GPU" if device is None else f"--device {device} is a GPU"
        raise LedgerError(f"{asked} and there is none here; with --device cpu the last bits may differ")
    dtype = getattr(torch, record.groups[0]["parameters"][0][1])
    model = load_causal_lm(source, dtype, trust_remote_code=trust_remote_code)
    tokenizer = _tokenizer(source, trust_remote_code)
    module = under_ledger_names(model, record).to(place)
    others = differences(record, place)
    if others:
        print(f"zo-lightning: warning: {others}; the last bits of the weights may differ", file=sys.stderr)  # noqa: T201
    with Progress(console=Console(stderr=True), transient=True) as bar, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*the last bits of the weights may differ")
        task = bar.add_task("Replaying", total=len(record) if steps is None else steps)
        found = take_steps(
            module, record, steps=steps, check=not allow_mismatch, progress=lambda done: bar.update(task, completed=done)
        )
    make_room(folder, _WEIGHTS)
    model.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    taken = len(record) if steps is None else steps
    print(f"wrote {folder}: {taken} steps replayed, sha256 {found}: {_verdict(found, record.final, steps)}")  # noqa: T201


def _verdict(found: str, final: str | None, steps: int | None) -> str:
    if steps is not None:
        return "not compared, since the ledger has the hash of the last step alone"
    if final is None:
        return "not compared, since the run was broken off before it could note its own"
    return "that of the run's weights" if found == final else f"NOT that of the run's weights, {final}"


def _tokenizer(source: str, trust_remote_code: bool) -> PreTrainedTokenizerBase | None:
    """The base model's tokenizer, if it has one."""
    try:
        return AutoTokenizer.from_pretrained(source, trust_remote_code=trust_remote_code)
    except (OSError, ValueError):
        return None
