"""The folder that a command writes a model into."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

__all__ = ["check_out", "make_room"]


def check_out(out: str, overwrite: bool) -> Path:
    """The folder ``--out`` names, which is not made yet.

    Raises:
        FileExistsError: If it is not empty and ``overwrite`` is not set, or is no folder.
    """
    folder = Path(out)
    if folder.exists() and (not folder.is_dir() or (any(folder.iterdir()) and not overwrite)):
        raise FileExistsError(f"--out {out!r} exists and is not an empty folder; give another one, or --overwrite true")
    return folder


def make_room(folder: Path, leftovers: Iterable[str]) -> None:
    """Make the folder, and remove what an earlier model may have left and would be loaded with the new one.

    Args:
        folder: See :func:`check_out`.
        leftovers: Patterns of file names.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for pattern in leftovers:
        for path in folder.glob(pattern):
            path.unlink()
