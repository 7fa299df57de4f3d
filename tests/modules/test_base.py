"""The base module in a Trainer: one step per batch, schedulers, refusals."""

import copy
from functools import partial

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from tests.quadratic import Quadratic, batches, loader, trainer, weights
from zo_lightning.callbacks import AdaNAGED
from zo_lightning.modules import ModelError, ZOModule
from zo_lightning.optim import ZerothOrder
from zo_lightning.optim.methods import ConservativeZO


def plain(params, probes="sequential"):
    return ZerothOrder(params, lr=0.05, smoothing=1e-3, probes=probes)


class Record(Callback):
    """What each batch did."""

    def __init__(self):
        self.steps, self.lrs, self.hooks, self.losses = [], [], 0, []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.hooks += 1

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.steps.append(trainer.global_step)
        self.lrs.append(trainer.optimizers[0].param_groups[0]["lr"])
        self.losses.append(float(outputs["loss"]))


def test_one_step_per_batch_and_max_steps_ends_the_run(tmp_path):
    record, module = Record(), Quadratic(optimizer=plain)
    fit = trainer(tmp_path, max_steps=7, callbacks=[record])
    fit.fit(module, loader())
    assert record.steps == [1, 2, 3, 4, 5, 6, 7]
    assert fit.global_step == 7
    assert module.evaluations == 1 + 2 * 7  # one observed forward, then two probes each
    assert record.hooks == module.evaluations  # Lightning's hook runs after every evaluation of a single batch


def test_probes_run_as_one_forward_where_they_can(tmp_path):
    calls = []

    class Spy(Quadratic):
        def loss(self, batch):
            calls.append(len(batch[0]))
            return super().loss(batch)

    module, other = Spy(optimizer=partial(plain, probes="auto")), Quadratic(optimizer=plain)
    records = Record(), Record()
    for run, record in zip((module, other), records, strict=True):
        trainer(tmp_path, max_steps=7, callbacks=[record]).fit(run, loader())
    # to see how the weights are used; both ways in the first step, to compare them; from then on doubled batches
    assert calls == [6, 6, 6, 12] + [12] * 6
    assert records[0].losses == pytest.approx(records[1].losses, rel=1e-5)
    torch.testing.assert_close(weights(module), weights(other), rtol=1e-5, atol=1e-6)


def test_the_steps_are_those_of_the_bare_optimizer(tmp_path):
    """Lightning adds nothing and loses nothing: bit for bit."""
    module, record = Quadratic(optimizer=plain), Record()
    trainer(tmp_path, max_steps=6, callbacks=[record]).fit(module, loader())
    other = Quadratic()
    optimizer = ZerothOrder(
        ZerothOrder(other.named_parameters()).geometry.split(other.named_parameters(), other), lr=0.05, smoothing=1e-3
    ).attach(other)
    data = batches()
    losses = [float(optimizer.step(lambda k=k: other.loss(data[k % 4]))) for k in range(6)]
    optimizer.fold()
    assert torch.equal(weights(module), weights(other))
    assert record.losses == losses


def mean_loss(module) -> float:
    with torch.no_grad():
        return float(torch.stack([module.loss(batch).mean() for batch in batches()]).mean())


def test_training_lowers_the_loss_and_leaves_the_frozen_weights(tmp_path):
    module = Quadratic()
    frozen, before = module.frozen.weight.clone(), mean_loss(module)
    trainer(tmp_path, max_steps=200, callbacks=[AdaNAGED()]).fit(module, loader())
    assert mean_loss(module) < 0.7 * before
    assert torch.equal(module.frozen.weight, frozen)


def test_train_loss_is_logged(tmp_path):
    fit = trainer(tmp_path, max_steps=1, callbacks=[record := Record()])
    fit.fit(Quadratic(optimizer=plain), loader())
    assert float(fit.callback_metrics["train/loss"]) == pytest.approx(record.losses[0])


@pytest.mark.parametrize(("interval", "expected"), [("step", [0.5**k for k in range(1, 7)]), ("epoch", [1] * 4 + [0.5] * 2)])
def test_schedulers_are_stepped_by_their_interval(interval, expected, tmp_path):
    record = Record()
    module = Quadratic(
        optimizer=plain,
        lr_scheduler=lambda optimizer: torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5),
        lr_scheduler_interval=interval,
    )
    trainer(tmp_path, max_steps=6, callbacks=[record]).fit(module, loader())
    assert record.lrs == pytest.approx([0.05 * factor for factor in expected])


def test_scheduler_that_needs_a_metric_is_refused(tmp_path):
    module = Quadratic(lr_scheduler=torch.optim.lr_scheduler.ReduceLROnPlateau)
    with pytest.raises(MisconfigurationException, match="ReduceLROnPlateau is not supported"):
        trainer(tmp_path, max_steps=1).fit(module, loader())


def test_first_order_optimizer_is_refused(tmp_path):
    module = Quadratic(optimizer=lambda params: torch.optim.SGD([p for _, p in params], lr=0.1))
    with pytest.raises(MisconfigurationException, match=r"must be zo_lightning\.optim\.ZerothOrder or a subclass, got SGD"):
        trainer(tmp_path, max_steps=1).fit(module, loader())


