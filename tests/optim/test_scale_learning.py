"""How ZO Fine-tuner's networks learn, against autograd through the step itself."""

import copy

import pytest
import torch
from torch.func import functional_call

from tests.optim.reference import bits, same_bits
from tests.optim.zoo import IDS, Mixed
from zo_lightning.optim import Gaussian, ScaleLearner
from zo_lightning.optim.directions import Address

EPSILON = 1e-3
CPU = torch.device("cpu")


def model(dtype=torch.float64) -> Mixed:
    torch.manual_seed(3)
    return Mixed().to(dtype)


class WrittenOut:
    """One meta-step with x' as a function of φ for autograd: nothing of the package but networks' formula and directions."""

    def __init__(self, net, networks, lr, optimizer):
        self.net, self.networks, self.lr, self.optimizer = net, networks, lr, optimizer
        self.sigma = torch.ones(len(networks.names), dtype=torch.float64)
        self.seen, self.count = (0.0, 0.0), 0

    def step(self, ids):
        xs = {name: p.detach() for name, p in self.net.named_parameters()}
        moments = torch.stack([torch.stack([x.mean(), x.var()]) for x in xs.values()])
        losses = torch.tensor(self.seen, dtype=torch.float64).expand(len(xs), 2)
        s = torch.cat([moments, losses, self.sigma[:, None]], dim=1)
        w1, b1, w2, b2 = (getattr(self.networks, key) for key in ("w1", "b1", "w2", "b2"))
        rows = [w2[j] @ torch.tanh(w1[j] @ s[j] + b1[j]) + b2[j] for j in range(len(xs))]
        sigma = torch.stack(rows).abs()
        sizes = torch.tensor([x.numel() for x in xs.values()], dtype=torch.float64)
        N = (sizes.sum() / (sizes * sigma.detach() ** 2).sum()).sqrt()
        z = {n: Gaussian().draw(Address(9, self.count, n), x.shape, CPU).double() for n, x in xs.items()}

        def at(t, scale):
            moved = {n: x + t * N * scale[j] * z[n] for j, (n, x) in enumerate(xs.items())}
            return functional_call(self.net, moved, (ids,)).mean()

        plus, minus = (at(t, sigma.detach()).item() for t in (EPSILON, -EPSILON))
        slope = (plus - minus) / (2 * EPSILON)
        loss = at(-self.lr * slope, sigma)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.net.zero_grad()
        self.sigma, self.seen = sigma.detach(), (plus, minus)
        self.count += 1
        return loss.item()


@pytest.mark.parametrize("kind", ["sgd", "adam"])
def test_gradient_against_autograd_through_the_step(kind):
    net, other = model(), model()
    lr, network_lr = 0.3, {"sgd": 0.5, "adam": 1e-3}[kind]
    learner = ScaleLearner(dict(net.named_parameters()), lr, EPSILON, network_lr, kind, seed=9)
    networks = copy.deepcopy(learner.networks)
    before = copy.deepcopy(learner.networks)
    optimizer = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}[kind](networks.parameters(), lr=network_lr)
    reference = WrittenOut(other, networks, lr, optimizer)
    for _ in range(5):
        seen = learner.step(lambda: net(IDS))
        assert seen.loss == pytest.approx(reference.step(IDS), rel=1e-7)
        assert seen.finite
    for key in ("w1", "b1", "w2", "b2"):
        moved = getattr(networks, key) - getattr(before, key)
        assert float(moved.detach().abs().max()) > 1e-4
        # the drawn numbers are float32, and so are the products with them
        torch.testing.assert_close(
            getattr(learner.networks, key), getattr(networks, key), rtol=0, atol=1e-6 * float(moved.detach().abs().max())
        )
    assert not torch.equal(net.emb.weight, learner.networks.w1)  # the model itself has not moved
    assert same_bits(bits(net), bits(model()))


