"""Recipes for a laptop, and variations of recipes without loops."""

import dataclasses

from looplm_jax.config import (
    CheckpointConfig,
    DataConfig,
    DepthConfig,
    EvaluationConfig,
    ModelConfig,
    Objective,
    Recipe,
    RecordKind,
    Schedule,
    SourceConfig,
    Stage,
    StartConfig,
)
from looplm_jax.models import presets


def text_small() -> Recipe:
    """Your own text on a laptop: 5.3M parameters, Stage I on 8M tokens, then Stage II for the gate."""
    return Recipe(
        name="text-small",
        description=text_small.__doc__ or "",
        model=presets.small(vocab_size=4096),
        stages=(
            Stage(
                name="pretrain",
                # 8M tokens.
                steps=4000,
                batch_size=8,
                sequence_length=256,
                learning_rate=1e-3,
                schedule=Schedule.WARMUP_STABLE_DECAY,
                warmup_steps=100,
                decay_steps=800,
                final_learning_rate=1e-4,
            ),
            _gate_stage(steps=400, batch_size=8, sequence_length=256),
        ),
        evaluation=EvaluationConfig(every=500, sequences=128),
    )


def demo() -> Recipe:
    """The demonstration: one layer looped four times, trained on the source of Python's standard library.

    It takes minutes on two cores. It has one layer because the benefit of loops is largest where there is least depth
    without them.
    """
    return Recipe(
        name="demo",
        description="The main job in minutes on two cores: one layer looped four times.",
        model=ModelConfig(
            vocab_size=2048,
            width=192,
            mlp_width=512,
            num_layers=1,
            num_heads=4,
            rope_theta=1e4,
            max_positions=1024,
        ),
        # More than usual, because the standard library has few documents.
        data=DataConfig(validation_fraction=0.05),
        stages=(
            Stage(
                name="pretrain",
                steps=3000,
                batch_size=4,
                sequence_length=128,
                beta=0.1,  # the paper's value for its first stage
                learning_rate=1.5e-3,
                schedule=Schedule.WARMUP_STABLE_DECAY,
                warmup_steps=40,
                decay_steps=1000,
                final_learning_rate=1.5e-4,
            ),
            _gate_stage(steps=200, batch_size=8, sequence_length=128),
        ),
        checkpoint=CheckpointConfig(every=500, keep=2),
        evaluation=EvaluationConfig(every=1000, sequences=256),
    )


def demo_one_loop() -> Recipe:
    """The layers of `demo` applied once: the same parameters and tokens, no loops."""
    return dataclasses.replace(without_loops(demo()), name="demo-one-loop", description=demo_one_loop.__doc__ or "")


def sft() -> Recipe:
    """Supervised fine-tuning of any model on chats. Start it from a run folder or a Hugging Face folder.

    The model, its number of loops and its tokenizer are those of the checkpoint. Only the answers are learned.
    """
    return Recipe(
        name="sft",
        description="Supervised fine-tuning on chats; start it from a checkpoint.",
        model=presets.small(),  # replaced by that of the checkpoint
        stages=(
            Stage(
                name="sft",
                steps=400,
                batch_size=8,
                sequence_length=1024,
                learning_rate=2e-5,  # the paper's
                schedule=Schedule.COSINE,
                warmup_steps=20,
            ),
        ),
        data=DataConfig(sources=(SourceConfig(path="chats.jsonl", kind=RecordKind.CHAT),), validation_fraction=0.05),
        start=StartConfig(model=True, chat_tokens=True),
        evaluation=EvaluationConfig(every=100, sequences=64),
    )


def mano_small() -> Recipe:
    """Mano, modular arithmetic in prefix notation (paper, section 6.2), at a size for a laptop.

    The examples are generated, so it needs no data.
    """
    return Recipe(
        name="mano-small",
        description=mano_small.__doc__ or "",
        model=ModelConfig(
            vocab_size=16,  # modulus 7, lengths 1..4, three operators and the marks
            width=128,
            mlp_width=352,
            num_layers=2,
            num_heads=4,
            rope_theta=1e4,
            max_positions=1024,
        ),
        data=DataConfig(sources=(SourceConfig(path="mano:length=4,modulus=7"),)),
        stages=(
            Stage(
                name="pretrain",
                steps=2000,
                batch_size=16,
                sequence_length=256,
                learning_rate=1e-3,
                schedule=Schedule.COSINE,
                warmup_steps=100,
                final_learning_rate=1e-4,
            ),
        ),
        evaluation=EvaluationConfig(every=500, sequences=64),
    )


def without_loops(recipe: Recipe) -> Recipe:
    """Returns the recipe with one loop: the same parameters and data, and only the pre-training stages."""
    # Without loops there is no gate to train.
    stages = tuple(
        dataclasses.replace(stage, loops=1, min_loops=0, depth=DepthConfig(), backprop_loops=0)
        for stage in recipe.stages
        if stage.objective is not Objective.GATE
    )
    model = dataclasses.replace(recipe.model, loops=1)

    return dataclasses.replace(recipe, name=f"{recipe.name}-1-loop", model=model, stages=stages)


def _gate_stage(*, steps: int, batch_size: int, sequence_length: int) -> Stage:
    """Returns Stage II. The paper does not print its learning rate and length; these are ours."""
    return Stage(
        name="gate",
        objective=Objective.GATE,
        steps=steps,
        batch_size=batch_size,
        sequence_length=sequence_length,
        learning_rate=1e-2,
        schedule=Schedule.COSINE,
        warmup_steps=min(20, steps // 5),
    )
