"""A step of two processes is that of one with the joint batch, and all that they tell each other is a few numbers."""

import pytest
import torch

from tests.strategies.problems import JOINT, Plain, Regression, Shards, fit, joint_batches, net, seeded, weights, whole_loss
from tests.strategies.worker import Pair
from zo_lightning.callbacks import AdaNAGED
from zo_lightning.optim import Gaussian, ZerothOrder
from zo_lightning.optim.directions import Address


def alone(tmp_path, module, steps, batches=None, **arguments):
    return fit(tmp_path, module, Shards(batches or steps), steps, **arguments)


def assert_equal_ranks(first: dict, second: dict) -> None:
    assert torch.equal(first["weights"], second["weights"])
    assert first["losses"] == second["losses"]
    assert first["slopes"] == second["slopes"]


@pytest.mark.parametrize("scenario", ["per_example", "scalar"])
def test_a_thousand_steps(pair, scenario, tmp_path):
    first, second = pair.result(scenario)
    assert_equal_ranks(first, second)
    assert len(first["losses"]) == 1000
    module = Regression(scalar=scenario == "scalar")
    record, _ = alone(tmp_path, module, 1000)
    assert first["losses"][:50] == pytest.approx(record.losses[:50], abs=1e-5)
    assert first["losses"][-1] == pytest.approx(record.losses[-1], abs=1e-2)
    assert first["whole"] == pytest.approx(whole_loss(module), abs=1e-2)
    assert whole_loss(module) < 0.5 * record.losses[0]
    assert 24 <= first["bytes"] / 1000 < 60


def test_a_module_that_is_taken_over(pair, tmp_path):
    first, second = pair.result("taken_over")
    assert_equal_ranks(first, second)
    module = Plain()
    record, _ = alone(tmp_path, module, 100)
    assert first["losses"][:50] == pytest.approx(record.losses[:50], abs=1e-5)
    assert first["whole"] == pytest.approx(whole_loss(module), abs=1e-2)


def test_uneven_shards(pair, tmp_path):
    """Five examples on one process, three on the other: each example counts the same."""
    first, second = pair.result("uneven")
    assert_equal_ranks(first, second)
    module = Regression()
    record, _ = alone(tmp_path, module, 50)
    assert first["losses"] == pytest.approx(record.losses, abs=1e-5)
    torch.testing.assert_close(first["weights"], weights(module), atol=1e-3, rtol=0)


def test_half_precision(pair):
    """The stochastic rounding of the two is the same."""
    assert_equal_ranks(*pair.result("half"))


@pytest.mark.parametrize("kind", ["module", "plain"])
def test_nothing_else_is_sent(pair, kind):
    """Counted where torch hands collectives to the backend."""
    for result in pair.result("counted"):
        sent = result[kind]["sent"]
        assert len(sent) == 30
        assert all(set(calls) == {"c10d::allgather_"} for calls, _ in sent)
        assert all(size < 1024 for _, size in sent)  # the first step calibrates
        assert sum(size for _, size in sent) == result[kind]["bytes"]
        # f₊, f₋, the gain and the number of losses; f too, where the curvature is measured
        assert [(sum(calls.values()), size) for calls, size in sent[1:]] == [
            (1, 40 if step % 10 == 0 else 32) for step in range(1, 30)
        ]


# ---- directions of each one's own ---------------------------------------------------------------------------------------
class InTurn(Regression):
    """The first direction is probed on the first shard, the second on the other."""

    def __init__(self, **arguments) -> None:
        super().__init__(**arguments)
        self.calls = 0

    def loss(self, batch):
        x, y = batch
        optimizer = self.trainer.optimizers[0]
        if optimizer.probing:
            shard = slice(0, 4) if self.calls % 4 < 2 else slice(4, JOINT)
            self.calls += 1
            x, y = x[shard], y[shard]
        return super().loss((x, y))


def test_split_directions(pair, tmp_path):
    first, second = pair.result("split_low_rank")
    assert_equal_ranks(first, second)
    settings = {"lr": 0.05, "smoothing": 0.01, "probes": "sequential", "num_directions": 2}
    module = InTurn(optimizer=lambda params: seeded(params, **settings))
    record, _ = alone(tmp_path, module, 5, callbacks=[])
    assert [len(slopes) for slopes in first["slopes"]] == [2] * 5
    assert first["slopes"] == record.slopes
    assert torch.equal(first["weights"], weights(module))


def test_split_directions_by_hand(pair):
    """Two directions on each of two processes: a step of SGD along all four, in double precision."""
    first, second = pair.result("split_gaussian")
    assert_equal_ranks(first, second)
    model = net().double()
    (x, y), *_ = joint_batches()
    x, y, tau = x.double(), y.double(), 0.01
    named = {f"net.{name}": p.detach() for name, p in model.named_parameters()}
    start = {name: p.clone() for name, p in named.items()}
    slopes, directions = [], []
    for query in range(4):
        shard = slice(0, 4) if query < 2 else slice(4, JOINT)
        u = {n: Gaussian().draw(Address(7, 0, n, query), p.shape, torch.device("cpu")).double() for n, p in named.items()}
        losses = []
        for sign in (1, -1):
            for name, p in named.items():
                p.copy_(start[name] + sign * tau * u[name])
            with torch.no_grad():
                losses.append((model(x[shard]) - y[shard]).square().mean())
        slopes.append(float((losses[0] - losses[1]) / (2 * tau)))
        directions.append(u)
    assert first["slopes"] == [pytest.approx(slopes, abs=1e-6)]
    after = [start[n] - 0.05 * sum(s * u[n] for s, u in zip(slopes, directions, strict=True)) / 4 for n in named]
    torch.testing.assert_close(first["weights"], torch.cat([p.flatten() for p in after]), atol=1e-6, rtol=0)


