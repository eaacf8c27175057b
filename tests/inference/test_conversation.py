import jax
import numpy as np
import pytest
from tiny_chat import TOKENIZER, WORDS, make_loaded

from looplm_jax.data import Message, tokens_and_mask
from looplm_jax.data.tokenizers import SymbolTokenizer
from looplm_jax.errors import UserError
from looplm_jax.halting import FixedLoops
from looplm_jax.inference import Conversation, Engine, EngineConfig, Finish, Sampling, replay

OPENING = [TOKENIZER.token_id("<|im_start|>"), TOKENIZER.token_id("assistant")]
STOPS = (0, 2)
CONFIG = EngineConfig(slots=1, capacity=128, chunk=64, page_size=32)


@pytest.fixture(scope="module")
def engine():
    loaded = make_loaded()
    return Engine(*loaded, TOKENIZER, config=CONFIG)


def spoken(generator, most=7):
    return " ".join(generator.choice(WORDS, generator.integers(1, most)))


def in_one_prompt(engine, messages, **options):
    """Returns the answer to a single prompt with all turns."""
    prompt = [*tokens_and_mask(messages, TOKENIZER).tokens.tolist(), *OPENING]
    (result,) = engine.generate([prompt], stop_ids=STOPS, **options)
    return result


@pytest.mark.parametrize("system", [pytest.param(None, marks=pytest.mark.slow), "word3 word1"])
def test_answers_are_those_of_one_prompt_with_all_turns(engine, system):
    generator, finishes = np.random.default_rng(0), set()
    for seed in range(3):
        chat = Conversation(engine, TOKENIZER, system)
        for turn in range(3):
            text, sampling = spoken(generator), Sampling(temperature=1.0, seed=seed + 10 * turn)
            turns = [*chat.messages, Message("user", text)]
            expected = in_one_prompt(engine, turns, max_new_tokens=12, sampling=sampling.numbered(turn))
            made = tuple(chat.say(text, max_new_tokens=12, sampling=sampling))
            assert tuple(new.token for new in made) == expected.tokens == chat.result.tokens
            np.testing.assert_allclose([new.log_prob for new in made], expected.log_probs, atol=1e-4)
            assert chat.messages[-2:] == (Message("user", text), Message("assistant", expected.text))
            finishes.add(chat.result.finish)
    assert finishes == {Finish.LENGTH, Finish.STOP}


def test_only_what_is_new_is_read(engine):
    chat = Conversation(engine, TOKENIZER)
    list(chat.say("word1 word2", max_new_tokens=8))
    before = engine.stats.prompt_tokens
    list(chat.say("word3", max_new_tokens=2))
    last_and_end_of_turn, turn, opening = 2, 4, 2
    assert engine.stats.prompt_tokens - before <= last_and_end_of_turn + turn + opening


@pytest.mark.parametrize("close", [True, False])
def test_an_answer_that_is_cut_short_is_kept_as_far_as_it_came(engine, close):
    one_loop = {"policy": FixedLoops(loops=1)}  # one token per tick, so that a token is in progress at the end
    chat = Conversation(engine, TOKENIZER)
    answer = chat.say("word1", stop_ids=(), **one_loop)
    made = [next(answer) for _ in range(3)]
    if close:
        answer.close()
    else:
        chat.stop()
        made += answer
    assert chat.result.finish is Finish.CANCELLED
    assert chat.result.tokens == tuple(new.token for new in made)
    assert chat.messages[-1] == Message("assistant", "".join(new.text for new in made))
    turns = [*chat.messages, Message("user", "word2")]
    expected = in_one_prompt(engine, turns, max_new_tokens=6, **one_loop)
    answer = list(chat.say("word2", max_new_tokens=6, **one_loop))
    assert tuple(new.token for new in answer) == expected.tokens
    np.testing.assert_allclose([new.log_prob for new in answer], expected.log_probs, atol=1e-4)
    loaded = make_loaded()
    np.testing.assert_allclose(replay(loaded.model, loaded.params, chat.result), chat.result.log_probs, atol=1e-4)


def test_a_window_that_is_full(engine):
    chat = Conversation(engine, TOKENIZER, "word0")
    list(chat.say("word1 " * 100, stop_ids=()))  # until the room is used up
    assert chat.result.finish is Finish.LENGTH
    said = chat.messages
    with pytest.raises(UserError, match=r"^the window of 128 tokens is full: 127 of the conversation and 8 of this"):
        next(chat.say("word2"))
    assert chat.messages == said
    chat.reset()
    assert (chat.messages, chat.result) == ((Message("system", "word0"),), None)
    first = in_one_prompt(engine, [*chat.messages, Message("user", "word2")], max_new_tokens=5)
    assert tuple(new.token for new in chat.say("word2", max_new_tokens=5)) == first.tokens


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, not 0"),
        ({"policy": FixedLoops(loops=4)}, "4 loops are more than the 3 of this engine"),
    ],
)
def test_a_turn_that_cannot_be_served_changes_nothing(engine, options, message):
    chat = Conversation(engine, TOKENIZER)
    with pytest.raises(UserError, match=message):
        next(chat.say("word1", **options))
    assert chat.messages == ()


def test_turns_draw_with_keys_of_their_own(engine):
    """The same message later gets another answer; the same conversation from the start gets the same answers."""
    drawn = Sampling(temperature=1e4, seed=3)  # so that the context hardly matters
    chat, answers = Conversation(engine, TOKENIZER), []
    for _ in range(2):
        chat.reset()
        for _ in range(3):
            answers.append(tuple(new.token for new in chat.say("word1", max_new_tokens=6, sampling=drawn, stop_ids=())))
    assert answers[:3] == answers[3:]
    assert len({answer[:2] for answer in answers}) == 3


def test_answers_do_not_overlap(engine):
    """Otherwise both would continue from the same cache, and one of them would be lost."""
    chat, busy = Conversation(engine, TOKENIZER), r"^an answer is still being given; read it to its end, or close it, "
    answer = chat.say("word1", max_new_tokens=8, stop_ids=())
    next(answer)
    for overlapping in (lambda: next(chat.say("word2")), chat.reset):
        with pytest.raises(UserError, match=busy):
            overlapping()
    list(answer)
    assert len(list(chat.say("word2", max_new_tokens=3, stop_ids=()))) == 3
    assert [message.content for message in chat.messages[::2]] == ["word1", "word2"]


def test_a_turn_that_fails_changes_nothing():
    loaded = make_loaded()
    broken = jax.tree.map(lambda leaf: np.full(leaf.shape, np.nan, np.float32), loaded.params)
    engine = Engine(loaded.model, jax.device_put(broken), TOKENIZER, config=CONFIG)
    chat = Conversation(engine, TOKENIZER)
    with pytest.raises(UserError, match="logits were not finite"):
        list(chat.say("word1", max_new_tokens=4))
    assert chat.messages == ()


def test_a_tokenizer_without_chat(engine):
    with pytest.raises(UserError, match=r"^the tokenizer has no token <\|im_start\|>, which the chat format needs"):
        Conversation(engine, SymbolTokenizer(("<|endoftext|>", "word")))
