"""ZO Fine-tuner in use, against networks of torch's own modules and steps written out in float64."""

import copy
import io
import math
import re

import numpy as np
import pytest
import torch

from tests.optim.reference import bits, same_bits
from tests.optim.test_scale_networks import names_of, sequential
from tests.optim.zoo import IDS, Mixed, TiedHead, inputs
from zo_lightning.optim import Gaussian, LearnedScales, NonFiniteLossError, ScaleNetworks, ZerothOrder
from zo_lightning.optim.directions import Address
from zo_lightning.optim.methods.zo_finetuner import ZOFineTuner
from zo_lightning.optim.sampling import scale_recursion

EPSILON = 1e-3


def model(dtype=torch.float64) -> Mixed:
    torch.manual_seed(3)
    return Mixed().to(dtype)


def tuner(net, attach=True, **arguments) -> ZOFineTuner:
    optimizer = ZOFineTuner(net.named_parameters(), **{"lr": 0.02, "smoothing": EPSILON, "seed": 5, **arguments})
    return optimizer.attach(net) if attach else optimizer


# ---- a step --------------------------------------------------------------------------------------------------------------
def written_out(net, losses, steps, lr, seed, networks, refresh, rows=None):
    """ZO Fine-tuner in float64, tensor by tensor: σ of each step; the weights are moved."""
    names, sigma, seen = names_of(net), None, (0.0, 0.0)
    xs = dict(net.named_parameters())
    history, statistics = [], {}
    for step in range(steps):
        if step % refresh == 0:
            statistics = {
                n: (float(np.mean(x.detach().numpy())), float(np.var(x.detach().numpy(), ddof=1))) for n, x in xs.items()
            }
        previous = sigma or dict.fromkeys(names, 1.0)
        sigma = {
            n: abs(sequential(networks, i)(torch.tensor([*statistics[n], *seen, previous[n]], dtype=torch.float64)).item())
            for i, n in enumerate(names)
        }
        w = {n: x.numel() if rows is None or "emb" not in n else rows * x.shape[1] for n, x in xs.items()}
        N = math.sqrt(sum(w.values())) / math.sqrt(sum(w[n] * sigma[n] ** 2 for n in names))
        z = {n: Gaussian().draw(Address(seed, step, n), x.shape, torch.device("cpu")).double() for n, x in xs.items()}
        start = {n: x.detach().clone() for n, x in xs.items()}

        def at(t, start=start, N=N, sigma=sigma, z=z):
            with torch.no_grad():
                for n in names:
                    xs[n].copy_(start[n] + t * N * sigma[n] * z[n])

        values = []
        for t in (EPSILON, -EPSILON):
            at(t)
            values.append(float(losses(net).detach().mean()))
        seen = tuple(values)
        at(-lr * (seen[0] - seen[1]) / (2 * EPSILON))
        history.append(sigma)
    return history


@pytest.mark.parametrize("attach", [True, False])
@pytest.mark.parametrize("rows", [None, 2])
def test_steps_written_out(attach, rows, monkeypatch):
    monkeypatch.setattr(scale_recursion, "_EMBEDDING", re.compile("emb"))  # what the embedding is called here
    net, other = model(), model()
    networks = ScaleNetworks(names_of(net), seed=2).double()
    optimizer = tuner(net, attach, networks=None, network_seed=2, refresh=2, embedding_rows=rows)
    history = written_out(other, lambda m: m(IDS), 5, 0.02, 5, networks, 2, rows)
    for expected in history:
        optimizer.step(lambda: net(IDS))
        assert optimizer.sampler.sigma == pytest.approx(expected, rel=1e-6)  # float32 losses
    assert optimizer.forwards == 10 + attach  # the first finds out where the parameters are used
    start = dict(model().named_parameters())
    for name, parameter in net.named_parameters():
        torch.testing.assert_close(parameter, dict(other.named_parameters())[name], rtol=0, atol=1e-7)
        assert not torch.equal(parameter, start[name])


