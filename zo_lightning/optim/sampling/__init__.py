"""What learns the distribution of the directions: LDSD's mean, HiZOO's diagonal, ZO Fine-tuner's scales."""

from zo_lightning.optim.sampling.base import Draw, Sampler
from zo_lightning.optim.sampling.hessian import DiagonalHessian
from zo_lightning.optim.sampling.learned_mean import LearnedMean
from zo_lightning.optim.sampling.learned_scales import LearnedScales
from zo_lightning.optim.sampling.scale_learning import MetaStep, ScaleLearner
from zo_lightning.optim.sampling.scale_networks import ScaleNetworks

__all__ = [
    "DiagonalHessian",
    "Draw",
    "LearnedMean",
    "LearnedScales",
    "MetaStep",
    "Sampler",
    "ScaleLearner",
    "ScaleNetworks",
]
