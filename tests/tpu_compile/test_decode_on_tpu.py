"""The programs of a decoder that a TPU would run: none of their loops makes an array of the size of a row's cache."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tpu_programs import tpu_mesh

from looplm_jax.config import ComputeConfig, MeshConfig, ModelConfig, Remat
from looplm_jax.halting._policy_table import PolicyTable
from looplm_jax.inference._cache_layout import PoolSize, shardings
from looplm_jax.inference._cache_strategy import CacheStrategy
from looplm_jax.inference._engine_config import EngineConfig
from looplm_jax.inference._kv_cache import bytes_per_token, empty_cache
from looplm_jax.inference._loopwise_prefill import begin_chunk, run_loop
from looplm_jax.inference._packed_prefill import admit_pack, make_pack
from looplm_jax.inference._prefill import LastToken, prefill_chunk
from looplm_jax.inference._sampling import SamplingTable
from looplm_jax.inference._slots import empty_slots
from looplm_jax.inference._tick import run_ticks
from looplm_jax.inference.speculation._verify import SpeculativeRows, draft
from looplm_jax.models import presets
from looplm_jax.models._looplm import LoopLM, boxed_shapes
from looplm_jax.planning import _hlo as hlo
from looplm_jax.planning._traffic import elements_written
from looplm_jax.sharding import abstract_arrays, use_mesh

SMALL = ModelConfig(vocab_size=512, width=256, mlp_width=256, num_layers=2, num_heads=8, head_dim=128, loops=2)
CAPACITY = 16384  # so that the cache is larger than the fast memory, which small arrays are moved to
AROUND = {"prelude_layers": 1, "coda_layers": 1}
MOVES_NOTHING = {"tuple", "get-tuple-element", "parameter", "bitcast", "while", "conditional", "constant"}


class Chips:
    """A network on a mesh of one or more chips, and the programs of its decoder as these would run them."""

    def __init__(self, topology="v5e:2x2", config=SMALL, *, tensor=1):
        self.mesh = tpu_mesh(topology, MeshConfig(data=1, tensor=tensor), devices=tensor)
        self.model = LoopLM(config, ComputeConfig(remat=Remat.NONE))
        self.params = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.bfloat16, sharding=leaf.sharding),
            abstract_arrays(boxed_shapes(config), self.mesh),
        )

    def slots(self, *, slots=3, capacity=CAPACITY, strategy=CacheStrategy.FULL):
        return self._abstract(
            lambda: empty_slots(
                self.model,
                strategy,
                PoolSize.of(slots=slots, capacity=capacity, page_size=128),
                rows=slots,
                loops=self.model.config.loops,
                cache_dtype=jnp.bfloat16,
                policies=PolicyTable.empty(slots),
            )
        )

    def tick(self, **size):
        return self._compiled(run_ticks, self.slots(**size), loops=self.model.config.loops)

    def row(self, capacity=CAPACITY):
        return self._abstract(
            lambda: empty_cache(
                self.model.config,
                CacheStrategy.FULL,
                rows=1,
                capacity=capacity,
                loops=self.model.config.loops,
                dtype=jnp.bfloat16,
            )
        )

    def row_of_pages(self, strategy=CacheStrategy.FULL):
        cache = self.slots(strategy=strategy).cache
        pages = np.arange(cache.table.shape[1], dtype=np.int32)[None]
        return dataclasses.replace(cache, lengths=np.zeros(1, np.int32), table=pages)

    def chunk(self, row, *, tokens=128):
        numbers = jax.ShapeDtypeStruct((tokens,), jnp.int32), jax.ShapeDtypeStruct((), jnp.int32)
        return self._compiled(prefill_chunk, row, *numbers)

    def loop_of_chunk(self, strategy, *, tokens=128):
        """One loop of a chunk of a prompt, into a cache with one plane."""
        row, number = self.row_of_pages(strategy), jax.ShapeDtypeStruct((), jnp.int32)
        config, numbers = self.model.config, jax.ShapeDtypeStruct((tokens,), jnp.int32)
        with use_mesh(self.mesh):
            _, chunk = jax.eval_shape(functools.partial(begin_chunk, self.model), self.params, row, numbers, number)
        last = LastToken(
            hidden=jax.ShapeDtypeStruct((config.loops, config.width), jnp.bfloat16),
            state=jax.ShapeDtypeStruct((config.loops, config.width), jnp.bfloat16),
            gate_logits=jax.ShapeDtypeStruct((config.loops,), jnp.float32),
        )
        chunk = jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            chunk,
            shardings(chunk, self.mesh),
        )
        return self._compiled(run_loop, row, chunk, last, number)

    def pack(self, *, tokens=256, **size):
        slots = self.slots(**size)
        pack = make_pack(
            {0: [1] * 100, 2: [2] * 50},
            slots=slots.tokens.size,
            size=tokens,
            pages=np.zeros(slots.cache.table.shape, np.int32),
            settings=slots.settings,
            seen_tokens=None,
        )
        return self._compiled(admit_pack, slots, pack, loops=self.model.config.loops)

    def draft(self, *, rows=3, capacity=CAPACITY):
        def make():
            return SpeculativeRows(
                cache=empty_cache(
                    self.model.config,
                    CacheStrategy.FULL,
                    rows=rows,
                    capacity=capacity,
                    loops=self.model.config.loops,
                    dtype=jnp.bfloat16,
                ),
                tokens=jnp.zeros(rows, jnp.int32),
                num_generated=jnp.zeros(rows, jnp.int32),
                sampling=SamplingTable.empty(rows),
                seen_tokens=None,
            )

        return self._compiled(draft, self._abstract(make), loops=1, drafts=2)

    def _abstract(self, make):
        with use_mesh(self.mesh):
            shapes = jax.eval_shape(make)
        return jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            shapes,
            shardings(shapes, self.mesh),
        )

    def _compiled(self, program, *arrays, **settings):
        with use_mesh(self.mesh):
            traced = program.trace(self.model, self.params, *arrays, **settings)
            return traced.lower(lowering_platforms=("tpu",)).compile()


def arrays_made(compiled):
    """Bytes of each array that an instruction makes rather than updates, with the line that tells which."""
    program = hlo.parse(compiled.as_text())
    for run in program.runs():
        made = run.instruction
        if run.fused or made.opcode in MOVES_NOTHING or made.opcode.endswith("-start"):
            continue
        writes = elements_written(program, run.computation, made)
        for size, write in zip(hlo.array_bytes(made.shape), writes, strict=True):
            if write.target is None:
                yield size, f"{made.name} {made.shape}"


def assert_reads_in_place(chips, compiled):
    """No array is as large as the keys of one layer and plane of one row, let alone of all of them."""
    config, devices = chips.model.config, chips.mesh.size
    size, line = max(arrays_made(compiled))
    assert size < 2 * CAPACITY * config.kv_heads * config.head_width // devices, line
    assert compiled.memory_analysis().temp_size_in_bytes < 2**24


def test_no_layer_of_a_tick_copies_the_cache():
    chips = Chips()
    compiled = chips.tick()
    assert "decode_attention" in compiled.as_text()
    assert_reads_in_place(chips, compiled)


@pytest.mark.tpu_compile
@pytest.mark.parametrize(
    "strategy", [CacheStrategy(name) for name in ("full", "last", "average", "first", "ring(2)")], ids=str
)
@pytest.mark.parametrize(("changes", "tensor"), [(AROUND, 1), (AROUND, 4), ({**AROUND, "num_kv_heads": 1}, 1)])
def test_no_cache_is_copied_in_a_tick(strategy, changes, tensor):
    chips = Chips(config=dataclasses.replace(SMALL, **changes), tensor=tensor)
    assert_reads_in_place(chips, chips.tick(strategy=strategy))


@pytest.mark.tpu_compile
@pytest.mark.parametrize("changes", [AROUND, {"num_kv_heads": 1}])
@pytest.mark.parametrize("strategy", [CacheStrategy.LAST, CacheStrategy.AVERAGE])
def test_a_loop_of_a_chunk_reads_the_only_plane_in_place(strategy, changes):
    chips = Chips(config=dataclasses.replace(SMALL, **changes))
    assert_reads_in_place(chips, chips.loop_of_chunk(strategy))


@pytest.mark.tpu_compile
@pytest.mark.parametrize(
    ("changes", "tensor"),
    [
        ({"head_dim": 64}, 1),
        ({"head_dim": 96}, 1),
        ({"head_dim": 32}, 4),
        ({"num_kv_heads": 2}, 2),
        ({"num_kv_heads": 1}, 1),
        ({"num_kv_heads": 2, "head_dim": 64}, 1),
    ],
)
def test_heads_of_any_width_and_number_are_read_in_place(changes, tensor):
    """By the kernel in a tick, and block after block in a chunk of a prompt. The last four have one row a device."""
    chips = Chips(config=dataclasses.replace(SMALL, **changes), tensor=tensor)
    tick = chips.tick()
    assert "decode_attention" in tick.as_text()
    for compiled in (tick, chips.chunk(chips.row_of_pages())):
        assert_reads_in_place(chips, compiled)


@pytest.mark.tpu_compile
@pytest.mark.parametrize("changes", [{}, AROUND, {"num_kv_heads": 2}, {**AROUND, "num_kv_heads": 1}])
def test_a_chunk_of_a_prompt_reads_its_row_in_place(changes):
    chips = Chips(config=dataclasses.replace(SMALL, **changes))
    for row in (chips.row(), chips.row_of_pages()):
        assert_reads_in_place(chips, chips.chunk(row))


@pytest.mark.tpu_compile
@pytest.mark.parametrize("changes", [AROUND, {"num_kv_heads": 1}])
@pytest.mark.parametrize("strategy", [CacheStrategy.FULL, CacheStrategy.AVERAGE])
def test_prompts_that_are_read_together_are_written_in_place(strategy, changes):
    chips = Chips(config=dataclasses.replace(SMALL, **changes))
    assert_reads_in_place(chips, chips.pack(strategy=strategy))


@pytest.mark.tpu_compile
@pytest.mark.parametrize("changes", [AROUND, {"num_kv_heads": 1}])
def test_drafts_read_their_rows_in_place(changes):
    chips = Chips(config=dataclasses.replace(SMALL, **changes))
    assert_reads_in_place(chips, chips.draft())


@pytest.mark.tpu_compile
def test_the_default_engine_fits_the_smallest_chip():
    size = EngineConfig()
    compiled = Chips("v5e:2x2", presets.ouro_1_4b()).tick(slots=size.slots, capacity=size.capacity)
    assert compiled.memory_analysis().temp_size_in_bytes < 2**24


@pytest.mark.tpu_compile
@pytest.mark.parametrize("topology", ["v5e:2x2", "v6e:2x2", "v5p:2x2x1"])
@pytest.mark.parametrize("config", [presets.ouro_1_4b, presets.ouro_2_6b])
@pytest.mark.parametrize("slots", [1, 8, 32])
def test_ticks_of_every_size_and_generation_need_no_room_beside_the_cache(topology, config, slots):
    """Of 512 positions, 256 with 32 slots, so that cache and parameters fit."""
    chips = Chips(topology, config())
    size = {"slots": slots, "capacity": 256 if slots == 32 else 512, "strategy": CacheStrategy.LAST}
    compiled = chips.tick(**size)
    *_, positions, rows, width = chips.slots(**size).cache.planes.core.keys.shape
    # Pages keep these axes in a copy, or those that the kernel reads.
    of_pages = re.compile(rf"[\[,]({positions},{rows},{width}|{positions * rows},{width})\]")
    assert not [line for _, line in arrays_made(compiled) if of_pages.search(line)]

    # The write of the new keys and values waits for the last layer, so those of all layers exist together. So do up to
    # three arrays of logits: all of them, and what a filter of the sampler reads and returns. With 32 slots v6e and v5p
    # keep these in HBM. A copy of the keys alone would be larger.
    logits = 4 * slots * chips.model.config.vocab_size
    written = bytes_per_token(chips.model.config, CacheStrategy.LAST, loops=1, dtype=jnp.bfloat16) * slots
    assert compiled.memory_analysis().temp_size_in_bytes < written + 3 * logits + 2**21
