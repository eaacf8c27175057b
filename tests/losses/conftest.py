"""The precisions in which losses are compared with their goldens."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest


@dataclasses.dataclass(frozen=True)
class Precision:
    dtype: str
    rtol: float
    atol: float

    def arrays(self, values: dict[str, np.ndarray]) -> dict[str, jax.Array]:
        """Returns JAX arrays: floats in this precision, whole numbers as they are."""
        return {
            name: jnp.asarray(value, self.dtype if value.dtype.kind == "f" else value.dtype)
            for name, value in values.items()
        }

    def assert_close(self, ours: jax.Array, golden: np.ndarray) -> None:
        if golden.dtype.kind == "f":
            assert ours.dtype == self.dtype
        np.testing.assert_allclose(ours, golden, rtol=self.rtol, atol=self.atol)


@pytest.fixture(params=["float32", "float64"])
def precision(request):
    with jax.enable_x64(request.param == "float64"):
        yield (
            Precision("float32", rtol=2e-5, atol=1e-6)
            if request.param == "float32"
            else Precision("float64", rtol=1e-10, atol=1e-10)
        )
