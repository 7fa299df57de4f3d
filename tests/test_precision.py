"""Every precision of the Trainer is refused in a line, or its directional derivatives are those of a float64 recomputation."""

import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.func import functional_call
from torch.utils.data import DataLoader

from tests.quadratic import trainer as make_trainer
from zo_lightning.callbacks import AdaNAGED
from zo_lightning.modules import ZOModule
from zo_lightning.optim import CalibrationError, NonFiniteLossError, ParameterFree, ZerothOrder

STEPS = 4
TOLERANCE = {"32-true": 1e-3, "bf16-true": 0.15, "16-true": 0.03, "bf16-mixed": 0.15, "16-mixed": 0.03}


class Net(nn.Module):
    """Linear layers, of which the last one's weight is read past its slot, and so moved in place, where it is asked for."""

    def __init__(self, direct: bool) -> None:
        super().__init__()
        source = torch.Generator().manual_seed(3)
        self.first, self.last = nn.Linear(8, 16), nn.Linear(16, 4)
        with torch.no_grad():
            for p in (self.first.weight, self.last.weight):
                p.copy_(torch.randn(p.shape, generator=source) / p.shape[1] ** 0.5)
            for p in (self.first.bias, self.last.bias):
                p.fill_(0.1)
        self.holder = [self.last.weight] if direct else None

    def forward(self, x):
        weight = self.last.weight if self.holder is None else self.holder[0]
        return F.linear(torch.tanh(self.first(x)), weight, self.last.bias)


def squares(net, batch) -> torch.Tensor:
    x, y = batch
    return (net(x).float() - y.float()).square().mean(1)


class Own(ZOModule):
    def __init__(self, make, direct):
        super().__init__(optimizer=make)
        self.net = Net(direct)

    def loss(self, batch):
        return squares(self.net, batch)


class Foreign(LightningModule):
    def __init__(self, direct):
        super().__init__()
        self.net = Net(direct)

    def training_step(self, batch, batch_idx):
        return squares(self.net, batch).mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1.0)


def batches() -> list[tuple[torch.Tensor, torch.Tensor]]:
    source = torch.Generator().manual_seed(5)
    return [(torch.randn(64, 8, generator=source), 2 + torch.randn(64, 4, generator=source)) for _ in range(STEPS)]


def recomputed(weights, groups, seed, step, tau, batch, make) -> tuple[float, float]:
    """(f(x + τu) - f(x - τu)) / 2τ and (f(x + τu) + f(x - τu)) / 2 in float64.

    The direction u is what the step of an optimizer over float64 parameters is made of, which evaluates nothing.
    """
    net = Net(False).double()
    net.load_state_dict({name.removeprefix("net."): value.double() for name, value in weights.items()})
    points = {name: nn.Parameter(torch.zeros_like(value, dtype=torch.float64)) for name, value in weights.items()}
    twin = make([{**group, "params": [(name, points[name]) for name in group["params"]]} for group in groups], lr=1.0)
    for group in twin.param_groups:
        group["seed"], group["step"] = seed, step
    made_up = iter((1.0, 0.0))  # a positive slope: the step is -u
    twin.step(lambda: torch.tensor(next(made_up)))
    inputs = tuple(tensor.double() for tensor in batch)

    def loss(sign: float) -> float:
        moved = {name: p - sign * tau * points[f"net.{name}"].detach() for name, p in net.named_parameters()}
        with torch.no_grad():
            output = functional_call(net, moved, (inputs[0],))
            return float((output - inputs[1]).square().mean())

    plus, minus = loss(1), loss(-1)
    return (plus - minus) / (2 * tau), (plus + minus) / 2


class Check(Callback):
    """Compares each step's slope; it reads the weights before each step, with whatever was pending written."""

    def __init__(self, zo, make):
        self.zo, self.make, self.rows, self.dtypes = zo, make, [], set()

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.zo.optimizer.fold()
        self.before = {name: p.detach().clone() for name, p in pl_module.named_parameters()}
        self.dtypes |= {p.dtype for p in pl_module.parameters()}

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        optimizer, report = self.zo.optimizer, self.zo.optimizer.last
        groups = [
            {"params": g["param_names"], "geometry": g["geometry"], "radius": g["radius"], "transposed": g["transposed"]}
            for g in optimizer.param_groups
        ]
        head = optimizer.param_groups[0]
        slope, loss = recomputed(self.before, groups, head["seed"], report.step, report.smoothing, batch, self.make)
        self.rows.append((report.slopes[0], slope, report.loss, loss, report.smoothing))


