r"""The classification tasks of MeZO, in its prompt shapes.

Source: the tasks and templates of https://github.com/princeton-nlp/MeZO (large_models), so that results can be compared
with the literature; most of its prompts come from PromptSource. So are the neutral prompts: what of a prompt belongs to the
label, which is nothing where that has a line of its own. The labels are those of ``glue`` and ``super_glue``.
All the hub datasets are plain parquet files: none runs code.
"""

from __future__ import annotations

from typing import Any

from zo_lightning.data.tasks.classification import ClassificationTask
from zo_lightning.data.tasks.registry import register_task


@register_task("sst2")
class SST2(ClassificationTask):
    """SST-2: is a sentence of a film review negative or positive?"""

    def __init__(self) -> None:
        super().__init__(
            name="sst2",
            template="{sentence} It was",
            verbalizers=[" terrible", " great"],
            class_names=["negative", "positive"],
            hub="nyu-mll/glue",
            hub_config="sst2",
            neutral_template="It was",
        )

    def prepare(self, row: dict[str, Any]) -> dict[str, Any]:
        """Strip the sentence: those of SST-2 end in a space."""
        row["sentence"] = row["sentence"].strip()
        return row


@register_task("rte")
class RTE(ClassificationTask):
    """RTE: does the premise entail the hypothesis?"""

    def __init__(self) -> None:
        super().__init__(
            name="rte",
            template='{premise}\nDoes this mean that "{hypothesis}" is true? Yes or No?\n',
            verbalizers=["Yes", "No"],
            class_names=["entailment", "not_entailment"],
            hub="aps/super_glue",
            hub_config="rte",
            neutral_template="",
        )


@register_task("cb")
class CB(ClassificationTask):
    """CommitmentBank: does the premise entail or contradict the hypothesis, or neither?"""

    def __init__(self) -> None:
        super().__init__(
            name="cb",
            template='Suppose {premise} Can we infer that "{hypothesis}"? Yes, No, or Maybe?\n',
            verbalizers=["Yes", "No", "Maybe"],
            class_names=["entailment", "contradiction", "neutral"],
            hub="aps/super_glue",
            hub_config="cb",
            neutral_template="",
            small_dev=100,  # of 250 training rows, as in MeZO
        )


@register_task("boolq")
class BoolQ(ClassificationTask):
    """BoolQ: is the answer to a question about a passage yes?"""

    def __init__(self) -> None:
        super().__init__(
            name="boolq",
            template="{passage} {question}\n",
            verbalizers=["No", "Yes"],
            hub="aps/super_glue",
            hub_config="boolq",
            neutral_template="",
        )

    def prepare(self, row: dict[str, Any]) -> dict[str, Any]:
        """Write the question, which is in lower case and bare, as a sentence."""
        question = row["question"]
        row["question"] = question[:1].upper() + question[1:] + ("" if question.endswith("?") else "?")
        return row


@register_task("wic")
class WiC(ClassificationTask):
    """Word in Context: has a word the same sense in two sentences?"""

    def __init__(self) -> None:
        super().__init__(
            name="wic",
            template=(
                'Does the word "{word}" have the same meaning in these two sentences? Yes, No?\n{sentence1}\n{sentence2}\n'
            ),
            verbalizers=["No", "Yes"],
            hub="aps/super_glue",
            hub_config="wic",
            neutral_template="",
        )


@register_task("wsc")
class WSC(ClassificationTask):
    """Winograd Schema Challenge: does a pronoun refer to a noun phrase?"""

    def __init__(self) -> None:
        super().__init__(
            name="wsc",
            template=('{text}\nIn the previous sentence, does the pronoun "{span2_text}" refer to {span1_text}? Yes or No?\n'),
            verbalizers=["No", "Yes"],
            hub="aps/super_glue",
            hub_config="wsc.fixed",
            neutral_template="",
        )

    def prepare(self, row: dict[str, Any]) -> dict[str, Any]:
        """Write the pronoun in lower case, wherever it stood in its sentence."""
        row["span2_text"] = row["span2_text"].lower()
        return row


@register_task("multirc")
class MultiRC(ClassificationTask):
    """MultiRC: is an answer to a question about a paragraph correct? Every answer is one example."""

    def __init__(self) -> None:
        super().__init__(
            name="multirc",
            template=('{paragraph}\nQuestion: {question}\nI found this answer "{answer}". Is that correct? Yes or No?\n'),
            verbalizers=["No", "Yes"],
            hub="aps/super_glue",
            hub_config="multirc",
            neutral_template="",
        )
