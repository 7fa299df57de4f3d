"""Small models, each with a way of using its parameters that a displacement has to get right."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

IDS = torch.tensor([[0, 3, 1], [4, 4, 2], [1, 0, 3], [2, 1, 4]])


def inputs(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(11), dtype=torch.float64).to(dtype)


class Mixed(nn.Module):
    """Embedding, 3-D convolution kernel, matrix, vectors, norm: one loss per row of ids."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(5, 4)
        self.conv = nn.Conv1d(4, 4, 3, padding=1)
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, 3)

    def forward(self, ids: Tensor) -> Tensor:
        h = self.conv(self.emb(ids).transpose(1, 2)).transpose(1, 2)
        logits = self.head(torch.tanh(self.norm(h)).mean(1))
        return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), ids[:, 0] % 3, reduction="none")


class TiedHead(nn.Module):
    """The embedding is the head's weight: two modules own one parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(5, 4)
        self.body = nn.Linear(4, 4)
        self.head = nn.Linear(4, 5, bias=False)
        self.head.weight = self.emb.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(torch.tanh(self.body(self.emb(ids))))


class FunctionalHead(nn.Module):
    """The embedding's weight is used outside of the embedding's forward too."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(5, 4)
        self.body = nn.Linear(4, 4)

    def forward(self, ids: Tensor) -> Tensor:
        return F.linear(torch.tanh(self.body(self.emb(ids))), self.emb.weight)


class BypassedForward(nn.Module):
    """A child's ``forward`` is called without its hooks."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first.forward(x)))


class RootParameter(nn.Module):
    """Raw parameters of the root, one in a ParameterList."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.randn(4))
        self.more = nn.ParameterList([nn.Parameter(torch.randn(4, 4)), nn.Parameter(torch.randn(()))])
        self.lin = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(self.lin(x * self.scale) @ self.more[0]) * self.more[1]


class CalledTwice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.lin(torch.tanh(self.lin(x)))


class Recursive(nn.Module):
    """Its forward calls itself while it is active."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4) / 2)

    def forward(self, x: Tensor, depth: int = 3) -> Tensor:
        inner = self(x, depth - 1) if depth else x
        return torch.tanh(inner @ self.weight)


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(4, 3, num_layers=2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.lstm(x)[0]


class Attention(nn.Module):
    """``in_proj_weight`` is the module's own, ``out_proj.weight`` is read from outside of ``out_proj``."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=False)[0]


class Encoder(nn.Module):
    """In eval mode without gradients torch has a fused path, which a stand-in rules out."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.encoder(x)


class Captured(nn.Module):
    """A weight that is used both as an attribute and as an object in a plain list."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(4, 4)
        self.kept = [self.lin.weight]

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.lin(x)) @ self.kept[0]


class Parametrized(nn.Module):
    """A weight computed from its parts at each access."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.lin(x))


@dataclass(frozen=True)
class Case:
    """A model and its input.

    Attributes:
        build: Makes the model.
        tokens: Whether its input is token ids.
        in_place: The parameters that a stand-in in their slot would not reach.
        formed: The matrices used by functions that do not take factors.
    """

    build: Callable[[], nn.Module]
    tokens: bool = False
    in_place: tuple[str, ...] = ()
    formed: tuple[str, ...] = ()

    def module(self, dtype: torch.dtype = torch.float64) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(5)
            module = self.build()
        module.to(dtype)
        with torch.no_grad():  # no symmetric initial values: zero biases would hide a mistake
            for i, parameter in enumerate(module.parameters()):
                noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i), dtype=torch.float64)
                parameter.add_((0.1 * noise).to(dtype))
        return module

    def loss(self, module: nn.Module) -> Tensor:
        """A generic smooth function of the output: every output counts, with its own weight."""
        dtype = next(module.parameters()).dtype
        out = module(IDS) if self.tokens else module(inputs(2, 3, 4, dtype=dtype))
        out = out.double()
        return (torch.sin(out) + 0.3 * out**2).mul(inputs(*out.shape)).mean()


CASES = {
    "mixed": Case(Mixed, tokens=True),
    "tied_head": Case(TiedHead, tokens=True),
    "functional_head": Case(FunctionalHead, tokens=True),
    "bypassed_forward": Case(BypassedForward),
    "root_parameter": Case(RootParameter),
    "called_twice": Case(CalledTwice),
    "recursive": Case(Recursive),
    "captured": Case(Captured, in_place=("lin.weight",)),
    "lstm": Case(Recurrent, formed=tuple(f"lstm.weight_{kind}_l{i}" for i in (0, 1) for kind in ("ih", "hh"))),
    "attention": Case(Attention, formed=("attention.in_proj_weight", "attention.out_proj.weight")),
    "encoder": Case(
        Encoder,
        formed=tuple(f"encoder.layers.{i}.self_attn.{w}" for i in (0, 1) for w in ("in_proj_weight", "out_proj.weight")),
    ),
    "parametrized": Case(Parametrized, formed=tuple(f"lin.parametrizations.weight.original{i}" for i in (0, 1))),
}
