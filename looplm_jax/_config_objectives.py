"""The settings of single objectives: the prior over exits, the gate, LoopRPT, and policy gradients."""

import dataclasses
import enum

from looplm_jax._config_fields import check_kinds as _check_kinds
from looplm_jax._config_fields import field as _field
from looplm_jax._config_fields import require as _require

# Exits (Stages I and II)


class PriorKind(enum.Enum):
    """The family of the prior over exit loops."""

    UNIFORM = "uniform"
    GEOMETRIC = "geometric"
    POISSON_LOG_NORMAL = "poisson_log_normal"


@dataclasses.dataclass(frozen=True, kw_only=True)
class PriorConfig:
    """The prior over exit loops toward which the exit distribution is regularized."""

    kind: PriorKind = _field("family of the prior", PriorKind.UNIFORM)
    rate: float = _field("geometric: probability of exit at each loop", 0.5)
    mean: float = _field("poisson_log_normal: mean number of loops", 4.0)
    sigma: float = _field("poisson_log_normal: standard deviation of the log of the rate", 0.5)

    def __post_init__(self) -> None:
        _check_kinds(self, "prior")
        _require(0 < self.rate < 1, f"prior.rate must be in (0, 1), not {self.rate}")
        _require(self.mean > 1, f"prior.mean must exceed 1 loop, not {self.mean}")
        _require(self.sigma > 0, f"prior.sigma must be positive, not {self.sigma}")


class GateTarget(enum.Enum):
    """The gain that trains the gate of loop t: the previous one, t-1 -> t (as printed), or the next, t -> t+1."""

    AS_PRINTED = "as_printed"
    LOOK_AHEAD = "look_ahead"


# Reinforcement learning on text


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoopRPTConfig:
    """Reinforcement learning on the exits of given text: LoopRPT, arXiv 2603.19714.

    The weights are those of the four terms of the loss in `losses.looprpt`.
    """

    # Rollouts.
    rollouts: int = _field("noisy rollouts of a sequence, G; each multiplies the time of a step, not its memory", 8)
    noise: float = _field("standard deviation of the noise on the state after every loop", 0.1)
    # What is learned from.
    hard_share: float = _field("fraction of the tokens of a document, those of the highest entropy, to learn from", 0.2)
    # Rewards.
    exit_threshold: float = _field(
        "cumulative exit probability of the teacher's loop that loops are compared with", 0.5
    )
    penalty: float = _field("price of one more loop, nats", 0.02)
    penalty_scale: float = _field("how much higher the price is for a token that the teacher is certain of", 0.5)
    # Terms of the loss.
    policy_weight: float = _field("weight of the policy gradient of exits", 1.0)
    representation_weight: float = _field("weight of the cross-entropy of every loop, higher for better loops", 1.0)
    entropy_weight: float = _field("weight of the entropy of the exit distribution", 0.01)
    kl_weight: float = _field("weight of the divergence of the rollouts from the teacher", 1e-3)

    teacher_decay: float = _field("decay of the teacher, an average of earlier students; 1: frozen", 0.995)

    def __post_init__(self) -> None:
        _check_kinds(self, "looprpt")
        _require(
            self.rollouts >= 2,
            f"looprpt.rollouts must be at least 2, because rollouts are compared with each other, not {self.rollouts}",
        )
        _require(0 < self.hard_share <= 1, f"looprpt.hard_share must be in (0, 1], not {self.hard_share}")
        for name in ("exit_threshold", "teacher_decay"):
            _require(0 <= getattr(self, name) <= 1, f"looprpt.{name} must be in [0, 1], not {getattr(self, name)}")

        weights = ("policy_weight", "representation_weight", "entropy_weight", "kl_weight")
        for name in ("noise", "penalty", "penalty_scale", *weights):
            _require(getattr(self, name) >= 0, f"looprpt.{name} must not be negative, not {getattr(self, name)}")


# Reinforcement learning on answers


class Credit(enum.Enum):
    """The action of a token whose probability a policy gradient changes.

    ACTION: the token and its exit loop. TOKEN: the token at its exit loop; the gate learns nothing. TRAJECTORY: the
    token at all loops, by their weights (RLTT, arXiv 2602.10520).
    """

    ACTION = "action"
    TOKEN = "token"
    TRAJECTORY = "trajectory"


