"""Compiled programs are read correctly, on text that is short enough to count by hand."""

# ruff: noqa: E501

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from looplm_jax.planning._hlo import array_bytes, parse
from looplm_jax.planning._program_facts import attention_kernel, collectives, custom_calls, matmuls, replica_groups

TEXT = """HloModule jit_train_step, is_scheduled=true

%fused_start (p.1: bf16[8,4]) -> (bf16[8,4], bf16[32,4]) {
  %p.1 = bf16[8,4]{1,0:T(8,128)(2,1)} parameter(0)
  %all-gather.1 = bf16[32,4]{1,0} all-gather(%p.1), channel_id=5, replica_groups=[1,4]<=[4], dimensions={0}
  ROOT %s = (bf16[8,4]{1,0}, bf16[32,4]{1,0}) custom-call(%all-gather.1), custom_call_target="AsyncCollectiveStart"
}

%fused_done (p.2: bf16[8,4]) -> bf16[32,4] {
  %p.2 = bf16[8,4]{1,0} parameter(0)
  ROOT %all-gather.2 = bf16[32,4]{1,0} all-gather(%p.2), channel_id=5, replica_groups=[1,4]<=[4], dimensions={0}
}

%all-reduce-scatter.1 (p.3: f32[64]) -> f32[16] {
  %p.3 = f32[64]{0} parameter(0)
  %all-reduce.3 = f32[64]{0} all-reduce(%p.3), channel_id=7, replica_groups={{0,1,2,3}}, to_apply=%add
  ROOT %ds = f32[16]{0} dynamic-slice(%all-reduce.3), dynamic_slice_sizes={16}
}

%layers_condition (c: (s32[], bf16[8,4])) -> pred[] {
  %limit = s32[]{:T(128)} constant(3)
  %c = (s32[]{:T(128)}, bf16[8,4]{1,0}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%c), index=0
  ROOT %lt = pred[] compare(%i, %limit), direction=LT
}

%layers_body (b: (s32[], bf16[8,4])) -> (s32[], bf16[8,4]) {
  %b = (s32[]{:T(128)}, bf16[8,4]{1,0}) parameter(0)
  %w = bf16[8,4]{1,0} get-tuple-element(%b), index=1
  %fusion.1 = (bf16[8,4]{1,0}, bf16[32,4]{1,0}) fusion(%w), kind=kCustom, calls=%fused_start
  %fusion.2 = bf16[32,4]{1,0} fusion(%w), kind=kCustom, calls=%fused_done
  %splash_mha_fwd.3 = (f32[8,128]{1,0}, /*index=1*/bf16[8,4]{1,0}) custom-call(%w), custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={
"xprof_metadata":"{}"
}}
  %dot.1 = bf16[8,8]{1,0} dot(%w, %w), metadata={op_name="jit(train_step)/LoopLM.loop_step/core/while/body/layers/mlp/up/dot_general"}
  %wide = f32[8,4]{1,0} convert(%w)
  %dot.2 = f32[8]{0} dot(%wide, %wide), metadata={op_name="jit(train_step)/LoopLM.loop/LoopLM.loop_step/gate/dot_general"}
  %dot.3 = f32[8,8]{1,0} dot(%wide, %wide), metadata={op_name="jit(train_step)/LoopLM.loop_step/core/while/body/layers/mlp/down/dot_general"}
  ROOT %out = (s32[]{:T(128)}, bf16[8,4]{1,0}) tuple(%b, %w)
}

%loops_body (d: (s32[], bf16[8,4])) -> (s32[], bf16[8,4]) {
  %d = (s32[], bf16[8,4]{1,0}) parameter(0)
  ROOT %while.1 = (s32[], bf16[8,4]{1,0}) while(%d), condition=%layers_condition, body=%layers_body, metadata={op_name="jit(train_step)/core/while"}
}

ENTRY %main (a: bf16[8,4]) -> f32[16] {
  %a = bf16[8,4]{1,0} parameter(0)
  %g = f32[64]{0} convert(%a)
  %while.2 = (s32[], bf16[8,4]{1,0}) while(%a), condition=%unknown, body=%loops_body, metadata={op_name="jit(train_step)/LoopLM.prefill/while"}, backend_config={"known_trip_count":{"n":"5"}}
  ROOT %reduced = f32[16]{0} fusion(%g), kind=kCustom, calls=%all-reduce-scatter.1
}
"""


def found(text=TEXT, slices=1):
    return {(each.kind, each.between_slices): each for each in collectives(parse(text), 4, slices)}


def test_what_loops_repeat_is_multiplied():
    gather = found()["all-gather", False]
    assert gather.loops == ("loops", "layers")
    assert gather.in_loop_over_t
    assert gather.count == 5 * 3  # once a layer, though two fusions show it
    assert gather.bytes == 15 * (32 * 4 * 2) * 3 // 4  # each device forwards three of four shards
    assert gather.asynchronous


