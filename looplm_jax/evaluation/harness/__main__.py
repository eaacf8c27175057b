"""The command line of lm-evaluation-harness, with the model `looplm` and the tasks of this package registered.

    python -m looplm_jax.evaluation.harness run --model looplm --model_args checkpoint=runs/text-small exit=q=0.5 \\
        --tasks looplm_smoke

`--model_args` are checkpoint, step, loops or exit, max_length, add_bos_token (true or false) and cache. A rule with
commas needs its own quotes: exit="'kl=1e-3,max=6'".
"""

import sys

from looplm_jax.errors import UserError
from looplm_jax.evaluation.harness import TASKS, require_lm_eval

_ADAPTER = "looplm_jax.evaluation.harness._adapter:LoopLMAdapter"


def main() -> int:
    """Runs the command in `sys.argv`. Returns 2 for a user error."""
    try:
        require_lm_eval()
        _run_harness()
    except UserError as error:
        print(f"looplm: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


def _run_harness() -> None:
    """Registers the adapter and runs the harness's command line."""
    # Here, so that a missing package is reported in one line.
    import lm_eval.models  # noqa: F401  (registers the harness's own models)
    from lm_eval._cli import HarnessCLI
    from lm_eval.api.registry import model_registry
    from lm_eval.utils import setup_logging

    setup_logging()
    if "looplm" not in model_registry:
        model_registry.register("looplm", target=_ADAPTER)

    parser = HarnessCLI()
    arguments = parser.parse_args()
    # The package's own tasks are the default, unless the user names a folder or a configuration.
    if "include_path" in arguments and not (arguments.include_path or getattr(arguments, "config", None)):
        arguments.include_path = str(TASKS)
    parser.execute(arguments)


if __name__ == "__main__":
    sys.exit(main())
