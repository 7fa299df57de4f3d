"""Each method's published step, written down again in float64: one function a method, registered by its name."""

from tests.optim.methods.formulas import fixed, learned, low_rank
from tests.optim.methods.formulas.registry import COMMON, REFERENCES, Reference

__all__ = ["COMMON", "REFERENCES", "Reference", "fixed", "learned", "low_rank"]
