"""The main memory traffic of programs, on text that is short enough to count by hand."""

# ruff: noqa: E501

import pytest
from hypothesis import given
from hypothesis import strategies as st

from looplm_jax.planning._hlo import arrays_in_shape, parse
from looplm_jax.planning._traffic import Buffer, CacheUse, program_traffic

# Three layers of weights of 2,048 bytes each, and a cache of 16,384 bytes.
WEIGHTS, CACHE = "bf16[3,8,128]{2,1,0:T(8,128)(2,1)}", "bf16[4,16,128]{2,1,0:T(8,128)(2,1)}"
PARTS = f"""
%fused_slice (p: bf16[3,8,128], i: s32[]) -> bf16[8,128] {{
  %p = {WEIGHTS} parameter(0)
  %i = s32[]{{:T(128)}} parameter(1)
  %zero = s32[]{{:T(128)}} constant(0)
  %sliced = bf16[1,8,128]{{2,1,0:T(8,128)(2,1)}} dynamic-slice(%p, %i, %zero, %zero), dynamic_slice_sizes={{1,8,128}}
  ROOT %b = bf16[8,128]{{1,0:T(8,128)(2,1)}} bitcast(%sliced)
}}

%fused_update (c: bf16[4,16,128], u: bf16[16,128], i: s32[]) -> bf16[4,16,128] {{
  %c = {CACHE} parameter(0)
  %u = bf16[16,128]{{1,0:T(8,128)(2,1)}} parameter(1)
  %j = s32[]{{:T(128)}} parameter(2)
  %zero.1 = s32[]{{:T(128)}} constant(0)
  %wide = bf16[1,16,128]{{2,1,0:T(8,128)(2,1)}} bitcast(%u)
  ROOT %updated = {CACHE} dynamic-update-slice(%c, %wide, %j, %zero.1, %zero.1)
}}

%fused_attention (k: bf16[4,16,128], q: bf16[16,128]) -> f32[16] {{
  %k = {CACHE} parameter(0)
  %q = bf16[16,128]{{1,0:T(8,128)(2,1)}} parameter(1)
  %second = bf16[1,16,128]{{2,1,0:T(8,128)(2,1)}} slice(%k), slice={{[1:2], [0:16], [0:128]}}
  %float = f32[1,16,128]{{2,1,0:T(8,128)}} convert(%second)
  ROOT %sum = f32[16]{{0:T(128)}} reduce(%float, %q), dimensions={{0,2}}, to_apply=%add
}}

%condition (c: (s32[], {WEIGHTS})) -> pred[] {{
  %limit = s32[]{{:T(128)}} constant(3)
  %s = (s32[]{{:T(128)}}, {WEIGHTS}) parameter(0)
  %n = s32[]{{:T(128)}} get-tuple-element(%s), index=0
  ROOT %lt = pred[]{{:T(512)}} compare(%n, %limit), direction=LT
}}

%by_data (c: (s32[], {WEIGHTS})) -> pred[] {{
  %t = (s32[]{{:T(128)}}, {WEIGHTS}) parameter(0)
  ROOT %done = pred[]{{:T(512)}} constant(false)
}}
"""


def program(entry, body=""):
    """Returns a program of the parts above, on weights, the cache and a state, with a loop body if one is given."""
    loop = f"%body (b: (s32[], bf16[3,8,128])) -> (s32[], bf16[3,8,128]) {{\n{body}\n}}\n" if body else ""
    return parse(f"""HloModule jit_run_ticks, is_scheduled=true
{PARTS}
{loop}
ENTRY %main (w: bf16[3,8,128], c: bf16[4,16,128], x: bf16[16,128]) -> f32[8,8] {{
  %w = {WEIGHTS} parameter(0), metadata={{op_name="params['core']"}}
  %cache = {CACHE} parameter(1), metadata={{op_name="slots.cache.planes.core.keys"}}
  %x = bf16[16,128]{{1,0:T(8,128)(2,1)}} parameter(2), metadata={{op_name="slots.state"}}
  %at = s32[]{{:T(128)}} constant(1)
{entry}
}}
""")


NOTHING = CacheUse()


def moved(program, cache=NOTHING):
    def holds(name):
        return Buffer.WEIGHTS if "params" in name else Buffer.CACHE if "cache" in name else Buffer.TEMPORARY

    found = program_traffic(program, holds, cache)
    read = {buffer: count for buffer, count in found.read.items() if count}
    return read, {buffer: count for buffer, count in found.written.items() if count}