def fit(folder, kind, precision, make, direct=False, **arguments):
    module, zo = Own(make, direct), AdaNAGED()
    if kind == "taken over":
        module, zo = Foreign(direct), AdaNAGED(optimizer=make)
    check = Check(zo, make)
    if precision == "16-mixed":
        arguments["plugins"] = [MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu"))]
    else:
        arguments["precision"] = precision
    trainer = make_trainer(folder, max_steps=STEPS, callbacks=[zo, check], **arguments)
    trainer.fit(module, DataLoader(batches(), batch_size=None))
    return module, zo, check


def check_slopes(check, precision) -> None:
    assert len(check.rows) == STEPS
    scale = max(abs(slope) for _, slope, *_ in check.rows)
    for measured, slope, probed, loss, tau in check.rows:
        assert measured != 0, "f₊ == f₋"
        assert abs(measured - slope) <= TOLERANCE[precision] * scale, (measured, slope, tau)
        assert probed == pytest.approx(loss, rel=TOLERANCE[precision])


KINDS = pytest.mark.parametrize("kind", ["own", "taken over"])
DIRECTIONS = pytest.mark.parametrize("directions", ["low_rank", "gaussian"])
EXPECTED = {"bf16-true": torch.bfloat16, "16-true": torch.float16}


@KINDS
@DIRECTIONS
@pytest.mark.parametrize("direct", [False, True], ids=["attached", "one in place"])
@pytest.mark.parametrize("precision", TOLERANCE)
@pytest.mark.filterwarnings("ignore:1 parameters are used otherwise than as their module's attribute")
def test_slopes_are_those_of_a_float64_recomputation(kind, directions, direct, precision, tmp_path):
    make = partial(ZerothOrder, directions=directions, seed=11)
    if kind == "own" and precision == "16-mixed":
        with pytest.raises(MisconfigurationException, match=r"precision '16-mixed' scales gradients") as found:
            fit(tmp_path, kind, precision, make, direct)
        assert "\n" not in str(found.value)
        return
    module, zo, check = fit(tmp_path, kind, precision, make, direct)
    check_slopes(check, precision)
    assert check.dtypes == {EXPECTED.get(precision, torch.float32)}
    assert all(p.dtype in check.dtypes for p in module.parameters())
    assert zo.optimizer._made_path is None  # the end of the fit has detached it
    first = Net(direct).to(next(module.parameters()).dtype)
    assert not any(torch.equal(p, q) for p, q in zip(module.net.parameters(), first.parameters(), strict=True))


@KINDS
@DIRECTIONS
@pytest.mark.parametrize("direct", [False, True], ids=["attached", "one in place"])
@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed"])
@pytest.mark.filterwarnings("ignore:1 parameters are used otherwise than as their module's attribute")
def test_slopes_with_autocasts_cache_of_weights(kind, directions, direct, precision, monkeypatch, tmp_path):
    """Coming releases of Lightning turn it on within training_step: a cast that is kept would hide every displacement."""
    if kind == "own" and precision == "16-mixed":
        return  # refused

    def cached(self):
        dtype = torch.bfloat16 if self.precision == "bf16-mixed" else torch.float16
        return torch.autocast("cpu", dtype=dtype, cache_enabled=True)

    monkeypatch.setattr(MixedPrecision, "autocast_context_manager", cached)
    _, _, check = fit(tmp_path, kind, precision, partial(ZerothOrder, directions=directions, seed=11), direct)
    check_slopes(check, precision)


@DIRECTIONS
@pytest.mark.parametrize("attached", [True, False])
def test_several_steps_within_one_autocast_see_every_update(directions, attached):
    """The same losses as with a context, and so a cache, for each step."""
    found = []
    for whole in (True, False):
        net = Net(False)
        optimizer = ZerothOrder(net.named_parameters(), lr=0.1, smoothing=0.2, directions=directions, seed=1)
        if attached:
            optimizer.attach(net)

        def step(net=net, optimizer=optimizer, index=0):
            return float(optimizer.step(lambda: squares(net, batches()[index])))

        def cast():
            return torch.autocast("cpu", torch.bfloat16, cache_enabled=True)

        losses = []
        if whole:
            with cast():
                net(batches()[0][0])  # with gradients: this fills the cache
                losses = [step(index=index) for index in range(STEPS)]
                optimizer.fold()
                with torch.no_grad():
                    last = float(squares(net, batches()[0]).mean())
        else:
            for index in range(STEPS):
                with cast():
                    losses.append(step(index=index))
            optimizer.fold()
            with cast(), torch.no_grad():
                last = float(squares(net, batches()[0]).mean())
        found.append([*losses, last, optimizer.last.slopes[0]])
    assert found[0] == found[1]
    assert len(set(found[0])) == STEPS + 2
    assert found[0][-1] != 0


@DIRECTIONS
@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16, torch.float16])
def test_noise_does_not_depend_on_the_default_dtype(directions, default):
    """Lightning changes it within training_step under true half precision."""
    ends, data = [], batches()
    for dtype in (torch.float32, default):
        net = Net(False)
        optimizer = ZerothOrder(
            net.named_parameters(), directions=directions, step_rule=ParameterFree(STEPS), num_directions=2, seed=1
        ).attach(net)
        torch.set_default_dtype(dtype)
        try:
            for batch in data:
                optimizer.step(lambda net=net, batch=batch: squares(net, batch))
            optimizer.detach()
        finally:
            torch.set_default_dtype(torch.float32)
        ends.append(copy.deepcopy(net.state_dict()))
        assert {p.dtype for p in net.parameters()} == {torch.float32}
    torch.testing.assert_close(*ends, rtol=0, atol=0)


