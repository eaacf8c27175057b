"""Plans of a tick of the engine: the lower bound by arithmetic, and programs of the real TPU compiler."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import pytest
from plan_cases import MODEL, recipe_with

from looplm_jax.config import MeshConfig
from looplm_jax.errors import UserError
from looplm_jax.inference import CacheStrategy
from looplm_jax.models import presets
from looplm_jax.models._looplm import count_params
from looplm_jax.planning._budget import decode_timing
from looplm_jax.planning._decode_plan import DecodeRequest, abstract_params, check_heads, decode_floor, plan_decode
from looplm_jax.planning._targets import Target, find_target
from looplm_jax.planning._traffic import Buffer
from looplm_jax.sharding import make_mesh
from looplm_jax.sharding._hardware import known_chip

V5E = Target(name="v5e", devices=tuple(jax.devices()), chip=known_chip("TPU v5 lite"), shape=(1, 1))
COMPUTE = recipe_with().compute


@pytest.fixture
def tpu_compiler():
    pytest.importorskip("libtpu", reason="the TPU compiler (libtpu) is not installed")


def floor(model, request, **mesh):
    devices = make_mesh(MeshConfig(data=1, **mesh))
    return decode_floor(abstract_params(model, jnp.dtype(jnp.bfloat16), devices), model, request, devices=devices.size)


def test_the_floor_of_the_model_of_1_4_billion_parameters():
    """Eight slots with 512 tokens each: 3.475 GB, which take 4.2 ms at 819 GB/s."""
    model, request = presets.ouro_1_4b(), DecodeRequest(slots=8, capacity=512, filled=512)
    found = floor(model, request)
    embedding = 49152 * 2048
    assert found.parameters == 2 * (1_434_652_673 - embedding + 8 * 2048)
    assert found.cache_read == 8 * 512 * 24 * 2 * 2048 * 2
    assert found.cache_written == 8 * 24 * 2 * 2048 * 2
    assert found.total == pytest.approx(3.475e9, rel=1e-3)
    assert found.total / V5E.chip.hbm_bandwidth == pytest.approx(4.24e-3, rel=1e-2)


def test_devices_that_share_the_heads_share_the_floor():
    model, request = presets.ouro_1_4b(), DecodeRequest()
    alone, shared = floor(model, request), floor(model, request, tensor=8)
    assert shared.cache_read == alone.cache_read // 8
    assert shared.parameters == pytest.approx(alone.parameters / 8, rel=2e-3)  # norms are replicated


def test_a_head_that_is_the_embedding_is_read_whole():
    model = dataclasses.replace(presets.tiny(), tied_head=True)
    assert floor(model, DecodeRequest()).parameters == 2 * count_params(model)


def test_the_floor_has_one_plane_of_every_layer():
    model = dataclasses.replace(presets.tiny(), prelude_layers=1, coda_layers=2)
    one = DecodeRequest(slots=1, capacity=64, filled=10)
    assert floor(model, one).cache_read == 10 * (1 + 2 + 2) * 2 * model.kv_heads * model.head_width * 2


@pytest.mark.parametrize("cache", [CacheStrategy.FULL, CacheStrategy.AVERAGE, CacheStrategy("ring(2)")], ids=str)
def test_planes_of_the_cache_do_not_raise_the_floor(cache):
    assert floor(presets.tiny(), DecodeRequest(cache=cache)) == floor(presets.tiny(), DecodeRequest())


def test_half_of_the_capacity_is_filled_unless_told_otherwise():
    assert DecodeRequest(capacity=2048).positions == 1024
    assert DecodeRequest(capacity=2048, filled=0).positions == 0


def test_half_of_the_pages_are_filled_where_they_are_fewer_than_the_slots_could_take():
    assert DecodeRequest(slots=8, capacity=2048, pages=64).positions == 512
    assert DecodeRequest(slots=2, capacity=2048, pages=64).positions == 1024


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"pages": 10},
            "one request of --capacity=2048 takes 16 pages of 128 positions, and there are 10: 6 are missing; "
            "use --pages 16",
        ),
        (
            {"page_size": 4096, "pages": 7, "filled": 1},
            "--filled=1 takes 8 pages of 2048 positions in 8 slots, and there are 7: 1 are missing; use --pages 8",
        ),
        ({"pages": 0}, "--pages must be at least 1, not 0"),
        ({"page_size": 0}, "--page-size must be at least 1, not 0"),
        ({"filled": 2049}, "--filled must be between 0 and --capacity=2048, not 2049"),
    ],
)
def test_a_pool_that_is_too_small(options, message):
    with pytest.raises(UserError) as caught:
        DecodeRequest(**options)
    assert str(caught.value) == message


def test_tokens_of_a_second():
    timing = decode_timing(V5E, moved=819 * 10**7, floor=819 * 10**6, sent=0, slots=8, loops=4, loops_mean=2.0)
    assert timing.tick == pytest.approx(0.01)
    assert timing.floor == pytest.approx(0.001)
    assert timing.ticks_per_second == pytest.approx(100)
    assert (timing.tokens_per_second, timing.tokens_per_second_at_mean) == pytest.approx((200, 400))
    unknown = dataclasses.replace(V5E, chip=None)
    assert decode_timing(unknown, moved=1, floor=1, sent=0, slots=1, loops=1, loops_mean=None) is None


@pytest.mark.parametrize(
    ("model", "devices", "message"),
    [
        ({"num_heads": 4}, 8, "the 8 of v5e do not divide model.num_heads=4; choose a topology with fewer"),
        ({"num_heads": 8, "num_kv_heads": 2}, 8, "do not divide model.num_kv_heads=2"),
        ({"num_heads": 8, "vocab_size": 1001}, 8, "do not divide model.vocab_size=1001"),
    ],
)
def test_more_devices_than_heads(model, devices, message):
    changed = dataclasses.replace(MODEL, **model)
    with pytest.raises(UserError, match=message):
        check_heads(changed, dataclasses.replace(V5E, devices=V5E.devices[:devices]))


def plan_for_v5e(*, vocabulary, width, layers):
    """Plans a tick with four slots, 6 pages and the cache of the last loop."""
    model = dataclasses.replace(
        MODEL, vocab_size=vocabulary, width=width, mlp_width=4 * width, num_layers=layers, num_heads=width // 128
    )
    request = DecodeRequest(slots=4, capacity=256, pages=6, cache=CacheStrategy.LAST, loops_mean=1.5)
    return plan_decode(model, COMPUTE, request, find_target("v5e:1x1"))


@pytest.mark.slow
@pytest.mark.usefixtures("tpu_compiler")
def test_a_tick_for_v5e_reads_every_weight_once():
    """The embedding and the layers of the model are too large for the fast memory of the chip."""
    plan = plan_for_v5e(vocabulary=2**16, width=1024, layers=4)
    read, written = plan.moved.read, plan.moved.written
    assert read[Buffer.HEAD] == 1024 * 2**16 * 2
    assert read[Buffer.WEIGHTS] + read[Buffer.HEAD] == pytest.approx(plan.floor.parameters, rel=1e-3)
    assert written[Buffer.WEIGHTS] == written[Buffer.HEAD] == 0


@pytest.mark.usefixtures("tpu_compiler")
def test_the_plan_of_a_tick_for_v5e():
    """The model fits in the fast memory of the chip, so some weights are read from there a second time."""
    plan = plan_for_v5e(vocabulary=2**10, width=256, layers=2)
    assert plan.fits
    assert plan.dtype == "bfloat16"
    read, written = plan.moved.read, plan.moved.written
    assert read[Buffer.HEAD] == 256 * 2**10 * 2
    assert 1 <= (read[Buffer.WEIGHTS] + read[Buffer.HEAD]) / plan.floor.parameters < 2
    assert written[Buffer.WEIGHTS] == written[Buffer.HEAD] == 0
    assert written[Buffer.CACHE] >= plan.floor.cache_written
    assert plan.memory.parameters + plan.memory.cache < plan.memory.total < plan.memory.capacity
    assert plan.memory.cache == 6 * 128 * 2 * 2 * 256 * 2
    assert plan.reading == 256 * 2 * 256 * 2
    assert plan.timing.tokens_per_second_at_mean == pytest.approx(2 * plan.timing.tokens_per_second)
    as_json = json.loads(json.dumps(plan.to_json()))
    assert as_json["request"] == {
        "slots": 4,
        "capacity": 256,
        "page_size": 128,
        "pages": 6,
        "cache": "last",
        "filled": 96,
        "loops_mean": 1.5,
    }
    assert as_json["moved"]["head"] == {"read": read[Buffer.HEAD], "written": 0}
    assert as_json["ratio"] == plan.moved.total / plan.floor.total


@pytest.mark.tpu_compile
@pytest.mark.usefixtures("tpu_compiler")
def test_a_cache_that_is_too_large_does_not_fit():
    plan = plan_decode(MODEL, COMPUTE, DecodeRequest(slots=64, capacity=65536), find_target("v5e:1x1"))
    assert not plan.fits
    assert plan.moved is plan.timing is plan.ratio is None
    assert plan.memory.total > plan.memory.cache == 64 * 65536 * 3 * 2 * 2 * MODEL.width * 2
    assert plan.memory.capacity < plan.memory.total < 1.1 * (plan.memory.parameters + plan.memory.cache)


@pytest.mark.tpu_compile
@pytest.mark.usefixtures("tpu_compiler")
def test_every_parameter_of_the_model_of_1_4_billion_is_read_once():
    plan = plan_decode(presets.ouro_1_4b(), COMPUTE, DecodeRequest(slots=1, filled=2048), find_target("v5e:1x1"))
    read = plan.moved.read
    assert read[Buffer.WEIGHTS] + read[Buffer.HEAD] == pytest.approx(plan.floor.parameters, rel=1e-3)
    assert read[Buffer.CACHE] == pytest.approx(plan.floor.cache_read, rel=1e-2)
    assert plan.ratio < 1.15


@pytest.mark.tpu_compile
@pytest.mark.usefixtures("tpu_compiler")
def test_chips_that_share_the_heads_exchange_states():
    alone, shared = (
        plan_decode(MODEL, COMPUTE, DecodeRequest(slots=4), find_target(name)) for name in ("v5e:1x1", "v5e:1x2")
    )
    assert alone.sent == 0 < shared.sent
    assert shared.moved.read[Buffer.HEAD] == alone.moved.read[Buffer.HEAD] // 2
    assert shared.memory.cache == alone.memory.cache // 2
    assert shared.floor.total == pytest.approx(alone.floor.total / 2, rel=0.02)
