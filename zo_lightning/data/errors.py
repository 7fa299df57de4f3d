"""The one error that bad data raises."""

from __future__ import annotations


class DataError(ValueError):
    """Data, a task or a tokenizer that cannot be used as it is.

    The message is one line for the person at the command line: it names the file or the dataset, the row where one is
    to blame, and what to change.
    """
