"""The model card of an exported folder: what the model is, how it was trained, and how to run it.

The card holds only facts from the checkpoint and from the run folder around it.
"""

import dataclasses
import importlib.metadata
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from etils import epath

from looplm_jax.checkpoints import Restored
from looplm_jax.checkpoints._restore import find_steps
from looplm_jax.config import ModelConfig, Objective, OptimizerConfig, OptimizerKind, Recipe, Stage
from looplm_jax.convert._huginn_config import is_huginn
from looplm_jax.json_io import metrics_row, numbers
from looplm_jax.models._looplm import count_params
from looplm_jax.terminal import markdown_table

# No license: only the owner of the weights can choose one.
_HEAD = """\
---
library_name: transformers
pipeline_tag: text-generation
tags:
- {family}
- looped
- looplm_jax
- custom_code
---
"""
_ABOUT = (
    "A looped language model (Ouro, arXiv 2510.25741): one stack of layers is applied several times with the same "
    "weights, every loop can predict the next token, and a gate says after which loop to stop.\n"
)
_ABOUT_HUGINN = (
    "A looped language model (Huginn, arXiv 2502.05171): after a prelude, one stack of layers is applied several times "
    "with the same weights, and a coda reads the result.\n"
)
_USE = """\
## Use

With transformers 4.57 or 5; the folder holds its own PyTorch model:

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(FOLDER, trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)
batch = tokenizer(["Once"], return_tensors="pt")
out = model(**batch, loops={loops}, output_hidden_states=True)  # `loops` may differ from call to call
out.hidden_states      # the states after each loop
out.exit_probabilities # of each loop, for each token
model(**batch, exit_loop=1).logits         # at a fixed loop
model(**batch, exit_threshold=0.5).logits  # at the first loop whose cumulative exit probability reaches 0.5
model(**batch, exit_weighted=True).logits  # the mean over all loops, by their exit probabilities
```

The weights as a plain PyTorch state dict, without transformers:

```python
import looplm_jax
from looplm_jax.convert import to_torch_state_dict

loaded = looplm_jax.load(FOLDER)
state = to_torch_state_dict(loaded.params, loaded.model.config)
```

And in JAX: `looplm_jax.load(FOLDER)`, or `looplm convert from-hf FOLDER OUT` for a checkpoint that can be trained on.
"""

_USE_HUGINN = """\
## Use

With transformers 4.57 or 5; the folder holds its own PyTorch model:

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(FOLDER, trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)
batch = tokenizer(["Once"], return_tensors="pt")
model.generate(**batch, num_steps={loops})  # the loops, which may differ from call to call
model(**batch, init_scale=1.0).logits  # from noise of the published size; by default states start at zero
```

In JAX: `looplm_jax.load(FOLDER)`, or `looplm convert from-hf FOLDER OUT` for a checkpoint that can be trained on.

Tensors and fields of `config.json` have the names of Huginn's published code (arXiv 2502.05171).
"""

_LARGEST_EXPONENT = 700.0  # the largest exponent of a perplexity; math.exp overflows above about 709


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingRecord:
    """The facts known about a model: its recipe, the step it reached, and its last losses on held-out text."""

    recipe: Recipe
    step: int
    evaluation: Mapping[str, Any] | None  # the last evaluation row of `metrics.jsonl` up to `step`


# The record and the card


def training_record(checkpoint: str, restored: Restored) -> TrainingRecord:
    """Returns the record of the step restored from `checkpoint`, with metrics if it is in a run folder."""
    # The user may have named the run folder, its `checkpoints`, or one step.
    steps = find_steps(checkpoint, restored.step)[0].path.parent
    run = steps.parent if steps.name == "checkpoints" else steps
    # Later rows are of a run that was continued after this step.
    evaluations = [row for row in _metrics(run) if row.get("kind") == "evaluation" and row["step"] <= restored.step]
    return TrainingRecord(
        recipe=restored.metadata.recipe(),
        step=restored.step,
        evaluation=evaluations[-1] if evaluations else None,
    )


def model_card(record: TrainingRecord, *, dtype: str) -> str:
    """Returns the text of `README.md` for weights in `dtype`."""
    recipe = record.recipe
    huginn = is_huginn(recipe.model)
    parts = [
        f"# {_line(recipe.name)}\n\n{_line(recipe.description)}".rstrip() + "\n",
        _shape(recipe.model, dtype),
        _training(record),
        _evaluation(record),
        _versions(),
        (_USE_HUGINN if huginn else _USE).format(loops=recipe.model.loops),
    ]
    return _HEAD.format(family="huginn" if huginn else "ouro") + "\n" + "\n".join(part for part in parts if part)


# Sections


def _shape(model: ModelConfig, dtype: str) -> str:
    """Returns the table of the model's sizes."""
    rows = [
        ("parameters", f"{count_params(model):,} ({dtype})"),
        ("layers in the shared stack", model.num_layers),
        ("loops", model.loops),
        ("width, feed-forward width", f"{model.width}, {model.mlp_width}"),
        ("query heads, key/value heads, head width", f"{model.num_heads}, {model.kv_heads}, {model.head_width}"),
        ("vocabulary", f"{model.vocab_size:,}{', head tied to the embedding' if model.tied_head else ''}"),
        ("longest sequence", f"{model.max_positions:,} (rotary base {model.rope_theta:g})"),
    ]

    about = _ABOUT_HUGINN if is_huginn(model) else _ABOUT
    return f"{about}\n{markdown_table(('', ''), rows)}"


