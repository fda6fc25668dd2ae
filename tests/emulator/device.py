"""A GPU that computes: the dry run's, whose launches are carried out from the PTX of what Triton compiled."""

import ctypes
import sys
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(1, str(Path(__file__).parents[1] / "dry_run"))

import gpu
import machine
import memory
import ptx

PROCESSORS = 4  # of the GPU that is emulated: grids of as many programs as run at once stay small


class Launch(ctypes.Structure):
    _fields_ = [(name, ctypes.c_uint) for name in ("x", "y", "z", "threads", "threads_y", "threads_z", "shared")]


EXECUTE = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(Launch), ctypes.c_void_p, ctypes.POINTER(ctypes.c_void_p))


def argument(address, width):
    """A kernel's argument as a register; width 0: its address."""
    if width == 0:
        return np.array([address], np.uint64)
    return np.frombuffer(ctypes.string_at(address, width), memory.UNSIGNED[width])


class Emulator(gpu.Gpu):
    """``ran``: {kernel: [launches, programs, seconds]}; ``error``: what went wrong in a launch."""

    def __init__(self, capability):
        super().__init__(capability)
        from triton.compiler.compiler import CompiledKernel

        self.ran, self.sources, self.kernels_by_handle, self.error = {}, {}, {}, None
        start = CompiledKernel._init_handles

        def remember(compiled):
            start(compiled)
            self.sources[compiled.function] = compiled.asm["ptx"]

        CompiledKernel._init_handles = remember
        self.callback = EXECUTE(self.execute)
        self.library.dry_run_execute_with(self.callback)
        np.seterr(all="ignore")

    def patch(self, architecture, processors):
        """Triton may run on a CPU, with the tiles of a GPU."""
        from fastgrpo import backends

        self.as_cuda(architecture, PROCESSORS)
        backends.interpreting = lambda: True

    def execute(self, launch, function, parameters):
        try:
            self.launch(launch[0], function, parameters)
        except BaseException as error:
            self.error = error
            return 1
        return 0

    def launch(self, launch, function, parameters):
        if function not in self.kernels_by_handle:
            self.kernels_by_handle[function] = ptx.Kernel(self.sources[function])
        kernel = self.kernels_by_handle[function]
        arguments = [argument(parameters[k], width) for k, width in enumerate(kernel.parameters)]
        assert launch.threads == kernel.threads, (launch.threads, kernel.threads)
        begin = time.perf_counter()
        grid = launch.x, launch.y, launch.z
        for place in np.ndindex(*grid[::-1]):
            kernel.run(machine.Program(place[::-1], grid, kernel.threads, launch.shared), arguments)
        counts = self.ran.setdefault(kernel.name, [0, 0, 0.0])
        counts[0] += 1
        counts[1] += grid[0] * grid[1] * grid[2]
        counts[2] += time.perf_counter() - begin
