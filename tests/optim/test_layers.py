"""Imports point downwards only, and the bottom layer stands on torch alone."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

import zo_lightning

ROOT = Path(zo_lightning.__file__).parent
HEIGHT = {
    **{"optim": 0, "data": 1, "ledger": 1, "loggers": 1, "strategies": 1},
    **{"callbacks": 2, "modules": 2, "commands": 3, "cli": 4},
}
"""A layer may import those of a smaller height, and itself; callbacks and modules are neighbours."""


def layer_of(module: str) -> str | None:
    """``zo_lightning.optim.x`` → ``optim``; None for the package itself and for its loose files."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 and parts[1] in HEIGHT else None


def imports(path: Path) -> set[str]:
    """Modules of this package that a file imports, also inside functions; relative imports resolved."""
    package = ["zo_lightning", *path.relative_to(ROOT).parent.parts]
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*above, *filter(None, [node.module])])
            # `from zo_lightning import optim` names a layer in the alias
            found.update([f"{base}.{alias.name}" for alias in node.names] if base == "zo_lightning" else [base])
    return found


FILES = sorted(ROOT.rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_downwards(path):
    own = layer_of("zo_lightning." + ".".join(path.relative_to(ROOT).with_suffix("").parts))
    if own is None:
        return
    for name in imports(path):
        if name.split(".")[0] != "zo_lightning":
            continue
        other = layer_of(name)
        if own == "optim":
            assert other == "optim", f"{name}: optim imports nothing of the package but itself"
        elif other is not None and other != own:
            assert HEIGHT[other] < HEIGHT[own] or HEIGHT[other] == HEIGHT[own] == 2, name


@pytest.mark.parametrize("path", sorted((ROOT / "optim").glob("*.py")), ids=lambda p: p.name)
def test_optim_names_neither_lightning_nor_transformers(path):
    names = {name.split(".")[0] for name in imports(path)}
    assert names <= {"zo_lightning", "torch", *sys.stdlib_module_names}


def test_importing_optim_loads_neither_lightning_nor_transformers():
    program = "import sys, json, zo_lightning.optim; print(json.dumps(sorted({m.split('.')[0] for m in sys.modules})))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    loaded = set(json.loads(done.stdout))
    assert "torch" in loaded
    above = {"lightning", "pytorch_lightning", "lightning_fabric", "transformers", "datasets", "torchmetrics", "jsonargparse"}
    assert not loaded & above


def test_every_public_name_is_exported():
    import zo_lightning.optim as optim

    assert sorted(optim.__all__, key=str) == sorted(set(optim.__all__))
    assert all(hasattr(optim, name) for name in optim.__all__)
