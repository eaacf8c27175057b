"""The cache: for any chunking, padding, batching or beam search, results equal those of one plain forward pass."""

import copy

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import torch
from golden_torch import random_ids, tiny_model
from transformers import DynamicCache, GenerationConfig, StaticCache

pytestmark = pytest.mark.transformers

CLOSE = {"rtol": 1e-5, "atol": 1e-5}
LOOPS, LAYERS = 4, 2


@pytest.fixture(scope="module", params=[4, 2], ids="kv_heads={}".format)
def model(request):
    return tiny_model(num_key_value_heads=request.param)


@pytest.fixture(autouse=True)
def without_gradients():
    with torch.no_grad():
        yield


def greedy(model, ids, count=5, **settings):
    mask = settings.pop("attention_mask", torch.ones_like(ids))
    return model.generate(
        ids, attention_mask=mask, max_new_tokens=count, do_sample=False, pad_token_id=0, eos_token_id=None, **settings
    )[:, ids.shape[1] :]


def left_padded(rows):
    width = max(len(row) for row in rows)
    ids = torch.stack([torch.cat([torch.zeros(width - len(row), dtype=torch.long), row]) for row in rows])
    mask = torch.stack([(torch.arange(width) >= width - len(row)).long() for row in rows])
    return ids, mask


@pytest.mark.parametrize("chunks", [(12,), (5, 7), (1, 11), (4, 4, 4), (11, 1), (1,) * 12])
def test_chunked_prefill_is_whole_prefill_is_no_cache(model, chunks):
    ids = random_ids(2, 12)
    cache, parts = DynamicCache(), []
    for chunk in ids.split(chunks, dim=1):
        output = model(chunk, past_key_values=cache)
        parts.append(output.logits)
    assert output.past_key_values is cache
    assert len(cache.layers) == LOOPS * LAYERS
    torch.testing.assert_close(torch.cat(parts, dim=1), model(ids, use_cache=False).logits, **CLOSE)


def test_chunked_prefill_with_left_padding(model):
    ids, mask = left_padded([random_ids(1, 9)[0], random_ids(1, 3, seed=2)[0]])
    cache = DynamicCache()
    model(ids[:, :5], attention_mask=mask[:, :5], past_key_values=cache)
    rest = model(ids[:, 5:], attention_mask=mask, past_key_values=cache).logits
    whole = model(ids, attention_mask=mask, use_cache=False).logits
    torch.testing.assert_close(rest[mask[:, 5:].bool()], whole[:, 5:][mask[:, 5:].bool()], **CLOSE)


@pytest.mark.parametrize("loops", [1, 2, 6])
def test_cache_follows_the_number_of_loops_of_the_call(model, loops):
    ids = random_ids(2, 8)
    cached = greedy(model, ids, loops=loops)
    without = greedy(model, ids, loops=loops, use_cache=False)
    torch.testing.assert_close(cached, without)


def test_generate_grows_the_default_cache_and_cuts_prompts(model):
    ids = random_ids(2, 9)
    expected = greedy(model, ids, use_cache=False)
    torch.testing.assert_close(greedy(model, ids), expected)
    torch.testing.assert_close(greedy(model, ids, past_key_values=DynamicCache()), expected)
    torch.testing.assert_close(greedy(model, ids, past_key_values=DynamicCache(config=model.config)), expected)
    torch.testing.assert_close(greedy(model, ids, generation_config=GenerationConfig(prefill_chunk_size=4)), expected)


def test_a_second_turn_goes_on_with_the_cache_of_the_first(model):
    first, cache = random_ids(2, 6), DynamicCache()
    answer = greedy(model, first, past_key_values=cache)
    second = torch.cat([first, answer, random_ids(2, 3, seed=5)], dim=1)
    torch.testing.assert_close(greedy(model, second, past_key_values=cache), greedy(model, second))


def test_beam_search_reorders_every_plane(model):
    ids = random_ids(2, 7)
    torch.testing.assert_close(greedy(model, ids, num_beams=3), greedy(model, ids, num_beams=3, use_cache=False))


def test_assisted_generation_crops_every_plane(model):
    ids = random_ids(1, 7)
    torch.testing.assert_close(greedy(model, ids, assistant_model=tiny_model(seed=1)), greedy(model, ids))


