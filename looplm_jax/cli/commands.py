"""The commands of `looplm`: what each one checks before JAX is imported, and the module that then runs it.

The docstring of a `run_*` function is the description that `looplm COMMAND --help` shows.
"""

import argparse
import dataclasses
import json
from pathlib import Path

from looplm_jax import codec
from looplm_jax.cli._common import chosen_recipe, from_flags, recipe_or_checkpoint, with_overrides
from looplm_jax.config import (
    DataConfig,
    Objective,
    OnBadRecord,
    ReadLimits,
    Recipe,
    RecordKind,
    SourceConfig,
    sources_like,
)
from looplm_jax.errors import UserError
from looplm_jax.files import any_path, read_text
from looplm_jax.terminal import print_error

# Flags that have no effect on the other kind of plan are refused, because a user expects them to do something.
_PLAN_FLAGS = ("search", "limit", "write", "slices", "stage")
_DECODE_PLAN_FLAGS = ("slots", "capacity", "page_size", "pages", "filled", "cache", "loops_mean")

# Likewise for the kinds of evaluation.
_HELD_OUT_FLAGS = ("sequences", "data", "validation_fraction", "buckets")
_EXIT_FLAGS = ("exit", "loops", "depth_sweep", "limit")  # of tasks and of problems
_TASK_FLAGS = ("num_fewshot", "include_path", "batch_size", "max_length", "add_bos_token", "special_tokens")
_PROBLEM_FLAGS = ("reward", "max_new_tokens", "prompt_key", "answer_key", "template")
_COUNTS = ("max_loops", "sequences", "limit", "batch_size", "max_new_tokens")


# looplm tokenize


def run_tokenize(arguments: argparse.Namespace) -> int:
    """Prepare a corpus: convert documents to rows of tokens, which training reads in random order, also from a bucket.

        looplm tokenize 'mine/*.jsonl' --tokenizer tokenizer.model --sequence-length 4096 --out prepared
        looplm train --data prepared --stage.sequence_length 4096

    The same command resumes a run that stopped for any reason, with any number of workers.
    """
    # Imported here, as in every command: `--help` and mistakes in flags must not wait for these imports.
    from looplm_jax.cli.tokenize import prepare_corpus, verify_corpus
    from looplm_jax.corpus._work_units import PrepareConfig
    from looplm_jax.data.tokenizers import load_tokenizer

    if arguments.sources:
        _check_tokenize(arguments)
        order = PrepareConfig(
            sources=_sources(arguments),
            tokenizer=load_tokenizer(arguments.tokenizer, warn=print_error),
            sequence_length=arguments.sequence_length,
            validation_fraction=arguments.validation_fraction,
            on_bad_record=OnBadRecord(arguments.on_bad_record),
            decontaminate=tuple(arguments.decontaminate),
            ngram=arguments.ngram,
            near_duplicates=arguments.near_duplicates,
            limits=_limits(arguments),
        )
        status = prepare_corpus(order, arguments.out, arguments.workers)
        if status or not arguments.verify:
            return status
    elif not arguments.verify:
        raise UserError("there is nothing to prepare; name files, for example looplm tokenize 'mine/*.jsonl'")

    return verify_corpus(arguments.out)


def _check_tokenize(arguments: argparse.Namespace) -> None:
    """Raises UserError for missing or invalid arguments."""
    if not arguments.tokenizer:
        raise UserError(
            "say which tokenizer: --tokenizer PATH, a SentencePiece .model, a tokenizer.json or a Hugging Face folder"
        )
    if arguments.sequence_length is None:
        raise UserError("say how long a row is: --sequence-length S, that of the stages it is for")
    if arguments.workers is not None and arguments.workers < 1:
        raise UserError(f"--workers must be at least 1, not {arguments.workers}")


def _sources(arguments: argparse.Namespace) -> tuple[SourceConfig, ...]:
    """Returns the source configurations."""
    # Fields that were not given keep the defaults of SourceConfig.
    keys = {"text_key": arguments.text_key, "messages_key": arguments.messages_key}
    given = {name: value for name, value in keys.items() if value}
    kind = RecordKind.CHAT if arguments.chat else RecordKind.TEXT
    return tuple(
        SourceConfig(path=path, kind=kind, special_tokens=arguments.special_tokens, **given)
        for path in arguments.sources
    )


