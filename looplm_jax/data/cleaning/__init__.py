"""Cleaning of training data: removal of evaluation items (decontamination) and of near-duplicates."""

from looplm_jax.data.cleaning.decontamination_report import DecontaminationReport
from looplm_jax.data.cleaning.duplicates_report import DocumentPlace, DuplicatesReport
from looplm_jax.data.cleaning.findings import Findings
from looplm_jax.data.cleaning.near_duplicates import Duplicates, NearDuplicates
from looplm_jax.data.cleaning.ngrams import EvaluationNgrams, Match, Overlap, load_evaluation_ngrams

__all__ = [
    "DecontaminationReport",
    "DocumentPlace",
    "Duplicates",
    "DuplicatesReport",
    "EvaluationNgrams",
    "Findings",
    "Match",
    "NearDuplicates",
    "Overlap",
    "load_evaluation_ngrams",
]
