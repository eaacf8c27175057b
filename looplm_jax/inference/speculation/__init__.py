"""Self-speculation: a model drafts with its first loops and verifies with all of them (arXiv 2609.17184)."""

from looplm_jax.inference.speculation.result import SpeculativeResult
from looplm_jax.inference.speculation.screening import Reroute, Screen, ScreenedRow, Screening
from looplm_jax.inference.speculation.speculate import speculate

__all__ = ["Reroute", "Screen", "ScreenedRow", "Screening", "SpeculativeResult", "speculate"]
