"""A looped model with the interface of lm-evaluation-harness. Importing this module needs `lm_eval`."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window, simple_parse_args_string
from tqdm import tqdm

from looplm_jax.errors import UserError
from looplm_jax.evaluation.harness._generation import generate_texts, generation_request, with_own_keys
from looplm_jax.evaluation.harness._scoring import Likelihood, Window, WindowScorer
from looplm_jax.evaluation.harness._settings import HarnessSettings, ModelArgs
from looplm_jax.halting import ExitPolicy, FixedLoops
from looplm_jax.inference import Request
from looplm_jax.loading import Loaded, load

Answer = tuple[float, bool]  # a log-likelihood in nats, and whether greedy decoding produces the text


class LoopLMAdapter(TemplateLM):
    """Serves the harness: log-likelihoods from one forward pass, text from the engine, both under one exit policy."""

    def __init__(self, loaded: Loaded, settings: HarnessSettings, *, on_requests: Callable[[int], None] | None = None):
        super().__init__()
        self.policy: ExitPolicy = settings.policy or FixedLoops(loops=loaded.model.config.loops)
        self.loops = 0  # total loops of the tokens counted below
        self.tokens = 0  # scored or generated so far
        self._loaded = loaded
        self._settings = settings
        self._on_requests = on_requests
        self._scorer = self._make_scorer(self.policy.max_loops or loaded.model.config.loops, self.policy)

    @classmethod
    def create_from_arg_obj(
        cls, arg_dict: Mapping[str, Any], additional_config: Mapping[str, Any] | None = None
    ) -> "LoopLMAdapter":
        """Returns the model for `--model_args` and the harness's own flags."""
        given = ModelArgs.of({**(additional_config or {}), **arg_dict})
        # The total is not known in advance.
        bar = tqdm(desc="requests scored", unit="")
        return cls(load(given.checkpoint, step=given.step), given.settings, on_requests=bar.update)

    @classmethod
    def create_from_arg_string(
        cls, arg_string: str, additional_config: Mapping[str, Any] | None = None
    ) -> "LoopLMAdapter":
        """Returns the model for `checkpoint=...,exit=...`. Rules with commas need the command line or a dict."""
        return cls.create_from_arg_obj(simple_parse_args_string(arg_string), additional_config)

    @property
    def eot_token_id(self) -> int:
        """Returns the token that ends a document."""
        return self._loaded.need_tokenizer().eos_id

    @property
    def prefix_token_id(self) -> int:
        """Returns the token that precedes a text without context."""
        return self._loaded.need_tokenizer().bos_id

    @property
    def max_length(self) -> int:
        """Returns the number of tokens that the model reads."""
        longest = self._loaded.model.config.max_positions
        return min(self._settings.max_length or longest, longest)

    @property
    def mean_loops(self) -> float:
        """Returns the mean loops per token, over scored and generated ones; 0 if there are none."""
        return self.loops / self.tokens if self.tokens else 0.0

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Returns the ids of a text, after a bos token if the settings and the caller allow one."""
        tokenizer = self._loaded.need_tokenizer()
        add_bos = self._settings.add_bos_token and add_special_tokens is not False
        return [
            *([tokenizer.bos_id] if add_bos else []),
            *tokenizer.encode(string, special=self._settings.special_tokens),
        ]

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Raises UserError.

        A chat is tokens, while our tokenizers read the names of special tokens in a text as plain text.
        """
        raise UserError("chat templates are not supported; leave --apply_chat_template out")

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[Answer]:
        """Returns each text's log-likelihood after its context, in nats, and whether greedy decoding produces it."""
        return super().loglikelihood(list(requests), disable_tqdm=True)

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Returns the log-likelihood of whole texts, from windows that score each token once."""
        windows = [self._rolling(*request.args) for request in requests]
        # All windows of all texts in one call, so that batches are full.
        # The answers are in the order of the windows, so each text takes as many as it has windows.
        answers = iter(self.answers([window for parts in windows for window in parts]))
        return [sum((next(answers)[0] for _ in parts), 0.0) for parts in windows]

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Returns texts that continue contexts, up to a stop string, an end of text, or a number of tokens."""
        if not requests:
            return []
        results = generate_texts(
            self._loaded,
            with_own_keys([self._generation(*request.args) for request in requests]),
            slots=self._settings.batch_size,
            loops=self._scorer.loops,
            cache=self._settings.cache,
        )

        self.loops += sum(sum(result.exit_loops) for result in results)
        self.tokens += sum(len(result.tokens) for result in results)
        return [result.text for result in results]

    def answers(self, windows: Sequence[Window]) -> list[Answer]:
        """Returns the answer to each window."""
        likelihoods = self._scorer(windows)
        self.loops += sum(likelihood.loops[0] for likelihood in likelihoods)
        self.tokens += sum(window.scored for window in windows)
        return [(likelihood.log_prob[0], likelihood.greedy[0]) for likelihood in likelihoods]

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, Sequence[int], Sequence[int]]], **_: Any
    ) -> list[Answer]:
        return self.answers([Window.of(context, text, self.max_length) for _, context, text in requests])

    def _rolling(self, text: str) -> list[Window]:
        tokens = self.tok_encode(text, add_special_tokens=False)
        pairs = get_rolling_token_windows(
            token_list=tokens, prefix_token=self.prefix_token_id, max_seq_len=self.max_length, context_len=1
        )
        disjoint = map(make_disjoint_window, pairs)
        return [Window.of(context, scored, self.max_length) for context, scored in disjoint]

    def _generation(self, context: str, generation_kwargs: Mapping[str, Any]) -> Request:
        # An empty context needs at least one token to predict from.
        prompt_ids = self.tok_encode(context) or [self.prefix_token_id]
        tokenizer, policy = self._loaded.need_tokenizer(), self.policy
        return generation_request(prompt_ids, generation_kwargs, tokenizer, policy=policy, longest=self.max_length)

    def _make_scorer(self, loops: int, policy: ExitPolicy | None) -> WindowScorer:
        return WindowScorer(
            model=self._loaded.model,
            params=self._loaded.params,
            loops=loops,
            policy=policy,
            rows=self._settings.batch_size,
            longest=self.max_length,
            on_windows=self._on_requests,
        )


class EveryDepth(LoopLMAdapter):
    """An adapter that answers as if every token ran `depth` loops, which may change between runs of the tasks.

    This makes a depth sweep cheap: one forward pass gives the log-likelihoods of all depths, so windows that were
    already scored at another depth cost nothing. Text is generated again at each depth, because other depths produce
    other tokens.
    """

    def __init__(
        self, loaded: Loaded, settings: HarnessSettings, *, loops: int, on_requests: Callable[[int], None] | None = None
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
        likelihoods, index = [self._known[window] for window in windows], self.depth - 1
        return [(likelihood.log_prob[index], likelihood.greedy[index]) for likelihood in likelihoods]
