"""Rows for every task, in the columns of its hub dataset, made of the words of the tiny tokenizer."""

import json
from pathlib import Path

from tests.tiny import WORDS
from zo_lightning.data import Task

TEXTS = ("a bad film with no plot", "a great film", "no film was good ?")


def copa(index: int) -> dict:
    return {"choice1": "It was bad.", "choice2": "It was a great film.", "question": ("cause", "effect")[index % 2]}


def record(index: int) -> dict:
    entities = ["a film", "plot", "great"][: 2 + index % 2]
    return {
        "passage": "a film\n@highlight\nno plot",
        "query": "@placeholder was good",
        "entities": entities,
        "answers": ["plot"],
    }


def winogrande(index: int) -> dict:
    return {"sentence": "a film with _ was bad.", "option1": "no plot", "option2": "plot", "answer": str(1 + index % 2)}


def words(index: int) -> list[str]:
    """Answers of one word: every other word there is, so that a model without any knowledge is often right."""
    return [word for word in WORDS if word.isalpha() and word != "a"][index % 2 :: 2]  # of "a" and "?" nothing is compared


def squad(index: int) -> dict:
    return {"answers": {"text": words(index), "answer_start": [0] * len(words(index))}}


def drop(index: int) -> dict:
    return {"answers_spans": {"spans": words(index), "types": ["span"] * len(words(index))}}


OTHER_COLUMNS = {made.__name__: made for made in (copa, record, winogrande, squad, drop)}


def save_rows(task: Task, folder: Path) -> Path:
    """Rows with the columns of ``task``, as the hub's dataset has them."""
    folder.mkdir()
    other = OTHER_COLUMNS.get(task.name, lambda index: {})
    classes = getattr(task, "num_classes", 2)
    for split, count in (("train", 70), ("validation", 6)):
        rows = [
            {**dict.fromkeys(task.columns, TEXTS[index % 3]), "label": index % classes, **other(index)}
            for index in range(count)
        ]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder
