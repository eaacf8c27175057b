"""A looped model with the interface of lm-evaluation-harness. Importing this module needs `lm_eval`."""

import collections
import dataclasses
import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window, simple_parse_args_string
from tqdm import tqdm

from looplm_jax.convert._tokenizer_files import stop_ids
from looplm_jax.data.tokenizers import Tokenizer
from looplm_jax.errors import UserError, suggest
from looplm_jax.evaluation.harness._scoring import Likelihood, Window, WindowScorer
from looplm_jax.evaluation.harness._settings import HarnessSettings, ModelArgs
from looplm_jax.halting import ExitPolicy, FixedLoops
from looplm_jax.inference import CacheStrategy, Engine, EngineConfig, Finish, Request, Result, Sampling
from looplm_jax.inference._field_checks import real_number, whole_number
from looplm_jax.inference._kv_cache import bucket
from looplm_jax.loading import Loaded, load

Answer = tuple[float, bool]  # a log-likelihood in nats, and whether greedy decoding produces the text

_NEW_TOKENS = 256  # if a task does not specify it, as for the harness's own models
_TOP_K = 50  # the same for sampled tokens: the default of `transformers`
_LONGEST_CHUNK = 512
_OF_LENGTH = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
_KEYS = 2**31
_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed")
_NEUTRAL = {"num_beams": 1, "num_return_sequences": 1}  # arguments that tasks set for other engines


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
        # A policy without a bound of its own is evaluated up to the trained depth.
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
        results = _run_requests(
            self._loaded,
            _with_own_keys([self._generation(*request.args) for request in requests]),
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
        # The harness puts its prefix token before the first window, so a bos here would be one too many.
        tokens = self.tok_encode(text, add_special_tokens=False)
        pairs = get_rolling_token_windows(
            token_list=tokens, prefix_token=self.prefix_token_id, max_seq_len=self.max_length, context_len=1
        )
        # Windows overlap in their contexts, but each token is scored once.
        disjoint = map(make_disjoint_window, pairs)
        return [Window.of(context, scored, self.max_length) for context, scored in disjoint]

    def _generation(self, context: str, generation_kwargs: Mapping[str, Any]) -> Request:
        # An empty context needs at least one token to predict from.
        prompt_ids = self.tok_encode(context) or [self.prefix_token_id]
        tokenizer, policy = self._loaded.need_tokenizer(), self.policy
        return _generation_request(prompt_ids, generation_kwargs, tokenizer, policy=policy, longest=self.max_length)

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


# Text: requests of the harness as requests of the engine


def _generation_request(
    prompt_ids: Sequence[int],
    generation_kwargs: Mapping[str, Any],
    tokenizer: Tokenizer,
    *,
    policy: ExitPolicy,
    longest: int,
) -> Request:
    """Returns a request whose prompt is truncated on the left to leave room for the new tokens.

    The harness's Hugging Face model truncates in the same way.

    Args:
      prompt_ids: at least one token.
      generation_kwargs: arguments of a task: `until`, `max_gen_toks` under any of its names, `do_sample`, and the
        fields of `Sampling`.
      tokenizer: its end-of-text tokens also end a generation.
      policy: decides the loop at which each token exits.
      longest: the number of tokens that the model reads.

    Raises:
      UserError: an argument is not known, or no room is left for a prompt.
    """
    # None means that the argument was not set.
    given = {name: value for name, value in generation_kwargs.items() if value is not None}
    _check_names(given)

    # The first name that is present counts, as in the harness.
    lengths = [given[name] for name in _OF_LENGTH if name in given]
    new_tokens = whole_number("max_gen_toks", lengths[0], least=1) if lengths else _NEW_TOKENS
    if new_tokens >= longest:
        raise UserError(
            f"{new_tokens} new tokens leave no room for a prompt in the {longest} that the model reads; "
            "ask for fewer with generation_kwargs max_gen_toks"
        )

    until = given.get("until", [])
    return Request(
        prompt_ids=tuple(prompt_ids[-(longest - new_tokens) :]),
        max_new_tokens=new_tokens,
        policy=policy,
        sampling=_sampling(given),
        stop_ids=tuple(stop_ids(tokenizer)),
        # An empty stop string would end every text at once.
        stop_strings=tuple(text for text in ([until] if isinstance(until, str) else until) if text),
    )


def _with_own_keys(requests: Sequence[Request]) -> list[Request]:
    """Returns the requests, each with its own random keys. Repeats of a prompt are its samples 0, 1, ...

    Keys derive from the prompt and the number of the repeat, so that neither the order of the requests nor the other
    requests affect an answer.
    """
    seen: collections.Counter[tuple[int, ...]] = collections.Counter()
    numbered = []
    for request in requests:
        # "<i4": the digest must not depend on the byte order of the machine.
        digest = hashlib.sha256(np.asarray(request.prompt_ids, "<i4").tobytes()).digest()
        index, sample = int.from_bytes(digest[:4], "big") % _KEYS, seen[request.prompt_ids]
        seen[request.prompt_ids] += 1

        sampling = dataclasses.replace(request.sampling, index=index, sample=sample)
        numbered.append(dataclasses.replace(request, sampling=sampling))
    return numbered


def _run_requests(
    loaded: Loaded, requests: Sequence[Request], *, slots: int, loops: int, cache: CacheStrategy
) -> list[Result]:
    """Returns the engine's results for at least one request. Raises UserError if a request failed."""
    longest = loaded.model.config.max_positions

    # The cache is as large as the longest request needs, rounded up so that few shapes are compiled.
    window = bucket(max(len(request.prompt_ids) + request.max_new_tokens for request in requests), longest)
    config = EngineConfig(
        slots=min(slots, len(requests)),
        capacity=window,
        loops=loops,
        cache=cache,
        chunk=min(_LONGEST_CHUNK, window),
        queue=len(requests),
    )

    engine = Engine(loaded.model, loaded.params, loaded.need_tokenizer(), config=config)
    handles = [engine.submit(request) for request in requests]
    # All requests are in the queue, so the engine works until every one is answered.
    while engine.step():
        pass

    results = [handle.result() for handle in handles]
    for result in results:
        if result.finish is Finish.FAILED:
            raise UserError(result.error)
    return results


def _check_names(given: Mapping[str, Any]) -> None:
    """Raises UserError for arguments that have no effect here."""
    known = ("until", "do_sample", *_OF_LENGTH, *_SAMPLING)
    for name, value in given.items():
        if name not in known and _NEUTRAL.get(name) != value:
            raise UserError(f"generation_kwargs {name}={value!r} is not supported{suggest(name, known)}")


def _sampling(given: Mapping[str, Any]) -> Sampling:
    """Returns greedy sampling unless the task asks for `do_sample`, or omits it and sets a temperature."""
    settings = {name: given[name] for name in _SAMPLING if name in given}
    temperature = real_number("temperature", settings.pop("temperature", 0.0))
    if not given.get("do_sample", temperature > 0):
        return Sampling(**settings)
    if temperature == 0:
        raise UserError("generation_kwargs do_sample=True needs a temperature above 0; 0 takes the likeliest token")
    # The task's own top_k replaces the default.
    return Sampling(**{"temperature": temperature, "top_k": _TOP_K, **settings})
