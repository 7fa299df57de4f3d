"""Filling in templates, and the columns that they name."""

from __future__ import annotations

from string import Formatter

from zo_lightning.data.errors import DataError

__all__ = ["label_key", "template_columns"]


def template_columns(template: str, name: str, argument: str = "template", required: bool = True) -> list[str]:
    """List the columns that a template names, each once, in order.

    Args:
        template: In the syntax of :meth:`str.format`.
        name: The task's name, for messages.
        argument: What messages call the template.
        required: Whether it has to name a column.

    Returns:
        The names; ``{choice.text}`` and ``{choice[text]}`` name the column ``choice``.

    Raises:
        DataError: If it cannot be read, or a field in it names no column.
    """
    columns: dict[str, None] = {}
    try:
        fields = [field for _, field, _, _ in Formatter().parse(template) if field is not None]
    except ValueError as error:
        raise DataError(f"task {name!r}: cannot read the {argument} {template!r}: {error}; write {{{{ for a {{") from error
    for field in fields:
        column = field.split(".")[0].split("[")[0]
        if not column or column.isdigit():
            raise DataError(f"task {name!r}: {{{field}}} in the {argument} {template!r} names no column, write {{column}}")
        columns[column] = None
    if required and not columns:
        raise DataError(f"task {name!r}: the {argument} {template!r} names no column; write for example {{text}}")
    return list(columns)


def label_key(label: object) -> str:
    """Write a label as text, one way for all file formats."""
    if isinstance(label, bool):
        return str(label).lower()
    # A CSV column of integers with a gap is read as floats.
    if isinstance(label, float) and label.is_integer():
        return str(int(label))
    return str(label).strip()
