"""Prepared corpora: documents that are cleaned, tokenized and packed once, into files that support random access.

`looplm tokenize` is `prepare` on the command line. It divides the input into units, which worker processes turn into
shards of packed sequences. The written bytes depend neither on the number of workers nor on interruptions. Nothing here
imports JAX, so that workers start fast. Parts of the cleaning are useful
on their own:

    >>> import pathlib, tempfile
    >>> from looplm_jax.corpus import load_evaluation_ngrams
    >>> path = pathlib.Path(tempfile.mkdtemp(), "items.txt")
    >>> _ = path.write_text("a train leaves the station at nine and arrives at noon")
    >>> ngrams = load_evaluation_ngrams([str(path)], n=8)
    >>> ngrams.overlap("As written: a train leaves the station at nine and arrives late.").matches[0].words
    9

Preparation:
  `PrepareConfig` describes what to prepare, `prepare` does it, and `Watcher` receives the progress. `is_prepared`
  recognizes a prepared corpus.

Reading:
  `open_prepared` returns a `PreparedCorpus`, with its `Manifest` and its sequences by index; `verify` checks every
  byte.

Decontamination:
  `load_evaluation_ngrams` returns `EvaluationNgrams`, whose method `overlap` finds evaluation items in a text, as an
  `Overlap` of several `Match`es. `Findings` collects them and `DecontaminationReport` summarizes them.

Near-duplicates:
  `NearDuplicates` computes signatures and finds `Duplicates`; `DuplicatesReport` summarizes them, with the
  `DocumentPlace` of each.
"""

from etils import epy

with epy.lazy_api_imports(globals()):
    # isort: off
    # Preparation.
    from looplm_jax.corpus._work_units import PrepareConfig
    from looplm_jax.corpus._prepare import Watcher, prepare

    # Reading.
    from looplm_jax.corpus._format import Manifest, is_prepared
    from looplm_jax.corpus._reader import PreparedCorpus, open_prepared, verify

    # Decontamination.
    from looplm_jax.corpus._decontamination import EvaluationNgrams, Findings, Match, Overlap, load_evaluation_ngrams
    from looplm_jax.corpus._reports import DecontaminationReport

    # Near-duplicates.
    from looplm_jax.corpus._near_duplicates import Duplicates, NearDuplicates
    from looplm_jax.corpus._reports import DocumentPlace, DuplicatesReport

__all__ = [
    "DecontaminationReport",
    "DocumentPlace",
    "Duplicates",
    "DuplicatesReport",
    "EvaluationNgrams",
    "Findings",
    "Manifest",
    "Match",
    "NearDuplicates",
    "Overlap",
    "PrepareConfig",
    "PreparedCorpus",
    "Watcher",
    "is_prepared",
    "load_evaluation_ngrams",
    "open_prepared",
    "prepare",
    "verify",
]
