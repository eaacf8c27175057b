"""Generation: sampling, a cache with a plane for each loop, and loops that stop where the exit policy says."""

from looplm_jax.inference.generate import Finish, Generation, NewToken, generate
from looplm_jax.inference.sampling import Sampling

__all__ = ["Finish", "Generation", "NewToken", "Sampling", "generate"]