LAYER = f"""
  %state = (s32[]{{:T(128)}}, {WEIGHTS}) parameter(0)
  %number = s32[]{{:T(128)}} get-tuple-element(%state), index=0
  %all = {WEIGHTS} get-tuple-element(%state), index=1
  %own = bf16[8,128]{{1,0:T(8,128)(2,1)S(1)}} fusion(%all, %number), kind=kLoop, calls=%fused_slice
  %product = f32[8,8]{{1,0:T(8,128)}} dot(%own, %own), lhs_contracting_dims={{1}}, rhs_contracting_dims={{1}}
  ROOT %after = (s32[]{{:T(128)}}, {WEIGHTS}) tuple(%number, %all)"""


def loop(condition="%condition", config=""):
    return f"""
  %start = (s32[]{{:T(128)}}, {WEIGHTS}) tuple(%at, %w)
  ROOT %while = (s32[]{{:T(128)}}, {WEIGHTS}) while(%start), condition={condition}, body=%body{config}"""


def test_a_loop_reads_one_slice_in_each_of_its_turns():
    """The slice is in fast memory. The product, 8x8 float32 in main memory, takes a tile of 8x128."""
    read, written = moved(program(loop(), LAYER))
    assert read == {Buffer.WEIGHTS: 3 * 8 * 128 * 2}
    assert written == {Buffer.TEMPORARY: 3 * 8 * 128 * 4}


@given(st.integers(1, 100))
def test_what_a_loop_moves_grows_with_its_trip_count(count):
    config = f', backend_config={{"known_trip_count":{{"n":"{count}"}}}}'
    assert moved(program(loop("%by_data", config), LAYER))[0] == {Buffer.WEIGHTS: count * 8 * 128 * 2}


def test_a_copy_of_the_cache_is_read_and_written_and_read_again():
    entry = f"""
  %copied = {CACHE} copy(%cache)
  %sum = f32[16]{{0:T(128)S(1)}} fusion(%copied, %x), kind=kLoop, calls=%fused_attention
  ROOT %end = f32[16]{{0:T(128)S(1)}} negate(%sum)"""
    read, written = moved(program(entry))
    assert read == {Buffer.CACHE_COPY: 4 * 16 * 128 * 2 + 16 * 128 * 2, Buffer.TEMPORARY: 16 * 128 * 2}
    assert written == {Buffer.CACHE_COPY: 4 * 16 * 128 * 2}


@pytest.mark.parametrize(
    "entry",
    [
        f"ROOT %fast = {CACHE.replace('(2,1)', '(2,1)S(1)')} copy(%cache)",
        f"%begun = ({CACHE.replace('(2,1)', '(2,1)S(1)')}, {CACHE}, u32[]{{:S(2)}}) copy-start(%cache)\n"
        f"  ROOT %fast = {CACHE.replace('(2,1)', '(2,1)S(1)')} copy-done(%begun)",
    ],
)
def test_to_bring_the_cache_into_fast_memory_is_to_read_it(entry):
    assert moved(program(f"  {entry}")) == ({Buffer.CACHE: 4 * 16 * 128 * 2}, {})


def test_a_slice_that_is_brought_there_in_the_background():
    entry = f"""
  %begun = (({CACHE}), bf16[1,16,128]{{2,1,0:T(8,128)(2,1)S(1)}}, s32[]{{:S(2)}}) slice-start(%cache), slice={{[0:1], [0:16], [0:128]}}
  ROOT %fast = bf16[1,16,128]{{2,1,0:T(8,128)(2,1)S(1)}} slice-done(%begun)"""
    assert moved(program(entry)) == ({Buffer.CACHE: 16 * 128 * 2}, {})


@pytest.mark.parametrize(
    "update",
    [
        f"{CACHE} fusion(%cache, %x, %at), kind=kLoop, calls=%fused_update",
        f"{CACHE} dynamic-update-slice(%cache, %x, %at, %at, %at)",
        f"{CACHE} scatter(%cache, %at, %x), to_apply=%assign",
    ],
)
def test_an_update_in_place_writes_what_is_new(update):
    read, written = moved(program(f"  ROOT %new = {update}"))
    assert read == {Buffer.TEMPORARY: 16 * 128 * 2}
    assert written == {Buffer.CACHE: 16 * 128 * 2}