def test_an_all_reduce_of_which_a_share_is_kept_is_a_reduce_scatter():
    scatter = found()["reduce-scatter", False]
    assert (scatter.loops, scatter.count, scatter.bytes) == ((), 1, 64 * 4 * 3 // 4)
    assert not scatter.in_loop_over_t
    assert not scatter.asynchronous
    assert found().keys() == {("all-gather", False), ("reduce-scatter", False)}


def test_what_is_started_and_waited_for_later_is_asynchronous():
    wrapped = """
%async (p.9: f32[64]) -> f32[64] {
  %p.9 = f32[64]{0} parameter(0)
  ROOT %all-reduce.9 = f32[64]{0} all-reduce(%p.9), channel_id=8, replica_groups={{0,1,2,3}}, to_apply=%add
}

ENTRY"""
    started = """
  %sum = ((f32[64]{0}), f32[64]{0}, s32[]) async-start(%g), calls=%async
  %summed = f32[64]{0} async-done(%sum)
  %start = (bf16[8,4]{1,0}, bf16[32,4]{1,0}) all-gather-start(%a), channel_id=10, replica_groups=[1,4]<=[4]
  %done = bf16[32,4]{1,0} all-gather-done(%start)
  %at.once = bf16[32,4]{1,0} all-gather(%a), channel_id=11, replica_groups=[1,4]<=[4], dimensions={0}
"""
    text = TEXT.replace("\nENTRY", wrapped).replace("  %while.2", started + "  %while.2")
    outside = [each for each in collectives(parse(text), 4) if not each.loops]
    assert sorted((each.kind, each.asynchronous, each.count) for each in outside) == [
        ("all-gather", False, 1),
        ("all-gather", True, 1),
        ("all-reduce", True, 1),
        ("reduce-scatter", False, 1),
    ]


@pytest.mark.parametrize(("kind", "shares"), [("ALL_REDUCE", 2 * 2 / 3), ("ALL_GATHER", 2)])
def test_what_goes_from_slice_to_slice(kind, shares):
    """Through the hosts of three slices, a sum sends twice two thirds of a device's bytes; other collectives send all of
    them to two slices."""
    send = (
        "  %send.1 = (f32[96]{0}, u32[], token[]) send(%a, %t), channel_id=9, is_host_transfer=true, "
        f'frontend_attributes={{_xla_megascale_transfer_type="{kind}"}}\n'
    )
    text = TEXT.replace("  %g = f32[64]{0} convert(%a)\n", "  %g = f32[64]{0} convert(%a)\n" + send)
    sent = found(text, slices=3)[kind.lower().replace("_", "-"), True]
    assert (sent.devices, sent.count, sent.bytes) == (3, 1, 96 * 4 * shares)


def test_products_and_kernels():
    program = parse(TEXT)
    products = matmuls(program, "bf16")
    assert products.by_type == {"bf16": 1, "f32": 2}
    assert products.float32_at == ("core/layers/mlp/down/dot_general",)
    assert matmuls(program, "f32").float32_at == ()
    assert attention_kernel(program) == "splash"
    assert custom_calls(program) == ("AsyncCollectiveStart", "splash_mha_fwd")


@pytest.mark.parametrize(
    ("target", "kernel"),
    [
        ("__gpu$xla.gpu.triton", "triton"),
        ("__cudnn$fmhaScaleBiasSoftmaxBackward", "cudnn"),
        ("__cublas$gemm", "xla"),
    ],
)
def test_the_attention_of_a_gpu_is_known_by_what_it_calls(target, kernel):
    text = TEXT.replace("splash_mha_fwd", "pallas_call").replace("tpu_custom_call", target)
    assert attention_kernel(parse(text)) == kernel


def test_bytes_of_shapes():
    assert array_bytes("(f32[2,3]{1,0:T(8,128)}, bf16[]{:T(128)}, pred[7]{0}, token[])") == [24, 2, 7, 0]


@pytest.mark.parametrize(
    ("text", "groups"),
    [
        ("replica_groups={{0,2},{1,3}}, dimensions={0}", ((0, 2), (1, 3))),
        ("replica_groups=[2,2]<=[4], x", ((0, 1), (2, 3))),
        ("replica_groups=[2,2]<=[2,2]T(1,0), x", ((0, 2), (1, 3))),
        ("replica_groups=mesh['a'=2,'b'=2] {'a'}, x", ((0, 2), (1, 3))),
        ("replica_groups=mesh['a'=2,'b'=2] {'a','b'}, x", ((0, 1, 2, 3),)),
        ("source_target_pairs={{0,1},{1,0}}", ((0, 1), (1, 0))),
        ("replica_groups={}, x", ((0, 1, 2, 3),)),
    ],
)
def test_groups_in_every_form(text, groups):
    assert replica_groups(text, 4) == groups


@given(st.lists(st.integers(1, 3), min_size=1, max_size=4), st.data())
def test_groups_of_a_mesh_cover_every_device_once(sizes, data):
    axes = data.draw(st.sets(st.integers(0, len(sizes) - 1), min_size=1))
    mesh = ",".join(f"'axis_{at}'={size}" for at, size in enumerate(sizes))
    exchanging = ",".join(f"'axis_{at}'" for at in sorted(axes))
    groups = replica_groups(f"replica_groups=mesh[{mesh}] {{{exchanging}}}", int(np.prod(sizes)))
    assert sorted(device for group in groups for device in group) == list(range(int(np.prod(sizes))))
    assert {len(group) for group in groups} == {int(np.prod([sizes[at] for at in axes]))}
