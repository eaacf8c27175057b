"""A depth sweep over tasks: one forward pass gives the log-likelihoods of all depths."""

from collections.abc import Callable, Sequence

from looplm_jax.evaluation.harness.adapter import Answer, LoopLMAdapter
from looplm_jax.evaluation.harness.scoring import Likelihood
from looplm_jax.evaluation.harness.settings import Settings
from looplm_jax.evaluation.harness.windows import Window
from looplm_jax.halting import FixedLoops
from looplm_jax.loading import Loaded


class EveryDepth(LoopLMAdapter):
    """An adapter that answers as if every token ran `depth` loops, which may change between runs of the tasks.

    Windows that were already scored at another depth cost nothing. Text is generated again at each depth, because other
    depths produce other tokens.
    """

    def __init__(
        self, loaded: Loaded, settings: Settings, *, loops: int, on_requests: Callable[[int], None] | None = None
    ):
        super().__init__(loaded, settings, on_requests=on_requests)
        self._scorer = self._make_scorer(loops, None)
        self._known: dict[Window, Likelihood] = {}
        self.depth = loops

    @property
    def depth(self) -> int:
        """Returns the loops of every token."""
        return self.policy.max_loops or 1

    @depth.setter
    def depth(self, loops: int) -> None:
        self.policy = FixedLoops(loops=loops)

    def answers(self, windows: Sequence[Window]) -> list[Answer]:
        """Returns the answer to each window at `depth`."""
        # dict.fromkeys removes repeats and keeps the order.
        new = [window for window in dict.fromkeys(windows) if window not in self._known]
        self._known |= zip(new, self._scorer(new), strict=True)
        found, place = [self._known[window] for window in windows], self.depth - 1
        return [(likelihood.log_prob[place], likelihood.greedy[place]) for likelihood in found]
