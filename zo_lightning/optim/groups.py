"""From a model's parameters to parameter groups with a geometry each."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from zo_lightning.optim.directions import Directions
from zo_lightning.optim.geometry import GEOMETRIES, make_geometry

__all__ = ["DEFAULT_RADII", "GeometryMap", "GeometrySpec", "named_groups", "parameter_kinds"]

KINDS = ("matrix", "embedding", "vector")
GeometrySpec = str | Mapping[str, Any] | None

DEFAULT_RADII = {"matrix": 1.0, "embedding": 1.0, "vector": 0.1}
"""Radius per kind of parameter for low-rank directions; docs/measurements.md has the measurement."""


def parameter_kinds(module: nn.Module) -> dict[str, str]:
    """Return ``"matrix"``, ``"embedding"`` or ``"vector"`` for each parameter name of ``module`` (tied ones once)."""
    tables = {m.weight for m in module.modules() if isinstance(m, (nn.Embedding, nn.EmbeddingBag))}
    return {
        name: "vector" if p.dim() < 2 else "embedding" if p in tables else "matrix" for name, p in module.named_parameters()
    }


class GeometryMap:
    """Which geometry and radius each parameter has.

    The kind of a parameter (``matrix``, ``embedding``, ``vector``) decides, unless a name pattern overrides it. Patterns are
    those of :mod:`fnmatch` (``*`` matches dots too) on the qualified name; the last that matches wins. A value is a
    geometry's name or a mapping ``{name: ..., radius: ...}``, of which either may be left out; ``None`` (``null`` in YAML)
    leaves the parameters as they are: they are neither probed nor updated.

    Args:
        rules: From kinds and patterns to geometries.
        directions: The family of directions, which decides the defaults: for low-rank directions spectral for matrices and
            embeddings and sign for vectors, for dense ones sign for all.

    Raises:
        ValueError: If a geometry does not exist, a radius is not positive, or a value has an unknown key.
    """

    def __init__(self, rules: Mapping[str, GeometrySpec] | None = None, *, directions: Directions) -> None:
        self._directions = directions
        if directions.low_rank:
            matrix = {kind: {"name": "spectral", "radius": DEFAULT_RADII[kind]} for kind in ("matrix", "embedding")}
            self._kinds: dict[str, dict[str, Any] | None] = {
                **matrix,
                "vector": {"name": "sign", "radius": DEFAULT_RADII["vector"]},
            }
        else:
            self._kinds = {kind: {"name": "sign", "radius": 1.0} for kind in KINDS}
        self._patterns: dict[str, dict[str, Any] | None] = {}
        for key, spec in (rules or {}).items():
            parsed = _parse(key, spec)
            if key in KINDS:
                self._kinds[key] = None if parsed is None else {**(self._kinds[key] or {}), **parsed}
            else:
                self._patterns[key] = parsed

    def of(self, name: str, kind: str) -> dict[str, Any] | None:
        """Return ``{"name": ..., "radius": ...}`` for one parameter, or None where it stays as it is."""
        spec = self._kinds[kind]
        for pattern, override in self._patterns.items():
            if fnmatch.fnmatchcase(name, pattern):
                spec = None if override is None else {**(spec or {"name": "sign", "radius": 1.0}), **override}
        return spec

    def split(self, named: Iterable[tuple[str, nn.Parameter]], module: nn.Module | None = None) -> list[dict[str, Any]]:
        """Split parameters into groups of one geometry and radius.

        Args:
            named: Names and parameters; those that need no gradient are left out.
            module: The module they belong to, from which embeddings and transposed weights are told; without it matrices
                and vectors are told by their dimensions.

        Returns:
            Groups for :class:`~zo_lightning.optim.ZerothOrder`, with the keys ``params`` (name and parameter pairs),
            ``geometry``, ``radius`` and ``transposed``.

        Raises:
            ValueError: If a pattern matches no parameter, a geometry cannot be combined with the directions, or nothing is
                left to train.
        """
        pairs = [(name, p) for name, p in named if p.requires_grad]
        kinds = (
            {}
            if module is None
            else {p: kind for (_, p), kind in zip(module.named_parameters(), parameter_kinds(module).values(), strict=True)}
        )
        stored_transposed = set() if module is None else _transposed(module)
        for pattern in self._patterns:
            if not any(fnmatch.fnmatchcase(name, pattern) for name, _ in pairs):
                raise ValueError(
                    f"geometry: the pattern {pattern!r} matches no trainable parameter; the names look like "
                    f"{', '.join(repr(name) for name, _ in pairs[:3])}, and the kinds are {', '.join(KINDS)}"
                )
        groups: dict[tuple[str, float, bool], list[tuple[str, nn.Parameter]]] = {}
        for name, parameter in pairs:
            spec = self.of(name, kinds.get(parameter, "vector" if parameter.dim() < 2 else "matrix"))
            if spec is None:
                continue
            geometry = make_geometry(spec["name"], spec["radius"])
            reason = geometry.accepts(self._directions, parameter.shape)
            if reason is not None:
                raise ValueError(f"geometry {spec['name']!r} of {name!r} with {self._directions.signature()}: {reason}")
            key = (spec["name"], float(spec["radius"]), parameter in stored_transposed)
            groups.setdefault(key, []).append((name, parameter))
        if not groups:
            raise ValueError(
                "no parameter is left to train: every one is frozen (requires_grad=False) or has the geometry null"
            )
        return [
            {"params": members, "geometry": geometry, "radius": radius, "transposed": transposed}
            for (geometry, radius, transposed), members in groups.items()
        ]


def named_groups(params: Iterable[Any], geometry: GeometryMap) -> list[dict[str, Any]]:
    """Give every parameter a name and every group a geometry."""
    given = list(params)
    if not given:
        raise ValueError("the optimizer got an empty parameter list")
    groups = given if isinstance(given[0], dict) else [{"params": given}]
    result: list[dict[str, Any]] = []
    count = 0
    unassigned: list[tuple[dict[str, Any], list[tuple[str, nn.Parameter]]]] = []
    for group in groups:
        members = group["params"]
        members = [members] if isinstance(members, Tensor) else list(members)
        named = []
        for member in members:
            named.append(member if isinstance(member, tuple) else (f"parameter.{count}", member))
            count += 1
        options = {key: value for key, value in group.items() if key != "params"}
        if "geometry" in options:
            result.append({"transposed": False, "radius": 1.0, **options, "params": named})
        else:
            unassigned.append((options, named))
    if unassigned:
        parts = geometry.split([pair for _, named in unassigned for pair in named])
        for options, named in unassigned:
            own = {parameter for _, parameter in named}
            for part in parts:
                members = [pair for pair in part["params"] if pair[1] in own]
                if members:
                    result.append({**part, **options, "params": members})
    return result


def _transposed(module: nn.Module) -> set[nn.Parameter]:
    """Weights stored as (in, out). A tied embedding that also serves as a Linear's weight counts as the Linear's."""
    stored_in_out: set[Any] = {
        m.weight for m in module.modules() if isinstance(m, (nn.Embedding, nn.EmbeddingBag)) or type(m).__name__ == "Conv1D"
    }
    return stored_in_out - {m.weight for m in module.modules() if isinstance(m, nn.Linear)}


def _parse(key: str, spec: GeometrySpec) -> dict[str, Any] | None:
    if spec is None:
        return None
    if not isinstance(spec, (str, Mapping)):
        raise ValueError(
            f"geometry[{key!r}] must be a geometry's name, a mapping with 'name' and 'radius', or null, got {spec!r}"
        )
    parsed: dict[str, Any] = {"name": spec} if isinstance(spec, str) else dict(spec)
    unknown = set(parsed) - {"name", "radius"}
    if unknown:
        raise ValueError(
            f"geometry[{key!r}] has the unknown key {sorted(unknown)[0]!r}; the keys are 'name' (one of "
            f"{', '.join(sorted(GEOMETRIES))}) and 'radius'"
        )
    try:
        if "radius" in parsed:
            parsed["radius"] = float(parsed["radius"])
        make_geometry(parsed.get("name", "sign"), parsed.get("radius", 1.0))
    except (TypeError, ValueError) as error:
        raise ValueError(f"geometry[{key!r}]: {error}") from None
    return parsed
