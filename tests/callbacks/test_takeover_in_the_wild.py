"""What modules and Trainers of other people do: all points of a step see the same module, and what cannot be served is said."""

import random
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import BackboneFinetuning, BatchSizeFinder, EarlyStopping, ModelPruning
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.nn.utils import prune
from torch.utils.data import DataLoader, IterableDataset

from tests.callbacks.foreign import Classifier, batches, loader, make_trainer, seeded
from tests.quadratic import Quadratic
from tests.quadratic import loader as quadratic_loader
from zo_lightning.callbacks import AdaNAGED, ResumeCheckpoint
from zo_lightning.data import ShuffleSampler
from zo_lightning.data.loader import ResumableDataLoader
from zo_lightning.optim import ZerothOrder
from zo_lightning.optim.shown import ShownDense, ShownMatrix, ShownVector


def fit(folder, module, steps, *callbacks, data=None, zo=None, **arguments) -> AdaNAGED:
    zo = zo or AdaNAGED()
    trainer = make_trainer(folder, max_steps=steps, limit_val_batches=0, callbacks=[*callbacks, zo], **arguments)
    trainer.fit(module, data or loader(), loader(2))
    return zo


# ---- all points of a step see the same module ---------------------------------------------------------------------------
class Drawing(Classifier):
    """Notes what it has drawn from generators of its own, or counted, in each evaluation."""

    seen: list = []  # noqa: RUF012 (of the class, so that no evaluation's is taken back)

    def __init__(self) -> None:
        super().__init__(dropout=0.0)
        type(self).seen = []
        self.torch_generator = torch.Generator().manual_seed(3)
        self.python_generator = random.Random(3)
        self.numpy_generator = np.random.default_rng(3)
        self.old_numpy_generator = np.random.RandomState(3)
        self.calls = 0
        self.counts = np.zeros(2)
        self.everywhere = torch.zeros(1).expand(4)

    def training_step(self, batch, batch_idx):
        value = type(self).draw(self)
        type(self).seen.append((self.trainer.global_step, value))
        self.log("value", value)
        return super().training_step(batch, batch_idx) * (1 + value)


def count(self) -> float:
    self.calls += 1
    self.counts[0] += 1
    assert self.counts[0] == self.calls
    return 1 / self.calls


DRAWS = {
    "torch": lambda self: float(torch.rand((), generator=self.torch_generator)),
    "python": lambda self: self.python_generator.random(),
    "numpy": lambda self: float(self.numpy_generator.random()),
    "old numpy": lambda self: float(self.old_numpy_generator.rand()),
    "counter": count,
}


@pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS)
def test_all_evaluations_of_a_step_draw_and_count_the_same(draw, tmp_path):
    kind = type("Drawing", (Drawing,), {"draw": draw})
    module = seeded(kind)
    fit(tmp_path, module, 4)
    per_step: dict[int, set] = {}
    for step, value in module.seen:
        per_step.setdefault(step, set()).add(value)
    assert [len(values) for values in per_step.values()] == [1] * 4
    mine = module.calls, module.counts[0]
    again = seeded(kind)
    alone = [draw(again) for _ in range(4)]
    assert [values.pop() for values in per_step.values()] == alone, "as one evaluation of each batch would"
    assert mine == (again.calls, again.counts[0])


def test_generators_of_own_modules_too():
    net = nn.Linear(3, 1)
    net.generator = torch.Generator().manual_seed(0)
    drawn = []
    optimizer = ZerothOrder(net.named_parameters(), seed=0).attach(net)

    def loss():
        drawn.append(float(torch.rand((), generator=net.generator)))
        return net(torch.ones(2, 3)).square().mean() * drawn[-1]

    for _ in range(2):
        optimizer.step(loss)
    expected = torch.rand(2, generator=torch.Generator().manual_seed(0)).tolist()
    assert drawn == [expected[0]] * 3 + [expected[1]] * 2


