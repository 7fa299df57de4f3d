"""What ships with the package: a tiny pretrained OPT and the data of its task, for the quick start."""

from __future__ import annotations

from pathlib import Path

__all__ = ["resolve"]

_FOLDER = Path(__file__).parent
_NAMES = ("quickstart",)


def resolve(name_or_path: str, part: str = "") -> str:
    """Return the package's own folder where ``name_or_path`` is the name of a shipped asset, and anything else unchanged.

    A folder of one's own with such a name is written as ``./quickstart``.

    Args:
        name_or_path: A model or data set: ``"quickstart"``, a folder, or a name on the Hugging Face hub.
        part: Folder inside the asset, ``"data"`` for the rows; the model and its tokenizer are at the top.
    """
    return str(_FOLDER / name_or_path / part) if name_or_path in _NAMES else name_or_path
