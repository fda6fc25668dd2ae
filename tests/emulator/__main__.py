"""The Triton backend's tests on a GPU that is emulated: what Triton compiles for it is carried out, in numpy.

``make gpu-emulate`` runs the quick ones for each capability, ``ARGS=--everything`` all of them, for hours;
``ARGS="tests/test_frozen.py -k peaks --capabilities 9.0"`` is handed to pytest. The exit status is the verdict.
"""

import argparse
import importlib.metadata
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "dry_run"))
sys.path.insert(1, str(Path(__file__).parents[2]))

import gpu

from fastgrpo.kernels.report import triton_folder

TESTS = Path(__file__).parents[1]
FOLDER = TESTS.parent / "build" / "emulator"
CAPABILITIES = ("8.0", "8.6", "8.9", "9.0", "10.0", "12.0")
FILES = (
    "logprobs", "triton_loss", "objectives", "certified", "frozen", "support", "topk", "lora", "divergence",
    "certified_divergence", "held", "full_kl", "plan", "row_terms",
)  # fmt: skip


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python tests/emulator", description=__doc__)
    parser.add_argument("--triton", default=importlib.metadata.version("triton"), help="its version")
    parser.add_argument("--capabilities", nargs="+", default=CAPABILITIES, choices=CAPABILITIES)
    parser.add_argument(
        "--everything", action="store_true", help=f"all tests of {', '.join(FILES)}, not the quick ones"
    )
    parser.add_argument("--errors", action="store_true", help="ex2 and division off by up to 2^-22, as a GPU's may be")
    options, rest = parser.parse_known_args(argv)
    if not any(".py" in argument and not argument.startswith("-") for argument in rest):
        rest = [*([] if options.everything else ["-m", "quick"]), *rest]
        rest += [str(TESTS / f"test_{name}.py") for name in FILES]
    gpu.build(FOLDER)
    triton_folder(options.triton)
    quietly = len(options.capabilities) > 1
    jobs = [(options.triton, capability, options.errors, rest, quietly) for capability in options.capabilities]
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        failed = [name for name in pool.map(lambda job: run(*job), jobs) if name]
    print(f"emulated: {', '.join(options.capabilities)}; failed: {', '.join(failed) or 'none'}")
    return 1 if failed else 0


def run(triton, capability, errors, arguments, quietly):
    """-> the capability if pytest fails on it. quietly: beside others, so that what it says comes at its end."""
    environment = gpu.environment(FOLDER, triton, capability)
    environment["PYTHONPATH"] += os.pathsep + str(TESTS)
    environment |= {"FASTGRPO_EMULATE": capability, "FASTGRPO_EMULATE_ERRORS": str(int(errors))}
    command = [sys.executable, "-m", "pytest", "-p", "emulator.plugin", *arguments]
    print(f"Triton {triton}, capability {capability}: begins", flush=True)
    done = subprocess.run(command, env=environment, cwd=TESTS.parent, capture_output=quietly, text=True)
    if quietly:
        print(f"Triton {triton}, capability {capability}:", done.stdout, done.stderr, sep="\n", flush=True)
    return capability if done.returncode else None


if __name__ == "__main__":
    sys.exit(main())
