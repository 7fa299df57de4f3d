"""From parameters to groups with a geometry each."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn

from tests.optim.zoo import Mixed, TiedHead
from zo_lightning.optim import GEOMETRIES, Gaussian, GeometryMap, LowRank, Rademacher, Sphere
from zo_lightning.optim.groups import DEFAULT_RADII, parameter_kinds

LOW_RANK = LowRank()
DENSE = [Gaussian(), Rademacher(), Sphere()]


class Conv1D(nn.Module):
    """Named and stored as in transformers: weight of shape (in, out)."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 7))
        self.bias = nn.Parameter(torch.zeros(7))


def table(groups) -> dict[str, tuple[str, float, bool]]:
    """By parameter name: geometry, radius, transposed."""
    found = {}
    for group in groups:
        assert set(group) == {"params", "geometry", "radius", "transposed"}
        for name, _ in group["params"]:
            assert name not in found
            found[name] = (group["geometry"], group["radius"], group["transposed"])
    return found


def split(module: nn.Module, rules=None, directions=LOW_RANK):
    return table(GeometryMap(rules, directions=directions).split(list(module.named_parameters()), module))


def test_kinds():
    assert parameter_kinds(Mixed()) == {
        "emb.weight": "embedding",
        "conv.weight": "matrix",
        "conv.bias": "vector",
        "norm.weight": "vector",
        "norm.bias": "vector",
        "head.weight": "matrix",
        "head.bias": "vector",
    }
    assert parameter_kinds(TiedHead())["emb.weight"] == "embedding"
    assert "head.weight" not in parameter_kinds(TiedHead())


def test_defaults_for_low_rank_directions():
    found = split(Mixed())
    assert found["emb.weight"] == ("spectral", DEFAULT_RADII["embedding"], True)
    assert found["conv.weight"] == found["head.weight"] == ("spectral", DEFAULT_RADII["matrix"], False)
    for name in ("conv.bias", "norm.weight", "norm.bias", "head.bias"):
        assert found[name] == ("sign", DEFAULT_RADII["vector"], False)


@pytest.mark.parametrize("directions", DENSE, ids=lambda d: d.name)
def test_defaults_for_dense_directions(directions):
    assert {spec[:2] for spec in split(Mixed(), directions=directions).values()} == {("sign", 1.0)}


def test_members_of_a_group_keep_their_order_and_nothing_is_lost():
    module = Mixed()
    named = list(module.named_parameters())
    groups = GeometryMap(directions=LOW_RANK).split(iter(named), module)
    assert sorted(n for g in groups for n, _ in g["params"]) == sorted(n for n, _ in named)
    order = [n for n, _ in named]
    for group in groups:
        indices = [order.index(name) for name, _ in group["params"]]
        assert indices == sorted(indices)


def test_override_by_kind():
    found = split(Mixed(), {"vector": {"radius": 0.5}, "matrix": "row", "embedding": {"name": "euclidean", "radius": 3}})
    assert found["head.bias"] == ("sign", 0.5, False)
    assert found["head.weight"] == ("row", DEFAULT_RADII["matrix"], False)
    assert found["emb.weight"] == ("euclidean", 3.0, True)


def test_override_by_pattern_keeps_what_it_leaves_out():
    found = split(Mixed(), {"head.*": {"radius": 0.25}, "*.bias": "euclidean"})
    assert found["head.weight"] == ("spectral", 0.25, False)
    assert found["head.bias"] == ("euclidean", 0.25, False)
    assert found["conv.bias"] == ("euclidean", DEFAULT_RADII["vector"], False)


def test_the_last_pattern_that_matches_wins():
    rules = {"*": {"name": "row", "radius": 1}, "head.*": {"name": "sign", "radius": 2}, "*.weight": {"radius": 3}}
    found = split(Mixed(), rules)
    assert found["head.weight"] == ("sign", 3.0, False)
    assert found["head.bias"] == ("sign", 2.0, False)
    assert found["emb.weight"] == ("row", 3.0, True)
    reverse = split(Mixed(), dict(reversed(rules.items())))
    assert {spec[:2] for spec in reverse.values()} == {("row", 1.0)}


def test_patterns_override_kinds_whatever_their_order():
    a = split(Mixed(), {"head.weight": "row", "matrix": "euclidean"})
    b = split(Mixed(), {"matrix": "euclidean", "head.weight": "row"})
    assert a == b
    assert a["head.weight"][0] == "row"
    assert a["conv.weight"][0] == "euclidean"


