"""Several evaluations of a batch, of which one is the user's: its logs, metrics, attributes and buffers, and nothing else."""

import copy
import random
from collections import Counter, OrderedDict, defaultdict, deque

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.loggers.logger import Logger
from torch import nn
from torchmetrics import MeanMetric, MetricCollection, MetricTracker, MinMaxMetric
from torchmetrics.classification import MulticlassAccuracy, MulticlassAUROC, MulticlassF1Score, MulticlassPrecision
from torchmetrics.wrappers import ClasswiseWrapper

from tests.callbacks.foreign import BATCHES, ROWS, Classifier, batches, loader, make_trainer, mean_loss, seeded, tensors
from zo_lightning.callbacks import AdaNAGED
from zo_lightning.callbacks.muting import muted

EPOCHS = 2


class Table(Logger):
    """A logger that keeps what it is given; ``experiment`` is a list."""

    def __init__(self):
        super().__init__()
        self.rows, self.experiment = [], []

    name, version = "table", 0

    def log_metrics(self, metrics, step=None):
        self.rows.append((step, dict(metrics)))

    def log_hyperparams(self, *args, **kwargs):
        pass


class Busy(Classifier):
    """Keeps books of every evaluation in all the ways that people do."""

    def __init__(self, **arguments):
        super().__init__(**arguments)
        kinds = {"acc": MulticlassAccuracy, "precision": MulticlassPrecision, "f1": MulticlassF1Score}
        self.several = MetricCollection({name: kind(3, average="macro") for name, kind in kinds.items()}, prefix="t_")
        self.area = MulticlassAUROC(3)  # its state is a list of all predictions
        self.classwise = ClasswiseWrapper(MulticlassAccuracy(3, average=None))
        self.range = MinMaxMetric(MulticlassAccuracy(3, average="micro"))
        self.tracker = MetricTracker(MulticlassAccuracy(3, average="micro"))
        self.mean = nn.ModuleDict({"loss": MeanMetric()})
        self.register_buffer("centre", torch.zeros(3))
        self.register_buffer("count", torch.zeros((), dtype=torch.long))
        self.register_buffer("wide", torch.ones(1).expand(3))  # one number that is seen three times
        self.calls, self.total, self.word = 0, 0.0, ""
        self.losses, self.logits = [], []
        self.by_label, self.labels = {}, set()
        self.recent = deque(maxlen=2)
        self.frequency, self.lists = Counter(), defaultdict(list)
        self.nested = {"deep": [{"losses": []}, torch.zeros(2)]}
        self.running = torch.zeros(3)
        self.alias = self.losses
        self.made = None

    def on_train_epoch_start(self):
        self.tracker.increment()

    def training_step(self, batch, batch_idx):
        x, y = batch
        logits = self(x)
        loss = F.cross_entropy(logits, y)
        self.centre = 0.9 * self.centre + 0.1 * logits.mean(0)  # another tensor each time
        self.count += 1
        self.calls += 1
        self.total += float(loss)
        self.word += "x"
        self.losses.append(float(loss))
        self.logits.append(logits.clone())
        self.by_label[len(self.by_label)] = float(loss)
        self.labels.add(float(loss))
        self.recent.append(float(loss))
        self.frequency["steps"] += 1
        self.lists["losses"].append(float(loss))
        self.nested["deep"][0]["losses"].append(float(loss))
        self.nested["deep"][1] += 1
        self.running += logits.mean(0)
        self.made = torch.ones(2) if self.made is None else self.made + 1
        if not hasattr(self, "late"):
            self.late = 0
        self.late += 1
        for metric in (self.area, self.classwise, self.range, self.tracker):
            metric.update(logits, y)
        self.mean["loss"].update(loss)
        self.log("loss", loss, on_step=True, on_epoch=True)
        self.log_dict(self.several(logits, y), on_step=True, on_epoch=False)
        self.log("area", self.area, on_step=False, on_epoch=True, metric_attribute="area")
        self.log("calls", float(self.calls), reduce_fx="max", on_step=False, on_epoch=True)
        self.logger.experiment.append(batch_idx)
        self.logger.log_metrics({"direct": batch_idx}, step=self.global_step)
        return {"loss": loss, "logits": logits}

    def configure_optimizers(self):
        return torch.optim.SGD(self.body.parameters(), lr=0.1)


