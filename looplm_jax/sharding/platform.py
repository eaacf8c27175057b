"""What the program being traced will run on: the devices of the mesh in use, or those that run by default.

The mesh may be of devices that are not here: a TPU program is traced and compiled on a machine without a TPU.
"""

import jax

from looplm_jax.errors import UserError


def target_platform() -> str:
    """`cpu`, `gpu` or `tpu`."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def target_kind() -> str:
    """The model of the device, such as `TPU v5 lite`."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.local_devices()[0].device_kind if device is None else device.device_kind


def require_platform() -> None:
    """Starts the platform that programs run on.

    Raises:
      UserError: JAX was told to use one that is not here, or that does not start.
    """
    try:
        jax.local_devices()
    except (RuntimeError, AssertionError) as error:
        named = jax.config.values["jax_platforms"]
        reason = " ".join(str(error).split()) or "it is not installed, or has no device"
        raise UserError(
            f"JAX cannot use the platform {named!r} here ({reason}); "
            "set JAX_PLATFORMS to one that is here, such as cpu, or unset it"
        ) from None
