"""Rewards: how well a text answers a problem, from the prompt, the text and the right answer.

A reward is a pure function of three strings. Those of this module return 0 or 1.
"""

import decimal
import math
import numbers
import re
from collections.abc import Callable, Mapping

from looplm_jax.config import Reward
from looplm_jax.errors import UserError
from looplm_jax.terminal import one_line

RewardFunction = Callable[[str, str, str], float]
"""Returns the reward of `(prompt, text, answer)`, usually in [0, 1]."""

# With commas between groups of three digits, or without; a minus is a sign unless something stands before it.
_NUMBER = re.compile(r"(?:(?<![\w.)])-)?(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?")
_BOXED = "\\boxed{"
# Without effect on the meaning of a formula.
_SPACING = re.compile(r"\\left|\\right|\\[!,;: ]|\$|\s")
_DECIMAL = re.compile(r"[0-9]+\.[0-9]+")


# Rewards


def exact(prompt: str, text: str, answer: str) -> float:
    """Returns 1 if the text is the answer, but for white space around it."""
    del prompt
    return float(text.strip() == answer.strip())


def number(prompt: str, text: str, answer: str) -> float:
    """Returns 1 if the last number of the text is that of the answer, as in GSM8K.

    Raises:
      UserError: the answer has no number.
    """
    del prompt
    wanted = _last_number(answer)
    if wanted is None:
        raise UserError(f"the answer {answer!r} holds no number; use another reward")
    return float(_last_number(text) == wanted)


def boxed(prompt: str, text: str, answer: str) -> float:
    r"""Returns 1 if the last `\boxed{...}` of the text has the content of the answer, as in MATH.

    Spaces, `$`, `\left`, `\right` and trailing zeros of decimals are ignored. The answer is the content of its own last
    box if it has one, or else the whole answer.
    """
    del prompt
    found, wanted = last_boxed(text), last_boxed(answer)
    return float(found is not None and _plain(found) == _plain(answer if wanted is None else wanted))


REWARDS: Mapping[Reward, RewardFunction] = {Reward.EXACT: exact, Reward.NUMBER: number, Reward.BOXED: boxed}
"""The reward of each name."""


def judge(reward: RewardFunction, prompt: str, text: str, answer: str, *, where: str) -> float:
    """Returns the reward of a text.

    Raises:
      UserError: the function raises, or returns something else than a finite number; `where` names the problem.
    """
    try:
        value = reward(prompt, text, answer)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    except Exception as error:
        raise UserError(f"{where}: the reward raised {one_line(f'{type(error).__name__}: {error}')}") from error

    if not isinstance(value, numbers.Real) or not math.isfinite(value):
        raise UserError(f"{where}: a reward must be a finite number, not {value!r}")
    return float(value)


# Parts of a text


def last_boxed(text: str) -> str | None:
    r"""Returns the content of the last `\boxed{...}` whose braces are balanced, or None."""
    place = text.rfind(_BOXED)
    while place >= 0:
        depth, start = 1, place + len(_BOXED)
        for end in range(start, len(text)):
            depth += {"{": 1, "}": -1}.get(text[end], 0)
            if depth == 0:
                return text[start:end]
        # A text that was cut may end inside its last box.
        place = text.rfind(_BOXED, 0, place)
    return None


def _last_number(text: str) -> decimal.Decimal | None:
    """Returns the last number of a text, or None."""
    found = _NUMBER.findall(text)
    return decimal.Decimal(found[-1].replace(",", "")) if found else None


def _plain(formula: str) -> str:
    """Returns a formula without what does not change its meaning."""
    bare = _SPACING.sub("", formula)
    return _DECIMAL.sub(lambda match: match[0].rstrip("0").rstrip("."), bare)