@pytest.mark.parametrize("accumulate", [1, 2])
def test_first_order_steps_are_those_of_torch(accumulate, tmp_path):
    """The mean gradient of the batches of a step; an epoch's last step may have fewer."""
    torch.manual_seed(0)
    module = Quadratic(
        optimizer=partial(torch.optim.SGD, lr=0.1, momentum=0.9),
        lr_scheduler=lambda optimizer: torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5),
        accumulate_grad_batches=accumulate,
        first_order=True,
    )
    twin = copy.deepcopy(module.net)
    per_epoch = -(-len(batches()) // accumulate)
    trainer(tmp_path, max_epochs=2).fit(module, loader())
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.1, momentum=0.9)
    for step in range(2 * per_epoch):
        window = batches()[step % per_epoch * accumulate :][:accumulate]
        optimizer.zero_grad()
        torch.stack([(twin(x) - y).square().mean(dim=1).mean() for x, y in window]).mean().backward()
        optimizer.param_groups[0]["lr"] = 0.1 * 0.5**step
        optimizer.step()
    for a, b in zip(module.net.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_first_order_and_a_zeroth_order_optimizer_contradict_each_other(tmp_path):
    with pytest.raises(MisconfigurationException, match=r"first_order=True .* such as torch\.optim\.AdamW, got ZerothOrder"):
        trainer(tmp_path, max_steps=1).fit(Quadratic(first_order=True), loader())
    module = Quadratic(optimizer=partial(torch.optim.SGD, lr=0.1), first_order=True)
    with pytest.raises(MisconfigurationException, match="first_order=True takes none: remove one"):
        trainer(tmp_path, max_steps=1, callbacks=[AdaNAGED()]).fit(module, loader())


def test_steps_of_several_batches_are_refused_where_the_losses_decide_on_the_probes(tmp_path):
    module = Quadratic(optimizer=ConservativeZO, accumulate_grad_batches=2)
    with pytest.raises(MisconfigurationException, match=r"ConservativeZO needs the whole batch at once: .*=2"):
        trainer(tmp_path, max_steps=1).fit(module, loader())


def test_everything_frozen_is_refused(tmp_path):
    module = Quadratic()
    module.net.requires_grad_(False)
    with pytest.raises(ModelError, match="Quadratic has no trainable parameter"):
        trainer(tmp_path, max_steps=1).fit(module, loader())


def test_mixed_half_precision_is_refused(tmp_path):
    plugin = MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu"))
    with pytest.raises(MisconfigurationException, match=r"precision '16-mixed' scales gradients.*'bf16-mixed'"):
        trainer(tmp_path, max_steps=1, plugins=[plugin]).fit(Quadratic(), loader())


def test_sharded_weights_are_refused(tmp_path):
    module = Quadratic()
    module.trainer = trainer(tmp_path, devices=2, strategy=ModelParallelStrategy())
    with pytest.raises(MisconfigurationException, match=r"ModelParallelStrategy is not supported.*use strategy='zo_ddp'"):
        module.setup("fit")


def test_gradient_clipping_is_refused_by_lightning(tmp_path):
    with pytest.raises(MisconfigurationException, match="gradient clipping is not supported for manual optimization"):
        trainer(tmp_path, max_steps=1, gradient_clip_val=1.0).fit(Quadratic(), loader())


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_broken_weights_are_named_before_the_first_step(value, tmp_path):
    module = Quadratic()
    with torch.no_grad():
        module.net.weight[1, 2] = value
        module.net.bias[0] = value
    with pytest.raises(ModelError, match=r"NaN or infinite values in 'net\.weight' and 1 more"):
        trainer(tmp_path, max_steps=1).fit(module, loader())
    assert module.evaluations == 0


@pytest.mark.parametrize("probes", ["sequential", "stacked"])
def test_bfloat16_mixed_precision_probes_see_their_displacement(probes, tmp_path):
    """Autocast keeps casts of weights: a displaced weight must not be served from there."""
    losses = []

    class Spy(Quadratic):
        def loss(self, batch):
            result = super().loss(batch)
            losses.extend(part.mean().item() for part in result.float().split(6))
            return result

    module = Spy(optimizer=lambda params: ZerothOrder(params, lr=0.5, smoothing=0.5, probes=probes))
    trainer(tmp_path, max_steps=2, precision="bf16-mixed").fit(module, loader(1))
    probed = losses[1:3] + losses[-2:]  # of the first step, and of the second
    assert len(set(probed)) == 4


def test_loss_must_be_defined(tmp_path):
    with pytest.raises(NotImplementedError, match="ZOModule must define `loss"):
        ZOModule().loss(None)


def test_running_statistics_move_once_per_batch(tmp_path):
    """As by one forward of the batch: the first layer is batch normalisation, so that the displacement plays no part."""

    class Normed(Quadratic):
        def __init__(self):
            super().__init__()
            self.norm = torch.nn.BatchNorm1d(5)

        def loss(self, batch):
            x, y = batch
            return (self.net(self.norm(x)) - y).square().mean()

    module = Normed()
    by_hand = torch.nn.BatchNorm1d(5)
    batches = loader()
    trainer(tmp_path, max_steps=3).fit(module, batches)
    for x, _ in list(batches)[:3]:
        by_hand(x)
    assert int(module.norm.num_batches_tracked) == 3
    torch.testing.assert_close(module.norm.running_mean, by_hand.running_mean, rtol=0, atol=0)
    torch.testing.assert_close(module.norm.running_var, by_hand.running_var, rtol=0, atol=0)
