"""ChatML, the chat format of Ouro: `<|im_start|>role\\n…<|im_end|>\\n` for every message."""

from collections.abc import Iterable, Sequence

from looplm_jax.data.documents import Example, Message
from looplm_jax.data.tokenizers.base import IM_END, IM_START, Tokenizer
from looplm_jax.errors import UserError

ASSISTANT = "assistant"


def render(messages: Iterable[Message]) -> str:
    """Returns the chat as text for display. Use `tokens_and_mask` to tokenize a chat."""
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