class AtX(Callback):
    """The loss at the weights before the step, by a forward of its own, and what the batch's outputs were."""

    def __init__(self, zo):
        self.zo, self.before, self.first, self.outputs = zo, [], [], []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        twin = copy.deepcopy(pl_module.body)
        self.before.append(mean_loss(twin, [batch]))

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        report = self.zo.optimizer.last
        self.first.append(report.loss + report.smoothing * report.slopes[0])  # f₊ of (f₊ + f₋)/2 and (f₊ - f₋)/2τ
        self.outputs.append(outputs)


@pytest.fixture(scope="module", params=[1, 4], ids=["at x", "at x + τu"])
def fitted(request, tmp_path_factory):
    """A run whose user's evaluations are at x, always or every fourth step."""
    zo = AdaNAGED(interval=request.param)
    seen, table = AtX(zo), Table()
    module = seeded(Busy, dropout=0.0)
    fit = make_trainer(tmp_path_factory.mktemp("run"), max_epochs=EPOCHS, callbacks=[zo, seen], logger=table)
    fit.fit(module, loader(), loader(1))
    return module, seen, table, fit, request.param


def test_the_users_evaluation_is_that_of_the_steps_first_point(fitted):
    module, seen, table, _, interval = fitted
    steps = EPOCHS * BATCHES
    expected = [seen.before[t] if t % interval == 0 else seen.first[t] for t in range(steps)]
    assert module.losses == pytest.approx(expected, rel=1e-5)
    logged = [row["loss_step"] for _, row in table.rows if "loss_step" in row]
    assert logged == pytest.approx(expected, rel=1e-5)
    assert [float(output["loss"]) for output in seen.outputs] == pytest.approx(expected, rel=1e-5)
    if interval == 1:
        assert len(set(expected)) == steps
    else:
        assert any(abs(module.losses[t] - seen.before[t]) > 1e-5 for t in range(1, steps) if t % interval)
    epochs = [row["loss_epoch"] for _, row in table.rows if "loss_epoch" in row]
    assert epochs == pytest.approx([sum(expected[:BATCHES]) / BATCHES, sum(expected[BATCHES:]) / BATCHES], rel=1e-5)


def test_attributes_see_one_evaluation_of_each_batch(fitted):
    module, *_ = fitted
    steps, losses = EPOCHS * BATCHES, module.losses
    assert len(losses) == module.calls == module.late == module.frequency["steps"] == steps
    assert module.alias is module.losses
    assert module.word == "x" * steps
    assert module.total == pytest.approx(sum(losses))
    assert list(module.by_label.values()) == list(module.recent.__class__(losses)) == losses
    assert module.labels == set(losses)
    assert list(module.recent) == losses[-2:]
    assert module.lists == {"losses": losses}
    assert module.made.tolist() == [steps, steps]
    torch.testing.assert_close(module.running, torch.stack(module.logits).mean(1).sum(0))


def test_nested_containers_see_one_evaluation_of_each_batch(fitted):
    module, *_ = fitted
    assert module.nested["deep"][0]["losses"] == module.losses
    assert module.nested["deep"][1].tolist() == [EPOCHS * BATCHES] * 2


def test_the_loggers_see_one_evaluation_of_each_batch(fitted):
    _, _, table, fit, _ = fitted
    assert table.experiment == list(range(BATCHES)) * EPOCHS
    assert [row["direct"] for _, row in table.rows if "direct" in row] == table.experiment
    assert [step for step, row in table.rows if "direct" in row] == list(range(EPOCHS * BATCHES))
    assert [row["calls"] for _, row in table.rows if "calls" in row] == [BATCHES, 2 * BATCHES]
    assert fit.loggers == [table]


