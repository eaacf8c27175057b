"""All kernels compute the same, on one device and on a mesh that shards rows, heads and sequences."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import AbstractDevice, AbstractMesh

from looplm_jax.config import AttentionKernel, ComputeConfig, Dtype, MeshConfig, ModelConfig, Recipe, Stage
from looplm_jax.errors import UserError
from looplm_jax.models import _attention_kernels as attention_kernels
from looplm_jax.models._attention import attend, visible
from looplm_jax.models._attention_kernels import choose_kernel, cudnn_attention, self_attention, triton_attention
from looplm_jax.models._looplm import LoopLM
from looplm_jax.sharding import make_mesh, use_mesh
from looplm_jax.training._compile import abstract_batch
from looplm_jax.training._state import abstract_state
from looplm_jax.training._step import make_train_step

LENGTH = 256
ROWS_AND_HEADS = MeshConfig(data=2, fsdp=2, tensor=2)
SEQUENCES = MeshConfig(data=2, context=4)
SEQUENCES_AND_HEADS = MeshConfig(data=1, tensor=2, context=4)
KERNELS = [AttentionKernel.XLA, AttentionKernel.SPLASH, AttentionKernel.TRITON]


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(attention_kernels, "_CHUNK", 96)  # which does not divide the length


def packed_rows(rows):
    """Returns positions and documents of rows with three documents each."""
    random, columns = np.random.default_rng(0), np.arange(LENGTH)
    cuts = np.sort(random.choice(np.arange(1, LENGTH), (rows, 2), replace=False), axis=1)
    segments = 1 + (columns >= cuts[:, :1]).astype(np.int32) + (columns >= cuts[:, 1:])
    starts = np.where(segments == 1, 0, np.where(segments == 2, cuts[:, :1], cuts[:, 1:]))
    return jnp.asarray(columns - starts, jnp.int32), jnp.asarray(segments, jnp.int32)


def arrays(rows=2, heads=4, kv_heads=2):
    random = np.random.default_rng(1)
    shapes = [(rows, LENGTH, count, 8) for count in (heads, kv_heads, kv_heads)]
    return *(jnp.asarray(random.normal(size=shape), jnp.float32) for shape in shapes), *packed_rows(rows)


def plain(queries, keys, values, positions, segments):
    return attend(queries, (keys,), (values,), (visible(positions, segments, positions, segments),))


@functools.partial(jax.jit, static_argnames="function")
def mixed_and_gradients(function, queries, keys, values, positions, segments):
    def total(queries, keys, values):
        mixed = function(queries, keys, values, positions, segments)
        return jnp.sum(
            jnp.sin(mixed) * jnp.arange(mixed.size, dtype=jnp.float32).reshape(mixed.shape) / mixed.size
        ), mixed

    return jax.grad(total, argnums=(0, 1, 2), has_aux=True)(queries, keys, values)


def assert_same(function, inputs):
    assert_close(mixed_and_gradients(function, *inputs), mixed_and_gradients(plain, *inputs))


def assert_close(found, wanted):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5), found, wanted)


@pytest.mark.parametrize("kernel", KERNELS)
def test_every_kernel_computes_plain_attention_and_its_gradients(kernel):
    assert_same(functools.partial(self_attention, kernel), arrays())


@given(
    st.lists(st.integers(1, LENGTH - 1), min_size=1, max_size=8, unique=True).map(sorted),
    st.lists(st.integers(0, 9), min_size=9, max_size=9, unique=True),
)
def test_triton_keeps_documents_apart_wherever_they_are_cut(cuts, names):
    """Ids are in any order and include 0, the id of padding."""
    lengths = np.diff([0, *cuts, LENGTH])
    segments = np.repeat(names[: len(lengths)], lengths)[None]
    positions = np.concatenate([np.arange(length) for length in lengths])[None]
    queries, keys, values = arrays(rows=1)[:3]
    places = (jnp.asarray(positions, jnp.int32), jnp.asarray(segments, jnp.int32))
    assert_same(triton_attention, (queries, keys, values, *places))


@pytest.mark.parametrize(
    ("kernel", "mesh", "kv_heads"),
    [
        pytest.param(AttentionKernel.XLA, ROWS_AND_HEADS, 2, marks=pytest.mark.slow),
        (AttentionKernel.SPLASH, ROWS_AND_HEADS, 2),
        pytest.param(AttentionKernel.XLA, SEQUENCES, 2, marks=pytest.mark.slow),
        pytest.param(AttentionKernel.SPLASH, SEQUENCES, 2, marks=pytest.mark.slow),
        (AttentionKernel.TRITON, SEQUENCES, 2),
        pytest.param(AttentionKernel.XLA, SEQUENCES_AND_HEADS, 8, marks=pytest.mark.slow),
        (AttentionKernel.SPLASH, SEQUENCES_AND_HEADS, 8),
    ],
)
def test_a_mesh_changes_nothing(kernel, mesh, kv_heads):
    """Four devices per sequence, with fewer key heads than devices and with more."""
    inputs = arrays(rows=4, heads=8, kv_heads=kv_heads)
    wanted = mixed_and_gradients(plain, *inputs)
    with use_mesh(make_mesh(mesh)):
        found = mixed_and_gradients(functools.partial(self_attention, kernel), *inputs)
    assert_close(found, wanted)


def test_rows_that_do_not_divide_over_a_mesh_are_computed_all_the_same():
    wanted = mixed_and_gradients(plain, *arrays())
    with use_mesh(make_mesh(MeshConfig(data=8))):
        found = mixed_and_gradients(functools.partial(self_attention, AttentionKernel.SPLASH), *arrays())
    assert_close(found, wanted)


def chosen(
    platform, kind, *, length=4096, head_width=128, dtype=jnp.bfloat16, attention=AttentionKernel.AUTO, context=1
):
    """Returns the kernel of a program for devices that need not be attached."""
    device = AbstractDevice(device_kind=kind, num_cores=1, platform=platform)
    mesh = AbstractMesh((1, 1, 1, context), ("data", "fsdp", "tensor", "context"), abstract_device=device)
    compute = ComputeConfig(attention=attention)
    with jax.sharding.use_abstract_mesh(mesh):
        return choose_kernel(compute, length=length, head_width=head_width, dtype=dtype)


def test_auto_takes_the_kernel_of_the_platform_that_the_program_is_for():
    assert chosen("tpu", "TPU v5 lite") is AttentionKernel.SPLASH
    assert chosen("gpu", "NVIDIA H200") is AttentionKernel.CUDNN
    assert chosen("gpu", "NVIDIA H200", length=8190) is AttentionKernel.CUDNN
    assert chosen("gpu", "NVIDIA H200", length=8192) is AttentionKernel.TRITON
    assert chosen("cpu", "cpu") is AttentionKernel.XLA


def test_auto_takes_xla_where_a_kernel_does_not_fit():
    assert chosen("tpu", "TPU v5 lite", length=4100) is AttentionKernel.XLA
    assert chosen("gpu", "NVIDIA H200", dtype=jnp.float32) is AttentionKernel.XLA
    assert chosen("gpu", "NVIDIA H200", head_width=100) is AttentionKernel.XLA
    assert chosen("gpu", "NVIDIA H200", length=4097) is AttentionKernel.XLA
    assert chosen("gpu", "NVIDIA H200", length=8194) is AttentionKernel.XLA
    assert chosen("gpu", "NVIDIA H200", length=8192, dtype=jnp.float32) is AttentionKernel.XLA
    assert chosen("gpu", "NVIDIA H200", length=8192, head_width=256) is AttentionKernel.XLA


def test_short_sequences_keep_their_mask_unless_devices_share_them():
    assert chosen("cpu", "cpu", length=1024) is None
    assert chosen("cpu", "cpu", length=1024, context=2) is AttentionKernel.XLA
    assert chosen("tpu", "TPU v5 lite", length=1) is None


@pytest.mark.parametrize(
    ("platform", "options", "message"),
    [
        ("tpu", {"attention": AttentionKernel.SPLASH, "length": 100}, "a multiple of 128 tokens, not 100; change"),
        (
            "tpu",
            {"attention": AttentionKernel.CUDNN},
            "compute.attention=cudnn needs a GPU; set compute.attention=auto",
        ),
        ("gpu", {"attention": AttentionKernel.CUDNN, "dtype": jnp.float32}, "cudnn needs bfloat16, .* not float32"),
        ("gpu", {"attention": AttentionKernel.CUDNN, "length": 8192}, "below 8192 .* not bfloat16, 8192 tokens"),
        (
            "cpu",
            {"attention": AttentionKernel.TRITON},
            "compute.attention=triton needs a GPU; set compute.attention=auto",
        ),
        ("gpu", {"attention": AttentionKernel.TRITON, "dtype": jnp.float32}, "triton needs bfloat16, .* not float32"),
        ("gpu", {"attention": AttentionKernel.TRITON, "length": 8200}, "a multiple of 64 tokens .* 8200 tokens"),
        ("gpu", {"attention": AttentionKernel.TRITON, "head_width": 256}, "up to 128, .* heads of 256; set"),
    ],
)
def test_a_kernel_that_cannot_do_it_is_refused(platform, options, message):
    with pytest.raises(UserError, match=message):
        chosen(platform, "some chip", **options)


def test_on_a_gpu_the_lowered_program_calls_cudnn_forward_and_backward(monkeypatch):
    from jax._src.cudnn import fused_attention_stablehlo

    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91000)
    shape = jax.ShapeDtypeStruct((2, LENGTH, 4, 64), jnp.bfloat16)
    rows = jax.ShapeDtypeStruct((2, LENGTH), jnp.int32)

    def total(*inputs):
        return jnp.sum(cudnn_attention(*inputs), dtype=jnp.float32)

    traced = jax.jit(jax.grad(total, argnums=(0, 1, 2))).trace(shape, shape, shape, rows, rows)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    for call in ("__cudnn$fmhaScaleBiasSoftmax", "__cudnn$fmhaScaleBiasSoftmaxBackward"):
        assert f"@{call}(" in text
    assert square_arrays(text, LENGTH)  # the bias


def square_arrays(text, length):
    """Returns the shapes in a lowered program that have two dimensions of at least `length`."""
    shapes = {tuple(map(int, shape.split("x"))) for shape in re.findall(r"tensor<(\d+(?:x\d+)*)x\w+>", text)}
    return [shape for shape in shapes if sum(size >= length for size in shape) > 1]


def test_no_array_of_a_train_step_for_gpus_has_8192_queries_and_as_many_keys(monkeypatch):
    """Rows and heads are sharded over a mesh, as is the state."""
    monkeypatch.setattr(attention_kernels, "target_platform", lambda: "gpu")
    mesh = make_mesh(MeshConfig(data=1, fsdp=2, tensor=2))
    model = ModelConfig(vocab_size=512, width=128, mlp_width=128, num_layers=1, num_heads=2, head_dim=64, loops=2)
    stage = Stage(name="s", steps=2, batch_size=2, sequence_length=8192, loops=2)
    compute = ComputeConfig(dtype=Dtype.BFLOAT16)
    recipe, network = Recipe(name="r", model=model, stages=(stage,), compute=compute), LoopLM(model, compute)
    step = make_train_step(recipe, network, stage, first_step=0, loops=2)
    inputs = abstract_state(recipe, network, stage, mesh), abstract_batch(stage, mesh)
    with use_mesh(mesh):
        traced = jax.jit(step).trace(*inputs)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("custom_call @__gpu$xla.gpu.triton(") >= 3  # forward, and two kernels backward
    assert not square_arrays(text, 8192)