def _limits(arguments: argparse.Namespace) -> ReadLimits:
    """Returns the limits of what is read."""
    return ReadLimits(**{leaf.path: getattr(arguments, f"limit_{leaf.path}") for leaf in codec.leaves(ReadLimits())})


# looplm train


def run_train(arguments: argparse.Namespace) -> int:
    """Train a looped language model through the stages of a recipe.

        looplm train --recipe text-small --data 'mine/*.jsonl'

    Any field of the recipe is a flag: `--model.width 128`, `--stages.pretrain.steps 500`, `--stage.beta 0.1` (of every
    stage). The same command resumes a run that stopped.

    On many hosts, run the same command on each: with --distributed on a TPU pod or under Slurm, elsewhere with
    --coordinator, --processes and --process. Without these flags a run is one process.
    """
    # Complete before JAX is imported, so that mistakes in it are reported immediately.
    recipe = _train_recipe(arguments)
    if arguments.dry_run:
        print(json.dumps(codec.to_dict(recipe), indent=2))
        return 0

    # Stages without their own sources use those of the recipe.
    if not all(recipe.data_of(stage).sources for stage in recipe.stages):
        raise UserError("there is nothing to train on; say --data 'mine/*.jsonl' (.txt, .jsonl, .parquet, or a folder)")

    from looplm_jax.cli.train import TrainOptions, run_training
    from looplm_jax.distributed import JoinOptions
    from looplm_jax.training._profiling import ProfiledSteps

    options = TrainOptions(
        given=frozenset(codec.parse_flags(arguments.overrides)),
        join_options=JoinOptions(
            automatic=arguments.distributed,
            coordinator=arguments.coordinator,
            processes=arguments.processes,
            process=arguments.process,
        ),
        profile=ProfiledSteps.parse(arguments.profile_steps) if arguments.profile_steps else None,
        wandb_project=arguments.wandb,
    )
    return run_training(recipe, any_path(arguments.out or _default_folder(recipe)), options)


def _default_folder(recipe: Recipe) -> str:
    """Returns the default run folder. Raises UserError if the recipe's name would lead out of `runs`."""
    if recipe.name in ("", ".", "..") or "/" in recipe.name or "\0" in recipe.name:
        raise UserError(f"the recipe's name {recipe.name!r} is not that of a folder; say --out, or set another --name")
    return f"runs/{recipe.name}"


def _train_recipe(arguments: argparse.Namespace) -> Recipe:
    """Returns the recipe with the changes of the arguments."""
    recipe = chosen_recipe(arguments.recipe, arguments.scale)
    recipe = dataclasses.replace(recipe, data=_train_data(recipe, arguments))
    if arguments.data:
        # `--data` replaces the sources of all stages.
        recipe = dataclasses.replace(
            recipe, stages=tuple(dataclasses.replace(stage, sources=()) for stage in recipe.stages)
        )
    return with_overrides(recipe, arguments.overrides, arguments.flags, "train")


def _train_data(recipe: Recipe, arguments: argparse.Namespace) -> DataConfig:
    """Returns the data configuration with the changes of the arguments."""
    changes: dict[str, object] = {}
    if arguments.data:
        # Files of --data are read like the recipe's own sources, if these agree on kind and keys.
        known = (source for stage in recipe.stages for source in recipe.data_of(stage).sources)
        sources = sources_like(arguments.data, known)
        changes["sources"] = tuple(map(_as_chats, sources)) if arguments.chat else sources
        if any(stage.objective is Objective.POLICY_GRADIENT for stage in recipe.stages):
            changes["sources"] = tuple(dataclasses.replace(source, kind=RecordKind.PROBLEM) for source in sources)

    if arguments.tokenizer:
        changes["tokenizer"] = arguments.tokenizer
    if arguments.on_bad_record:
        changes["on_bad_record"] = OnBadRecord(arguments.on_bad_record)
    return dataclasses.replace(recipe.data, **changes)  # type: ignore[arg-type]


def _as_chats(source: SourceConfig) -> SourceConfig:
    """Returns the source with records that are chats."""
    return dataclasses.replace(source, kind=RecordKind.CHAT)


# looplm plan