def test_the_users_changes_of_learning_rates_are_made_once(tmp_path):
    class Decaying(Classifier):
        def training_step(self, batch, batch_idx):
            self.trainer.optimizers[0].param_groups[0]["lr"] *= 0.5
            return super().training_step(batch, batch_idx)

    module = seeded(Decaying)
    fit(tmp_path, module, 4)
    assert module.trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.1 * 0.5**4)


# ---- gradients with respect to the input --------------------------------------------------------------------------------
class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(6, 5), nn.Linear(5, 6)

    def forward(self, x):
        return x + self.outer(self.inner(x).tanh())


@pytest.mark.parametrize("directions", ["low_rank", "gaussian"])
def test_gradients_with_respect_to_the_input_are_those_at_the_point(directions):
    """As in a gradient penalty: compared with a copy whose weights are displaced by hand."""
    torch.manual_seed(0)
    net, x = Residual(), torch.randn(4, 6)
    plain = Residual()
    optimizer = ZerothOrder(net.named_parameters(), lr=0.0, smoothing=0.3, directions=directions, seed=0).attach(net)
    found = []

    def gradient(model) -> torch.Tensor:
        with torch.enable_grad():
            inputs = x.clone().requires_grad_()
            (result,) = torch.autograd.grad(model(inputs).square().sum(), inputs)
        return result

    def loss():
        plain.load_state_dict(slots(net))
        ours = gradient(net)
        torch.testing.assert_close(ours, gradient(plain), rtol=1e-5, atol=1e-5)
        found.append(ours)
        return ours.square().mean()

    for _ in range(2):
        optimizer.step(loss)
    assert not torch.equal(found[-1], found[-2])
    assert optimizer.last.slopes[0] != 0


def slots(module) -> dict[str, torch.Tensor]:
    """The weights that stand in the modules' parameter slots now."""
    displaced = (ShownMatrix, ShownVector, ShownDense)
    found = {}
    for prefix, owner in module.named_modules():
        for key, value in owner._parameters.items():
            weight = value.value() if isinstance(value, displaced) else getattr(value, "plain", value)
            found[f"{prefix}.{key}"] = weight.detach()
    return found


# ---- parameters that change during the run ------------------------------------------------------------------------------
def at_the_second_epoch(action):
    class Changing(Classifier):
        def on_train_epoch_start(self):
            if self.current_epoch == 1:
                action(self)

    module = seeded(Changing)
    module.body[4].requires_grad_(False)
    return module


CHANGES = {
    "has become trainable during the run": lambda self: self.body[4].requires_grad_(True),
    "has been frozen during the run": lambda self: self.body[0].requires_grad_(False),
    "body.0.weight' of .* has been replaced during the run": lambda self: prune.l1_unstructured(self.body[0], "weight", 0.3),
    "has been replaced during the run": lambda self: setattr(self.body[0], "weight", nn.Parameter(torch.zeros(12, 6))),
}


@pytest.mark.parametrize(("message", "change"), CHANGES.items(), ids=["unfrozen", "frozen", "pruned", "replaced"])
def test_changes_of_the_trained_parameters_are_refused(message, change, tmp_path):
    with pytest.raises(MisconfigurationException, match=message):
        fit(tmp_path, at_the_second_epoch(change), 20)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (BackboneFinetuning, "BackboneFinetuning changes during the run which parameters"),
        (partial(ModelPruning, "l1_unstructured", amount=0.3), "ModelPruning changes during the run which parameters"),
        (BatchSizeFinder, "BatchSizeFinder tries steps before AdaNAGED is ready"),
    ],
)
def test_callbacks_that_would_be_in_the_way_are_refused(make, message, tmp_path):
    zo = AdaNAGED()
    trainer = make_trainer(tmp_path, max_steps=2, callbacks=[make(), zo])
    with pytest.raises(MisconfigurationException, match=message):
        zo.setup(trainer, seeded(Classifier), "fit")


