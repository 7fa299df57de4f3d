"""Norms, dual norms and linear minimisation oracles, against float64 formulas and against each other."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.optim import reference
from tests.optim.reference import LAWS
from zo_lightning.optim import GEOMETRIES, Address, Factors, Gaussian, Geometry, LowRank, Rademacher, make_geometry, polar
from zo_lightning.optim.geometry import Column, polar_thin

NAMES = sorted(GEOMETRIES)
every_geometry = pytest.mark.parametrize("name", NAMES)
SHAPES = [(), (1,), (6,), (4, 4), (3, 5), (5, 3), (1, 4), (4, 1), (3, 2, 2), (2, 3, 2, 2)]


@dataclass
class Group:
    """Two points of a parameter group's space, with the norm's settings."""

    g: list[torch.Tensor]
    x: list[torch.Tensor]
    radius: float
    transposed: bool

    def geometry(self, name: str) -> Geometry:
        return make_geometry(name, self.radius, self.transposed)


@st.composite
def groups(draw) -> Group:
    shapes = draw(st.lists(st.sampled_from(SHAPES), min_size=1, max_size=4))
    source = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))

    def member(shape: tuple[int, ...]) -> torch.Tensor:
        scale = draw(st.sampled_from([1.0, 1e-4, 1e5]))
        kind = draw(st.sampled_from(["full", "full", "rank_one", "zero_row", "zero"]))
        z = torch.randn(shape, generator=source, dtype=torch.float64) * scale
        if kind == "rank_one" and len(shape) > 1:
            rows = torch.randn(shape[0], generator=source, dtype=torch.float64)
            z = (rows[:, None] * z[:1].reshape(1, -1)).reshape(shape)
        if kind == "zero_row" and len(shape):
            z[0] = 0
        return torch.zeros_like(z) if kind == "zero" else z

    return Group(
        [member(s) for s in shapes], [member(s) for s in shapes], draw(st.sampled_from([1.0, 0.1, 7.0])), draw(st.booleans())
    )


def inner(a, b) -> float:
    return sum(float((x * y).sum()) for x, y in zip(a, b, strict=True))


def close(left: float, right: float, scale: float = 0.0, tolerance: float = 1e-9) -> bool:
    return abs(left - right) <= tolerance * max(abs(left), abs(right), scale)


# ---- laws --------------------------------------------------------------------------------------------------------------
@every_geometry
@LAWS
@given(groups())
def test_the_oracle_attains_minus_the_dual_norm_inside_the_ball(name, group):
    geometry = group.geometry(name)
    s = geometry.lmo(group.g)
    assert [x.shape for x in s] == [g.shape for g in group.g]
    assert close(inner(group.g, s), -float(geometry.dual_norm(group.g)))
    if any(g.any() for g in group.g):
        assert close(float(geometry.norm(s)), 1.0)
    else:
        assert float(geometry.norm(s)) == 0
    for g, x in zip(group.g, s, strict=True):
        assert g.any() or not x.any()


@every_geometry
@LAWS
@given(groups())
def test_generalised_cauchy_schwarz(name, group):
    geometry = group.geometry(name)
    bound = float(geometry.norm(group.x)) * float(geometry.dual_norm(group.g))
    assert abs(inner(group.g, group.x)) <= bound * (1 + 1e-9)


@every_geometry
@LAWS
@given(groups(), st.sampled_from([-3.0, -1.0, 0.0, 1e-3, 2.5]))
def test_both_norms_are_norms(name, group, factor):
    geometry = group.geometry(name)
    for norm in (geometry.norm, geometry.dual_norm):
        a, b = float(norm(group.g)), float(norm(group.x))
        assert a >= 0
        assert (a > 0) == any(g.any() for g in group.g)
        assert float(norm([g + x for g, x in zip(group.g, group.x, strict=True)])) <= (a + b) * (1 + 1e-9)
        assert close(float(norm([g * factor for g in group.g])), abs(factor) * a)


@every_geometry
@LAWS
@given(groups())
def test_radius_is_the_length_of_a_unit_step(name, group):
    geometry, unit = group.geometry(name), make_geometry(name, 1.0, group.transposed)
    assert close(float(geometry.norm(group.g)), float(unit.norm(group.g)) / group.radius)
    assert close(float(geometry.dual_norm(group.g)), float(unit.dual_norm(group.g)) * group.radius)
    for a, b in zip(geometry.lmo(group.g), unit.lmo(group.g), strict=True):
        torch.testing.assert_close(a, b * group.radius)


@every_geometry
@LAWS
@given(groups(), st.integers(0, 2**31))
def test_no_feasible_point_beats_the_oracle(name, group, seed):
    geometry = group.geometry(name)
    best = inner(group.g, geometry.lmo(group.g))
    source = torch.Generator().manual_seed(seed)
    for attempt in range(10):
        point = [torch.randn(g.shape, generator=source, dtype=g.dtype) for g in group.g]
        if attempt % 2:  # start near the optimum, where a wrong oracle would be beaten
            point = [-g / max(float(g.abs().max()), 1e-30) + 0.1 * p for g, p in zip(group.g, point, strict=True)]
        length = float(geometry.norm(point))
        assert inner(group.g, [p / length for p in point]) >= best - 1e-9 * abs(best)


@every_geometry
@LAWS
@given(groups())
def test_float64_formulas(name, group):
    geometry = group.geometry(name)
    g = [x.numpy() for x in group.g]
    settings = (group.radius, group.transposed)
    assert close(float(geometry.norm(group.g)), reference.norm(name, g, *settings))
    assert close(float(geometry.dual_norm(group.g)), reference.dual_norm(name, g, *settings))
    for s, expected in zip(geometry.lmo(group.g), reference.extreme(name, g, *settings), strict=True):
        np.testing.assert_allclose(s.numpy(), -expected, rtol=1e-8, atol=1e-8 * group.radius)


@every_geometry
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_narrow_dtypes_are_worked_on_in_float32(name, dtype):
    source = torch.Generator().manual_seed(0)
    g = [torch.randn(s, generator=source).to(dtype) for s in [(40, 60), (300,), (3, 4, 2, 2)]]
    geometry, arrays = make_geometry(name, 0.5), [x.double().numpy() for x in g]
    assert close(float(geometry.norm(g)), reference.norm(name, arrays, 0.5), tolerance=1e-5)
    assert close(float(geometry.dual_norm(g)), reference.dual_norm(name, arrays, 0.5), tolerance=1e-5)
    for s, expected in zip(geometry.lmo(g), reference.extreme(name, arrays, 0.5), strict=True):
        np.testing.assert_allclose(s.double().numpy(), -expected, atol=1e-2 if s.dtype is not torch.float32 else 1e-5)


# ---- the table of norms, by hand ---------------------------------------------------------------------------------------
def test_norms_by_hand():
    w = torch.tensor([[3.0, 4.0, 0.0, 0.0], [0.0, 0.0, 0.0, 2.0]])  # m = 2 (out), n = 4 (in); singular values 5 and 2
    expected = {
        "euclidean": (29**0.5, 29**0.5),
        "sign": (4.0, 9.0),
        "spectral": ((4 / 2) ** 0.5 * 5, (2 / 4) ** 0.5 * 7),
        "row": (5 / 4**0.5, 4**0.5 * 7),
        "column": (4 / 2**0.5, 2**0.5 * 9),
    }
    assert expected.keys() == GEOMETRIES.keys()
    for name, (norm, dual) in expected.items():
        geometry = make_geometry(name)
        assert float(geometry.norm([w])) == pytest.approx(norm, rel=1e-6), name
        assert float(geometry.dual_norm([w])) == pytest.approx(dual, rel=1e-6), name
        # over several members: the larger norm, the sum of the duals; euclidean is one long vector
        vector = torch.tensor([1.0, 0.0])
        both = geometry.norm([w, vector]), geometry.dual_norm([w, vector])
        if name == "euclidean":
            assert both == (pytest.approx(30**0.5, rel=1e-6),) * 2
        else:
            assert float(both[0]) == pytest.approx(norm, rel=1e-6)
            extra = {"sign": 1.0, "spectral": 1.0, "row": 1.0, "column": 2**0.5}[name]
            assert float(both[1]) == pytest.approx(dual + extra, rel=1e-6)


@LAWS
@given(groups())
def test_a_transposed_weight_has_the_spectral_norm_of_its_transpose(group):
    stored, plain = make_geometry("spectral", transposed=True), make_geometry("spectral")
    for g in (g for g in group.g if g.dim() == 2):
        assert close(float(stored.norm([g.T])), float(plain.norm([g])))
        assert close(float(stored.dual_norm([g.T])), float(plain.dual_norm([g])))
        torch.testing.assert_close(stored.lmo([g.T])[0].T, plain.lmo([g])[0], rtol=1e-7, atol=1e-7)


# ---- polar -------------------------------------------------------------------------------------------------------------
@LAWS
@given(st.integers(0, 2**31), st.integers(2, 8))
def test_polar_of_square_matrices_is_scipys(seed, n):
    g = torch.randn(n, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    np.testing.assert_allclose(polar(g).numpy(), scipy.linalg.polar(g.numpy())[0], atol=1e-8)


@LAWS
@given(st.integers(0, 2**31), st.integers(1, 8), st.integers(1, 8), st.integers(1, 8), st.sampled_from([1e-20, 1.0, 1e20]))
def test_polar_is_a_partial_isometry_with_the_same_row_and_column_space(seed, m, n, r, scale):
    source = torch.Generator().manual_seed(seed)
    r = min(r, m, n)
    left, right = (torch.randn(k, r, generator=source, dtype=torch.float64) for k in (m, n))
    g = left @ right.T * scale
    p = polar(g)
    values = torch.linalg.svdvals(p)
    torch.testing.assert_close(values[:r], torch.ones(r, dtype=torch.float64))
    torch.testing.assert_close(values[r:], torch.zeros(min(m, n) - r, dtype=torch.float64))
    h = p.T @ g  # the other factor: symmetric, positive semidefinite, and g = p h
    torch.testing.assert_close(p @ h, g)
    torch.testing.assert_close(h, h.T)
    assert torch.linalg.eigvalsh((h + h.T) / 2).min() >= -1e-9 * h.abs().max()


@LAWS
@given(st.integers(0, 2**31), st.integers(2, 40), st.integers(1, 6), st.integers(0, 6), st.floats(-6, 6))
def test_polar_by_small_work_is_polar(seed, m, r, rank, scale):
    """Of factors of full and of lower rank, whose columns differ in size by up to a thousand."""
    source = torch.Generator().manual_seed(seed)
    rank = min(rank, m, r)
    left, right = torch.randn(m, rank, generator=source), torch.randn(rank, r, generator=source)
    g = left @ right * 10.0 ** torch.linspace(0, -3, r) * 10.0**scale
    exact = polar(g.double()) if rank == min(m, r) else None
    p = polar_thin(g)
    if exact is not None:
        torch.testing.assert_close(p.double(), exact, rtol=0, atol=2e-3)
    singular = torch.linalg.svdvals(p.double())
    assert ((singular - singular.round()).abs() < 1e-3).all(), "a partial isometry"
    assert int(singular.round().sum()) <= rank


@pytest.mark.parametrize("shape", [(3, 4), (1, 4), (4, 1)])
def test_polar_of_zero_is_zero(shape):
    assert torch.equal(polar(torch.zeros(shape)), torch.zeros(shape))


# ---- factors -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("name", "rank"), [("spectral", 1), ("spectral", 3), ("euclidean", 2), ("row", 1), ("row", 3), ("sign", 1)]
)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("m", "n"), [(7, 4), (4, 7), (5, 5)])
def test_factors_give_what_the_dense_product_gives(name, rank, transposed, m, n):
    z = LowRank(rank, 5).draw(Address(1, 2, "w"), torch.Size((m, n)), torch.device("cpu"))
    z = Factors(z.left.double(), torch.linalg.qr(z.right.double()).Q)
    geometry = make_geometry(name, 0.3, transposed)
    scale = geometry.coupling(z.dense().square().sum()) if geometry.coupled else None
    factored, dense = geometry.extreme_point(z, scale), geometry.extreme_point(z.dense(), scale)
    assert isinstance(factored, Factors)
    assert torch.equal(factored.right, z.right) or name == "sign"
    torch.testing.assert_close(factored.dense(), dense, rtol=1e-9, atol=1e-9)
    assert close(float(geometry.norm([factored.dense()])), 1.0)


# ---- refusals ----------------------------------------------------------------------------------------------------------
MATRIX, VECTOR = torch.Size((4, 5)), torch.Size((4,))


@every_geometry
def test_which_pairs_of_geometry_and_directions_are_refused(name):
    geometry = make_geometry(name)
    for dense in (Gaussian(), Rademacher()):
        assert geometry.accepts(dense, MATRIX) is None
    for rank in (1, 2):
        assert geometry.accepts(LowRank(rank), VECTOR) is None
        reason = geometry.accepts(LowRank(rank), MATRIX)
        assert (reason is not None) == (name == "column" or (name == "sign" and rank == 2))
        if reason is not None:
            assert {"sign": "rank 1", "column": "use row"}[name] in reason


def test_column_does_not_take_factors():
    with pytest.raises(ValueError, match="does not keep a held V"):
        Column().extreme_point(Factors(torch.ones(3, 1), torch.ones(2, 1)))


def test_euclidean_needs_its_group():
    with pytest.raises(ValueError, match="norm of the whole group"):
        make_geometry("euclidean").extreme_point(torch.ones(3))


@every_geometry
@pytest.mark.parametrize("radius", [0.0, -1.0, float("nan")])
def test_bad_radii(name, radius):
    with pytest.raises(ValueError, match=f"radius of the {name} geometry must be positive, got"):
        make_geometry(name, radius)


def test_unknown_name():
    with pytest.raises(ValueError, match="geometry must be one of column, euclidean, row, sign, spectral, got 'spektral'"):
        make_geometry("spektral")


@every_geometry
def test_geometries_are_values(name):
    assert make_geometry(name, 0.5) == make_geometry(name, 0.5)
    assert make_geometry(name, 0.5) != make_geometry(name, 0.6)
