"""Self-speculation: a model drafts with its first loops and verifies with all of them (arXiv 2609.17184).

    from looplm_jax.inference import speculate

    results = speculate(model, params, [[3, 14, 15], [92]], draft_loops=1, drafts=4, max_new_tokens=64)
    results[0].tokens, results[0].acceptance_rate, results[0].loops_per_token

`speculate` returns a `SpeculativeResult` per prompt. Tokens follow the distribution of generation with all loops.

A `Screen` is a function that sees the drafts of a row, a `ScreenedRow`, before they are verified. It returns a
`Screening` to continue or to stop the row, or a `Reroute` with other tokens.
"""

from etils import epy

with epy.lazy_api_imports(globals()):
    # Screens of drafts.
    from looplm_jax.inference.speculation._rows import Reroute, Screen, ScreenedRow, Screening, SpeculativeResult

    # Generation.
    from looplm_jax.inference.speculation._speculate import speculate

__all__ = ["Reroute", "Screen", "ScreenedRow", "Screening", "SpeculativeResult", "speculate"]
