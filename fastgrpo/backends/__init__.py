"""Two backends behind one interface, with these functions.

Of one head: ``forward(problem)``, ``partial_forward(problem)`` (what it combines), ``certified_forward(...)``,
``certified_partial_forward(...)``, ``certificate_like(problem)`` of their certificates, ``certified_backward(...)``,
``frozen_forward(...)``, ``slopes_like(problem)`` of what it keeps, ``backward(...)``, ``kept_logits(...)`` and
``kept_sums(...)`` (of fastgrpo/support.py), ``counted_rows(targets)`` (None where the host would have to wait),
``objective(...)``, and ``GUESSES_PEAKS`` (whether a certified forward's sums of exponentials may leave the trusted
range).

Of a divergence's two: ``divergence_forward(problem)``, ``certified_divergence_forward(...)``, and where
:func:`fastgrpo.divergence.choose_strategy` takes their strategies ``frozen_divergence_forward(...)`` with
``divergence_slopes_like(problem)``, ``trained_divergence_forward(...)``. Of vocabulary shards
``divergence_partials(problem)``, ``mixture_sums(...)``, ``certified_partials(...)``.
"""

import importlib
import os

import torch

from fastgrpo.inputs import BACKENDS, check_choice


def interpreting():
    """Whether Triton kernels run in its interpreter, the only way they run on a CPU."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def has_triton():
    return importlib.util.find_spec("triton") is not None


def choose(backend, hidden):
    """The name of the backend for this tensor.

    Raises:
        ValueError: if "triton" is asked for where it cannot run.
    """
    check_choice("backend", backend, BACKENDS)
    runs_on = hidden.is_cuda or (hidden.device.type == "cpu" and interpreting())
    if backend == "auto":
        return "triton" if hidden.is_cuda and has_triton() and hidden.dtype != torch.float64 else "torch"
    if backend == "triton":
        if not has_triton():
            raise ValueError("backend must be 'torch' or 'auto' where triton is not installed, got 'triton'")
        if hidden.dtype == torch.float64:
            raise ValueError("backend must be 'torch' or 'auto' for float64 hidden, got 'triton'")
        if not runs_on:
            raise ValueError(
                f"backend='triton' needs hidden on a GPU, got {hidden.device} "
                "(TRITON_INTERPRET=1 runs the kernels on a CPU, slowly, for tests)"
            )
    return backend


def load(name):
    """The backend's module; Triton is imported here, on first use."""
    return importlib.import_module(f"fastgrpo.backends.{name}_backend")
