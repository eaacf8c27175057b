"""The flags of every command. This module does not import JAX, so that `--help` is fast."""

import argparse
from pathlib import Path

from looplm_jax.codec import leaves
from looplm_jax.config import DataConfig, NormPlacement, OnBadRecord, ReadLimits, Reward, SourceConfig
from looplm_jax.errors import UserError
from looplm_jax.inference._cache_strategy import CacheStrategy
from looplm_jax.recipes import RECIPES, Scale, named_recipe

# A copy of choices that are defined in a module which imports JAX.
_DTYPES = ("float32", "bfloat16")
_CACHES = "{full,last,average,first,ring(K)}"

_EXIT_RULES = """\
exit rules, each optionally with bounds on loops, as in kl=1e-3,min=2,max=6:
  loops=4        a fixed number of loops
  q=0.5          the gate: the first loop where the probability of having left reaches q
  hidden=0.03    the state changed by less than this
  relative=0.03  likewise, as a share of its size
  state=0.03     likewise, before the coda (Huginn)
  cosine=1e-3    the direction of that state changed by less than this, as 1 - cosine
  kl=1e-3        the prediction changed by less than this, in nats; Huginn: kl=5e-4,reverse,from_uniform
  minp_kl=1e-5   likewise, without improbable tokens; Huginn: minp_kl=1e-5,from_uniform
  entropy=1e-3   its entropy changed by less than this, in nats
  stable=2       the likeliest token was that of the loop before, this many times in a row
  confidence=0.9 the likeliest token reached this probability
  margin=0.5     its probability exceeds that of the next one by this
  sampled        the loop is drawn from the exit distribution of the gate
"""


# Corpora and training


