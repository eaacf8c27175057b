"""Conversion of documents to examples: tokens, and a mask of the tokens that the model learns to predict.

The chat format is ChatML, the format of Ouro: `<|im_start|>role\\n…<|im_end|>\\n` for every message.
"""

import dataclasses
from collections.abc import Iterable, Sequence

import numpy as np
from jaxtyping import Bool, Int32

from looplm_jax.data._documents import Document, Message, Problem
from looplm_jax.data.tokenizers._base import IM_END, IM_START, Tokenizer
from looplm_jax.errors import UserError

ASSISTANT = "assistant"


@dataclasses.dataclass(frozen=True, eq=False)
class Example:
    """A tokenized document, chat or problem of N tokens.

    `loss_mask[i]` is true if token i is a prediction target. The first token never is, because nothing precedes it.
    """

    tokens: Int32[np.ndarray, "N"]
    loss_mask: Bool[np.ndarray, "N"]

    @classmethod
    def of(cls, tokens: Sequence[int], loss_mask: Sequence[bool]) -> "Example":
        """Returns an example with arrays made from plain lists."""
        return cls(np.asarray(tokens, np.int32), np.asarray(loss_mask, bool))


def to_example(record: Document | Example, tokenizer: Tokenizer, *, special: bool = False) -> Example:
    """Tokenizes a text, a chat or a problem. A task's record is already an example and is returned unchanged.

    With `special`, names of special tokens in the text are parsed as these tokens.
    """
    if isinstance(record, Example):
        return record
    if isinstance(record, str):
        return document_example(record, tokenizer, special=special)
    if isinstance(record, Problem):
        return problem_example(record, tokenizer, special=special)
    return tokens_and_mask(record, tokenizer, special=special)


def document_example(text: str, tokenizer: Tokenizer, *, special: bool = False) -> Example:
    """Returns the example `bos text eos`, in which every token but bos is a target."""
    tokens = [tokenizer.bos_id, *tokenizer.encode(text, special=special), tokenizer.eos_id]
    return Example.of(tokens, [False] + [True] * (len(tokens) - 1))


def chunks(example: Example, length: int) -> list[dict[str, np.ndarray]]:
    """Splits an example into chunks of at most `length` pairs of input token and next token.

    The last target of a chunk is the first input of the next, so every target appears exactly once. Chunks without a
    target are dropped.
    """
    # Inputs are all tokens but the last, and targets are all tokens but the first.
    features = {
        "tokens": example.tokens[:-1],
        "targets": example.tokens[1:],
        "loss_mask": example.loss_mask[1:].astype(np.float32),
    }

    starts = range(0, len(example.tokens) - 1, length)
    pieces = ({name: values[start : start + length] for name, values in features.items()} for start in starts)
    return [piece for piece in pieces if piece["loss_mask"].any()]


# Problems


def problem_example(problem: Problem, tokenizer: Tokenizer, *, special: bool = False) -> Example:
    """Returns prompt, answer and end mark as an example, in which the answer and the mark are targets.

    The text of prompt and answer is encoded as one piece, so a token in which both meet is a target. An answer to
    messages is a turn of the assistant.
    """
    if isinstance(problem.prompt, str):
        given = [tokenizer.bos_id, *tokenizer.encode(problem.prompt, special=special)]
        whole = document_example(problem.prompt + problem.answer, tokenizer, special=special)
        return Example(whole.tokens, np.arange(len(whole.tokens)) >= _shared(given, whole.tokens.tolist()))

    opening = prompt_tokens(problem.prompt, tokenizer, special=special)
    chat = (*problem.prompt, Message(ASSISTANT, problem.answer))
    whole = tokens_and_mask(chat, tokenizer, special=special)
    # Earlier turns of the assistant are part of the prompt.
    answer = np.arange(len(whole.tokens)) >= _shared(opening, whole.tokens.tolist())
    return Example(whole.tokens, whole.loss_mask & answer)


def prompt_tokens(prompt: str | tuple[Message, ...], tokenizer: Tokenizer, *, special: bool = False) -> tuple[int, ...]:
    """Returns the tokens that an answer follows: those of a text after bos, or of a chat and the start of a turn."""
    if isinstance(prompt, str):
        return (tokenizer.bos_id, *tokenizer.encode(prompt, special=special))

    # `<|im_start|>` and the role; the rest closes the turn.
    turn = tokens_and_mask([Message(ASSISTANT, "")], tokenizer).tokens.tolist()
    opening = turn[: 1 + len(tokenizer.encode(f"{ASSISTANT}\n"))]
    return (*tokens_and_mask(prompt, tokenizer, special=special).tokens.tolist(), *opening)


# Chats


def render(messages: Iterable[Message]) -> str:
    """Returns the chat as text for display. Use `tokens_and_mask` to tokenize a chat."""
    # ChatML.
    return "".join(f"{IM_START}{message.role}\n{message.content}{IM_END}\n" for message in messages)


def tokens_and_mask(messages: Iterable[Message], tokenizer: Tokenizer, *, special: bool = False) -> Example:
    """Returns the chat as tokens, with the assistant's content and the `<|im_end|>` that ends it as targets.

    Each message is encoded as one piece of text between its special tokens, as Hugging Face chat templates do. A
    message that begins with white space may therefore share its first token with the newline that follows the role;
    such a token is a target.

    Args:
      messages: the turns of the chat, in order.
      tokenizer: must have the tokens `<|im_start|>` and `<|im_end|>`.
      special: parse names of special tokens inside messages as these tokens. By default such names are plain text, so
        that a message cannot forge a turn.

    Raises:
      UserError: the tokenizer lacks a token of the format, or a role is not exactly one line.
    """
    start, end = _special(tokenizer, IM_START), _special(tokenizer, IM_END)

    newline = tokenizer.encode("\n")

    tokens: list[int] = []
    mask: list[bool] = []

    for message in messages:
        if message.role.splitlines() != [message.role]:
            raise UserError(
                f"the role {message.role!r} of a message is not one line; give a name such as {ASSISTANT!r}"
            )

        # The role and the content are encoded together, so the boundary between prompt and target is the end of the
        # longest common token prefix with the role alone. The leading 1 is `<|im_start|>`.
        head = tokenizer.encode(f"{message.role}\n")
        turn = tokenizer.encode(f"{message.role}\n{message.content}", special=special)
        given = 1 + _shared(head, turn)

        tokens += [start, *turn, end, *newline]
        mask += [False] * given + [message.role == ASSISTANT] * (len(turn) + 2 - given) + [False] * len(newline)

    return Example.of(tokens, mask)


def _shared(left: Sequence[int], right: Sequence[int]) -> int:
    """Returns the length of the longest common prefix, in tokens."""
    differs = (place for place, (one, other) in enumerate(zip(left, right)) if one != other)
    return next(differs, min(len(left), len(right)))


def _special(tokenizer: Tokenizer, name: str) -> int:
    """Returns the id of a token of the chat format. Raises UserError if the tokenizer has no such token."""
    token = tokenizer.token_id(name)
    if token is None:
        raise UserError(f"the tokenizer has no token {name}, which the chat format needs; use one made for chat")
    return token
