"""The XLA flags of the tests and of the processes that they start."""

# Test programs run only briefly, so compilation dominates. The older emitters of fused loops compile a training step
# about three times as fast as the default ones.
QUICK_TO_COMPILE = "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"


def quick_to_compile(devices: int) -> str:
    """Returns flags for programs on `devices` fake devices of the CPU."""
    return f"--xla_force_host_platform_device_count={devices} {QUICK_TO_COMPILE}"