def test_the_length_of_the_perturbation_is_that_of_mezo():
    net = model()
    optimizer = tuner(net)
    optimizer.step(lambda: net(IDS))
    units = [unit for group in optimizer.param_groups for unit in group["units"]]
    sizes = [p.numel() for group in optimizer.param_groups for p in group["params"]]
    assert sum(n * u * u for n, u in zip(sizes, units, strict=True)) == pytest.approx(sum(sizes), rel=1e-12)
    assert max(units) / min(units) > 2


# ---- control: one scale for all ------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("attach", [True, False])
def test_scale_one_is_mezo_bit_for_bit(dtype, attach):
    ours, theirs = model(dtype), model(dtype)
    optimizer = tuner(ours, attach, networks=1.0)
    mezo = ZerothOrder(theirs.named_parameters(), 0.02, EPSILON, directions="gaussian", update="sgd", seed=5)
    if attach:
        mezo.attach(theirs)
    for _ in range(6):
        assert torch.equal(optimizer.step(lambda: ours(IDS)), mezo.step(lambda: theirs(IDS)))
        assert same_bits(bits(ours), bits(theirs))
    assert all(unit == 1.0 for group in optimizer.param_groups for unit in group["units"])


@pytest.mark.parametrize("scale", [0.1, 3, 100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_another_constant_is_mezo(scale, dtype):
    ours, theirs = model(dtype), model(dtype)
    optimizer = tuner(ours, networks=scale)
    mezo = ZerothOrder(theirs.named_parameters(), 0.02, EPSILON, directions="gaussian", update="sgd", seed=5).attach(theirs)
    for _ in range(6):
        optimizer.step(lambda: ours(IDS))
        mezo.step(lambda: theirs(IDS))
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)
    assert set(optimizer.sampler.sigma.values()) == {scale}


def test_directions_are_drawn_in_pieces_as_without_scales(monkeypatch):
    """The scales are units of length: a direction is not made whole for them."""
    monkeypatch.setattr("zo_lightning.optim.directions.base._BLOCK_CPU", 4)
    monkeypatch.setattr("zo_lightning.optim.dense_path._BLOCKS_AT_ONCE", 1)
    ours, theirs = model(torch.float32), model(torch.float32)
    optimizer = tuner(ours, networks=1.0)
    mezo = ZerothOrder(theirs.named_parameters(), 0.02, EPSILON, directions="gaussian", update="sgd", seed=5).attach(theirs)
    for _ in range(3):
        optimizer.step(lambda: ours(IDS))
        mezo.step(lambda: theirs(IDS))
    assert same_bits(bits(ours), bits(theirs))
    optimizer._path.begin()
    assert len(list(optimizer._path.pieces(ours.head.weight, 0))) == 3


# ---- state ---------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("stop", [1, 3, 4])
def test_a_resumed_run_is_exact(stop):
    net = model(torch.float32)
    optimizer = tuner(net, refresh=3)
    file = io.BytesIO()
    for step in range(7):
        if step == stop:
            torch.save({"model": net.state_dict(), "optimizer": optimizer.state_dict()}, file)
        optimizer.step(lambda: net(IDS))
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    other = model(torch.float32)
    other.load_state_dict(saved["model"])
    resumed = tuner(other, refresh=3)
    resumed.load_state_dict(saved["optimizer"])
    for _ in range(stop, 7):
        resumed.rehearse(lambda: other(IDS))
        resumed.step(lambda: other(IDS))
    assert same_bits(bits(other), bits(net))
    assert resumed.sampler.sigma == optimizer.sampler.sigma
    with pytest.raises(ValueError, match="made with other scale networks"):
        tuner(model(), network_seed=1).load_state_dict(saved["optimizer"])
    with pytest.raises(ValueError, match="made with other scale networks"):
        tuner(model(), networks=1.0).load_state_dict(saved["optimizer"])


def test_rehearsals_and_parts_of_a_batch_change_nothing():
    plain, rehearsed, parted = (model() for _ in range(3))
    first, second, third = (tuner(net, refresh=2) for net in (plain, rehearsed, parted))
    for _ in range(4):
        first.step(lambda: plain(IDS))
        second.rehearse(lambda: rehearsed(IDS))
        second.step(lambda: rehearsed(IDS))
        third.accumulate(lambda: parted(IDS[:2]))
        third.rehearse(lambda: parted(IDS[2:]))
        third.step(lambda: parted(IDS[2:]))
        assert third.sampler.sigma == pytest.approx(first.sampler.sigma, rel=1e-6)
    assert same_bits(bits(rehearsed), bits(plain))
    for a, b in zip(plain.parameters(), parted.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


def test_a_skipped_step_leaves_no_trace():
    net, other = model(), model()
    optimizer, twin = tuner(net, max_nonfinite=3), tuner(other)
    optimizer.step(lambda: net(IDS))
    twin.step(lambda: other(IDS))
    before = copy.deepcopy(optimizer.sampler.state_dict())
    with pytest.warns(UserWarning, match="the update is skipped"):
        optimizer.step(lambda: net(IDS) * torch.nan)
    assert optimizer.sampler.state_dict() == before
    with pytest.warns(UserWarning, match="the update is skipped"):
        optimizer.step(lambda: net(IDS) * torch.nan)
    with pytest.raises(NonFiniteLossError):
        optimizer.step(lambda: net(IDS) * torch.nan)


# ---- names ---------------------------------------------------------------------------------------------------------------
def test_tied_weights_are_one_parameter():
    net = TiedHead().double()
    assert names_of(net) == ["emb.weight", "body.weight", "body.bias"]
    x = inputs(4, 5).argmax(1)
    optimizer = tuner(net)
    before = net.emb.weight.detach().clone()
    optimizer.step(lambda: net(x).square().mean(1))
    assert list(optimizer.sampler.sigma) == names_of(net)
    assert net.head.weight is net.emb.weight
    z = Gaussian().draw(Address(5, 0, "emb.weight"), before.shape, torch.device("cpu")).double()
    unit = next(
        unit
        for group in optimizer.param_groups
        for name, unit in zip(group["param_names"], group["units"], strict=True)
        if name == "emb.weight"
    )
    expected = before - 0.02 * optimizer.last.slopes[0] * unit * z
    torch.testing.assert_close(net.emb.weight.detach(), expected, rtol=0, atol=1e-7)


def test_a_parameter_without_a_network_gets_the_median():
    net = model()
    known = names_of(net)[:3]
    optimizer = tuner(net)
    optimizer.sampler._source = ScaleNetworks(known, seed=1)
    with pytest.warns(UserWarning, match=rf"4 of 7 parameters have no network .*: {', '.join(names_of(net)[3:])}$"):
        optimizer.step(lambda: net(IDS))
    optimizer.step(lambda: net(IDS))  # warnings are errors: there is no second one
    sigma = optimizer.sampler.sigma
    assert {sigma[name] for name in names_of(net)[3:]} == {sorted(sigma[name] for name in known)[1]}


def test_networks_of_another_model_are_an_error():
    net = model()
    optimizer = tuner(net)
    optimizer.sampler._source = ScaleNetworks(["x.weight"])
    with pytest.raises(ValueError, match=r"none of the 7 parameters has a network; .*'emb.weight'.*'x.weight'"):
        optimizer.step(lambda: net(IDS))


def test_frozen_parameters_play_no_part():
    net, other = model(), model()
    net.emb.requires_grad_(False)
    optimizer = tuner(net)
    optimizer.step(lambda: net(IDS))
    assert "emb.weight" not in optimizer.sampler.sigma
    assert torch.equal(net.emb.weight, other.emb.weight)


# ---- arguments -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"networks": 0.0}, "networks must be a file, None, or a finite number > 0"),
        ({"networks": math.nan}, "networks must be"),
        ({"refresh": 0}, "refresh must be at least 1"),
        ({"embedding_rows": 0}, "embedding_rows must be at least 1"),
    ],
)
def test_arguments_out_of_range(arguments, message):
    with pytest.raises(ValueError, match=message):
        LearnedScales(**arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"scaling": "output"}, "use scaling='none'"),
        ({"sides": 1}, "use sides=2"),
        ({"directions": "low_rank"}, "does not work with"),
    ],
)
def test_what_does_not_go_together(arguments, message):
    net = model()
    with pytest.raises(ValueError, match=message):
        ZerothOrder(
            net.named_parameters(), update="sgd", sampler=LearnedScales(), **{"directions": "gaussian", **arguments}
        ).attach(net).step(lambda: net(IDS))
