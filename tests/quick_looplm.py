"""`looplm` for processes that tests start: small windows, as in the tests themselves, and no figures at the end.

Before its first step a run fills a window, and after its last it draws: seconds in which nothing is tested.
"""

import sys

SHUFFLED_PIECES = 256

if __name__ == "__main__":
    from looplm_jax.cli import training_session
    from looplm_jax.cli.main import main
    from looplm_jax.data import packing

    packing._SHUFFLED_PIECES = SHUFFLED_PIECES
    training_session.write_run_report = lambda *_: []
    sys.exit(main())