def configure_tokenize(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `looplm tokenize`."""
    parser.add_argument(
        "sources",
        nargs="*",
        metavar="SOURCE",
        help="a glob, a folder or an fsspec URL of .jsonl, .txt, .parquet, .arrayrecord, compressed or not; "
        "or huggingface:dataset,split=...",
    )

    # What a row is.
    parser.add_argument(
        "--tokenizer", metavar="PATH", help="a SentencePiece .model, a tokenizer.json or a Hugging Face folder"
    )
    parser.add_argument("--sequence-length", type=int, metavar="S", help="positions of a row")
    parser.add_argument("--out", required=True, metavar="FOLDER", help="a new folder, here or at gs://")
    parser.add_argument("--workers", type=int, metavar="N", help="processes (default: one for each core)")

    parser.add_argument(
        "--validation-fraction",
        type=float,
        metavar="F",
        default=DataConfig().validation_fraction,
        help="share of documents held out, chosen by a hash of their text (default: %(default)s)",
    )

    # How a record becomes text.
    parser.add_argument("--text-key", metavar="NAME", help="field or column that holds the text (default: text)")
    parser.add_argument("--chat", action="store_true", help="records are chats: only the assistant's turns are learned")
    parser.add_argument(
        "--messages-key", metavar="NAME", help="field or column that holds the messages of a chat (default: messages)"
    )
    parser.add_argument(
        "--special-tokens",
        action="store_true",
        help="names of special tokens in the text, such as <|im_end|>, become these tokens (default: they are text)",
    )

    parser.add_argument(
        "--on-bad-record",
        choices=[choice.value for choice in OnBadRecord],
        default=OnBadRecord.STOP.value,
        help="what a record that cannot be read does (default: %(default)s)",
    )

    # What is left out.
    parser.add_argument(
        "--decontaminate",
        action="append",
        metavar="FILES",
        default=[],
        help="evaluation items, one a line of .jsonl or .txt: documents that hold words of theirs are left out; may "
        "be repeated",
    )
    parser.add_argument(
        "--ngram", type=int, metavar="N", default=13, help="how many words in a row (default: %(default)s)"
    )
    parser.add_argument(
        "--near-duplicates",
        type=float,
        metavar="SIMILARITY",
        default=0.0,
        help="leave out documents that are so much like an earlier one, 0.8 for example (default: keep all)",
    )

    # The same flags and help texts as the fields of a recipe.
    for leaf in leaves(ReadLimits()):
        parser.add_argument(
            f"--data.limits.{leaf.path}",
            type=int,
            metavar="N",
            default=leaf.value,
            dest=f"limit_{leaf.path}",
            help=f"{leaf.help} (default: %(default)s)",
        )

    parser.add_argument("--verify", action="store_true", help="read every shard again; without sources, do only that")


def configure_train(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `looplm train`; the fields of a recipe are listed below them."""
    names = ", ".join(RECIPES)

    # The recipe and its folder.
    parser.add_argument("--recipe", default="text-small", help=f"{names}, or a .json file (default: text-small)")
    parser.add_argument(
        "--out", help="run folder, or gs://bucket/folder (default: runs/<recipe>); one that holds this run is continued"
    )
    # What the recipe usually leaves open. These flags change several fields at once.
    parser.add_argument(
        "--data",
        action="append",
        metavar="PATH",
        help="files to train on: a glob, a folder or an fsspec URL of .txt, .jsonl(.gz, .zst), .parquet, .arrayrecord; "
        "huggingface:dataset,split=train; or a task such as mano:length=4,modulus=7; may be repeated",
    )
    parser.add_argument("--chat", action="store_true", help="the records of --data are chats, not texts")
    parser.add_argument(
        "--tokenizer", help="a SentencePiece .model or a tokenizer.json; default: train one on the data"
    )

    parser.add_argument(
        "--on-bad-record",
        choices=[choice.value for choice in OnBadRecord],
        help="what a record that cannot be read does (default: stop)",
    )
    parser.add_argument(
        "--scale",
        choices=[scale.value for scale in Scale],
        default=Scale.FULL.value,
        help="tiny: every stage of the recipe in a few steps, at a thousandth of the size (default: full)",
    )

    # How the run is watched.
    parser.add_argument(
        "--profile-steps", metavar="FIRST:LAST", help="trace these steps into the run folder, for the profiler's viewer"
    )
    parser.add_argument("--wandb", metavar="PROJECT", help="show the metrics in a project of Weights & Biases too")

    # The other processes of the run.
    parser.add_argument(
        "--distributed", action="store_true", help="find the other processes of a TPU pod or of a Slurm job"
    )
    parser.add_argument("--coordinator", metavar="HOST:PORT", help="where process 0 listens")
    parser.add_argument("--processes", type=int, metavar="N", help="how many processes there are")
    parser.add_argument("--process", type=int, metavar="I", help="which of them this is, from 0")

    parser.add_argument("--dry-run", action="store_true", help="print the recipe as JSON and stop")
    # `codec` parses the fields, not argparse.
    parser.epilog = "fields of the recipe (with the values of text-small):\n" + _field_list()


def _field_list() -> str:
    """Returns the list of recipe fields with their help texts."""
    fields = list(leaves(named_recipe("text-small")))
    width = max(len(leaf.path) for leaf in fields)
    return "\n".join(f"  --{leaf.path:{width}}  {leaf.help} ({_shown(leaf.value)})" for leaf in fields)


def _shown(value: object) -> str:
    """Returns a default value as text."""
    # Enums by value, as they are typed.
    value = getattr(value, "value", value)
    return "empty" if value in ("", ()) else str(value)


def configure_plan(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `looplm plan`."""
    parser.add_argument("recipe", help=f"{', '.join(RECIPES)}, or a .json file; with --decode also a checkpoint")
    parser.add_argument(
        "--topology", required=True, help="a slice, such as v5e:16x16 or v5p:4x8x8; or here: the attached devices"
    )
    parser.add_argument("--slices", type=int, help="how many such slices (default: 1)")
    parser.add_argument("--stage", action="append", metavar="NAME", help="only this stage; may be repeated")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything to this file too")

    # The search, which compiles many programs.
    parser.add_argument(
        "--search",
        action="store_true",
        help="try accumulation, remat, mesh, gathering and reduction; print the best choices",
    )
    parser.add_argument(
        "--write",
        type=Path,
        metavar="FILE",
        help="--search: write the recipe with the fastest choices, as settings for the topology, to this .json",
    )
    parser.add_argument(
        "--limit", type=int, help="--search: programs compiled for a stage, the most promising (default: 8)"
    )

    parser.add_argument(
        "--scale",
        choices=[scale.value for scale in Scale],
        default=Scale.FULL.value,
        help="tiny: every stage of the recipe at a thousandth of the size (default: full)",
    )

    decode = parser.add_argument_group("a tick of the engine")
    decode.add_argument("--decode", action="store_true", help="plan one tick of the engine instead of the train steps")
    decode.add_argument("--slots", type=int, metavar="N", help="requests at one time (default: 8)")
    decode.add_argument("--capacity", type=int, metavar="N", help="positions of the longest request (default: 2048)")
    decode.add_argument("--page-size", type=int, metavar="N", help="positions of a page of the cache (default: 128)")
    decode.add_argument(
        "--pages",
        type=int,
        metavar="N",
        help="pages that all slots share (default: as many as all need for the longest request)",
    )
    decode.add_argument("--filled", type=int, metavar="N", help="positions of each slot in use (default: half of them)")
    decode.add_argument(
        "--cache",
        type=_cache,
        metavar=_CACHES,
        help="loops whose keys and values are kept (default: full)",
    )
    decode.add_argument("--loops-mean", type=float, metavar="T", help="loops of a token on average, if some exit early")


# Evaluation and generation


def configure_evaluate(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `looplm evaluate`."""
    _add_checkpoint(parser)
    _add_step(parser)
    parser.add_argument("--max-loops", type=int, metavar="T", help="deepest loop (default: twice the trained depth)")
    parser.add_argument("--out", metavar="DIR", help="where to write (default: <run>/evaluation/step_N)")
    _add_dtype(parser)
    _add_held_out_data(parser.add_argument_group("held-out documents"))
    _add_tasks(parser.add_argument_group("tasks of lm-evaluation-harness"))
    _add_problems(parser.add_argument_group("problems"))
    parser.epilog = _EXIT_RULES


def _add_held_out_data(group: argparse._ArgumentGroup) -> None:
    """Adds the arguments about held-out documents."""
    group.add_argument("--sequences", type=int, metavar="N", help="held-out sequences (default: those of the recipe)")
    group.add_argument("--data", metavar="PATH", help="other files, a glob or a URL; their held-out documents are read")
    group.add_argument(
        "--validation-fraction", type=float, metavar="F", help="share of documents held out (default: the recipe's)"
    )
    group.add_argument(
        "--buckets",
        metavar="BASE",
        help="accuracy on easy, medium and hard tokens, by the entropy of this model's predictions after one loop",
    )


def _add_problems(group: argparse._ArgumentGroup) -> None:
    """Adds the arguments about problems."""
    group.add_argument(
        "--problems",
        metavar="PATH",
        help="answer the problems of .jsonl files, or those that a task holds out, such as addition:terms=4,digits=2",
    )
    group.add_argument(
        "--reward", choices=[reward.value for reward in Reward], help="judge of an answer (default: exact)"
    )
    group.add_argument("--max-new-tokens", type=int, metavar="N", help="of an answer (default: 128)")
    keys = SourceConfig(path="-")
    group.add_argument("--prompt-key", metavar="NAME", help=f"field with the prompt (default: {keys.prompt_key})")
    group.add_argument("--answer-key", metavar="NAME", help=f"field with the answer (default: {keys.answer_key})")
    group.add_argument("--template", metavar="TEXT", help=f"text around the prompt (default: {keys.template})")


def _add_tasks(group: argparse._ArgumentGroup) -> None:
    """Adds the arguments about tasks."""
    group.add_argument(
        "--tasks",
        metavar="A,B",
        help="tasks, groups or patterns with *; `lm_eval ls tasks` lists them, save looplm_smoke",
    )

    # Three ways to choose the depth, of which one can be given.
    depth = group.add_mutually_exclusive_group()
    depth.add_argument("--exit", metavar="RULE", help="see below (default: the trained depth)")
    depth.add_argument("--loops", type=int, metavar="N", help="the same as --exit loops=N")
    depth.add_argument(
        "--depth-sweep",
        action="store_true",
        # None tells a flag that was not given from its default, so that flags without effect can be refused.
        default=None,
        help="a score for each of the loops 1..T of --max-loops; log-likelihoods of all come from one forward pass, "
        "text is generated once for each",
    )

    # Which documents, and how they are put to the model.
    group.add_argument("--limit", type=int, metavar="N", help="only the first N documents of each task")
    group.add_argument("--num-fewshot", type=int, metavar="K", help="examples before each question")
    group.add_argument(
        "--include-path", metavar="DIR", help="a folder with YAML files of other tasks, whose code is run"
    )
    group.add_argument("--batch-size", type=int, metavar="N", help="requests at one time (default: 8)")
    group.add_argument(
        "--max-length", type=int, metavar="N", help="tokens that the model reads (default: all its positions)"
    )

    group.add_argument(
        "--add-bos-token", action="store_true", default=None, help="put a bos before every context (default: none)"
    )
    group.add_argument(
        "--special-tokens",
        action="store_true",
        default=None,
        help="names of special tokens in texts, such as <|im_end|>, become these tokens (default: they are text)",
    )


def configure_generate(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `looplm generate`."""
    _add_checkpoint(parser)

    prompt = parser.add_mutually_exclusive_group()
    prompt.add_argument(
        "--prompt", action="append", metavar="TEXT", help="text to continue; may be repeated, all are continued at once"
    )
    prompt.add_argument("--prompt-file", metavar="FILE", help="file with the text to continue (UTF-8)")

    parser.add_argument(
        "--special-tokens",
        action="store_true",
        help="names of special tokens in the prompt, such as <|im_end|>, become these tokens (default: they are text)",
    )
    parser.add_argument("--max-new-tokens", type=int, metavar="N", help="default: 128, or what the positions leave")

    parser.add_argument(
        "--samples",
        type=int,
        default=1,
        metavar="N",
        help="texts for each prompt, with different random keys (default: 1)",
    )
    parser.add_argument(
        "--index", type=int, default=0, metavar="I", help="draw for the first prompt as for prompt I of a longer list"
    )

    _add_generation(parser)
    parser.add_argument(
        "--revise", action="store_true", help="show each token as it stands after every loop, and revise it"
    )
    parser.add_argument(
        "--draft-loops",
        type=int,
        metavar="S",
        help="self-speculation: drafts by loop S, verified by the loops of --exit loops=T; the text is that of T",
    )
    parser.add_argument(
        "--drafts", type=int, default=4, metavar="K", help="drafts before they are verified (default: 4)"
    )
    parser.add_argument("--json", action="store_true", help="print a JSON object a prompt: text, tokens, exit loops")


def configure_chat(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `looplm chat`."""
    _add_checkpoint(parser)
    parser.add_argument("--system", metavar="TEXT", help="the system prompt")
    parser.add_argument("--max-new-tokens", type=int, default=512, metavar="N", help="of an answer (default: 512)")
    parser.add_argument(
        "--window", type=int, metavar="N", help="tokens of the whole chat (default: 4096, or the model's positions)"
    )
    _add_generation(parser)


def _add_generation(parser: argparse.ArgumentParser) -> None:
    """Adds the shared flags, and the list of exit rules as the epilog."""
    # Sampling.
    parser.add_argument("--temperature", type=float, default=0.0, help="0 (default): the most probable token")
    parser.add_argument("--top-k", type=int, default=0, metavar="K", help="draw from the K most probable; 0: all")
    parser.add_argument("--top-p", type=float, default=1.0, metavar="P", help="draw from the likeliest P; 1: all")
    parser.add_argument(
        "--min-p", type=float, default=0.0, metavar="P", help="draw from those P times as probable as the likeliest"
    )
    parser.add_argument(
        "--repetition-penalty", type=float, default=1.0, metavar="R", help="make tokens already there less likely"
    )

    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end before this; may be repeated")

    # Loops, and what they may cost.
    parser.add_argument("--exit", default="q=0.5", metavar="RULE", help="see below (default: q=0.5)")
    parser.add_argument(
        "--loops-per-token",
        type=float,
        default=float("inf"),
        metavar="N",
        help="on average never more than this after the first",
    )
    parser.add_argument(
        "--ms-per-token", type=float, default=float("inf"), metavar="MS", help="give up loops to keep to this time"
    )

    parser.add_argument(
        "--cache",
        type=_cache,
        metavar=_CACHES,
        default=CacheStrategy.FULL,
        help="loops whose keys and values are kept of a new token (default: full)",
    )

    _add_step(parser)
    _add_dtype(parser)
    parser.epilog = _EXIT_RULES


def _cache(name: str) -> CacheStrategy:
    try:
        return CacheStrategy(name)
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _add_checkpoint(parser: argparse.ArgumentParser) -> None:
    """Adds the checkpoint of a model."""
    parser.add_argument("checkpoint", help="a run folder, its checkpoints folder, one step, or a Hugging Face folder")


def _add_step(parser: argparse.ArgumentParser) -> None:
    """Adds `--step`."""
    parser.add_argument("--step", type=int, help="which step (default: the latest valid one)")


def _add_dtype(parser: argparse.ArgumentParser) -> None:
    """Adds `--dtype`."""
    parser.add_argument(
        "--dtype",
        choices=(*_DTYPES, "float16"),
        help="of the parameters (default: as stored on a CPU, elsewhere that of the matrix products)",
    )


# Checkpoints


def configure_inspect(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `looplm inspect`."""
    parser.add_argument("checkpoint", help="a run folder, its checkpoints folder, one step, or a prepared corpus")
    parser.add_argument("--step", type=int, help="only this step")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def configure_convert(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `looplm convert`, with one subcommand per direction."""
    # argparse does not require a subcommand by default: `direction` is then None.
    directions = parser.add_subparsers(
        title="directions", metavar="DIRECTION", dest="direction", parser_class=type(parser)
    )

    def direction(name: str, text: str) -> argparse.ArgumentParser:
        description = f"{text[0].upper()}{text[1:]}."
        return directions.add_parser(name, help=text, description=description, allow_abbrev=False)

    _add_from_hf(direction("from-hf", "a Hugging Face folder of an Ouro or a Huginn becomes a checkpoint"))
    _add_to_hf(direction("to-hf", "a checkpoint becomes a Hugging Face folder"))
    _add_upcycle(direction("upcycle", "a checkpoint with every layer copied"))
    _add_from_dense(direction("from-dense", "a Llama-layout model becomes the start of a loop"))


def _add_from_hf(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `looplm convert from-hf`."""
    parser.add_argument("folder", type=Path, help="config.json, safetensors and tokenizer.json of an Ouro model")
    _add_out(parser)
    parser.add_argument("--dtype", choices=_DTYPES, help="of the parameters (default: as in the files)")


def _add_to_hf(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `looplm convert to-hf`."""
    _add_saved_checkpoint(parser)
    _add_step(parser)
    _add_out(parser)
    parser.add_argument("--dtype", choices=_DTYPES, help="of the weights (default: as in the checkpoint)")
    parser.add_argument("--max-shard-size", default="5GB", metavar="SIZE", help="500MB, 5GB, ... (default: 5GB)")


def _add_upcycle(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `looplm convert upcycle`."""
    _add_saved_checkpoint(parser)
    _add_out(parser)
    parser.add_argument(
        "--layers", type=int, required=True, metavar="N", help="a multiple of the layers that are there"
    )

    parser.add_argument(
        "--order",
        choices=("interleave", "stack"),
        default="stack",
        help="0 0 1 1 ... or 0 1 ... 0 1 ...; see docs/upcycling.md (default: stack)",
    )


def _add_from_dense(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `looplm convert from-dense`."""
    parser.add_argument("folder", type=Path, help="config.json, safetensors and tokenizer.json of a Llama-layout model")
    _add_out(parser)
    parser.add_argument("--loops", type=int, default=4, metavar="T", help="loops of the looped model (default: 4)")

    parser.add_argument(
        "--norms",
        choices=[NormPlacement.PRE.value, NormPlacement.SANDWICH.value],
        default=NormPlacement.PRE.value,
        help="pre: loop 1 is the dense model; sandwich: as in Ouro, which training must win back (default: pre)",
    )
    parser.add_argument(
        "--second-norm",
        type=float,
        default=1.0,
        metavar="W",
        help="sandwich: first weight of the norms after the branches; see docs/dense_start.md (default: 1)",
    )

    parser.add_argument("--dtype", choices=_DTYPES, help="of the parameters (default: as in the files)")
    parser.add_argument("--seed", type=int, default=0, help="of the gate (default: 0)")


def _add_saved_checkpoint(parser: argparse.ArgumentParser) -> None:
    """Adds a checkpoint of this library, which is not a Hugging Face folder."""
    parser.add_argument("checkpoint", help="a run folder, its checkpoints folder, or one step; any fsspec URL")


def _add_out(parser: argparse.ArgumentParser) -> None:
    """Adds the folder to write."""
    parser.add_argument("out", type=Path, help="folder to write; must be empty, or not there yet")