def test_split_directions_learn(pair):
    first, second = pair.result("split_with_the_rule")
    assert_equal_ranks(first, second)
    assert first["whole"] < 0.6 * first["losses"][0]
    assert_equal_ranks(*pair.result("split_one_sided"))


# ---- where the processes differ -----------------------------------------------------------------------------------------
@pytest.mark.parametrize("scenario", ["not_finite", "not_finite_split"])
def test_one_loss_that_is_not_finite(pair, scenario):
    first, second = pair.result(scenario)
    assert first["finite"] == second["finite"] == [step not in (3, 6) for step in range(10)]
    assert torch.equal(first["weights"], second["weights"])
    assert first["callbacks"] == second["callbacks"]
    assert first["callbacks"]["zo/skipped"] == 2
    assert first["weights"].isfinite().all()


def test_probes_stacked_on_one_process_only(pair, tmp_path):
    first, second = pair.result("stacked_on_one")
    assert_equal_ranks(first, second)
    assert first["stacking"][-1] == "trusted"
    assert second["stacking"][-1] == "off"
    record, _ = alone(tmp_path, Regression(), 50)
    assert first["losses"] == pytest.approx(record.losses, abs=1e-5)


def test_an_exception_ends_both(pair, tmp_path):
    """The one that did not raise is not left waiting."""
    other = Pair(tmp_path, "dies_first")
    for both, culprit in ((pair, 1), (other, 0)):
        codes = both.codes if both is pair else both.wait(90)
        assert None not in codes
        assert 0 not in codes
        assert "ArithmeticError: this process breaks" in both.log(culprit)
        assert "ArithmeticError" not in both.log(1 - culprit)


# ---- stock DDP, accumulation --------------------------------------------------------------------------------------------
def test_every_strategy_gives_the_same(pair, tmp_path):
    first, second = pair.result("strategies")
    del first["seconds"]
    assert len(first) == 9
    for (kind, strategy), result in first.items():
        assert_equal_ranks(result, second[kind, strategy])
        assert torch.equal(result["weights"], first[kind, "zo_ddp"]["weights"]), (kind, strategy)
    for module in (Regression(), Plain()):
        record, _ = alone(tmp_path, module, 20)
        assert first[type(module).__name__, "ddp"]["losses"] == pytest.approx(record.losses, abs=1e-5)


def test_accumulation(pair, tmp_path):
    """Two batches of two processes are one step."""
    first, second = pair.result("accumulated")
    modules = ((Regression(accumulate_grad_batches=2), {}), (Plain(), {"accumulate_grad_batches": 2}))
    for module, arguments in modules:
        kind = type(module).__name__
        record, _ = alone(tmp_path, module, 20, 40, **arguments)
        for strategy in ("zo_ddp", "ddp"):
            result = first[kind, strategy]
            assert_equal_ranks(result, second[kind, strategy])
            assert result["steps"] == 20
            assert result["losses"] == pytest.approx(record.losses, abs=1e-5)
        assert torch.equal(first[kind, "zo_ddp"]["weights"], first[kind, "ddp"]["weights"])


# ---- checkpoints --------------------------------------------------------------------------------------------------------
@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
@pytest.mark.parametrize("kind", [Regression, Plain])
def test_checkpoints(pair, kind, tmp_path):
    """Two processes go on exactly, and one with the joint batch but for rounding."""
    first, second = (result[kind.__name__] for result in pair.result("checkpoints"))
    for part in first:
        assert_equal_ranks(first[part], second[part])
    assert first["first"]["losses"] + first["second"]["losses"] == first["whole"]["losses"]
    assert torch.equal(first["second"]["weights"], first["whole"]["weights"])
    optimizer = {} if kind is Regression else {"optimizer": seeded}
    module = kind()
    record, _ = alone(
        tmp_path,
        module,
        60,
        30,
        callbacks=[AdaNAGED(total_steps=60, **optimizer)],
        ckpt_path=pair.folder / f"{kind.__name__}-half.ckpt",
    )
    assert record.losses == pytest.approx(first["second"]["losses"], abs=1e-5)
    torch.testing.assert_close(first["whole"]["weights"], weights(module), atol=1e-3, rtol=0)


def test_the_optimizer_is_alone_until_it_joins():
    optimizer = ZerothOrder(net().parameters())
    assert (optimizer.ranks.rank, optimizer.ranks.size, optimizer.ranks.split) == (0, 1, False)
