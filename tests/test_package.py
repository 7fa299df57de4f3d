"""What importing the package costs and offers."""

import subprocess
import sys

import pytest

import zo_lightning

HEAVY = ("lightning", "transformers", "datasets", "torchmetrics")


@pytest.mark.parametrize("name", zo_lightning.__all__)
def test_public_names_are_found(name):
    assert getattr(zo_lightning, name) is not None
    assert name in dir(zo_lightning)


def test_unknown_names_are_attribute_errors():
    with pytest.raises(AttributeError, match="has no attribute 'AdaNAGD'"):
        zo_lightning.AdaNAGD  # noqa: B018


def test_the_optimizer_needs_torch_alone():
    """The bottom layer imports nothing of Lightning or transformers."""
    code = f"import sys, zo_lightning.optim; print([m for m in {HEAVY} if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