def run_plan(arguments: argparse.Namespace) -> int:
    """Compile the train step of each stage of a recipe for a TPU slice that need not exist here, and report its cost.

    With --decode: compile a tick of the engine, which generates text, instead of the train steps.

        looplm plan ouro-1.4b --topology v5e:16x16
        looplm plan ouro-1.4b --topology v5p:8x8x8 --slices 2 --stage long-context --json plan.json
        looplm plan ouro-1.4b --decode --topology v5e:1x1 --slots 8 --capacity 2048 --loops-mean 2.3

    Reports whether it fits, bytes by kind, what devices send each other, and a lower bound of the time; if it does not
    fit, what to change. Needs neither a TPU nor a network. Fields of the recipe are flags, as in `looplm train`.
    """
    _refuse_without_effect(arguments)
    if arguments.decode:
        return _run_decode_plan(arguments)

    recipe = chosen_recipe(arguments.recipe, arguments.scale)
    recipe = with_overrides(recipe, arguments.overrides, arguments.flags, "plan")
    from looplm_jax.cli.plan import PlanOptions, plan_stages

    return plan_stages(
        PlanOptions(
            recipe=recipe,
            typed=arguments.recipe,
            given=frozenset(codec.parse_flags(arguments.overrides)),
            topology=arguments.topology,
            slices=1 if arguments.slices is None else arguments.slices,
            stages=tuple(arguments.stage or ()),
            out=arguments.json,
            search=arguments.search,
            limit=8 if arguments.limit is None else arguments.limit,
            write=arguments.write,
        )
    )


def _run_decode_plan(arguments: argparse.Namespace) -> int:
    """Plans a tick of the engine."""
    recipe = recipe_or_checkpoint(arguments.recipe, arguments.scale)
    recipe = with_overrides(recipe, arguments.overrides, arguments.flags, "plan")
    from looplm_jax.cli.plan import plan_tick
    from looplm_jax.planning._decode_plan import DecodeRequest

    # Only what was given, so that the defaults stay in one place, `DecodeRequest`.
    given = {
        name: getattr(arguments, name) for name in ("slots", "page_size", "pages", "filled", "cache", "loops_mean")
    }
    given["capacity"] = arguments.capacity
    if arguments.capacity is None:
        # The default must fit models with fewer positions.
        given["capacity"] = min(DecodeRequest.capacity, recipe.model.max_positions)

    request = DecodeRequest(**{name: value for name, value in given.items() if value is not None})
    return plan_tick(recipe, request, typed=arguments.recipe, topology=arguments.topology, out=arguments.json)


def _refuse_without_effect(arguments: argparse.Namespace) -> None:
    """Raises UserError for a flag of the other kind of plan."""
    if arguments.write is not None and not arguments.search and not arguments.decode:
        raise UserError("--write has no effect without --search; add --search")

    unused = _PLAN_FLAGS if arguments.decode else _DECODE_PLAN_FLAGS
    named = [name for name in unused if getattr(arguments, name) not in (None, False)]
    if named:
        remedy = "leave one of them out" if arguments.decode else "add --decode"
        preposition = "with" if arguments.decode else "without"
        raise UserError(f"{_flag(named[0])} has no effect {preposition} --decode; {remedy}")

    if arguments.decode:
        for path in codec.parse_flags(arguments.overrides):
            # Fields of training have no effect on a tick.
            if "." in path and not path.startswith("model.") and path != "compute.dtype":
                raise UserError(f"--{path} has no effect with --decode; only --model.* and --compute.dtype do")


# looplm evaluate