def test_metrics_see_one_evaluation_of_each_batch(fitted):
    """Against metrics of their own, updated with the logits of the user's evaluations."""
    module, _, table, _, _ = fitted
    labels = list(tensors()[1].split(ROWS)) * EPOCHS
    per_step = [row for _, row in table.rows if "t_acc" in row]
    for logits, y, row in zip(module.logits, labels, per_step, strict=True):
        for name, metric in {"acc": MulticlassAccuracy, "precision": MulticlassPrecision, "f1": MulticlassF1Score}.items():
            assert row[f"t_{name}"] == pytest.approx(float(metric(3, average="macro")(logits, y)))
    all_logits, all_labels = torch.cat(module.logits), torch.cat(labels)
    for name, value in module.several.compute().items():  # never reset, as it was logged by value
        kind = {"t_acc": MulticlassAccuracy, "t_precision": MulticlassPrecision, "t_f1": MulticlassF1Score}[name]
        assert float(value) == pytest.approx(float(kind(3, average="macro")(all_logits, all_labels)))
    half = BATCHES * ROWS
    areas = [float(MulticlassAUROC(3)(all_logits[part], all_labels[part])) for part in (slice(half), slice(half, None))]
    assert [row["area"] for _, row in table.rows if "area" in row] == pytest.approx(areas)
    classwise = MulticlassAccuracy(3, average=None)(all_logits, all_labels)
    assert [float(v) for v in module.classwise.compute().values()] == pytest.approx(classwise.tolist())
    micro = [float(MulticlassAccuracy(3, average="micro")(all_logits[:n], all_labels[:n])) for n in (half, 2 * half)]
    assert float(module.range.compute()["raw"]) == pytest.approx(micro[1])
    tracked = module.tracker.compute_all()
    second = float(MulticlassAccuracy(3, average="micro")(all_logits[half:], all_labels[half:]))
    assert tracked.tolist() == pytest.approx([micro[0], second])
    assert float(module.mean["loss"].compute()) == pytest.approx(sum(module.losses) / len(module.losses), rel=1e-6)
    assert module.accuracy._update_count == 0


def test_buffers_move_once_per_batch(fitted):
    module, *_ = fitted
    assert int(module.count) == EPOCHS * BATCHES
    assert int(module.body[1].num_batches_tracked) == EPOCHS * BATCHES


def test_a_buffer_that_is_assigned_anew_moves_once_per_batch(fitted):
    module, *_ = fitted
    centre = torch.zeros(3)
    for logits in module.logits:
        centre = 0.9 * centre + 0.1 * logits.mean(0)
    torch.testing.assert_close(module.centre, centre)
    assert "centre" in dict(module.named_buffers())


def test_running_statistics_are_those_of_one_forward_of_each_batch(tmp_path):
    class First(Classifier):
        """The statistics of the inputs do not depend on the weights."""

        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(nn.BatchNorm1d(6), nn.Linear(6, 3))

    module, norm = seeded(First), nn.BatchNorm1d(6)
    make_trainer(tmp_path, max_epochs=2, callbacks=[AdaNAGED()], num_sanity_val_steps=0).fit(module, loader(), loader(2))
    for _ in range(2):
        for x, _ in batches():
            norm(x)
    assert torch.equal(module.body[0].running_mean, norm.running_mean)
    assert torch.equal(module.body[0].running_var, norm.running_var)
    assert int(module.body[0].num_batches_tracked) == 2 * BATCHES


@pytest.mark.parametrize(
    "draw",
    [lambda: float(torch.rand(())), lambda: np.random.beta(1, 1), random.random],  # noqa: NPY002 (as a mixup does)
    ids=["torch", "numpy", "python"],
)
def test_random_numbers_are_the_same_at_every_point(draw, tmp_path):
    """Else the difference of two points would be noise. From batch to batch they change."""
    drawn = []

    class Draws(Classifier):
        def training_step(self, batch, batch_idx):
            drawn.append((batch_idx, draw()))
            return super().training_step(batch, batch_idx)

    make_trainer(tmp_path, max_steps=4, callbacks=[AdaNAGED()], limit_val_batches=0).fit(seeded(Draws), loader(), loader())
    by_batch = [{value for index, value in drawn if index == batch} for batch in range(4)]
    assert [len(values) for values in by_batch] == [1] * 4
    assert len(set.union(*by_batch)) == 4
    assert sum(index == 1 for index, _ in drawn) == 2