def test_row_says_the_same_alone_and_in_any_padded_batch(model):
    rows = [random_ids(1, length, seed=length)[0] for length in (3, 8, 5)]
    ids, mask = left_padded(rows)
    wider_ids, wider_mask = (torch.cat([torch.zeros(3, 4, dtype=torch.long), x], dim=1) for x in (ids, mask))
    for settings in ({}, {"exit_threshold": 0.5}, {"exit_weighted": True}, {"use_cache": False}):
        together = greedy(model, ids, attention_mask=mask, **settings)
        wider = greedy(model, wider_ids, attention_mask=wider_mask, **settings)
        alone = torch.cat([greedy(model, row[None], **settings) for row in rows])
        torch.testing.assert_close(together, alone)
        torch.testing.assert_close(wider, alone)


def test_right_padding_changes_no_real_token(model):
    ids = random_ids(1, 6)
    padded = torch.cat([ids, torch.zeros(1, 3, dtype=torch.long)], dim=1)
    mask = (torch.arange(9) < 6).long()[None]
    ours = model(padded, attention_mask=mask).logits[:, :6]
    torch.testing.assert_close(ours, model(ids).logits, **CLOSE)


def test_rows_of_nothing_but_padding_stay_finite(model):
    mask = torch.tensor([[0, 0, 0, 0], [0, 1, 1, 1]])
    output = model(random_ids(2, 4), attention_mask=mask)
    assert output.logits.isfinite().all()
    assert output.gate_logits.isfinite().all()


def test_packed_documents_do_not_see_each_other(model):
    documents = [random_ids(1, length, seed=length) for length in (3, 5, 2)]
    positions = torch.cat([torch.arange(document.shape[1]) for document in documents])[None]
    packed = model(torch.cat(documents, dim=1), position_ids=positions, use_cache=False).logits
    alone = torch.cat([model(document, use_cache=False).logits for document in documents], dim=1)
    torch.testing.assert_close(packed, alone, **CLOSE)


def test_logits_to_keep_and_embeddings_as_input(model):
    ids = random_ids(2, 6)
    whole = model(ids).logits
    torch.testing.assert_close(model(ids, logits_to_keep=2).logits, whole[:, -2:], **CLOSE)
    torch.testing.assert_close(model(ids, logits_to_keep=torch.tensor([0, 3])).logits, whole[:, [0, 3]], **CLOSE)
    torch.testing.assert_close(model(inputs_embeds=model.model.embed_tokens(ids)).logits, whole, **CLOSE)


def test_a_copied_cache_can_be_gone_on_with_twice(model):
    ids, cache = random_ids(1, 6), DynamicCache()
    model(ids, past_key_values=cache)
    one, other = (model(random_ids(1, 2, seed=3), past_key_values=copy.deepcopy(cache)).logits for _ in range(2))
    torch.testing.assert_close(one, other)


def test_caches_that_cannot_hold_the_loops_are_refused(model):
    ids = random_ids(1, 4)
    with pytest.raises(ValueError, match=r"^a StaticCache cannot hold 4 loops of 2 layers; pass a Dyn.* or nothing$"):
        model(ids, past_key_values=StaticCache(config=model.config, max_cache_len=8))
    with pytest.raises(ValueError, match="a StaticCache cannot hold"):
        greedy(model, ids, cache_implementation="static")
    with pytest.raises(ValueError, match="a tuple cannot hold"):
        model(ids, past_key_values=())


@pytest.mark.parametrize(("filled", "asked"), [(4, 2), (2, 4), (1, 4)])
def test_a_cache_keeps_to_its_number_of_loops(model, filled, asked):
    cache = model(random_ids(1, 4), loops=filled, use_cache=True).past_key_values
    with pytest.raises(ValueError, match=f"^the cache was not filled with loops={asked}; keep its number of loops"):
        model(random_ids(1, 1), loops=asked, past_key_values=cache)


def test_masks_of_another_shape_are_refused(model):
    cache = model(random_ids(1, 4), use_cache=True).past_key_values
    with pytest.raises(
        ValueError, match=r"^attention_mask must be \[batch, 5\], for cached and new tokens, not \[1, 1\]$"
    ):
        model(random_ids(1, 1), attention_mask=torch.ones(1, 1), past_key_values=cache)
    with pytest.raises(ValueError, match=r"^attention_mask must be \[batch, 4\]"):
        model(random_ids(1, 4), attention_mask=torch.ones(1, 1, 4, 4))
