"""A GPU that is not there, for which Triton compiles. `make gpu` needs it, too, on a machine that gets no emulator."""

from __future__ import annotations


def pretend(architecture: int) -> None:
    """Tells triton that a GPU of this architecture is there."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime.driver import driver

    class Device:
        def get_current_device(self) -> int:
            return architecture

        def get_current_stream(self, device: int) -> int:
            return 0

        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", architecture, 32)

    driver.set_active(Device())
