"""The fixed point of a small loop and every gradient through it, from an own reading in float64 NumPy.

`python tests/deq_golden.py` computes data/deq.npz again from the inputs that it holds. Its implicit, phantom and
one-step gradients, the estimate of the Jacobian and the power method equal those of the torchdeq library to 7e-14;
`solver/` holds the residuals of its solvers, iteration by iteration.

The loop is `f(z) = tanh((mix @ z) W + e U + b)` on [B, S, D]; the objective is `sum(cotangent * z_star)`.
`implicit/`, `phantom/kK_tauDAMPING/`, `hutchinson/` (the Frobenius penalty for the direction `v`) and `stars/itersN/`
(the spectral penalty from `v0` after N products) hold gradients with respect to W, U, b and e.
"""

import functools
import pathlib

import numpy as np

_FILE = pathlib.Path(__file__).parent / "data" / "deq.npz"
_INPUTS = ("W", "U", "b", "mix", "e", "cotangent", "hutchinson/v", "stars/v0")
WEIGHTS = ("W", "U", "b", "e")


@functools.cache
def golden_arrays() -> dict[str, np.ndarray]:
    with np.load(_FILE) as arrays:
        return dict(arrays)


def computed(inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Returns all arrays of the file, from its inputs. Those of `solver/`, from the library, are kept."""
    loop, cotangent = _Loop(inputs), inputs["cotangent"]
    arrays = {name: inputs[name] for name in inputs if name in _INPUTS or name.startswith("solver/")}

    states = [np.zeros_like(inputs["e"])]
    while len(states) < 400:
        states.append(loop(states[-1]))
    z = states[-1]
    jacobian = loop.jacobian(z)
    flat = cotangent.reshape(len(z), -1)
    transposed = np.eye(flat.shape[1]) - np.swapaxes(jacobian, 1, 2)
    adjoint = np.linalg.solve(transposed, flat[..., None]).reshape(z.shape)

    arrays |= {
        "states": np.stack(states[:13]),
        "z_star": z,
        "objective": np.sum(cotangent * z),
        "jacobian": jacobian,
        "spectral_radius": np.abs(np.linalg.eigvals(jacobian)).max(axis=-1),
        "spectral_norm": np.linalg.norm(jacobian, 2, axis=(1, 2)),
        "frobenius2_over_n": np.sum(jacobian**2, axis=(1, 2)) / flat.shape[1],
        "adjoint": adjoint,
        "hutchinson/exact": np.mean(np.sum(jacobian**2, axis=(1, 2)) / flat.shape[1]),
    }
    arrays |= _under("implicit", loop.pull(z, adjoint))
    for k in (1, 3, 5):
        for damping in (1.0, 0.5):
            arrays |= _under(f"phantom/k{k}_tau{damping}", loop.phantom(z, cotangent, k, damping))

    direction = inputs["hutchinson/v"]
    value, gradients = loop.power(z, direction, 1, scale=1 / direction.size)
    arrays |= {"hutchinson/value": value} | _under("hutchinson", gradients, "grad_")
    for products in (1, 2, 4, 30):
        value, gradients = loop.power(z, inputs["stars/v0"], products)
        arrays |= {f"stars/iters{products}/value": value} | _under(f"stars/iters{products}", gradients, "grad_")

    return arrays


def _under(name, gradients, prefix=""):
    kept = WEIGHTS if not prefix else WEIGHTS[:3]  # of penalties, those of the parameters
    return {f"{name}/{prefix}{weight}": gradients[weight] for weight in kept}


class _Loop:
    """The loop, its Jacobian, and its gradients by hand."""

    def __init__(self, inputs):
        self.w, self.u, self.b, self.mix, self.e = (inputs[name] for name in ("W", "U", "b", "mix", "e"))

    def __call__(self, z):
        return np.tanh((self.mix @ z) @ self.w + self.e @ self.u + self.b)

    def jacobian(self, z):
        slope = 1 - self(z) ** 2
        whole = np.einsum("bik,ij,dk->bikjd", slope, self.mix, self.w)
        size = slope[0].size
        return whole.reshape(-1, size, size)

    def pull(self, z, cotangent):
        """Returns the product of a cotangent of f(z) with the derivative to every weight, and to z."""
        return self._before_tanh(z, cotangent * (1 - self(z) ** 2))

    def _before_tanh(self, z, cotangent):
        return {
            "W": np.einsum("bid,bik->dk", self.mix @ z, cotangent),
            "U": np.einsum("bid,bik->dk", self.e, cotangent),
            "b": cotangent.sum(axis=(0, 1)),
            "e": cotangent @ self.u.T,
            "z": self.mix.T @ cotangent @ self.w.T,
        }

    def phantom(self, z, cotangent, k, damping):
        states = [z]
        for _ in range(k):
            states.append(damping * self(states[-1]) + (1 - damping) * states[-1])

        total = dict.fromkeys(WEIGHTS, 0.0)
        for state in reversed(states[:-1]):
            step = self.pull(state, damping * cotangent)
            total = {weight: total[weight] + step[weight] for weight in WEIGHTS}
            cotangent = step["z"] + (1 - damping) * cotangent
        return total

    def power(self, z, direction, products, scale=1.0):
        """Returns `scale |v^T J|^2` after some products, with v renormalized between them, and its gradients."""
        output = self(z)
        slope = 1 - output**2
        directions, results = [], []
        for _ in range(products):
            directions.append(direction)
            results.append(self.mix.T @ (direction * slope) @ self.w.T)
            direction = results[-1] / np.linalg.norm(results[-1])

        of_result, total = 2 * scale * results[-1], dict.fromkeys(WEIGHTS, 0.0)
        for index in reversed(range(products)):
            scaled = directions[index] * slope
            of_scaled = self.mix @ of_result @ self.w
            step = self._before_tanh(z, of_scaled * directions[index] * -2 * output * slope)
            step["W"] = step["W"] + np.einsum("bjd,bjk->dk", of_result, self.mix.T @ scaled)
            total = {weight: total[weight] + step[weight] for weight in WEIGHTS}

            of_direction = of_scaled * slope
            if index:
                radial = np.sum(of_direction * directions[index]) * directions[index]
                of_result = (of_direction - radial) / np.linalg.norm(results[index - 1])

        return scale * np.sum(results[-1] ** 2), total


if __name__ == "__main__":
    np.savez_compressed(_FILE, **computed(golden_arrays()))