class LoopWeights(enum.Enum):
    """The weights of the loops of a token in RLTT.

    UNIFORM: 1/T. PROGRESSIVE: in proportion to a power of the loop. EXIT_PDF: the exit distribution, which is trained
    through them. EXIT_PDF_CONSTANT: the exit distribution as a constant.
    """

    UNIFORM = "uniform"
    PROGRESSIVE = "progressive"
    EXIT_PDF = "exit_pdf"
    EXIT_PDF_CONSTANT = "exit_pdf_constant"


class Reward(enum.Enum):
    """The judge of an answer, which compares it with the right one.

    EXACT: the same text, but for white space around it. NUMBER: the same last number. BOXED: the same content in the
    last `\\boxed{...}`.
    """

    EXACT = "exact"
    NUMBER = "number"
    BOXED = "boxed"


class Advantage(enum.Enum):
    """The comparison of the rewards of answers to one prompt.

    STD: distance from the mean in standard deviations (GRPO). MEAN: distance from the mean (Dr. GRPO). LEAVE_ONE_OUT:
    distance from the mean of the other answers.
    """

    STD = "std"
    MEAN = "mean"
    LEAVE_ONE_OUT = "leave_one_out"


class Aggregation(enum.Enum):
    """The mean that turns terms of tokens into the loss of a policy gradient.

    SEQUENCE: over the tokens of each answer, then over answers (GRPO). TOKEN: over all tokens (DAPO). CONSTANT: the
    sum, divided by the number of answers times the largest length (Dr. GRPO).
    """

    SEQUENCE = "sequence"
    TOKEN = "token"
    CONSTANT = "constant"


@dataclasses.dataclass(frozen=True, kw_only=True)
class PolicyConfig:
    """Reinforcement learning on generated answers: GRPO over tokens or over tokens and exits, and RLTT.

    Tokens are drawn at temperature 1 from the whole distribution, because the drawn distribution is the one that is
    updated.
    """

    # Rollouts.
    credit: Credit = _field("what is rewarded", Credit.ACTION)
    exits: str = _field("exit rule of rollouts; sampled with credit=action, loops=T with credit=trajectory", "sampled")
    answers: int = _field("answers to each prompt, G; a step has batch_size prompts", 8)
    max_new_tokens: int = _field("longest answer, in tokens", 64)
    slots: int = _field("answers that are generated at the same time", 64)
    # Rewards.
    reward: Reward = _field("judge of an answer", Reward.EXACT)
    loop_cost: float = _field("subtracted from the reward of an answer, times the share of its loops that it ran", 0.0)
    advantage: Advantage = _field("how rewards of the answers to a prompt are compared", Advantage.STD)
    # The loss.
    aggregation: Aggregation = _field("mean over tokens and answers", Aggregation.SEQUENCE)
    loop_weights: LoopWeights = _field("weights of loops with credit=trajectory", LoopWeights.EXIT_PDF)
    clip_low: float = _field("how far the ratio of probabilities may fall below 1", 0.2)
    clip_high: float = _field("how far the ratio of probabilities may rise above 1", 0.2)
    kl_weight: float = _field("weight of the divergence from the parameters at the start of the stage", 0.0)
    updates: int = _field("updates of the parameters with the answers of a step", 1)
    gap_tolerance: float = _field(
        "largest difference in nats between log-probabilities of rollout and replay; bfloat16 needs about 0.3", 1e-2
    )

    def __post_init__(self) -> None:
        _check_kinds(self, "policy")
        _require(
            self.answers >= 2,
            f"policy.answers must be at least 2, because answers are compared with each other, not {self.answers}",
        )
        for name in ("max_new_tokens", "slots", "updates"):
            _require(getattr(self, name) >= 1, f"policy.{name} must be at least 1, not {getattr(self, name)}")
        for name in ("loop_cost", "clip_low", "clip_high", "kl_weight"):
            _require(getattr(self, name) >= 0, f"policy.{name} must not be negative, not {getattr(self, name)}")
        _require(self.gap_tolerance > 0, f"policy.gap_tolerance must be positive, not {self.gap_tolerance}")
