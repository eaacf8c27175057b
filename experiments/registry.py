"""All experiments by name."""

from collections.abc import Mapping
from types import MappingProxyType

from experiments.addition import ADDITION
from experiments.capo import CAPO
from experiments.dense_start import DENSE_START
from experiments.depth import DEPTH
from experiments.early_exit import EARLY_EXIT
from experiments.equilibrium import EQUILIBRIUM
from experiments.frame import Experiment
from experiments.huginn_depth import HUGINN_DEPTH
from experiments.kv_sharing import KV_SHARING
from experiments.looprpt import LOOPRPT
from experiments.mano import MANO
from experiments.optimizers import OPTIMIZERS
from experiments.p_hop import P_HOP
from experiments.policy_depth import POLICY_DEPTH
from experiments.ponder import PONDER
from experiments.prior import PRIOR
from experiments.reachability import REACHABILITY
from experiments.stabilizers import STABILIZERS
from experiments.three_hop import THREE_HOP
from experiments.upcycling import UPCYCLING

_ALL: tuple[Experiment, ...] = (
    MANO,
    CAPO,
    THREE_HOP,
    ADDITION,
    P_HOP,
    REACHABILITY,
    PRIOR,
    EARLY_EXIT,
    KV_SHARING,
    DEPTH,
    POLICY_DEPTH,
    LOOPRPT,
    UPCYCLING,
    DENSE_START,
    OPTIMIZERS,
    STABILIZERS,
    HUGINN_DEPTH,
    PONDER,
    EQUILIBRIUM,
)
EXPERIMENTS: Mapping[str, Experiment] = MappingProxyType({each.name: each for each in _ALL})