# ---- losses that are not finite ----------------------------------------------------------------------------------------
class Poisoned(Foreign):
    """Some steps' losses are not finite."""

    bad: tuple[int, ...] = ()
    value = torch.nan

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return loss * self.value if self.trainer.global_step in self.bad else loss


class Path(Callback):
    def __init__(self):
        self.weights, self.skipped = [], []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.weights.append(torch.cat([p.detach().flatten() for p in pl_module.parameters()]))
        self.skipped.append(float(trainer.callback_metrics["zo/skipped"]))


def poisoned(folder, bad, value=torch.nan, steps=8, **arguments):
    module, path = Poisoned(False), Path()
    module.bad, module.value = bad, value
    zo = AdaNAGED(**arguments)
    trainer = make_trainer(folder, max_steps=steps, callbacks=[zo, path])
    return module, zo, path, lambda: trainer.fit(module, DataLoader(batches(), batch_size=None))


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_such_steps_are_skipped_and_counted(value, tmp_path):
    module, zo, path, fit = poisoned(tmp_path, (2, 3, 5), value)
    with pytest.warns(UserWarning, match=r"the update is skipped") as told:
        fit()
    told = [str(each.message) for each in told if "update is skipped" in str(each.message)]
    assert [message.split("(")[1] for message in told] == ["1 in a row)", "2 in a row)", "1 in a row)"]
    moved = [not torch.equal(a, b) for a, b in zip(path.weights, path.weights[1:], strict=False)]
    assert moved == [True, False, False, True, False, True, True]
    assert path.skipped == [0, 0, 1, 2, 2, 3, 3, 3]
    assert zo.rule.gap > 0
    assert torch.cat([p.flatten() for p in module.parameters()]).isfinite().all()


def test_too_many_in_a_row_end_the_run_with_the_last_good_weights(tmp_path):
    module, _, path, fit = poisoned(tmp_path, range(3, 9), optimizer=partial(ZerothOrder, max_nonfinite=3))
    with (
        pytest.warns(UserWarning, match="the update is skipped"),
        pytest.raises(NonFiniteLossError, match=r"NaN or infinite in 3 steps in a row \(last: nan at step 5\)"),
    ):
        fit()
    assert torch.equal(torch.cat([p.detach().flatten() for p in module.parameters()]), path.weights[2])
    assert "training_step" not in vars(module)


def test_a_loss_that_is_never_finite_is_told_at_once(tmp_path):
    module, _, _, fit = poisoned(tmp_path, range(9))
    with pytest.raises(CalibrationError, match="the loss of the first batch is nan"):
        fit()
    assert not {"training_step", "forward"} & set(vars(module))


# ---- losses that explode -----------------------------------------------------------------------------------------------
class Exploding(Foreign):
    """Twenty times the loss in steps 14 to 18."""

    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) * (20.0 if 14 <= self.trainer.global_step < 19 else 1.0)


class Counts(Callback):
    def __init__(self):
        self.rows = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.rows.append(tuple(float(trainer.callback_metrics[f"zo/{name}"]) for name in ("recalibrations", "forwards", "lr")))


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_an_explosion_is_logged_and_survives_a_resume(caplog, tmp_path):
    rows, states = {}, {}
    keep = ModelCheckpoint(tmp_path, "half", every_n_train_steps=20)
    for name, steps, path in (("whole", 32, None), ("half", 20, None), ("rest", 32, tmp_path / "half.ckpt")):
        zo, counts = AdaNAGED(total_steps=1000), Counts()
        kept = {"callbacks": [zo, counts, *([keep] if name == "half" else [])], "enable_checkpointing": name == "half"}
        trainer = make_trainer(tmp_path, max_steps=steps, **kept)
        with caplog.at_level("WARNING", "zo_lightning"):
            trainer.fit(Exploding(False), DataLoader(batches(), batch_size=None), ckpt_path=path)
        rows[name], states[name] = counts.rows, zo.state_dict()
    assert [row[0] for row in rows["whole"]] == [0] * 18 + [1] * 14
    messages = [record.getMessage() for record in caplog.records if "exploded" in record.getMessage()]
    assert len(messages) == 2  # of the whole run and of its first part
    assert messages[0].startswith("step 18: the loss has exploded to")
    assert rows["half"] + rows["rest"] == rows["whole"]
    assert states["rest"] == states["whole"]
    spent = [after[1] - before[1] for before, after in zip(rows["whole"], rows["whole"][1:], strict=False)]
    assert [index for index, count in enumerate(spent, 1) if count > 3] == [19], "one calibration, at the next step"
    assert rows["whole"][19][2] < rows["whole"][17][2]