def _training(record: TrainingRecord) -> str:
    """Returns the section about the training."""
    recipe = record.recipe
    parts = ["## Training\n"]
    if recipe.start.checkpoint:
        parts.append(f"Began with the parameters of `{_line(recipe.start.checkpoint)}`.\n")

    done = _steps_done(recipe.stages, record.step)
    if not any(done):
        return "\n".join([*parts, "No training step is recorded in this checkpoint.\n"])

    columns = ("stage", "steps", "batch", "sequence length", "tokens", "loops", "objective", "learning rate")
    rows = [_stage_row(stage, steps) for stage, steps in zip(recipe.stages, done, strict=True) if steps]

    optimizer = (
        f"{_optimizer(recipe.optimizer)}, weight decay {recipe.optimizer.weight_decay:g}, "
        f"gradients clipped to a global norm of {recipe.optimizer.clip_norm:g}; seed {recipe.seed}.\n"
    )

    return "\n".join([*parts, markdown_table(columns, rows), optimizer, _data(recipe)])


def _optimizer(optimizer: OptimizerConfig) -> str:
    """Returns the optimizer and what is specific to it."""
    adamw = f"AdamW, b1 {optimizer.b1:g}, b2 {optimizer.b2:g}"
    match optimizer.kind:
        case OptimizerKind.ADAMW:
            return adamw
        case OptimizerKind.ADAFACTOR:
            return f"Adafactor, decay exponent {optimizer.decay_exponent:g}"
        case OptimizerKind.MUON:
            return f"Muon for the matrices of the shared stack, momentum {optimizer.momentum:g}; for the rest {adamw}"


def _steps_done(stages: Sequence[Stage], step: int) -> list[int]:
    """Returns how many steps of each stage a run at `step` has completed."""
    done = []
    for stage in stages:
        # Stages run one after another.
        done.append(min(stage.steps, step))
        step -= done[-1]
    return done


def _stage_row(stage: Stage, steps: int) -> tuple[Any, ...]:
    """Returns the row of one stage in the table of stages."""
    of_all = "" if steps == stage.steps else f" of {stage.steps:,}"
    tokens = steps * stage.batch_size * stage.sequence_length

    if stage.objective is Objective.GATE:
        objective = (
            f"gate (Eq. 5, 6), {stage.gate_target.value}, k {stage.gain_slope:g}, gamma {stage.gain_threshold:g}"
        )
    elif stage.objective is Objective.LAST_LOSS:
        objective = "loss after the last loop"
    elif stage.objective is Objective.PONDER:
        objective = f"loss of the mixed state (ACT), ponder weight {stage.ponder_weight:g}"
    elif stage.objective is Objective.LOOPRPT:
        objective = f"LoopRPT (arXiv 2603.19714), {stage.looprpt.rollouts} rollouts"
    elif stage.objective is Objective.POLICY_GRADIENT:
        objective = f"policy gradient, credit {stage.policy.credit.value}, {stage.policy.answers} answers per prompt"
    else:
        objective = f"expected loss (Eq. 4), beta {stage.beta:g}, {stage.prior.kind.value} prior"

    rate = f"{stage.learning_rate:g}, {stage.schedule.value}, {stage.warmup_steps} warm-up steps"
    return (
        stage.name,
        f"{steps:,}{of_all}",
        stage.batch_size,
        stage.sequence_length,
        f"{tokens:,}",
        stage.loops_text,
        objective,
        rate,
    )


def _data(recipe: Recipe) -> str:
    if not recipe.data.sources:
        return ""
    rows = [(f"`{source.path}`", f"{source.weight:g}") for source in recipe.data.sources]
    held_out = f"{100 * recipe.data.validation_fraction:g} % of the documents were held out.\n"
    return f"{markdown_table(('data', 'weight'), rows)}\n{held_out}"


def _evaluation(record: TrainingRecord) -> str:
    """Returns the section with the losses on held-out text, or an empty string if none were recorded."""
    if record.evaluation is None:
        return ""
    losses = numbers(record.evaluation.get("loss_per_loop"))

    # A diverged run has losses whose exponential overflows.
    perplexities = [math.exp(min(loss, _LARGEST_EXPONENT)) for loss in losses]
    rows = [
        (loop, f"{loss:.4f}", f"{perplexity:.2f}")
        for loop, (loss, perplexity) in enumerate(zip(losses, perplexities, strict=True), start=1)
    ]

    table = markdown_table(("loop", "loss (nats/token)", "perplexity"), rows)
    return f"## Held-out text, at step {record.evaluation['step']:,}\n\n{table}"


def _versions() -> str:
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("looplm_jax", "jax"))
    return f"Written by {versions}.\n"


# Metrics and text


def _metrics(run: epath.Path) -> Iterator[dict[str, Any]]:
    """Returns the rows of `metrics.jsonl`; damaged lines are skipped."""
    path = run / "metrics.jsonl"
    rows = map(metrics_row, path.read_bytes().split(b"\n") if path.exists() else ())
    return (row for row in rows if row is not None)


def _line(text: str) -> str:
    return " ".join(text.split())
