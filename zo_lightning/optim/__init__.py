"""Zeroth-order optimization in plain PyTorch: directions, geometry, estimators and step rules."""

from zo_lightning.optim.directions import (
    DIRECTIONS,
    Address,
    Directions,
    Factors,
    Gaussian,
    LowRank,
    Rademacher,
    Sphere,
    make_directions,
)
from zo_lightning.optim.displacement import Displacement
from zo_lightning.optim.geometry import (
    GEOMETRIES,
    Column,
    Euclidean,
    Geometry,
    Row,
    Sign,
    Spectral,
    make_geometry,
    polar,
)
from zo_lightning.optim.groups import GeometryMap
from zo_lightning.optim.parameter_free import CalibrationError, ParameterFree
from zo_lightning.optim.ranks import Alone, Ranks
from zo_lightning.optim.rounding import round_stochastically
from zo_lightning.optim.step_rules import Probe, StepReport, StepRule
from zo_lightning.optim.updates import LMO, SGD, UPDATES, Update, make_update
from zo_lightning.optim.zeroth_order import NonFiniteLossError, ZerothOrder

__all__ = [
    "DIRECTIONS",
    "GEOMETRIES",
    "LMO",
    "SGD",
    "UPDATES",
    "Address",
    "Alone",
    "CalibrationError",
    "Column",
    "Directions",
    "Displacement",
    "Euclidean",
    "Factors",
    "Gaussian",
    "Geometry",
    "GeometryMap",
    "LowRank",
    "NonFiniteLossError",
    "ParameterFree",
    "Probe",
    "Rademacher",
    "Ranks",
    "Row",
    "Sign",
    "Spectral",
    "Sphere",
    "StepReport",
    "StepRule",
    "Update",
    "ZerothOrder",
    "make_directions",
    "make_geometry",
    "make_update",
    "polar",
    "round_stochastically",
]
