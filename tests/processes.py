"""Ranks of one process group, as torchrun would start them; what other processes do that import nothing large."""

import os
import socket
import subprocess
import sys
import time


def run_ranks(script, ranks, output, timeout=500, **environment):
    """Run ``script output`` in so many processes on CPUs; one that fails fails the test, with the end of its errors."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    environment = {
        **os.environ, "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port, "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "1", **environment,
    }  # fmt: skip
    environment.pop("PYTEST_XDIST_WORKER", None)
    command = [sys.executable, script, str(output)]
    runs = [
        subprocess.Popen(command, env={**environment, "RANK": str(r), "LOCAL_RANK": str(r)}, stderr=subprocess.PIPE,
                         stdout=subprocess.DEVNULL, text=True)
        for r in range(ranks)
    ]  # fmt: skip
    try:
        errors = [run.communicate(timeout=timeout)[1] for run in runs]
    finally:
        for run in runs:
            run.kill()
    for run, error in zip(runs, errors):
        assert run.returncode == 0, error[-4000:]


def obey(request, say):
    """What the workers of tests/test_bench.py do."""
    say(f"at {request}")
    if request == "crash":
        os._exit(3)
    if request == "hang":
        time.sleep(600)
    if request == "raise":
        raise RuntimeError("an illegal access")
    return request


def make_obedient():
    return obey
