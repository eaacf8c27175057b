"""An adapter for EleutherAI's lm-evaluation-harness: its tasks, at any number of loops or under any exit policy.

    looplm evaluate runs/text-small --tasks arc_easy,wikitext --exit q=0.5
    python -m looplm_jax.evaluation.harness run --model looplm --model_args checkpoint=runs/text-small exit=q=0.5 ...

The second command is the harness's own command line. It finds models of other packages only if they register
themselves, so it is started through this package.
"""

from pathlib import Path

from looplm_jax.errors import UserError

TASKS = Path(__file__).parent.parent / "tasks"  # tasks that need no network


def require_lm_eval() -> None:
    """Raises UserError if the optional package lm_eval is not installed."""
    try:
        import lm_eval  # noqa: F401
    except ImportError:
        raise UserError("tasks need lm_eval; pip install 'looplm_jax[eval]'") from None
