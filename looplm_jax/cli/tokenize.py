"""Prepare a corpus: convert documents to rows of tokens, which training reads in random order, also from a bucket.

    looplm tokenize 'mine/*.jsonl' --tokenizer tokenizer.model --sequence-length 4096 --out prepared
    looplm train --data prepared --stage.sequence_length 4096

The same command resumes a run that stopped for any reason, with any number of workers.
"""

import argparse

from looplm_jax.codec import leaves
from looplm_jax.config import DataConfig, OnBadRecord, ReadLimits, RecordKind, SourceConfig
from looplm_jax.errors import UserError
from looplm_jax.printing import complain


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `looplm tokenize`."""
    parser.add_argument(
        "sources",
        nargs="*",
        metavar="SOURCE",
        help="a glob, a folder or an fsspec URL of .jsonl, .txt, .parquet, .arrayrecord, compressed or not; "
        "or huggingface:dataset,split=...",
    )

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

    parser.add_argument("--text-key", metavar="NAME", help="field or column that holds the text (default: text)")
    parser.add_argument("--chat", action="store_true", help="records are chats: only the assistant's turns are learnt")
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


def run(arguments: argparse.Namespace) -> int:
    """Prepares or verifies a corpus, and prints what was written and which command to run next.

    Returns the exit status.
    """
    from looplm_jax.cli.tokenize_session import prepare_corpus, verify_corpus
    from looplm_jax.data.prepared.plan import Order
    from looplm_jax.data.tokenizers import load_tokenizer

    if arguments.sources:
        _check(arguments)
        order = Order(
            sources=_sources(arguments),
            tokenizer=load_tokenizer(arguments.tokenizer, warn=complain),
            sequence_length=arguments.sequence_length,
            validation_fraction=arguments.validation_fraction,
            on_bad_record=OnBadRecord(arguments.on_bad_record),
            decontaminate=tuple(arguments.decontaminate),
            ngram=arguments.ngram,
            near_duplicates=arguments.near_duplicates,
            limits=ReadLimits(**{leaf.path: getattr(arguments, f"limit_{leaf.path}") for leaf in leaves(ReadLimits())}),
        )
        status = prepare_corpus(order, arguments.out, arguments.workers)
        if status or not arguments.verify:
            return status
    elif not arguments.verify:
        raise UserError("there is nothing to prepare; name files, for example looplm tokenize 'mine/*.jsonl'")

    return verify_corpus(arguments.out)


def _check(arguments: argparse.Namespace) -> None:
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
    keys = {"text_key": arguments.text_key, "messages_key": arguments.messages_key}
    given = {name: value for name, value in keys.items() if value}
    kind = RecordKind.CHAT if arguments.chat else RecordKind.TEXT
    return tuple(
        SourceConfig(path=path, kind=kind, special_tokens=arguments.special_tokens, **given)
        for path in arguments.sources
    )
