"""`load`: from a checkpoint or a Hugging Face folder to a model, with any dtype, on any devices."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hf_folders import GROUPED, write_hf_folder

from looplm_jax import loading
from looplm_jax.config import ComputeConfig, Dtype, MeshConfig
from looplm_jax.convert._import_hf import convert_from_hf
from looplm_jax.errors import UserError
from looplm_jax.halting import FixedLoops
from looplm_jax.inference import generate
from looplm_jax.loading import load, parameter_dtype
from looplm_jax.models._looplm import LoopLM
from looplm_jax.planning._targets import find_target
from looplm_jax.sharding import first_device, make_mesh

pytest.importorskip("tokenizers")
CUBE = MeshConfig(data=2, fsdp=2, tensor=2)


@pytest.fixture(scope="module")
def hf_folder(tmp_path_factory):
    """Returns the folder of a model in bfloat16."""
    folder = tmp_path_factory.mktemp("hf") / "Ouro-tiny"
    write_hf_folder(folder, GROUPED, dtype=jnp.bfloat16)
    return folder


@pytest.fixture(scope="module")
def checkpoint(hf_folder):
    """Returns the same model as a checkpoint of this library."""
    convert_from_hf(hf_folder, hf_folder.parent / "converted")
    return hf_folder.parent / "converted"


def assert_same(actual, wanted):
    assert jax.tree.structure(actual) == jax.tree.structure(wanted)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(wanted), strict=True):
        assert (a.dtype, np.asarray(a).tobytes()) == (b.dtype, np.asarray(b).tobytes())


def test_a_hugging_face_folder_is_its_checkpoint(hf_folder, checkpoint):
    theirs, ours = load(hf_folder), load(checkpoint)
    assert_same(theirs.params, ours.params)
    assert (theirs.recipe.model, theirs.recipe.stages) == (ours.recipe.model, ours.recipe.stages)
    assert (theirs.recipe.name, theirs.step, theirs.warnings) == ("Ouro-tiny", 0, ())
    assert theirs.tokenizer.serialize() == ours.tokenizer.serialize()
    model, params = theirs
    assert model.config == GROUPED
    assert params is theirs.params


@pytest.mark.parametrize("kind", ["hf_folder", "checkpoint"])
@pytest.mark.parametrize("mesh", [None, CUBE], ids=["one device", "eight devices"])
@pytest.mark.parametrize("dtype", [None, jnp.float32, "bfloat16"])
def test_any_type_on_any_devices(request, kind, mesh, dtype):
    path = request.getfixturevalue(kind)
    stored = load(path).params
    loaded = load(path, mesh=mesh, dtype=dtype).params
    assert_same(loaded, jax.tree.map(lambda x: x.astype(dtype or jnp.bfloat16), stored))
    kernel = loaded["core"]["layers"]["mlp"]["up"]["kernel"]
    cut = 1 if mesh is None else 2
    assert kernel.sharding.shard_shape(kernel.shape) == (3, 32 // cut, 48 // cut)


@pytest.mark.parametrize(
    ("dtype", "compute"),
    [
        (jnp.bfloat16, Dtype.FLOAT32),
        (jnp.float16, Dtype.BFLOAT16),
        pytest.param(jnp.bfloat16, Dtype.BFLOAT16, marks=pytest.mark.slow),
        pytest.param(jnp.float16, Dtype.FLOAT32, marks=pytest.mark.slow),
    ],
)
def test_a_model_runs_on_narrow_parameters(hf_folder, compute, dtype):
    """Gate logits are float32 for any parameter dtype, and equal those of the same parameters in float32."""
    narrow = load(hf_folder, dtype=dtype)
    model = LoopLM(narrow.model.config, ComputeConfig(dtype=compute))
    tokens = jnp.arange(12, dtype=jnp.int32).reshape(2, 6)
    out = model.apply({"params": narrow.params}, tokens)
    wide = model.apply({"params": jax.tree.map(lambda x: x.astype(jnp.float32), narrow.params)}, tokens)
    assert out.gate_logits.dtype == jnp.float32
    assert out.hidden.dtype == jnp.dtype(compute.value)
    np.testing.assert_array_equal(out.hidden, wide.hidden)
    np.testing.assert_array_equal(out.gate_logits, wide.gate_logits)


def test_a_loaded_model_generates(hf_folder):
    loaded = load(hf_folder)
    made = generate(*loaded, loaded.tokenizer.encode("to the"), max_new_tokens=3, policy=FixedLoops(loops=2))
    assert len(made.tokens) == 3


def test_a_run_folder_with_safetensors_in_it_is_still_a_run(hf_folder, checkpoint, tmp_path):
    run = shutil.copytree(checkpoint, tmp_path / "run")
    shutil.copy(hf_folder / "model.safetensors", run)
    assert load(run).recipe.name == "Ouro-tiny"


def test_a_hugging_face_folder_has_no_steps(hf_folder):
    with pytest.raises(UserError, match="is a Hugging Face folder, which has no steps; leave step out"):
        load(hf_folder, step=3)


def test_a_folder_of_another_kind(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="is not a checkpoint: expected a run folder"):
        load(tmp_path)


def test_pickled_weights_are_refused_with_the_reason(tmp_path):
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(UserError, match="a pickled file is refused, since reading it runs whatever code its author"):
        load(tmp_path)


def test_a_mesh_that_does_not_fit(hf_folder, checkpoint):
    for path in (hf_folder, checkpoint):
        with pytest.raises(UserError, match=r"mesh\.tensor=8 does not divide model\.num_heads=4"):
            load(path, mesh=MeshConfig(tensor=8))


@pytest.mark.parametrize(
    ("compute", "held"), [(Dtype.AUTO, "bfloat16"), (Dtype.BFLOAT16, "bfloat16"), (Dtype.FLOAT32, "float32")]
)
def test_an_accelerator_holds_parameters_in_the_type_of_its_products(compute, held):
    pytest.importorskip("libtpu", reason="the TPU compiler (libtpu) is not installed")
    mesh = make_mesh(MeshConfig(), find_target("v5e:1x1").devices)
    assert parameter_dtype(None, ComputeConfig(dtype=compute), mesh) == jnp.dtype(held)
    assert parameter_dtype("float32", ComputeConfig(dtype=compute), mesh) == jnp.float32
    with pytest.raises(UserError, match=r"^a TPU has no float16; choose float32 or bfloat16$"):
        parameter_dtype(jnp.float16, ComputeConfig(dtype=compute), mesh)


def test_an_accelerator_holds_the_gate_as_it_is_stored(tmp_path, monkeypatch):
    write_hf_folder(tmp_path / "hf", GROUPED, dtype=jnp.float32)
    convert_from_hf(tmp_path / "hf", tmp_path / "run")
    stored = load(tmp_path / "hf").params
    monkeypatch.setattr(loading, "parameter_dtype", lambda dtype, *_: jnp.dtype(dtype or jnp.bfloat16))
    narrow = jax.tree.map(lambda x: x.astype(jnp.bfloat16), stored)

    for path in (tmp_path / "hf", tmp_path / "run"):
        assert_same(load(path).params, {**narrow, "gate": stored["gate"]})
        assert_same(load(path, dtype=jnp.bfloat16).params, narrow)


def test_a_cpu_holds_them_as_they_are_stored():
    assert parameter_dtype(None, ComputeConfig(), make_mesh(MeshConfig(), first_device())) is None


@pytest.mark.parametrize("dtype", ["float64", jnp.int8, "float8_e4m3fn", "brain"])
def test_parameters_are_of_three_types(hf_folder, checkpoint, dtype):
    name = dtype if isinstance(dtype, str) else "int8"
    for path in (hf_folder, checkpoint):
        with pytest.raises(
            UserError, match=rf"^dtype '{name}' is not for parameters; choose float32 or bfloat16 or float16$"
        ):
            load(path, dtype=dtype)
