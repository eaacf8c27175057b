"""Recipes of reinforcement learning on answers. They start from a trained model.

looplm train --recipe grpo-depth --start.checkpoint runs/addition --data 'addition:longest=4,digits=2'
looplm train --recipe grpo --start.checkpoint Ouro-1.4B-Thinking --data math.jsonl
looplm train --recipe rltt --start.checkpoint Ouro-2.6B-Thinking --data math.jsonl
"""

from looplm_jax.config import (
    CheckpointConfig,
    Credit,
    DataConfig,
    EvaluationConfig,
    MeshConfig,
    ModelConfig,
    Objective,
    OptimizerConfig,
    PolicyConfig,
    Recipe,
    Reward,
    SourceConfig,
    Stage,
    StartConfig,
)
from looplm_jax.models import presets

# Of RLTT: 140 steps of 32 problems with 8 answers each, a tenth of them warm-up.
_PRINTED = {
    "objective": Objective.POLICY_GRADIENT,
    "steps": 140,
    "batch_size": 32,
    "sequence_length": 3072,
    "accumulation": 4,
    "learning_rate": 1e-6,
    "warmup_steps": 14,
}
_OPTIMIZER = OptimizerConfig(b2=0.999, weight_decay=0.1, clip_norm=0.1)


def grpo_depth() -> Recipe:
    """GRPO over tokens and depth on a laptop: a model of `addition` learns when to stop, at a price per loop.

    Start it from a model of the task, such as the experiment `addition` trains.
    """
    return Recipe(
        name="grpo-depth",
        description=grpo_depth.__doc__ or "",
        model=ModelConfig(
            vocab_size=13,
            width=64,
            mlp_width=176,
            num_layers=1,
            num_heads=4,
            loops=3,
            rope_theta=1e4,
            max_positions=1024,
        ),
        data=DataConfig(sources=(SourceConfig(path="addition:longest=4,digits=2,terms=4"),)),
        stages=(
            Stage(
                name="policy",
                objective=Objective.POLICY_GRADIENT,
                steps=300,
                batch_size=32,
                sequence_length=17,
                loops=3,
                learning_rate=1e-4,
                warmup_steps=10,
                policy=PolicyConfig(credit=Credit.ACTION, answers=8, max_new_tokens=4, loop_cost=0.1),
            ),
        ),
        optimizer=OptimizerConfig(weight_decay=0.0),
        start=StartConfig(model=True),
        checkpoint=CheckpointConfig(every=100, keep=2),
        evaluation=EvaluationConfig(every=100, sequences=64),
        log_every=1,
    )


def grpo() -> Recipe:
    """GRPO (arXiv 2402.03300) at four loops for Ouro-1.4B, with the settings of RLTT.

    Start it from a Hugging Face folder. Answers are judged by what they put in a box.
    """
    return _printed("grpo", grpo.__doc__ or "", presets.ouro_1_4b(), Credit.TOKEN)


def rltt() -> Recipe:
    """RLTT (arXiv 2602.10520) for Ouro-2.6B: all four loops of an answer are rewarded.

    Start it from a Hugging Face folder. Answers are judged by what they put in a box.
    """
    return _printed("rltt", rltt.__doc__ or "", presets.ouro_2_6b(), Credit.TRAJECTORY)


def _printed(name: str, description: str, model: ModelConfig, credit: Credit) -> Recipe:
    """Returns a recipe with the settings of RLTT."""
    policy = PolicyConfig(
        credit=credit,
        exits="loops=4",
        answers=8,
        max_new_tokens=2048,
        slots=256,
        reward=Reward.BOXED,
        kl_weight=1e-3,
        # Rollout and replay multiply in bfloat16, in another order.
        gap_tolerance=0.3,
    )
    return Recipe(
        name=name,
        description=description,
        model=model,
        stages=(Stage(name="policy", policy=policy, **_PRINTED),),  # type: ignore[arg-type]
        optimizer=_OPTIMIZER,
        start=StartConfig(model=True),
        mesh=MeshConfig(data=1, fsdp=-1),
        evaluation=EvaluationConfig(every=20, sequences=64),
        checkpoint=CheckpointConfig(every=20),
        log_every=1,
    )
