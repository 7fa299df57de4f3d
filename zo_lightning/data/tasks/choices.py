r"""The multiple-choice tasks of MeZO and ZO-Bench, in their prompt shapes.

Source: the tasks and templates of https://github.com/princeton-nlp/MeZO (large_models; COPA and ReCoRD) and
https://github.com/ZO-Bench/ZO-LLM (WinoGrande), so that results can be compared with the literature. All the hub datasets are
plain parquet files: none runs code.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from zo_lightning.data.errors import DataError
from zo_lightning.data.tasks.multiple_choice import MultipleChoiceTask
from zo_lightning.data.tasks.registry import register_task

__all__ = ["COPA", "ReCoRD", "WinoGrande"]

_CONJUNCTIONS = {"effect": "so", "cause": "because"}


@register_task("copa")
class COPA(MultipleChoiceTask):
    """Choice of Plausible Alternatives: which of two sentences is the cause, or the effect, of a premise?"""

    def __init__(self) -> None:
        super().__init__(
            name="copa",
            template="{premise} {conjunction}",
            choices=["choice1", "choice2"],
            columns=["premise", "question"],
            hub="aps/super_glue",
            hub_config="copa",
            small_dev=100,  # of 400 training rows, as in MeZO
            neutral_template="{conjunction}",
        )

    def prepare(self, row: dict[str, Any]) -> dict[str, Any]:
        """Take the full stop off the premise, and say what connects it with the choices."""
        if row["question"] not in _CONJUNCTIONS:
            raise DataError(f"column 'question' holds {row['question']!r}, expected {list(_CONJUNCTIONS)}")
        row["premise"] = row["premise"].rstrip().removesuffix(".")
        row["conjunction"] = _CONJUNCTIONS[row["question"]]
        return row

    def candidates(self, row: Mapping[str, Any]) -> Sequence[str]:
        """The choices as they go on within the sentence: the first word in lower case, if it is not "I"."""
        return [self.candidate.format(choice=_within_a_sentence(text)) for text in self.texts(row)]


@register_task("record")
class ReCoRD(MultipleChoiceTask):
    """ReCoRD: which of the entities in a passage completes a sentence about it? Those that several mentions name are right.

    A candidate is the whole sentence. The list of entities has each once, and the first of the answers is trained on.
    """

    def __init__(self) -> None:
        super().__init__(
            name="record",
            template="{passage}\n-",
            choices="entities",
            label_column="answers",
            columns=["passage", "query"],
            hub="aps/super_glue",
            hub_config="record",
            neutral_template="-",
        )

    def prepare(self, row: dict[str, Any]) -> dict[str, Any]:
        """Write the highlights of the passage as a list."""
        row["passage"] = row["passage"].replace("@highlight\n", "- ")
        return row

    def texts(self, row: Mapping[str, Any]) -> list[str]:
        """The entities, each once, in the order of the row; there may be a single one."""
        texts = list(dict.fromkeys(str(entity).strip() for entity in row["entities"] or []))
        if not all(texts) or not texts:
            raise DataError(f"column 'entities' holds {row['entities']!r}, expected a list of names")
        return texts

    def candidates(self, row: Mapping[str, Any]) -> Sequence[str]:
        """The sentence, with each entity in its place."""
        query = row["query"]
        if "@placeholder" not in query:
            raise DataError(f"column 'query' holds no @placeholder: {query!r}")
        return [self.candidate.format(choice=query.replace("@placeholder", text)) for text in self.texts(row)]

    def gold(self, row: Mapping[str, Any]) -> list[int]:
        """The entities that are among the answers, in the order of those."""
        texts, answers = self.texts(row), [str(answer).strip() for answer in row["answers"] or []]
        if not answers:
            raise DataError("column 'answers' is empty; a row whose answers were never published has none, use another split")
        found = [texts.index(answer) for answer in dict.fromkeys(answers) if answer in texts]
        if not found:
            raise DataError(f"none of the answers {answers} is among the entities {texts}")
        return found


@register_task("winogrande")
class WinoGrande(MultipleChoiceTask):
    """WinoGrande: which of two names fills the blank of a sentence?

    The prompt is what precedes the blank, and a candidate is all the rest: a name, and what follows the blank.
    """

    def __init__(self) -> None:
        super().__init__(
            name="winogrande",
            template="{context}",
            choices=["option1", "option2"],
            label_column="answer",
            labels=[1, 2],
            columns=["sentence"],
            hub="allenai/winogrande",
            hub_config="winogrande_m",
            neutral_template="",
        )

    def prepare(self, row: dict[str, Any]) -> dict[str, Any]:
        """Take what precedes the blank."""
        row["context"], _ = _around_the_blank(row["sentence"])
        return row

    def candidates(self, row: Mapping[str, Any]) -> Sequence[str]:
        """Both names, each followed by the rest of the sentence, with the space in front that the prompt has not."""
        _, rest = _around_the_blank(row["sentence"])
        return [rest.replace("_", text, 1) for text in self.texts(row)]


def _within_a_sentence(sentence: str) -> str:
    first, space, rest = sentence.partition(" ")
    return (first if first == "I" else first.lower()) + space + rest


def _around_the_blank(sentence: str) -> tuple[str, str]:
    """A sentence in two: up to the blank, and from the space in front of the blank on."""
    before, blank, _ = sentence.strip().partition("_")
    if not blank:
        raise DataError(f"column 'sentence' holds no blank '_': {sentence!r}")
    context = before.rstrip()
    return context, sentence.strip()[len(context) :]
