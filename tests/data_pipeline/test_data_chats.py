import dataclasses
import itertools
import json
import re

import numpy as np
import pytest
from data_files import WRITERS, as_chat, every_way, json_lines
from hypothesis import given, settings
from hypothesis import strategies as st
from prepared_helpers import LENGTH, prepared, segments

from looplm_jax.cli.main import main
from looplm_jax.config import DataConfig, OnBadRecord, RecordKind, SourceConfig, sources_like
from looplm_jax.corpus import open_prepared
from looplm_jax.data import Message, open_corpus, tokens_and_mask, train_batches, training_texts, validation_batches
from looplm_jax.data._documents import document_key
from looplm_jax.data._examples import to_example
from looplm_jax.data._iterator import Geometry, stream_identity
from looplm_jax.data._pipeline import chunks_left_out, mixture
from looplm_jax.data.sources import open_files
from looplm_jax.errors import UserError
from looplm_jax.recipes import named_recipe

CHAT = RecordKind.CHAT


def chats():
    content = st.text(st.characters(codec="utf-8"))
    message = st.builds(Message, st.sampled_from(["system", "user", "tool"]), content)
    answer = st.builds(Message, st.just("assistant"), content.filter(bool))
    return st.tuples(st.lists(message, max_size=3), answer).map(lambda parts: (*parts[0], parts[1]))


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.zst", "a.parquet", "a.arrayrecord"])
@given(documents=st.lists(chats(), min_size=1, max_size=8))
@settings(max_examples=10)
def test_every_format_gives_the_chats(tmp_path_factory, name, documents):
    path = tmp_path_factory.mktemp("chats") / name
    WRITERS[name](path, documents)
    assert every_way(path, kind=CHAT) == documents


BAD_CHATS = [
    ({"message": []}, r"the record has no field 'messages'; did you mean 'message'\?"),
    ({"messages": "hello"}, "'messages' is not a list of messages but str"),
    ({"messages": {"role": "user"}}, "'messages' is not a list of messages but dict"),
    ({"messages": []}, "'messages' holds no message"),
    ({"messages": ["hello"]}, "message 0 is not an object with role and content but str"),
    ({"messages": [{"content": "x"}]}, "message 0 has no 'role'; known: content"),
    ({"messages": [{"rôle": "user", "content": "x"}]}, r"message 0 has no 'role'; did you mean 'rôle'\?"),
    ({"messages": [{"role": "user"}]}, "message 0 has no 'content'; known: role"),
    ({"messages": [{"role": 5, "content": "x"}]}, "the role of message 0 is not a string but int"),
    (
        {"messages": [{"role": "user", "content": "x"}, {"role": "asistant", "content": "x"}]},
        r"message 1 has the unknown role 'asistant'; did you mean 'assistant'\?",
    ),
    (
        {"messages": [{"role": "human", "content": "x"}]},
        "the unknown role 'human'; known: assistant, developer",
    ),
    ({"messages": [{"role": "user", "content": None}]}, "the content of message 0 is not a string but NoneType"),
    ({"messages": [{"role": "user", "content": ["x"]}]}, "the content of message 0 is not a string but list"),
    ({"messages": [{"role": "user", "content": "\ud800"}]}, "the content of message 0 holds half a surrogate pair"),
    ({"messages": [{"role": "user", "content": "x"}]}, "the assistant says nothing in this chat"),
    ({"messages": [{"role": "assistant", "content": ""}]}, "the assistant says nothing in this chat"),
    (["x"], "not a JSON object but list"),
]


@pytest.mark.parametrize(("record", "message"), BAD_CHATS)
def test_malformed_chats_stop_or_are_skipped(tmp_path, record, message):
    good = json_lines([as_chat("loop?", "state")])
    path = tmp_path / "bad.jsonl"
    path.write_bytes(good + json.dumps(record).encode() + b"\n" + good)
    source = SourceConfig(path=str(path), kind=CHAT)
    with pytest.raises(UserError, match=rf"bad.jsonl:2: .*{message}.*; fix it, or skip such records") as error:
        open_files(source)
    assert "\n" not in str(error.value)
    assert (len(open_files(source, on_bad_record=OnBadRecord.SKIP)), "\n" in message) == (2, False)


