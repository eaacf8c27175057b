"""Counts of findings and the report of decontamination."""

import json

from cleaning_cases import evaluation
from hypothesis import given
from hypothesis import strategies as st

from looplm_jax.corpus import DecontaminationReport, Findings, Match, Overlap

MATCHES = st.builds(
    Match,
    file=st.sampled_from(["a.jsonl", "b.txt"]),
    line=st.integers(1, 9),
    words=st.integers(8, 99),
    share=st.sampled_from([0.1, 0.5, 1.0]),
    excerpt=st.text("xyz ", max_size=9),
)
OVERLAPS = st.none() | st.lists(MATCHES, min_size=1, max_size=3).map(lambda matches: Overlap(tuple(matches)))
DOCUMENTS = st.lists(st.tuples(st.sampled_from(["books", "web"]), OVERLAPS), max_size=60)


def _found(documents: list[tuple[int, tuple[str, Overlap | None]]]) -> Findings:
    findings = Findings()
    for number, (source, overlap) in documents:
        findings.add(source, f"{source}:{number}", overlap)
    return findings


@given(DOCUMENTS, st.integers(1, 5), st.randoms())
def test_findings_do_not_depend_on_parts_and_their_order(documents, parts, random):
    numbered = list(enumerate(documents))
    whole = _found(numbered).to_json()
    pieces = [_found(numbered[part::parts]) for part in range(parts)]
    random.shuffle(pieces)
    merged = Findings()
    for piece in pieces:
        merged.merge(Findings.from_json(json.loads(json.dumps(piece.to_json()))))
    assert merged.to_json() == whole


def test_the_report_counts_items_and_documents_and_shows_the_longest(tmp_path):
    items = [" ".join(f"w{i}_{j}" for j in range(20)) for i in range(4)]
    ngrams = evaluation(tmp_path, *items, "too short")
    findings = Findings()
    texts = {
        "books": [items[0], "nothing here", f"{items[0]} {items[1][:70]}"],
        "web": [items[2][:100], "also | clean"],
    }
    for source, documents in texts.items():
        for line, text in enumerate(documents, start=1):
            findings.add(source, f"{source}.jsonl:{line}", ngrams.overlap(text))
    report = DecontaminationReport.of(ngrams.n, ngrams.files, findings)
    [file] = report.to_json()["files"]
    assert file == {
        "file": str(tmp_path / "evaluation.jsonl"),
        "items": 5,
        "too_short": 1,
        "found": 3,
        "half": 3,
        "whole": 1,
    }
    assert json.loads(json.dumps(report.to_json()))["sources"] == [
        {"source": "books", "documents": 3, "dropped": 2},
        {"source": "web", "documents": 2, "dropped": 1},
    ]
    lines = report.to_markdown().splitlines()
    assert f"| {tmp_path}/evaluation.jsonl | 5 | 1 | 3 | 3 | 1 |" in lines
    assert "| books | 3 | 2 |" in lines
    [first, *_] = [line for line in lines if ".jsonl:1 | books" in line]
    assert first.startswith(f"| 40 | 100% | {tmp_path}/evaluation.jsonl:1 | books.jsonl:1 | w0 0 w0 1")


def test_a_report_of_clean_data_has_no_longest_matches(tmp_path):
    ngrams, findings = evaluation(tmp_path, " ".join(f"word{i}" for i in range(9))), Findings()
    findings.add("web", "web.txt:1", ngrams.overlap("clean"))
    text = DecontaminationReport.of(13, ngrams.files, findings).to_markdown()
    assert "13 words in a row" in text
    assert "Longest" not in text