# ---- Trainers -----------------------------------------------------------------------------------------------------------
def test_the_callback_serves_a_module_of_ours_after_one_of_theirs(tmp_path):
    zo = AdaNAGED()
    fit(tmp_path, seeded(Classifier), 2, zo=zo)
    module = Quadratic()
    make_trainer(tmp_path, max_steps=3, callbacks=[zo]).fit(module, quadratic_loader())
    assert zo.optimizer is module.trainer.optimizers[0]
    assert zo.optimizer.step_rule is zo.rule
    assert zo.rule.calibrated


class Stream(IterableDataset):
    def __iter__(self):
        yield from batches()


@pytest.mark.parametrize("own", [False, True])
def test_a_loader_without_a_length(own, tmp_path):
    """N is not known, and the rate does not fall."""
    module = Quadratic(accumulate_grad_batches=2) if own else seeded(Classifier)
    data = DataLoader(Stream(), batch_size=None)
    if own:
        data = DataLoader(Stream(), batch_size=None, collate_fn=lambda b: (b[0][:, :5], b[0][:, :3]))
    zo = AdaNAGED()
    trainer = make_trainer(tmp_path, max_epochs=2, limit_val_batches=0, callbacks=[zo])
    trainer.fit(module, data, None if own else loader(2))
    assert zo.rule.total_steps is None
    assert zo.optimizer.step_index == (6 if own else 12)


@pytest.mark.parametrize("arguments", [{"log_every_n_steps": 0}, {"barebones": True}], ids=["no logging", "barebones"])
@pytest.mark.filterwarnings("ignore:.*barebones:UserWarning")
def test_without_logging(arguments, tmp_path):
    zo = AdaNAGED()
    quiet = {} if "barebones" in arguments else {"logger": False, "enable_progress_bar": False, "enable_checkpointing": False}
    trainer = Trainer(accelerator="cpu", default_root_dir=tmp_path, max_steps=3, callbacks=[zo], **quiet, **arguments)
    trainer.fit(seeded(Classifier), loader(), loader(2))
    assert zo.optimizer.step_index == 3


def test_a_second_fit_of_the_same_trainer_plans_its_own_steps(tmp_path):
    zo = AdaNAGED()
    trainer = make_trainer(tmp_path, max_epochs=2, limit_val_batches=0, callbacks=[zo])
    module = seeded(Classifier)
    trainer.fit(module, loader(), loader(2))
    assert zo.rule.total_steps == 12
    trainer.fit_loop.max_epochs = 5
    trainer.fit(module, loader(), loader(2))
    assert zo.rule.total_steps == 18


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`:UserWarning")
def test_a_run_that_early_stopping_has_ended_is_over(tmp_path):
    """Going on from its last checkpoint does nothing, until the callback is left out."""

    def go(*callbacks, **arguments):
        trainer = make_trainer(tmp_path, max_epochs=9, callbacks=[ResumeCheckpoint(tmp_path), *callbacks, AdaNAGED()])
        x, y = (torch.cat(part) for part in zip(*batches(), strict=True))
        data = list(zip(x, y, strict=True))
        trainer.fit(seeded(Classifier), ResumableDataLoader(data, 8, sampler=ShuffleSampler(data)), loader(2), **arguments)
        return trainer.global_step

    ended = go(EarlyStopping("val_loss", min_delta=1e9, patience=1))
    assert ended == 12
    last = tmp_path / "last.ckpt"
    assert go(EarlyStopping("val_loss", min_delta=1e9, patience=1), ckpt_path=last) == ended
    assert go(ckpt_path=last) == 54


def test_a_loader_that_cannot_be_resumed_is_pointed_at(tmp_path):
    with pytest.warns(UserWarning, match=r"has no state_dict.*ResumableDataLoader"):
        fit(tmp_path, seeded(Classifier), 2, ResumeCheckpoint(tmp_path))


def test_the_loss_is_wanted_in_float32(tmp_path):
    class Coarse(Classifier):
        def training_step(self, batch, batch_idx):
            return F.cross_entropy(self(batch[0]), batch[1]).bfloat16()

    with pytest.warns(UserWarning, match=r"training_step returns a loss in torch.bfloat16, too coarse"):
        fit(tmp_path, seeded(Coarse), 2)