# ---- muted by itself ---------------------------------------------------------------------------------------------------
class Bare(LightningModule):
    def __init__(self, **attributes):
        super().__init__()
        for name, value in attributes.items():
            setattr(self, name, value)


plain = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=3)
leaves = plain | st.builds(lambda n: torch.arange(float(n)), st.integers(0, 3))
keys = st.text("abc", min_size=1, max_size=2)
values = st.recursive(
    leaves,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(keys, inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.lists(inner, max_size=3).map(deque)
        | st.dictionaries(keys, inner, max_size=2).map(OrderedDict)
        | st.sets(st.integers(), max_size=3)
    ),
    max_leaves=8,
)


def disturb(value, seen: set[int]) -> None:
    """Change whatever can be changed in place, at every depth."""
    if id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, torch.Tensor):
        value += 1
    elif isinstance(value, dict):
        for inner in list(value.values()):
            disturb(inner, seen)
        value["new"] = 7
        value.pop(next(iter(value)))
    elif isinstance(value, (list, deque, tuple)):
        for inner in value:
            disturb(inner, seen)
        if not isinstance(value, tuple):
            value.append(7)
            value.rotate(1) if isinstance(value, deque) else value.reverse()
    elif isinstance(value, set):
        value ^= {1, 7}


def same(a, b) -> bool:
    if type(a) is not type(b):
        return False
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple, deque)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def parts(value) -> list[int]:
    """The identities of everything that can be changed, in order."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple, deque)) else ()
    own = [id(value)] if isinstance(value, (dict, list, deque, set, torch.Tensor)) else []
    return own + [number for each in inner for number in parts(each)]


@settings(deadline=None, max_examples=100, derandomize=True, database=None)
@given(st.dictionaries(st.sampled_from("pqrs"), values, min_size=1, max_size=4), st.data())
def test_attributes_of_any_nesting_come_back_as_the_same_objects(attributes, data):
    shared = data.draw(st.sampled_from(sorted(attributes)))
    module = Bare(**attributes, alias=attributes[shared], holder=[attributes[shared], attributes[shared]])
    trainer = make_trainer("")
    before = {name: copy.deepcopy(vars(module)[name]) for name in (*attributes, "alias", "holder")}
    objects = {name: parts(vars(module)[name]) for name in before}
    with muted(trainer, module):
        seen: set[int] = set()
        for name in before:
            disturb(vars(module)[name], seen)
        for name in attributes:
            if isinstance(attributes[name], (int, float, str, type(None))):
                setattr(module, name, "another")
        module.more = [1]
    for name, value in before.items():
        assert same(vars(module)[name], value), name
        assert parts(vars(module)[name]) == objects[name], name
    assert not hasattr(module, "more")


def test_containers_that_hold_themselves_or_modules():
    module = Bare(own=[1], layers=[nn.Linear(2, 2)])
    module.own.append(module.own)
    layer, weight = module.layers[0], module.layers[0].weight.detach().clone()
    with muted(make_trainer(""), module):
        module.own.append(2)
        module.layers.append(nn.Linear(3, 3))
    assert module.own[0] == 1
    assert module.own[1] is module.own
    assert len(module.own) == 2
    assert module.layers == [layer]
    assert torch.equal(layer.weight, weight)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_all_comes_back_after_an_exception(error):
    module, table = Bare(count=[1]), Table()
    fit = make_trainer("", logger=table)

    def fails():
        with muted(fit, module):
            module.count.append(2)
            module.log("nothing", 1.0)
            module.log_dict({"nothing": 1.0})
            fit.loggers[0].experiment.add_image("nothing", 1)
            fit.loggers[0].log_metrics({"nothing": 1.0})
            raise error

    with pytest.raises(error):
        fails()
    assert module.count == [1]
    assert fit.loggers == [table]
    assert (table.rows, table.experiment) == ([], [])
    assert not {"log", "log_dict"} & set(vars(module))


def test_a_log_of_the_instances_own_is_silent_too():
    said = []
    module = Bare()
    module.log = lambda *arguments: said.append(arguments)
    own = module.log
    with muted(make_trainer(""), module):
        module.log("x", 1.0)
    assert said == []
    assert module.log is own
