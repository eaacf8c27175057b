"""ChatML, the chat format of Ouro: `<|im_start|>role\\n…<|im_end|>\\n` for every message."""

from collections.abc import Iterable, Sequence

from looplm_jax.data.documents import Example, Message
from looplm_jax.data.tokenizers.base import IM_END, IM_START, Tokenizer
from looplm_jax.errors import UserError

ASSISTANT = "assistant"


def render(messages: Iterable[Message]) -> str:
    """The chat as text, for people to read; to make tokens of it use `tokens_and_mask`."""
    return "".join(f"{IM_START}{message.role}\n{message.content}{IM_END}\n" for message in messages)


def tokens_and_mask(messages: Iterable[Message], tokenizer: Tokenizer, *, special: bool = False) -> Example:
    """The chat as tokens. Targets are what an assistant says and the `<|im_end|>` that ends it.

    Special tokens come from the structure alone, unless `special`: their names inside a message are text. What is
    between them is encoded as a whole, as Hugging Face's chat templates are, so a message that begins with white space
    may share its first token with the line's end before it.

    Raises:
      UserError: the tokenizer lacks these tokens, or a role is not one line.
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
        head = tokenizer.encode(f"{message.role}\n")
        turn = tokenizer.encode(f"{message.role}\n{message.content}", special=special)
        given = 1 + _shared(head, turn)
        tokens += [start, *turn, end, *newline]
        mask += [False] * given + [message.role == ASSISTANT] * (len(turn) + 2 - given) + [False] * len(newline)
    return Example.of(tokens, mask)


def _shared(left: Sequence[int], right: Sequence[int]) -> int:
    """How many tokens both begin with."""
    differs = (place for place, (one, other) in enumerate(zip(left, right)) if one != other)
    return next(differs, min(len(left), len(right)))


def _special(tokenizer: Tokenizer, name: str) -> int:
    token = tokenizer.token_id(name)
    if token is None:
        raise UserError(f"the tokenizer has no token {name}, which the chat format needs; use one made for chat")
    return token
