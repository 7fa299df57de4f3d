"""Learning rates of an optimizer that is never stepped, as factors on the steps of another."""

import math

import pytest
import torch
from lightning.pytorch import Callback
from torch import nn

from tests.callbacks.foreign import Classifier, loader, make_trainer, seeded
from zo_lightning.callbacks import AdaNAGED
from zo_lightning.callbacks.schedule import Schedule
from zo_lightning.optim import ZerothOrder

LAMBDAS = [lambda step: 1 / (1 + step), lambda step: min(1.0, (step + 1) / 4)]


class TwoRates(Classifier):
    """A body and a head with rates and schedules of their own; ``first`` of them has a weight decay."""

    def configure_optimizers(self):
        groups = [
            {"params": self.body[0].parameters(), "lr": 0.3, "weight_decay": 0.1},
            {"params": self.body[4].parameters(), "lr": 0.02},
        ]
        optimizer = torch.optim.AdamW(groups)
        return [optimizer], [{"scheduler": torch.optim.lr_scheduler.LambdaLR(optimizer, LAMBDAS), "interval": "step"}]


class Rates(Callback):
    """γ of each step as a multiple of the rule's, by parameter."""

    def __init__(self, zo):
        self.zo, self.seen = zo, []

    def on_train_batch_end(self, *args):
        optimizer = self.zo.optimizer
        factors = [rate / self.zo.rule.step_size for rate in optimizer.last.rates]
        names = [group["param_names"] for group in optimizer.param_groups]
        self.seen.append({name: factor for group, factor in zip(names, factors, strict=True) for name in group})


def fit(folder, module, steps, **arguments):
    zo = AdaNAGED(**arguments)
    rates = Rates(zo)
    trainer = make_trainer(folder, max_steps=steps, callbacks=[zo, rates], limit_val_batches=0)
    torch.manual_seed(7)
    trainer.fit(module, loader(), loader())
    return zo, rates.seen


def test_every_group_follows_its_own_schedule(tmp_path):
    module = seeded(TwoRates, dropout=0.0)
    norm = module.body[1].weight.clone()
    zo, seen = fit(tmp_path, module, 5)
    for step, rates in enumerate(seen):
        for name, factor in rates.items():
            assert factor == pytest.approx(LAMBDAS[name.startswith("body.4")](step)), (step, name)
    assert set(seen[0]) == {"body.0.weight", "body.0.bias", "body.4.weight", "body.4.bias"}
    assert zo.rule.schedule == "constant"
    assert {group["follows"] for group in zo.optimizer.param_groups} == {0, 1}
    assert torch.equal(module.body[1].weight, norm), "what the module's optimizer does not hold is not trained"


def test_the_length_of_a_step_is_the_scheduled_one(tmp_path):
    """Measured at the weights: the sign of a bias' direction has entries of one size, γ times the schedule."""

    class Steep(TwoRates):
        def on_train_batch_start(self, batch, batch_idx):
            self.path.append([self.body[k].bias.detach().clone() for k in (0, 4)])

    module = seeded(Steep, dropout=0.0)
    module.path = []
    zo = AdaNAGED(geometry={"vector": {"name": "sign", "radius": 1.0}})
    trainer = make_trainer(tmp_path, max_steps=3, callbacks=[zo], limit_val_batches=0)
    gammas = []

    class Gamma(Callback):
        def on_train_batch_end(self, *args):
            gammas.append(zo.rule.step_size)

    trainer.callbacks.append(Gamma())
    trainer.fit(module, loader(), loader())
    module.path.append([module.body[k].bias.detach().clone() for k in (0, 4)])
    for step in range(3):
        for k in range(2):
            moved = (module.path[step + 1][k] - module.path[step][k]).abs().double()
            assert float(moved.amax()) == pytest.approx(gammas[step] * LAMBDAS[k](step), rel=1e-3)


# ---- by itself ---------------------------------------------------------------------------------------------------------
def pair(lr: float = 0.2, **more):
    p, q = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2))
    source = torch.optim.SGD([{"params": [p], "lr": lr, **more}, {"params": [q], "lr": 2 * lr}])
    schedule = Schedule(source)
    optimizer = ZerothOrder(schedule.split([{"params": [("p", p), ("q", q)], "geometry": "sign"}]))
    return source, schedule, optimizer


def factors(schedule, optimizer) -> list[float]:
    schedule.apply(optimizer)
    return [group["lr"] / group["initial_lr"] if "initial_lr" in group else math.nan for group in optimizer.param_groups]


def test_groups_are_split_by_the_group_they_follow():
    _, _, optimizer = pair()
    assert [(g["param_names"], g["follows"], g["geometry"]) for g in optimizer.param_groups] == [
        (["p"], 0, "sign"),
        (["q"], 1, "sign"),
    ]


def test_untouched_rates_leave_the_rule_alone():
    _, schedule, optimizer = pair()
    assert all(map(math.isnan, factors(schedule, optimizer)))
    assert [group["lr"] for group in optimizer.param_groups] == [1e-3, 1e-3]


def test_a_rate_that_a_callback_sets_is_followed():
    source, schedule, optimizer = pair()
    source.param_groups[1]["lr"] = 0.1
    assert factors(schedule, optimizer)[1] == pytest.approx(0.25)
    source.param_groups[1]["lr"] = 0.4  # and back
    assert factors(schedule, optimizer)[1] == pytest.approx(1.0)


def test_a_warm_up_begins_at_zero():
    source, schedule, optimizer = pair()
    scheduler = torch.optim.lr_scheduler.LambdaLR(source, lambda step: step / 2)
    seen = []
    for _ in range(4):
        seen.append(factors(schedule, optimizer))
        source.step()
        scheduler.step()
    assert [row[0] for row in seen] == pytest.approx([0.0, 0.5, 1.0, 1.5])
    assert [row[1] for row in seen] == pytest.approx([0.0, 0.5, 1.0, 1.5])


def test_one_cycle_is_relative_to_its_peak():
    p = nn.Parameter(torch.ones(3))
    source = torch.optim.SGD([p], lr=0.5)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(source, 0.8, total_steps=10, pct_start=0.3, cycle_momentum=False)
    schedule = Schedule(source)
    optimizer = ZerothOrder(schedule.split([{"params": [("p", p)], "geometry": "sign"}]))
    seen = []
    for _ in range(10):
        seen += factors(schedule, optimizer)
        source.step()
        if len(seen) < 10:
            scheduler.step()
    assert max(seen) == pytest.approx(1.0)
    assert seen[0] == pytest.approx(1 / 25)
    assert seen[-1] == pytest.approx(1 / 25 / 1e4)


def test_plateaus_are_followed_though_they_leave_no_mark():
    source, schedule, optimizer = pair()
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(source, factor=0.1, patience=0)
    seen = []
    for loss in (1.0, 2.0, 2.0):
        scheduler.step(loss)
        seen.append(factors(schedule, optimizer))
    assert all(map(math.isnan, seen[0]))
    assert [row[0] for row in seen[1:]] == pytest.approx([0.1, 0.01])
    assert [row[1] for row in seen[1:]] == pytest.approx([0.1, 0.01])


def test_a_resumed_schedule_stays_relative_to_the_beginning():
    source, schedule, optimizer = pair()
    source.param_groups[0]["lr"] = 0.05
    assert factors(schedule, optimizer)[0] == pytest.approx(0.25)
    again, second, other = pair(lr=0.05)  # what a run that reads its rate anew would take for the beginning
    second.load_state_dict(schedule.state_dict())
    assert factors(second, other)[0] == pytest.approx(0.25)
    assert again.param_groups[0]["lr"] == 0.05
