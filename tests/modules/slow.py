"""Candidates scored one at a time in float64: whole sequences, no padding, no plan."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from zo_lightning.data import Example


@torch.no_grad()
def log_likelihood(model: torch.nn.Module, prompt: Sequence[int], candidate: Sequence[int]) -> float:
    """Sum of log p of a candidate's tokens behind a prompt."""
    log_p = model(torch.tensor([[*prompt, *candidate]])).logits[0].double().log_softmax(dim=-1)
    return sum(float(log_p[len(prompt) - 1 + i, token]) for i, token in enumerate(candidate))


class Scorer:
    """Texts instead of tokens: a model and its tokenizer, without anything of this package."""

    def __init__(self, folder: Path) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(folder)

    def __call__(self, prompt: str, candidates: Sequence[str]) -> tuple[list[float], list[int]]:
        """The sums, and the numbers of tokens by which each text exceeds the prompt (as MeZO counts them)."""
        start = len(self.tokenizer(prompt)["input_ids"])
        texts = [self.tokenizer(prompt + candidate)["input_ids"] for candidate in candidates]
        sums = [log_likelihood(self.model, ids[:start], ids[start:]) for ids in texts]
        return sums, [len(ids) - start for ids in texts]


def logged(folder: Path, name: str) -> float:
    """The last value of a metric in the only metrics.csv below a folder."""
    (path,) = folder.glob("**/metrics.csv")
    with path.open() as file:
        return [float(row[name]) for row in csv.DictReader(file) if row.get(name)][-1]


def make_examples(cases) -> list[Example]:
    """Examples from the tokens of a prompt, those of its candidates, and the right ones of these."""
    return [
        Example(
            prompt="",
            candidates=[str(ids) for ids in candidates],
            prompt_ids=prompt,
            candidate_ids=candidates,
            label=gold[0],
            gold=gold,
            index=index,
        )
        for index, (prompt, candidates, gold) in enumerate(cases)
    ]