def test_null_leaves_parameters_alone_and_a_later_pattern_brings_them_back():
    found = split(Mixed(), {"vector": None})
    assert set(found) == {"emb.weight", "conv.weight", "head.weight"}
    found = split(Mixed(), {"*": None, "head.*": {"name": "spectral", "radius": 2.0}})
    assert found == {"head.weight": ("spectral", 2.0, False), "head.bias": ("spectral", 2.0, False)}
    found = split(Mixed(), {"vector": None, "norm.bias": "sign"})
    assert found["norm.bias"] == ("sign", 1.0, False)


def test_frozen_parameters_are_left_out():
    module = Mixed()
    module.emb.requires_grad_(False)
    assert "emb.weight" not in split(module)


def test_transposed_storage():
    module = nn.ModuleDict({"c": Conv1D(), "e": nn.EmbeddingBag(5, 4), "l": nn.Linear(4, 5)})
    found = split(module)
    assert found["c.weight"][2]
    assert found["e.weight"][2]
    assert not found["l.weight"][2]
    assert not found["c.bias"][2]


def test_a_tied_embedding_counts_as_the_linears():
    found = split(TiedHead())
    assert found["emb.weight"] == ("spectral", DEFAULT_RADII["embedding"], False)


def test_without_a_module_dimensions_tell():
    named = list(Mixed().named_parameters())
    found = table(GeometryMap({"matrix": {"radius": 2}}, directions=LOW_RANK).split(named))
    assert found["emb.weight"] == ("spectral", 2.0, False)
    assert found["head.bias"][0] == "sign"


# ---- errors ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ({"matrix": "spektral"}, "geometry['matrix']: geometry must be one of column, euclidean, row, sign, spectral, got"),
        ({"head.*": {"name": "l2"}}, "geometry['head.*']: geometry must be one of"),
        ({"vector": {"radius": -1}}, "geometry['vector']: radius of the sign geometry must be positive, got -1"),
        ({"vector": {"name": "row", "radius": 0}}, "radius of the row geometry must be positive, got 0"),
        ({"vector": {"radius": "wide"}}, "geometry['vector']: could not convert string to float"),
        ({"vector": {"radius": None}}, "geometry['vector']: "),
        ({"vector": {"norm": "sign"}}, "geometry['vector'] has the unknown key 'norm'; the keys are 'name' (one of column"),
        ({"vector": 3}, "geometry['vector'] must be a geometry's name, a mapping with 'name' and 'radius', or null, got 3"),
    ],
)
def test_bad_rules_say_where_and_what(rules, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        GeometryMap(rules, directions=LOW_RANK)


def test_a_radius_may_be_text_as_yaml_reads_1e_3():
    assert split(Mixed(), {"vector": {"radius": "1e-3"}})["head.bias"] == ("sign", 1e-3, False)


def test_a_pattern_without_match_names_the_names_and_the_kinds():
    with pytest.raises(ValueError, match=r"the pattern 'matrices' matches no trainable parameter") as error:
        split(Mixed(), {"matrices": "row"})
    assert "'emb.weight'" in str(error.value)
    assert "matrix, embedding, vector" in str(error.value)


@pytest.mark.parametrize("rules", [{"*": None}, {"matrix": None, "embedding": None, "vector": None}])
def test_nothing_left_to_train(rules):
    with pytest.raises(ValueError, match="no parameter is left to train"):
        split(Mixed(), rules)


@pytest.mark.parametrize(("name", "rank"), [("sign", 2), ("column", 1)])
def test_pairs_that_cannot_be_combined_name_the_parameter(name, rank):
    with pytest.raises(ValueError, match=rf"geometry '{name}' of 'head.weight' with low_rank\(rank={rank}, interval=50\)"):
        split(Mixed(), {"head.*": name}, LowRank(rank))


@pytest.mark.parametrize(
    ("directions", "name"),
    [(d, name) for d in [*DENSE, LOW_RANK] for name in GEOMETRIES if not (d.low_rank and name == "column")],
    ids=lambda value: getattr(value, "name", value),
)
def test_every_other_pair_can(directions, name):
    found = split(Mixed(), dict.fromkeys(("matrix", "embedding", "vector"), name), directions)
    assert {spec[0] for spec in found.values()} == {name}
