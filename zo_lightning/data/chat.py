"""Prompts as turns of a chat, in the format of the tokenizer's chat template."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from zo_lightning.data.errors import DataError
from zo_lightning.data.prompting import Demonstration
from zo_lightning.data.tokenization import FramedPrompt

__all__ = ["ChatPrompting"]

# Stand for a turn of the user and one of the model, to find where a template puts them.
_USER, _MODEL = "(the turn of the user)", "(the turn of the model)"
# Some templates write today's date, which would change the prompts from day to day; this is the one that Llama 3.1 has.
_DATE = "26 Jul 2024"


@dataclass(frozen=True)
class ChatPrompting:
    """The prompt as the user's turn, the candidates as what the model may answer, demonstrations as earlier turns.

    What a template writes between its generation prompt and the model's words (a space; for models that may think first, an
    empty thought) is written too, so that an answer stands where the model's own earlier turns have theirs.

    Args:
        tokenizer: A tokenizer with a chat template.
        system_prompt: What the chat begins with; by default what the template writes by itself, if anything.

    Attributes:
        template: The template.
        end_of_turn: What the template writes after a turn of the model, without white space around it.

    Raises:
        DataError: If the tokenizer has no chat template, or it cannot be used.
    """

    tokenizer: PreTrainedTokenizerBase = field(repr=False, compare=False)
    system_prompt: str | None = None
    template: str = field(init=False)
    end_of_turn: str = field(init=False)
    _opening: str = field(init=False)
    _space: str = field(init=False)

    def __post_init__(self) -> None:
        name = self.tokenizer.name_or_path
        if not self.tokenizer.chat_template:
            raise DataError(
                f"the tokenizer {name!r} has no chat template: leave chat_template out, or take the "
                "tokenizer of an instruction-tuned model"
            )
        asked = [*self._system(), {"role": "user", "content": _USER}]
        prompt = self._render(asked)
        whole = self._render([*asked, {"role": "assistant", "content": _MODEL}], answered=True)
        before, found, after = whole.rpartition(_MODEL)
        if prompt.count(_USER) != 1 or not found:
            raise DataError(f"the chat template of {name!r} does not write each turn once as it is")
        if self.system_prompt is not None and self.system_prompt.strip() not in prompt:
            raise DataError(f"the chat template of {name!r} has no place for a system prompt, leave system_prompt out")
        opening = before.removeprefix(prompt) if before.startswith(prompt) else ""
        # A space belongs to the word after it.
        attributes = {
            "template": self.tokenizer.get_chat_template(),
            "end_of_turn": after.strip(),
            "_opening": opening.rstrip(" "),
            "_space": " " * (len(opening) - len(opening.rstrip(" "))),
        }
        for attribute, value in attributes.items():
            object.__setattr__(self, attribute, value)

    def prompt(self, prompt: str, shown: Sequence[Demonstration] = ()) -> FramedPrompt:
        """Write the chat up to where the model answers.

        Args:
            prompt: The task's prompt; the white space around it is left out.
            shown: The demonstrations.

        Returns:
            The whole, of which the prompt's own beginning may be cut.

        Raises:
            DataError: If the template refuses it.
        """
        earlier = self._system()
        for each in shown:
            earlier += [
                {"role": "user", "content": each.prompt.strip()},
                {"role": "assistant", "content": each.answer.strip()},
            ]
        before, _, after = self._render([*earlier, {"role": "user", "content": _USER}]).rpartition(_USER)
        whole = self._render([*earlier, {"role": "user", "content": prompt.strip()}])
        if not (whole.startswith(before) and whole.endswith(after) and len(whole) >= len(before) + len(after)):
            raise DataError("the chat template writes something else around this prompt than around others")
        return FramedPrompt(before, whole[len(before) : len(whole) - len(after)], after + self._opening)

    def candidates(self, candidates: Sequence[str], ends: bool = False) -> list[str]:
        """Write candidates as the template writes a turn of the model.

        Args:
            candidates: The task's candidates; white space in front of them is left out.
            ends: Whether they end the turn; white space behind them is then left out too.

        Returns:
            What follows the prompt.
        """
        if ends and self.end_of_turn:
            return [self._space + text.strip() + self.end_of_turn for text in candidates]
        return [self._space + text.lstrip() for text in candidates]

    def _system(self) -> list[dict[str, str]]:
        return [] if self.system_prompt is None else [{"role": "system", "content": self.system_prompt}]

    def _render(self, messages: list[dict[str, str]], answered: bool = False) -> str:
        options: dict[str, Any] = {"tokenize": False, "add_generation_prompt": not answered, "date_string": _DATE}
        try:
            return str(self.tokenizer.apply_chat_template(messages, **options))
        except TemplateError as error:
            raise DataError(
                f"the chat template of {self.tokenizer.name_or_path!r} refuses the chat ({error}); a template without system "
                "prompts needs system_prompt left out"
            ) from error
