"""A GPU of any capability that is not there: Triton and fastgrpo go through every step but the execution."""

import contextlib
import ctypes
import os
import subprocess
import types
from pathlib import Path

import torch

from fastgrpo.kernels import report

HERE = Path(__file__).parent
# shared memory a block and processors, of A100, RTX 3090, RTX 4090, H200, B200, RTX 5090
DEVICES = {
    "8.0": (166912, 108), "8.6": (101376, 82), "8.9": (101376, 128), "9.0": (232448, 132), "10.0": (232448, 148),
    "12.0": (101376, 170),
}  # fmt: skip


def environment(folder, version, capability):
    """What a process must be started with to find the libcuda built in ``folder`` and the Triton asked for."""
    shared, processors = DEVICES[capability]
    inherited = report.environment(version)
    return {
        **inherited,
        "LD_LIBRARY_PATH": os.pathsep.join(filter(None, (str(folder), inherited.get("LD_LIBRARY_PATH")))),
        "TRITON_LIBCUDA_PATH": str(folder),
        "PYTHONPATH": os.pathsep.join(filter(None, (inherited["PYTHONPATH"], str(HERE.parents[1])))),
        "DRY_RUN_SHARED": str(shared),
        "DRY_RUN_PROCESSORS": str(processors),
        "OMP_NUM_THREADS": "1",
    }  # fmt: skip


def build(folder):
    folder.mkdir(parents=True, exist_ok=True)
    command = ["gcc", "-shared", "-fPIC", "-Wall", "-o", folder / "libcuda.so.1", HERE / "libcuda.c"]
    subprocess.run(command, check=True)
    link = folder / "libcuda.so"
    link.unlink(missing_ok=True)
    link.symlink_to("libcuda.so.1")


class Gpu:
    """Counts what the process it is made in launches and compiles."""

    def __init__(self, capability):
        import triton
        from triton.backends.nvidia import driver as nvidia

        major, minor = map(int, capability.split("."))

        class Driver(nvidia.CudaDriver):
            def __init__(self):
                self.utils, self.launcher_cls = nvidia.CudaUtils(), nvidia.CudaLauncher
                self.get_device_capability = lambda device=None: (major, minor)
                self.get_current_stream = lambda device=None: 0
                self.get_current_device = lambda: 0
                self.set_current_device = lambda device: None

            @staticmethod
            def is_active():
                return True

        triton.runtime.driver.set_active(Driver())
        self.bound = self.hooked = 0
        self.watch_launches()
        self.library = ctypes.CDLL("libcuda.so.1")
        for name in ("launches", "bad_launches"):
            getattr(self.library, f"dry_run_{name}").restype = ctypes.c_long
        self.kernels = {name: kernel for _, name, kernel in report.all_kernels()}
        self.patch(f"sm_{major}{minor}", DEVICES[capability][1])

    def watch_launches(self):
        """Count those whose arguments are bound, and those that a profiler would see."""
        from triton import knobs
        from triton.runtime.jit import JITFunction

        run = JITFunction.run

        def bind(kernel, *args, warmup, **kwargs):
            self.bound += not warmup
            return run(kernel, *args, warmup=warmup, **kwargs)

        def hook(metadata):
            self.hooked += 1

        JITFunction.run = bind
        if knobs.runtime.launch_enter_hook is None:  # Triton 3.4
            knobs.runtime.launch_enter_hook = hook
        else:
            knobs.runtime.launch_enter_hook.add(hook)

    def as_cuda(self, architecture, processors):
        """CPU tensors take the kernels of CUDA ones."""
        from fastgrpo import lora
        from fastgrpo.kernels import grids, tiles

        lora.has_native = lambda hidden: True
        lora.mm16 = lambda a, b: a.float() @ b.float()
        tiles.architecture = lambda device: architecture
        grids.processor_count = lambda device: processors

    def patch(self, architecture, processors):
        """CPU tensors take the branches of CUDA ones, and a launch that does nothing leaves plausible results."""
        from fastgrpo import backends, inputs
        from fastgrpo.kernels import certified_divergence, forward, row_order

        self.as_cuda(architecture, processors)
        backends.choose = lambda backend, hidden: "triton"
        inputs.checks_values = lambda device: False
        run_forward, run_certified = forward.run_forward, forward.run_certified

        def filled(*args, stats=None, merged=None, **kwargs):
            run_forward(*args, stats=stats, merged=merged, **kwargs)
            (merged if stats is None else stats).fill_(0.1)

        def certified(*args, **kwargs):
            certificate = run_certified(*args, **kwargs)
            g = torch.Generator().manual_seed(0)
            certificate.flags.copy_(torch.rand(certificate.flags.shape, generator=g) < 0.05)  # one bit of some words
            certificate.dropped.copy_(1e-4 * torch.rand(certificate.dropped.shape, generator=g))
            certificate.dropped[::97] = torch.inf
            return certificate

        def ordered(*args, **kwargs):
            order, *rest = row_order.order_rows(*args, **kwargs)
            return order.copy_(torch.arange(order.numel())), *rest

        forward.run_forward, forward.run_certified = filled, certified
        forward.order_rows = certified_divergence.order_rows = ordered

    @property
    def launches(self):
        return self.library.dry_run_launches()

    @property
    def bad_launches(self):
        return self.library.dry_run_bad_launches()

    @property
    def compiled(self):
        """{kernel: variants the JIT has in its cache}."""
        return {name: sum(len(cache[0]) for cache in k.device_caches.values()) for name, k in self.kernels.items()}

    @contextlib.contextmanager
    def counting(self):
        """-> .launches, .compiles, .bound, .hooked once left."""
        before, count = self.counts, types.SimpleNamespace()
        yield count
        vars(count).update({name: number - before[name] for name, number in self.counts.items()})

    @property
    def counts(self):
        compiles = sum(self.compiled.values())
        return {"launches": self.launches, "compiles": compiles, "bound": self.bound, "hooked": self.hooked}
