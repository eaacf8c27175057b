"""The training pipeline of Ouro (arXiv 2510.25741, section 4), all stages at full size.

    looplm train --recipe ouro-1.4b --data.root gs://mine/corpora/{length} --out gs://mine/ouro-1.4b
    looplm convert upcycle gs://mine/ouro-1.4b/checkpoints/STEP mine/ouro-48 --layers 48    # the end of pretrain-2
    looplm train --recipe ouro-2.6b --data.root gs://mine/corpora/{length} --start.checkpoint mine/ouro-48

Here, `looplm tokenize` has written `gs://mine/corpora/4096/nemotron-cc` from that source for sequences of 4,096 tokens.
With text instead of prepared data, one folder serves the lengths of all stages: `--data.root gs://mine/corpora`.

The paper does not print the following values, which are ours: the steps of warm-up (2,000), the point in the first
stage at which the batch doubles (half-way), AdamW's epsilon (1e-8), the length and rate of Stage II, and the tokens of
an example of the fine-tuning.
"""

import dataclasses

from looplm_jax.config import (
    CheckpointConfig,
    ComputeConfig,
    DataConfig,
    EvaluationConfig,
    Gather,
    MeshConfig,
    ModelConfig,
    Objective,
    Recipe,
    RecordKind,
    Reduce,
    Remat,
    Schedule,
    SourceConfig,
    Stage,
    TopologySettings,
)
from looplm_jax.models import presets

_M = 2**20
_B, _T = 10**9, 10**12

# In percent of the tokens.
# Stage 1.
_PRETRAIN = {
    "nemotron-cc": 73.4,
    "map-cc": 13.0,
    "ultra-fineweb-zh": 2.0,
    "opencoder-pretrain": 7.5,
    "megamath-web": 4.1,
}
# Stage 2.
_ANNEAL = {
    "nemotron-cc-hq": 66.5,
    "nemotron-cc-math-v1": 15.0,
    "megamath-hq": 4.6,
    "opc-annealing": 0.5,
    "nemotron-code": 3.8,
    "sft-code": 3.4,
    "sft-general": 6.2,
}
# Stages 3 and 4, and the fine-tuning.
_LONG = {"prolong-64k": 100.0}
_MID_TRAIN = (("sft-mix", 90), (_PRETRAIN, 30), (_ANNEAL, 180))  # billions of tokens
_THINKING = {"thinking-math": 3500, "thinking-code": 3200, "thinking-science": 808, "thinking-chat": 767}  # thousands


# The gradient of all parameters fits in the memory of a v5e for the smaller model, but not for the larger one.
_ONCE_A_STEP = ComputeConfig(gather=Gather.PER_STEP, reduce=Reduce.STEP)
_IN_EVERY_LOOP = ComputeConfig(gather=Gather.PER_STEP, reduce=Reduce.LOOP)

# What stages of Ouro-1.4B can save for the backward pass in the memory of a topology, according to `looplm plan`.
_SAVED_1_4B = {
    "pretrain-1": {"v6e:16x16": Remat.SAVE_QKV, "v5p:4x8x8": Remat.DOTS},
    "pretrain-3": {"v5e:16x16": Remat.SAVE_OUTPUTS},
}


def ouro_1_4b_recipe() -> Recipe:
    """Ouro-1.4B: 24 layers, trained from scratch on 7.7T tokens, then Stage II for the gate."""
    stages = tuple(_with_saved(stage) for stage in (*_first_stages(), *_later_stages()))
    return _recipe("ouro-1.4b", ouro_1_4b_recipe.__doc__, presets.ouro_1_4b(), stages, _ONCE_A_STEP)


def ouro_2_6b_recipe() -> Recipe:
    """Ouro-2.6B: 48 layers. Start it from Ouro-1.4B at the end of `pretrain-2`, with its 24 layers doubled."""
    return _recipe("ouro-2.6b", ouro_2_6b_recipe.__doc__, presets.ouro_2_6b(), _later_stages(), _IN_EVERY_LOOP)


def ouro_1_4b_thinking_recipe() -> Recipe:
    """Ouro-1.4B-Thinking: fine-tuning on 8.3M chats. Start it from `ouro-1.4b`."""
    stages = (_fine_tuning(),)
    return _recipe("ouro-1.4b-thinking", ouro_1_4b_thinking_recipe.__doc__, presets.ouro_1_4b(), stages, _ONCE_A_STEP)


def ouro_2_6b_thinking_recipe() -> Recipe:
    """Ouro-2.6B-Thinking: fine-tuning on 8.3M chats. Start it from `ouro-2.6b`."""
    stages = (_fine_tuning(),)
    return _recipe("ouro-2.6b-thinking", ouro_2_6b_thinking_recipe.__doc__, presets.ouro_2_6b(), stages, _IN_EVERY_LOOP)


def _with_saved(stage: Stage) -> Stage:
    """Returns a stage of Ouro-1.4B with its settings for topologies of 256 chips."""
    settings = tuple(
        TopologySettings(
            topology=topology,
            accumulation=stage.accumulation,
            mesh=MeshConfig(data=1, fsdp=256),
            compute=dataclasses.replace(_ONCE_A_STEP, remat=remat),
        )
        for topology, remat in _SAVED_1_4B.get(stage.name, {}).items()
    )
    return dataclasses.replace(stage, settings=settings)


