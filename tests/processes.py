"""Ranks of one process group, as torchrun would start them; what other processes do that import nothing large."""

import contextlib
import importlib
import os
import signal
import socket
import subprocess
import sys
import time
import traceback
from pathlib import Path


def run_ranks(script, ranks, output, timeout=500, **environment):
    """Run ``main(output)`` of a script beside this file in so many processes on CPUs; one that fails fails the test,
    with the end of its errors."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    environment = {
        **os.environ, "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port, "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "1", **environment,
    }  # fmt: skip
    environment.pop("PYTEST_XDIST_WORKER", None)
    command = [sys.executable, __file__, Path(script).stem, str(ranks), str(output)]
    run = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True,
                           start_new_session=True)  # fmt: skip
    try:
        errors = run.communicate(timeout=timeout)[1]
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(run.pid, signal.SIGKILL)
    assert run.returncode == 0, errors[-4000:]


def fork_ranks(name, ranks, output):
    """Imports once what every rank needs, which takes longer than most of them run."""
    main = importlib.import_module(name).main
    running = {fork_rank(main, output, rank) for rank in range(ranks)}
    while running:
        ended, failed = os.wait()
        running.remove(ended)
        if failed:
            for rank in running:  # they would wait for it
                os.kill(rank, signal.SIGKILL)
            sys.exit(1)


def fork_rank(main, output, rank):
    """-> the process that does it."""
    if child := os.fork():
        return child
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    failed = True
    try:
        main(output)
        failed = False
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(failed)


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


if __name__ == "__main__":
    fork_ranks(sys.argv[1], int(sys.argv[2]), sys.argv[3])
