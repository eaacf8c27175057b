"""`looplm` for processes that tests start: small shuffle windows, as in the tests themselves, and no figures.

A run fills a window before its first step and plots after its last one. Both take seconds and test nothing here.
"""

import sys

SHUFFLED_PIECES = 256

if __name__ == "__main__":
    from looplm_jax.cli import train
    from looplm_jax.cli.main import main
    from looplm_jax.data import _packing as packing

    packing._SHUFFLED_PIECES = SHUFFLED_PIECES
    train.write_run_report = lambda *_: []
    sys.exit(main())
