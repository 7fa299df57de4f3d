"""The quickstart learns its task, and it is the rule that does it."""

from functools import partial
from pathlib import Path

import pytest
import torch
import yaml
from lightning.pytorch import Trainer, seed_everything

from zo_lightning.callbacks import AdaNAGED
from zo_lightning.data import PromptDataModule
from zo_lightning.modules import CausalLMClassificationModule
from zo_lightning.optim import LMO, ZerothOrder

CONFIG = yaml.safe_load((Path(__file__).parents[1] / "configs" / "quickstart.yaml").read_text())


class RandomSigns(LMO):
    """The sign of a coin in place of that of the slope."""

    def __init__(self) -> None:
        self.coins = torch.Generator().manual_seed(0)

    def coefficient(self, slope: float) -> float:
        return 2.0 * torch.randint(0, 2, (), generator=self.coins).item() - 1.0


class Still(LMO):
    """γ = 0."""

    def coefficient(self, slope: float) -> float:
        return 0.0


class Scaled(CausalLMClassificationModule):
    """The same model with a multiple of its loss."""

    factor = 1.0

    def loss(self, batch):
        return super().loss(batch) * self.factor


def run(folder, steps: int, update: str | LMO = "lmo", factor: float = 1.0) -> tuple[float, Scaled]:
    """Fit the quickstart for ``steps`` of its steps; the validation accuracy and the module at the end."""
    seed_everything(0, verbose=False)
    module = Scaled("quickstart", optimizer=partial(ZerothOrder, update=update))
    module.factor = factor
    data = PromptDataModule(**{**CONFIG["data"]["init_args"], "data_dir": "quickstart"})
    trainer = Trainer(
        accelerator="cpu",
        max_steps=steps,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        limit_val_batches=0,
        default_root_dir=folder,
        callbacks=[AdaNAGED(total_steps=CONFIG["trainer"]["max_steps"])],
    )
    trainer.fit(module, data)
    [metrics] = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, default_root_dir=folder).validate(
        module, data, verbose=False
    )
    return metrics["val/acc"], module


def test_it_learns(tmp_path):
    accuracy, _ = run(tmp_path, 200)
    assert accuracy >= 0.9


@pytest.mark.parametrize("update", [RandomSigns(), Still()], ids=["random signs", "no step"])
def test_without_the_rule_it_stays_near_chance(update, tmp_path):
    accuracy, _ = run(tmp_path, 250 if isinstance(update, RandomSigns) else 5, update)
    assert 0.35 <= accuracy <= 0.65


def test_a_multiple_of_the_loss_changes_nothing(tmp_path):
    """Bit for bit, for a power of two."""
    _, module = run(tmp_path, 30)
    _, other = run(tmp_path, 30, factor=2.0**10)
    for (name, a), b in zip(module.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(a.view(torch.int32), b.view(torch.int32)), name