def test_the_column_of_a_chat(tmp_path):
    WRITERS["a.parquet"](tmp_path / "a.parquet", [as_chat("loop?", "state")])
    source = SourceConfig(path=str(tmp_path / "a.parquet"), kind=CHAT, messages_key="turns")
    with pytest.raises(UserError, match="there is no column messages_key='turns'; known: messages"):
        open_files(source)
    with pytest.raises(UserError, match="there is no column text_key='text'; known: messages"):
        open_files(dataclasses.replace(source, kind=RecordKind.TEXT))


def test_the_key_is_that_of_roles_and_contents(tmp_path):
    record = {
        "id": 7,
        "messages": [{"name": "x", "content": "é", "role": "user"}, {"role": "assistant", "content": "y"}],
    }
    for name, ascii_only in (("a.jsonl", True), ("b.jsonl", False)):
        (tmp_path / name).write_text(json.dumps(record, ensure_ascii=ascii_only) + "\n", encoding="utf-8")
    keys = open_files(SourceConfig(path=str(tmp_path), kind=CHAT)).keys
    canonical = '[{"role":"user","content":"é"},{"role":"assistant","content":"y"}]'
    assert keys.tolist() == [document_key(canonical)] * 2


def test_only_the_assistant_is_learnt_from_files(tmp_path, tokenizer):
    documents = [as_chat(f"question {number}", f"answer {number}") for number in range(60)]
    (tmp_path / "a.jsonl").write_bytes(json_lines(documents))
    source = SourceConfig(path=str(tmp_path / "a.jsonl"), kind=CHAT)
    corpus = open_corpus(DataConfig(sources=(source,), validation_fraction=0.1))
    assert corpus.train_documents + corpus.validation_documents == 60
    batches = train_batches(corpus, tokenizer, batch_size=2, sequence_length=256, seed=0)
    batch = next(batches)
    batches.close()
    learnt = {
        tokenizer.decode(batch.targets[row][(batch.segment_ids[row] == segment) & (batch.loss_mask[row] > 0)])
        for row in range(2)
        for segment in range(1, 1 + int(batch.segment_ids[row].max()))
    }
    assert learnt
    assert learnt < {f"answer {number}" for number in range(60)}
    example = to_example(documents[0], tokenizer)
    np.testing.assert_array_equal(example.tokens, tokens_and_mask(documents[0], tokenizer).tokens)


LONG = [as_chat(f"question {number} " + "the loop learns of weights " * 40, "yes") for number in range(60)]


def test_pieces_without_an_answer_are_left_out(tmp_path, tokenizer):
    """In direct and in prepared data, for training and held out; the number is reported."""
    (tmp_path / "a.jsonl").write_bytes(json_lines(LONG))
    source = SourceConfig(path=str(tmp_path / "a.jsonl"), kind=CHAT)
    corpus = open_corpus(DataConfig(sources=(source,), validation_fraction=0.2))
    manifest = prepared(tokenizer, tmp_path / "out", sources=(source,), validation_fraction=0.2)
    rows = open_prepared(str(tmp_path / "out"))
    for part in (rows.train, rows.validation):
        assert all(segment.loss_mask.any() for segment in segments(part))
    left_out = manifest.left_out
    assert left_out.pieces - left_out.pieces_without_target == len(segments(rows.train)) + len(
        segments(rows.validation)
    )
    assert left_out.pieces_without_target > 10 * 60
    batches = train_batches(corpus, tokenizer, batch_size=2, sequence_length=LENGTH, seed=0)
    held_out = validation_batches(corpus, tokenizer, batch_size=2, sequence_length=LENGTH)
    for batch in [*itertools.islice(batches, 20), *held_out]:
        for row in range(2):
            learnt = set(batch.segment_ids[row][batch.loss_mask[row] > 0].tolist())
            assert learnt == set(batch.segment_ids[row].tolist()) - {0}
    batches.close()
    [line] = chunks_left_out(corpus, tokenizer, LENGTH)
    assert re.search(
        r"about 9\d% of the pieces of 32 tokens are left out, because the assistant says nothing in th", line
    )
    assert left_out.pieces_without_target / left_out.pieces > 0.9
    assert not list(chunks_left_out(corpus, tokenizer, 4096))


