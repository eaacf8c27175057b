"""Every experiment by name."""

from collections.abc import Mapping
from types import MappingProxyType

from experiments.experiment import Experiment
from experiments.mano import MANO

EXPERIMENTS: Mapping[str, Experiment] = MappingProxyType({each.name: each for each in (MANO,)})