def test_attention_in_a_fusion_reads_its_slice_of_the_cache():
    entry = "  ROOT %sum = f32[16]{0:T(128)} fusion(%cache, %x), kind=kLoop, calls=%fused_attention"
    read, written = moved(program(entry))
    assert read == {Buffer.CACHE: 16 * 128 * 2, Buffer.TEMPORARY: 16 * 128 * 2}
    assert written == {Buffer.TEMPORARY: 128 * 4}  # 16 numbers in a tile of 128


CALL = 'custom-call({operands}), custom_call_target="tpu_custom_call"'


def test_a_kernel_reads_the_filled_positions_of_every_slot():
    call = CALL.format(operands="%x, %cache")
    use = CacheUse(slots=4, read=1000, written=10)
    read, written = moved(program(f"  ROOT %mixed = bf16[16,128]{{1,0:T(8,128)(2,1)}} {call}"), use)
    assert read == {Buffer.CACHE: 4000, Buffer.TEMPORARY: 16 * 128 * 2}
    assert written == {Buffer.TEMPORARY: 16 * 128 * 2}
    aliased = f"  ROOT %new = {CACHE} {call}, output_to_operand_aliasing={{{{}}: (1, {{}})}}"
    assert moved(program(aliased), use)[1] == {Buffer.CACHE: 40}


def test_a_kernel_without_the_cache_moves_what_it_declares():
    declared = ', backend_config={"custom_call_config":{"cost_estimate":{"flops":"1","bytes_accessed":"5000"}}}'
    call = CALL.format(operands="%w") + declared
    read, written = moved(program(f"  ROOT %made = bf16[8,128]{{1,0:T(8,128)(2,1)}} {call}"))
    assert read == {Buffer.WEIGHTS: 5000 - 8 * 128 * 2}
    assert written == {Buffer.TEMPORARY: 8 * 128 * 2}


def test_a_loop_that_data_end_reads_the_filled_positions():
    body = LAYER.replace(WEIGHTS, CACHE).replace(
        "fusion(%all, %number), kind=kLoop, calls=%fused_slice", "dynamic-slice(%all, %number, %number, %number)"
    )
    text = loop("%by_data").replace(WEIGHTS, CACHE).replace("%w)", "%cache)")
    read, _ = moved(program(text, body), CacheUse(read=5000))
    assert read == {Buffer.CACHE: 3 * 8 * 128 * 2}  # 2,048 bytes at a time


def test_of_a_condition_the_branch_that_moves_most_counts():
    branches = f"""
%head (h: {WEIGHTS}) -> f32[8,8] {{
  %h = {WEIGHTS} parameter(0)
  ROOT %logits = f32[8,8]{{1,0:T(8,128)}} dot(%h, %h)
}}

%nothing (e: ()) -> f32[8,8] {{
  %e = () parameter(0)
  ROOT %zeros = f32[8,8]{{1,0:T(8,128)}} broadcast()
}}
"""
    entry = """
  %none = () tuple()
  %exits = pred[]{:T(512)} constant(true)
  ROOT %chosen = f32[8,8]{1,0:T(8,128)} conditional(%exits, %none, %w), branch_computations={%nothing, %head}"""
    text = program(entry)
    text.computations.update(parse(branches).computations)
    assert moved(text) == ({Buffer.WEIGHTS: 2 * 3 * 8 * 128 * 2}, {Buffer.TEMPORARY: 8 * 128 * 4})


@given(st.lists(st.integers(1, 300), min_size=1, max_size=4), st.sampled_from([(8, 128), (2, 128), (1024,)]), st.data())
def test_an_array_takes_whole_tiles(dims, tile, data):
    order = data.draw(st.permutations(range(len(dims))))
    layout = ",".join(map(str, order)), ",".join(map(str, tile))
    (array,) = arrays_in_shape(f"f32[{','.join(map(str, dims))}]{{{layout[0]}:T({layout[1]})}}")
    assert array.bytes >= 4 * array.elements
    for size, axis in zip(reversed(tile), order, strict=False):
        dims[axis] = (dims[axis] + size - 1) // size * size
    whole = 4
    for size in dims:
        whole *= size
    assert array.bytes == whole
