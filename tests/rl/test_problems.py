"""Problems of files and of tasks: as questions for the engine, and as documents to train on."""

import json

import numpy as np
import pytest
from tiny_chat import TOKENIZER

from looplm_jax.config import DataConfig, RecordKind, SourceConfig
from looplm_jax.data import Message, Problem, open_corpus, train_batches
from looplm_jax.data._documents import document_key
from looplm_jax.data._examples import to_example
from looplm_jax.data.tasks import make_task
from looplm_jax.data.tasks._registry import TASKS
from looplm_jax.errors import UserError
from looplm_jax.rl import held_out_questions, to_question, training_questions
from looplm_jax.testing import tiny_tokenizer

SMALL = {"capo": "capo:people=20", "threehop": "threehop:people=30", "reachability": "reachability"}


def problems(path, **fields):
    return SourceConfig(path=str(path), kind=RecordKind.PROBLEM, **fields)


def written(folder, *records):
    path = folder / "problems.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_a_problem_is_a_question_and_a_document(tmp_path):
    tokenizer = tiny_tokenizer()
    path = written(tmp_path, {"problem": "2 b 2", "solution": 4})
    source = problems(path, prompt_key="problem", answer_key="solution", template="q {prompt} a ")
    (question,) = held_out_questions(source, tokenizer)
    assert (question.prompt, question.answer) == ("q 2 b 2 a ", "4")
    assert list(question.prompt_ids) == [tokenizer.bos_id, *tokenizer.encode(question.prompt)]

    example = to_example(Problem(question.prompt, question.answer), tokenizer)
    assert example.tokens.tolist() == [*question.prompt_ids, *tokenizer.encode("4"), tokenizer.eos_id]
    assert example.loss_mask.tolist() == [False] * len(question.prompt_ids) + [True, True]


def test_messages_are_answered_by_the_assistant(tmp_path):
    chat = [{"role": "user", "content": "word1"}, {"role": "assistant", "content": "word2"}]
    chat.append({"role": "user", "content": "word3"})
    (question,) = held_out_questions(problems(written(tmp_path, {"prompt": chat, "answer": "word4"})), TOKENIZER)
    messages = tuple(Message(**message) for message in chat)
    example = to_example(Problem(messages, "word4"), TOKENIZER)
    prompt = len(question.prompt_ids)
    assert example.tokens[:prompt].tolist() == list(question.prompt_ids)
    # Only the last turn is learned: the answer, and the end of the turn.
    assert np.flatnonzero(example.loss_mask).tolist() == [prompt, prompt + 1]
    assert example.tokens[prompt + 1] == TOKENIZER.token_id("<|im_end|>")


@pytest.mark.parametrize("name", TASKS)
def test_problems_of_every_task(name):
    """The question and the answer, encoded, are the problem."""
    task = make_task(SMALL.get(name, name))
    example = task.validation_example(3)
    question = to_question(example, task.tokenizer)
    first = int(np.argmax(example.loss_mask))
    assert list(question.prompt_ids) == example.tokens[:first].tolist()
    targets = example.tokens[example.loss_mask].tolist()
    answer = task.tokenizer.encode(question.answer, special=True)
    assert answer == (targets[:-1] if targets[-1] == task.tokenizer.eos_id else targets)
    assert answer


def test_training_questions_are_a_function_of_seed_and_number(tmp_path):
    tokenizer = tiny_tokenizer()
    path = written(tmp_path, *({"prompt": " ".join(str(n)), "answer": "a"} for n in range(40)))
    corpus = open_corpus(DataConfig(sources=(problems(path, template="{prompt} "),), validation_fraction=0.25))
    first, again = (training_questions(corpus, tokenizer, seed=0) for _ in range(2))
    assert [first[n] for n in range(60)] == [again[n] for n in reversed(range(60))][::-1]
    other = training_questions(corpus, tokenizer, seed=1)
    assert [first[n].prompt for n in range(20)] != [other[n].prompt for n in range(20)]
    # An epoch is every problem that is not held out.
    count = corpus.train_documents
    assert len({first[n].prompt for n in range(count)}) == count < 40
    batch = next(train_batches(corpus, tokenizer, batch_size=2, sequence_length=16, seed=0))
    assert 0 < batch.loss_mask.sum() < batch.loss_mask.size


def test_keys_of_problems_differ():
    keys = {document_key(own) for own in (Problem("a", "b"), Problem("ab", ""), Problem("a", "c"), "ab")}
    assert len(keys) == 4


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"prompt": "x"}, r"problems.jsonl:1: the problem has no answer 'answer'"),
        ({"prompt": "x", "answer": " "}, r"problems.jsonl:1: the answer of the problem is empty"),
        ({"prompt": "x", "answer": ["y"]}, r"problems.jsonl:1: the answer is not a string but list"),
        ({"question": "x", "answer": "y"}, r"problems.jsonl:1: the record has no field 'prompt'"),
        ({"prompt": [], "answer": "y"}, r"problems.jsonl:1: 'prompt' holds no message"),
    ],
)
def test_bad_problems_are_named(tmp_path, record, message):
    with pytest.raises(UserError, match=message):
        open_corpus(DataConfig(sources=(problems(written(tmp_path, record)),)))


def test_what_holds_no_problems(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    for path in (tmp_path / "a.txt", "huggingface:gsm8k,split=train"):
        with pytest.raises(UserError, match=r"holds no problems; give .jsonl files"):
            open_corpus(DataConfig(sources=(problems(path),)))
    with pytest.raises(UserError, match=r"^the template of a source must contain \{prompt\}, not 'Q:'$"):
        problems("x", template="Q:")
    (tmp_path / "b.jsonl").write_text('{"text": "a"}\n')
    texts = open_corpus(DataConfig(sources=(SourceConfig(path=str(tmp_path / "b.jsonl")),), validation_fraction=0.0))
    with pytest.raises(UserError, match=r"b.jsonl is read as text, not as problems; set its kind$"):
        training_questions(texts, tiny_tokenizer(), seed=0)
    with pytest.raises(UserError, match=r"has another vocabulary than the model"):
        list(held_out_questions(SourceConfig(path="mano:length=2"), tiny_tokenizer()))