def test_tiny_rates_are_not_lost():
    """At η_u = 1e-6 a step changes the networks by less than float16 or bfloat16 can hold, and yet by what it should."""
    moved = []
    for lr in (1e-6, 1e-3):
        net = model(torch.float32)
        learner = ScaleLearner(dict(net.named_parameters()), lr, EPSILON, 0.1, seed=9)
        before = learner.networks.w2.detach().clone()
        learner.step(lambda net=net: net(IDS))
        moved.append(learner.networks.w2.detach() - before)
    assert 0 < float(moved[0].abs().max()) < 1e-5
    torch.testing.assert_close(moved[0] * 1e3, moved[1], rtol=0.02, atol=0.02 * float(moved[1].abs().max()))


def test_the_model_is_put_back_bit_for_bit():
    net = model(torch.float32)
    learner = ScaleLearner(dict(net.named_parameters()), lr=1.0, seed=1)
    before = bits(net)
    for failing in range(4):
        calls = []

        def closure(calls=calls, failing=failing):
            calls.append(1)
            if len(calls) > failing:
                raise KeyError("stop")
            return net(IDS)

        if failing < 3:
            with pytest.raises(KeyError, match="stop"):
                learner.step(closure)
        else:
            learner.step(closure)
        assert same_bits(bits(net), before)
    assert all(p.grad is None for p in net.parameters())


@pytest.mark.parametrize("where", [0, 2])
def test_a_loss_that_is_not_finite_teaches_nothing(where):
    net = model()
    learner = ScaleLearner(dict(net.named_parameters()), seed=1)
    learner.step(lambda: net(IDS))
    before, weights = bits(learner.networks), bits(net)
    history = learner.state_dict()["histories"]
    calls = []

    def closure():
        calls.append(1)
        return net(IDS) * (torch.nan if len(calls) > where else 1.0)

    assert not learner.step(closure).finite
    assert same_bits(bits(learner.networks), before)
    assert same_bits(bits(net), weights)
    assert learner.state_dict()["histories"] == history


def test_tasks_have_histories_of_their_own():
    net = model()
    learner, alone = (ScaleLearner(dict(net.named_parameters()), lr=1e-9, network_lr=1e-9, seed=1) for _ in range(2))
    learner.step(lambda: net(IDS), "a")
    learner.step(lambda: 3 * net(IDS), "b")
    found = learner.step(lambda: net(IDS), "a")
    alone.step(lambda: net(IDS))
    alone.step(lambda: net(IDS))
    # networks that hardly learn: the second step of a task has the same scales whatever came between
    assert list(found.sigma) == pytest.approx(list(alone.step(lambda: net(IDS)).sigma), rel=0.2)
    histories = learner.state_dict()["histories"]
    assert set(histories) == {"a", "b"}
    assert histories["b"]["plus"] == pytest.approx(3 * histories["a"]["plus"], rel=0.2)


def test_learner_resumes_exactly():
    net = model(torch.float32)
    one, two = (ScaleLearner(dict(net.named_parameters()), 1e-2, 1e-3, 1e-3, "adam", 1, refresh=3) for _ in range(2))
    for step in range(7):
        if step == 4:
            two.load_state_dict(copy.deepcopy(one.state_dict()))
        one.step(lambda: net(IDS), f"{step % 2}")
        if step >= 4:
            two.step(lambda: net(IDS), f"{step % 2}")
    assert same_bits(bits(one.networks), bits(two.networks))
    with pytest.raises(ValueError, match="of other parameters"):
        ScaleLearner({"x": net.emb.weight}).load_state_dict(one.state_dict())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"lr": 0.0}, "lr must be"),
        ({"network_lr": float("inf")}, "network_lr must be"),
        ({"smoothing": -1.0}, "smoothing must be"),
        ({"network_optimizer": "lbfgs"}, "'sgd' or 'adam'"),
        ({"refresh": 0}, "refresh must be"),
    ],
)
def test_learner_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        ScaleLearner(dict(model().named_parameters()), **arguments)
