"""The published methods, each a composition of directions, scheme, update rule and step rule: no step of its own."""

from __future__ import annotations

from zo_lightning.optim.methods.fzoo import FZOO
from zo_lightning.optim.methods.hizoo import HiZOO
from zo_lightning.optim.methods.jaguar import JaguarSignSGD
from zo_lightning.optim.methods.jaguar_muon import JaguarMuon
from zo_lightning.optim.methods.ldsd import LDSD
from zo_lightning.optim.methods.ldsd_adamm import LDSDAdaMM
from zo_lightning.optim.methods.ldsd_jaguar import LDSDJaguar
from zo_lightning.optim.methods.lozo import LOZO
from zo_lightning.optim.methods.subzero import SubZero
from zo_lightning.optim.methods.zo_adamm import ZOAdaMM
from zo_lightning.optim.methods.zo_conservative import ConservativeZO
from zo_lightning.optim.methods.zo_finetuner import ZOFineTuner
from zo_lightning.optim.methods.zo_muon import ZOMuon
from zo_lightning.optim.methods.zo_sgd import ZOSGD
from zo_lightning.optim.methods.zo_signsgd import ZOSignSGD
from zo_lightning.optim.zeroth_order import ZerothOrder

METHODS: dict[str, type[ZerothOrder]] = {
    "adanaged": ZerothOrder,  # with the step rule ParameterFree
    "zo_sgd": ZOSGD,
    "zo_signsgd": ZOSignSGD,
    "zo_adamm": ZOAdaMM,
    "zo_conservative": ConservativeZO,
    "jaguar_signsgd": JaguarSignSGD,
    "jaguar_muon": JaguarMuon,
    "ldsd_sgd": LDSD,
    "ldsd_adamm": LDSDAdaMM,
    "ldsd_jaguar": LDSDJaguar,
    "zo_finetuner": ZOFineTuner,
    "lozo": LOZO,
    "subzero": SubZero,
    "zo_muon": ZOMuon,
    "fzoo": FZOO,
    "hizoo": HiZOO,
}
"""The methods by the names of their configurations (configs/methods)."""

__all__ = [
    "FZOO",
    "LDSD",
    "LOZO",
    "METHODS",
    "ZOSGD",
    "ConservativeZO",
    "HiZOO",
    "JaguarMuon",
    "JaguarSignSGD",
    "LDSDAdaMM",
    "LDSDJaguar",
    "SubZero",
    "ZOAdaMM",
    "ZOFineTuner",
    "ZOMuon",
    "ZOSignSGD",
]