def _recipe(
    name: str, description: str | None, model: ModelConfig, stages: tuple[Stage, ...], compute: ComputeConfig
) -> Recipe:
    return Recipe(
        name=name,
        description=description or "",
        # The base of the first stage; later stages raise it with their sequences.
        model=dataclasses.replace(model, rope_theta=1e4 if name == "ouro-1.4b" else 1e6),
        stages=stages,
        # Parameters and optimizer state are sharded over all devices: on one v5e they would not fit.
        mesh=MeshConfig(data=1, fsdp=-1),
        compute=compute,
        data=DataConfig(sources=_mixture(_PRETRAIN), validation_fraction=1e-5),
        # At most a thousand steps are lost.
        checkpoint=CheckpointConfig(every=1000, keep=3),
        evaluation=EvaluationConfig(every=5000, sequences=512),
    )


def _first_stages() -> tuple[Stage, ...]:
    """Returns Stage 1a with eight loops. Its batch doubles half-way, hence two stages."""
    first = _stage(
        "pretrain-1",
        tokens=3 * _T // 2,
        batch=4 * _M,
        length=4096,
        loops=8,
        beta=0.1,
        learning_rate=3e-4,
        warmup_steps=2000,
        rope_theta=1e4,
        mixture=_PRETRAIN,
    )
    second = _stage(
        "pretrain-2",
        tokens=3 * _T // 2,
        batch=8 * _M,
        length=4096,
        loops=8,
        beta=0.1,
        learning_rate=3e-4,
        rope_theta=1e4,
        mixture=_PRETRAIN,
    )
    return first, second


def _later_stages() -> tuple[Stage, ...]:
    """Returns Stages 1b to 4, which both sizes run after the fork, and Stage II."""
    return (
        # Stage 1b: four loops from here on, because eight were unstable at this scale.
        _stage(
            "pretrain-3",
            tokens=3 * _T,
            batch=8 * _M,
            length=4096,
            learning_rate=3e-4,
            rope_theta=1e4,
            mixture=_PRETRAIN,
        ),
        # Stage 2: better data, sequences four times as long, and a decay to a tenth of the rate.
        _stage(
            "anneal",
            tokens=14 * _T // 10,
            batch=8 * _M,
            length=16384,
            context=2,
            learning_rate=3e-4,
            schedule=Schedule.COSINE,
            final_learning_rate=3e-5,
            rope_theta=4e4,
            mixture=_ANNEAL,
        ),
        # Stage 3: the longest sequences, which eight devices share.
        _stage(
            "long-context",
            tokens=20 * _B,
            batch=8 * _M,
            length=65536,
            context=8,
            learning_rate=3e-5,
            rope_theta=1e6,
            mixture=_LONG,
        ),
        # Stage 4: the mixtures of the stages before, and instructions.
        _stage(
            "mid-train",
            tokens=300 * _B,
            batch=8 * _M,
            length=32768,
            context=4,
            learning_rate=3e-5,
            schedule=Schedule.COSINE,
            final_learning_rate=1e-5,
            rope_theta=1e6,
            mixture=_mid_train_mixture(),
        ),
        # Stage II: the gate alone, on the loss of each loop.
        _stage(
            "gate",
            objective=Objective.GATE,
            tokens=2 * _B,
            batch=_M,
            length=4096,
            learning_rate=1e-3,
            schedule=Schedule.COSINE,
            warmup_steps=100,
            mixture=_ANNEAL,
        ),
    )


def _fine_tuning() -> Stage:
    """Returns the fine-tuning: two epochs of 8.3M chats. Their mean length of 4,096 tokens is our assumption."""
    return _stage(
        "sft",
        tokens=2 * 8_300_000 * 4096,
        batch=8 * _M,
        length=32768,
        context=4,
        learning_rate=2e-5,
        schedule=Schedule.COSINE,
        mixture=_THINKING,
        kind=RecordKind.CHAT,
    )


def _stage(
    name: str,
    *,
    tokens: int,
    batch: int,
    length: int,
    mixture: dict[str, float] | dict[str, int],
    kind: RecordKind = RecordKind.TEXT,
    context: int = 1,
    **settings: object,
) -> Stage:
    """Returns a stage of `tokens` tokens, in batches of `batch` tokens.

    In each microbatch, 256 devices have one sequence each, or `context` of them share a sequence that is too long for
    the memory of a v5e.
    """
    # The paper gives batches in tokens.
    sequences = batch // length
    return Stage(
        name=name,
        steps=max(tokens // batch, 1),
        batch_size=sequences,
        sequence_length=length,
        accumulation=max(sequences * context // 256, 1),
        context=0 if context == 1 else context,
        sources=_mixture(mixture, kind),
        **settings,  # type: ignore[arg-type]
    )


def _mixture(
    weights: dict[str, float] | dict[str, int], kind: RecordKind = RecordKind.TEXT
) -> tuple[SourceConfig, ...]:
    """Returns sources that are folders in `data.root`, with their weights."""
    return tuple(SourceConfig(path=name, weight=weight, kind=kind) for name, weight in weights.items())


def _mid_train_mixture() -> dict[str, float]:
    """Returns the mixture of mid-training, which contains the mixtures of earlier stages."""
    weights: dict[str, float] = {}
    for mixture, amount in _MID_TRAIN:
        sources = {mixture: 100.0} if isinstance(mixture, str) else mixture
        # Percentages do not add up to exactly 100.
        total = sum(sources.values())
        weights |= {name: amount * weight / total for name, weight in sources.items()}
    return weights