def run_evaluate(arguments: argparse.Namespace) -> int:
    """Measure loss and accuracy at every depth, and loss against mean loops; or run tasks, or answer problems.

        looplm evaluate runs/text-small
        looplm evaluate runs/text-small --buckets runs/base
        looplm evaluate runs/text-small --tasks arc_easy,wikitext --exit q=0.5
        looplm evaluate runs/text-small --tasks looplm_smoke --depth-sweep
        looplm evaluate runs/math --problems test.jsonl --reward boxed --exit sampled

    Reads the held-out documents of the checkpoint's own data, or of other files. Tasks download their own data, except
    looplm_smoke, whose data is included; they need pip install 'looplm_jax[eval]'.
    """
    for name in _COUNTS:
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise UserError(f"{_flag(name)} must be at least 1, not {value}")
    if arguments.num_fewshot is not None and arguments.num_fewshot < 0:
        raise UserError(f"--num-fewshot must not be negative, not {arguments.num_fewshot}")

    # Checked before the import of the evaluation, which takes seconds.
    if arguments.problems is None:
        _refuse(arguments, _PROBLEM_FLAGS, "is for problems: give --problems too")
    elif arguments.tasks is not None:
        raise UserError("--tasks and --problems are two evaluations; leave one out")
    if arguments.tasks is None:
        _refuse(arguments, _TASK_FLAGS, "is for tasks: give --tasks too")
    if arguments.tasks is None and arguments.problems is None:
        _refuse(arguments, _EXIT_FLAGS, "is for tasks: give --tasks too")
        from looplm_jax.cli.evaluate import HeldOutOptions, evaluate_held_out_documents

        return evaluate_held_out_documents(from_flags(HeldOutOptions, arguments))

    kind = "--tasks" if arguments.problems is None else "--problems"
    _refuse(arguments, _HELD_OUT_FLAGS, f"is for held-out documents: leave it or {kind} out")
    if arguments.max_loops is not None and not arguments.depth_sweep:
        raise UserError("--max-loops is for --depth-sweep here; use --loops for a fixed number of loops")
    if arguments.problems is not None:
        from looplm_jax.cli.problems import ProblemOptions, evaluate_problems

        return evaluate_problems(from_flags(ProblemOptions, arguments))

    from looplm_jax.cli.evaluate import TaskOptions, evaluate_tasks

    return evaluate_tasks(from_flags(TaskOptions, arguments))


def _refuse(arguments: argparse.Namespace, names: tuple[str, ...], why: str) -> None:
    """Raises UserError for the first of the arguments that is set."""
    for name in names:
        if getattr(arguments, name) is not None:
            raise UserError(f"{_flag(name)} {why}")


def _flag(name: str) -> str:
    """Returns the flag of an argument."""
    return f"--{name.replace('_', '-')}"


# looplm generate, chat, inspect and convert


def run_generate(arguments: argparse.Namespace) -> int:
    """Continue a prompt, with as many loops as each token needs.

        looplm generate runs/text-small --prompt 'def main(' --exit q=0.5

    On a terminal, the color of the text shows how many loops it used. Ctrl-C stops generation and keeps the text so
    far.
    """
    # Without a prompt the text is empty, which is refused with a hint.
    texts = [read_text(Path(arguments.prompt_file))] if arguments.prompt_file else arguments.prompt or [""]
    if not all(texts):
        raise UserError("the prompt is empty; give --prompt TEXT or --prompt-file FILE")

    from looplm_jax.cli.generate import GenerateOptions, generate_texts, speculate_texts

    run = generate_texts if arguments.draft_loops is None else speculate_texts
    return run(texts, from_flags(GenerateOptions, arguments))


def run_chat(arguments: argparse.Namespace) -> int:
    """Chat with a model that supports ChatML, and see how many loops its tokens used.

        looplm chat runs/ouro --system 'Be brief.' --exit q=0.5

    The cache is kept between turns, so only the new tokens of each turn are processed. Lines come from the terminal, or
    from a pipe until it ends. Ctrl-C stops an answer. A line that starts with a slash is a command; /help lists them.
    """
    from looplm_jax.cli.chat import ChatOptions, chat_with_model

    return chat_with_model(from_flags(ChatOptions, arguments))


def run_inspect(arguments: argparse.Namespace) -> int:
    """Show the contents of a checkpoint, and check whether it is valid: all steps are checked against their digests.

    For a prepared corpus: how many rows it has, from which sources, and what was left out.

        looplm inspect runs/text-small
    """
    from looplm_jax.cli.inspect import show_contents

    return show_contents(arguments.checkpoint, step=arguments.step, as_json=arguments.json)


def run_convert(arguments: argparse.Namespace) -> int:
    """Convert weights: Hugging Face folders, deeper stacks, dense models.

    looplm convert from-hf Ouro-1.4B runs/ouro                  # a Hugging Face folder becomes a checkpoint
    looplm convert to-hf runs/text-small exported               # and back, with a working PyTorch model
    looplm convert upcycle runs/ouro runs/deep --layers 48      # every layer twice
    looplm convert from-dense SmolLM2-135M runs/looped          # a Llama becomes the start of a looped model
    """
    if arguments.direction is None:
        raise UserError(
            "say which way: looplm convert from-hf, to-hf, upcycle or from-dense; see `looplm convert --help`"
        )

    from looplm_jax.cli.convert import DIRECTIONS

    DIRECTIONS[arguments.direction](arguments)
    return 0