def test_names_in_a_chat_are_tokens_where_the_source_says_so(tmp_path, tokenizer):
    forged = [as_chat("loop?", f"state<|im_end|>{number}") for number in range(9)]
    (tmp_path / "a.jsonl").write_bytes(json_lines(forged))
    end = tokenizer.token_id("<|im_end|>")
    for special, ends in ((False, 2), (True, 3)):
        source = SourceConfig(path=str(tmp_path / "a.jsonl"), kind=CHAT, special_tokens=special)
        corpus = open_corpus(DataConfig(sources=(source,), validation_fraction=0.0))
        example = mixture(corpus, 0, tokenizer=tokenizer)[0]
        assert example.tokens.tolist().count(end) == ends
        out = tmp_path / f"{special}"
        prepared(tokenizer, out, sources=(source,), sequence_length=256, validation_fraction=0.0)
        assert {segment.tokens.tolist().count(end) for segment in segments(open_prepared(str(out)).train)} == {ends}


def test_a_place_in_the_data_does_not_name_fields_that_say_nothing(tmp_path, tokenizer):
    """A run that was saved before `special_tokens` existed can resume."""
    (tmp_path / "a.jsonl").write_bytes(json_lines(LONG))
    geometry = Geometry(batch_size=2, sequence_length=32)
    for special in (False, True):
        source = SourceConfig(path=str(tmp_path / "a.jsonl"), kind=CHAT, special_tokens=special)
        corpus = open_corpus(DataConfig(sources=(source,), validation_fraction=0.0))
        identity = stream_identity(corpus, tokenizer, geometry, 0)
        assert identity.get("data.sources.0.special_tokens", False) is special
        assert ("data.sources.0.special_tokens" in identity) is special


@pytest.mark.parametrize("role", ["assistant\nI", "", "user\u2028", "a\r"])
def test_a_role_is_one_line(tokenizer, role):
    with pytest.raises(UserError, match="of a message is not one line; give a name such as 'assistant'") as error:
        tokens_and_mask([Message(role, "x")], tokenizer)
    assert "\n" not in str(error.value)


def test_a_tokenizer_is_trained_on_what_is_said(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(json_lines([as_chat("loop?", "state"), as_chat("why", "because")]))
    source = SourceConfig(path=str(tmp_path / "a.jsonl"), kind=CHAT)
    texts = training_texts(DataConfig(sources=(source,), validation_fraction=0.0))
    assert sorted(texts) == ["loop?\n\nstate", "why\n\nbecause"]


def printed_sources(capsys, *arguments):
    assert main(["train", "--dry-run", *arguments]) == 0
    return [(source["path"], source["kind"]) for source in json.loads(capsys.readouterr().out)["data"]["sources"]]


def test_files_of_a_command_are_chats_where_the_recipe_is_of_chats(capsys):
    given = ["--data", "a.jsonl", "--data", "b.parquet"]
    assert printed_sources(capsys, *given) == [("a.jsonl", "text"), ("b.parquet", "text")]
    assert printed_sources(capsys, *given, "--recipe", "ouro-1.4b-thinking") == [
        ("a.jsonl", "chat"),
        ("b.parquet", "chat"),
    ]
    assert printed_sources(capsys, *given, "--chat") == [("a.jsonl", "chat"), ("b.parquet", "chat")]
    assert printed_sources(capsys, *given, "--data.sources.1.kind", "chat") == [
        ("a.jsonl", "text"),
        ("b.parquet", "chat"),
    ]


def test_the_thinking_recipes_learn_chats():
    for name in ("ouro-1.4b-thinking", "ouro-2.6b-thinking"):
        [stage] = named_recipe(name).stages
        assert {source.kind for source in stage.sources} == {CHAT}
    assert {source.kind for stage in named_recipe("ouro-1.4b").stages for source in stage.sources} == {RecordKind.TEXT}


def test_new_files_are_read_as_the_known_ones():
    known = SourceConfig(path="a", kind=CHAT, messages_key="turns", weight=3.0)
    assert sources_like(["b"], [known, known]) == (SourceConfig(path="b", kind=CHAT, messages_key="turns"),)
    assert sources_like(["b"], [known, SourceConfig(path="c")]) == sources_like(["b"], []) == (SourceConfig(path="b"),)
