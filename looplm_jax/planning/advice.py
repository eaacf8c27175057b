"""What to change about a stage that does not fit, or that waits for the links."""

from collections.abc import Iterator, Sequence

from jax.sharding import Mesh

from looplm_jax.config import Gather, Recipe, Reduce, Remat, Stage
from looplm_jax.planning.collectives import Collective
from looplm_jax.planning.memory import Memory

_MUCH = 0.5  # of the memory: what takes more should be spread over more devices


def advice(
    recipe: Recipe, stage: Stage, mesh: Mesh, memory: Memory, exchanges: Sequence[Collective], *, fits: bool
) -> tuple[str, ...]:
    """Flags to type, the cheapest change first; empty where nothing need change."""
    return tuple(_to_send_less(mesh, exchanges) if fits else _to_fit(recipe, stage, mesh, memory))


def _to_fit(recipe: Recipe, stage: Stage, mesh: Mesh, memory: Memory) -> Iterator[str]:
    compute, shares = recipe.compute_of(stage), mesh.shape["data"] * mesh.shape["fsdp"]
    if compute.reduce is Reduce.STEP:
        yield "hold gradients in the type of the matrix products: --compute.reduce microbatch"
    elif compute.reduce is Reduce.MICROBATCH:
        yield "hold the shards of gradients alone: --compute.reduce loop"
    elif compute.gather is Gather.PER_STEP:
        yield "gather the weights of each layer when it runs: --compute.gather per_layer"
    if compute.remat in (Remat.NONE, Remat.DOTS, Remat.SAVE_QKV, Remat.SAVE_OUTPUTS):
        yield "compute the layers again in the backward pass: --compute.remat layer"
    parts = next_accumulation(stage, shares)
    if parts is not None:
        yield f"cut the batch into more parts: --stages.{stage.name}.accumulation {parts}"
    state = memory.parameters + memory.optimizer
    if mesh.shape["data"] > 1 and memory.capacity and state > _MUCH * memory.capacity:
        yield "spread the parameters over all devices: --mesh.data 1 --mesh.fsdp -1"
    if parts is None and compute.remat is Remat.LAYER:
        yield "keep what layers start from in the memory of the host: --compute.remat offload"
    if parts is None:
        more = 2 * mesh.shape["context"]
        yield f"let {more} devices share each sequence: --stages.{stage.name}.context {more}"


def _to_send_less(mesh: Mesh, exchanges: Sequence[Collective]) -> Iterator[str]:
    gathered = any(each.between_slices and each.in_loop_over_t and each.kind == "all-gather" for each in exchanges)
    if gathered and mesh.shape["data"] == 1:
        yield "every loop sends weights from slice to slice; keep them within one: --mesh.data SLICES --mesh.fsdp -1"


def next_accumulation(stage: Stage, shares: int) -> int | None:
    """The next number of parts that divides the batch into parts that `shares` devices can share; None: no more."""
    bigger = range(stage.accumulation + 1, stage.batch_size // shares + 1)
    return next((parts for parts in bigger if stage.batch_size % (parts * shares) == 0), None)
