"""The platform that the traced program will run on: that of the current mesh, or the default one.

The mesh may consist of devices that this machine does not have: a TPU program can be traced and compiled without a TPU.
"""

import jax

from looplm_jax.errors import UserError


def target_platform() -> str:
    """Returns `cpu`, `gpu` or `tpu`."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    if device is not None:
        return device.platform
    require_platform()
    return jax.default_backend()


def target_kind() -> str:
    """Returns the device kind, such as `TPU v5 lite`."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.local_devices()[0].device_kind if device is None else device.device_kind


def first_device() -> list[jax.Device]:
    """Returns a list of only the first device of this process.

    Raises:
      UserError: its platform does not start.
    """
    require_platform()
    return jax.local_devices()[:1]


def require_platform() -> None:
    """Initializes the platform that programs run on.

    Raises:
      UserError: JAX_PLATFORMS names a platform that is not available or does not start.
    """
    try:
        jax.local_devices()
    except (RuntimeError, AssertionError) as error:
        named = jax.config.values["jax_platforms"]
        reason = " ".join(str(error).split()).partition(" (set JAX_PLATFORMS=")[0]
        raise UserError(
            f"JAX cannot use the platform {named!r} here ({reason or 'it is not installed, or has no device'}); "
            "set JAX_PLATFORMS=cpu, which is always available, or unset it"
        ) from None


def require_compilation() -> None:
    """Checks that programs are compiled, as training, evaluation and the engine require.

    Raises:
      UserError: JAX_DISABLE_JIT is set.
    """
    if jax.config.values["jax_disable_jit"]:
        raise UserError("this command runs compiled programs; unset JAX_DISABLE_JIT")
