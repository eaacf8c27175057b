"""The computation of a stage: dtypes, kernels, rematerialization, collectives, meshes and settings of topologies."""

import dataclasses
import enum
import re

from looplm_jax._config_fields import check_kinds as _check_kinds
from looplm_jax._config_fields import field as _field
from looplm_jax._config_fields import require as _require
from looplm_jax.errors import UserError

# For example v5e:16x16, 2 x v5p:4x8x8, cpu:8.
_TOPOLOGY = re.compile(r"(?:[1-9]\d* x )?[a-z][a-z0-9-]*:[1-9]\d*(?:x[1-9]\d*)*")


# Choices


class Dtype(enum.Enum):
    """The dtype of matrix products. `auto` is bfloat16 on TPU and GPU, and float32 on CPU."""

    AUTO = "auto"
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"


class AttentionKernel(enum.Enum):
    """The implementation of self-attention: XLA, the splash kernel on TPU, or the cuDNN or Triton kernel on GPU.

    `auto` selects splash on TPU if the shapes allow it. On GPU, if shapes and dtype allow it, it selects cuDNN below
    8,192 tokens and Triton from there on. Otherwise it selects XLA.
    """

    AUTO = "auto"
    XLA = "xla"
    SPLASH = "splash"
    CUDNN = "cudnn"
    TRITON = "triton"


class Remat(enum.Enum):
    """The values that the backward pass recomputes: none, all except matrix products, each layer, or each whole loop.

    `save_qkv` recomputes each layer except queries, keys, values and the outputs of attention and feed-forward.
    `save_outputs` saves only the two outputs. `offload` recomputes each layer from its input, which is kept in host
    memory.
    """

    NONE = "none"
    DOTS = "dots"
    SAVE_QKV = "save_qkv"
    SAVE_OUTPUTS = "save_outputs"
    LAYER = "layer"
    LOOP = "loop"
    OFFLOAD = "offload"


class Gather(enum.Enum):
    """The frequency of all-gathering sharded parameters: for each layer of each loop, or once per step.

    All loops use the same weights. `per_step` divides the communication by the number of loops, and holds a whole copy
    during the step.
    """

    PER_LAYER = "per_layer"
    PER_STEP = "per_step"


class Reduce(enum.Enum):
    """The frequency of summing gradients over devices: in every loop of the model, per microbatch, or per step.

    `microbatch` and `step` hold the gradient of all parameters on every device, and need `gather=per_step`. The
    gradient is in the dtype of the matrix products for `microbatch` and in float32 for `step`. `auto` is `step` if each
    device holds all parameters anyway, and `loop` if they are sharded.
    """

    AUTO = "auto"
    LOOP = "loop"
    MICROBATCH = "microbatch"
    STEP = "step"


# Settings


@dataclasses.dataclass(frozen=True, kw_only=True)
class ComputeConfig:
    """The computation of the model: dtype, attention kernel, rematerialization and collectives.

    No field changes the contents of a checkpoint.
    """

    # Arithmetic.
    dtype: Dtype = _field("dtype of matrix products; parameters stay float32", Dtype.AUTO)
    attention: AttentionKernel = _field("implementation of self-attention", AttentionKernel.AUTO)
    # Memory and communication.
    remat: Remat = _field("what the backward pass recomputes", Remat.LAYER)
    gather: Gather = _field("when sharded parameters are all-gathered", Gather.PER_LAYER)
    reduce: Reduce = _field("when gradients are summed over devices", Reduce.AUTO)
    loss_chunk: int = _field("positions whose logits are computed at a time", 128)

    def __post_init__(self) -> None:
        _check_kinds(self, "compute")
        _require(
            self.reduce in (Reduce.AUTO, Reduce.LOOP) or self.gather is Gather.PER_STEP,
            f"compute.reduce={self.reduce.value} needs whole parameters on every device; "
            "set compute.gather=per_step, or compute.reduce=loop",
        )
        _require(self.loss_chunk >= 1, f"compute.loss_chunk must be at least 1, not {self.loss_chunk}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """The number of devices along each axis of the mesh.

    The product must be the number of devices. One axis may be -1, which takes the remaining devices.
    """

    data: int = _field("copies of the model, each with a shard of the batch", -1)
    fsdp: int = _field("shards of the parameters, each with a shard of the batch", 1)
    tensor: int = _field("shards of heads, feed-forward width and vocabulary", 1)
    context: int = _field("shards of each sequence, which also shard the parameters", 1)

    def __post_init__(self) -> None:
        _check_kinds(self, "mesh")
        sizes = dataclasses.asdict(self)
        for name, size in sizes.items():
            _require(
                size == -1 or size >= 1, f"mesh.{name} must be at least 1, or -1 for all that are left, not {size}"
            )
        # Two open axes would have more than one solution.
        _require(list(sizes.values()).count(-1) <= 1, "only one axis of mesh may be -1")

    def with_context(self, context: int) -> "MeshConfig":
        """Returns a mesh of the same devices in which `context` devices share a sequence.

        The devices are taken from `fsdp`, or else from `data`. Parameters are sharded over `fsdp` and `context` alike,
        so devices from `fsdp` move no parameter. An axis of -1 adapts by itself.

        Raises:
          UserError: neither axis has enough devices.
        """
        # An axis of -1 takes the devices that remain.
        if -1 in dataclasses.asdict(self).values():
            return dataclasses.replace(self, context=context)

        # Devices that share a sequence now are free for the new number.
        for name in ("fsdp", "data"):
            size = getattr(self, name) * self.context
            if size % context == 0:
                return dataclasses.replace(self, **{name: size // context}, context=context)

        raise UserError(
            f"{context} devices cannot share a sequence: neither mesh.fsdp={self.fsdp} nor mesh.data={self.data} "
            "divides; change one of them, or the context of the stage"
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class TopologySettings:
    """The settings of a stage for one topology, which replace the recipe's `mesh` and `compute`.

    Nothing here changes what is trained: the results are the same to rounding.
    """

    topology: str = _field("devices as `looplm plan` names them, such as v5e:16x16, 2 x v5p:4x8x8 or cpu:8")
    accumulation: int = _field("microbatches of a step")
    mesh: MeshConfig
    compute: ComputeConfig

    def __post_init__(self) -> None:
        _check_kinds(self, "settings")
        _require(
            _TOPOLOGY.fullmatch(self.topology) is not None,
            f"settings.topology must look like v5e:16x16, 2 x v5p:4x8x8 or cpu:8, not {self.topology!r}",
        )
        _require(
            self.accumulation >= 1,
            f"settings.{self.topology}.accumulation must be at least 1, not {self.accumulation}",
        )
