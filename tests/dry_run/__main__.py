"""Everything of the Triton backend but its execution, without a GPU: bind, compile, load and launch every kernel.

``make gpu-dry-run`` (``TRITON=3.6.0`` picks one version). Triton's own JIT runs over a libcuda that executes nothing,
for each version of Triton and each compute capability, driven by the public functions. Fails on an exception, a
launch too many, one bound again where only its chunk changed, one that Triton's launch hook does not see, or a
compilation where only the batch changed. The exit status is the verdict.
"""

import argparse
import json
import os
import subprocess
import sys
import traceback
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(1, str(Path(__file__).parents[2]))

import gpu

from fastgrpo.kernels.report import triton_folder

VERSIONS = ("3.4.0", "3.5.1", "3.6.0", "3.7.1", "3.8.0", "3.9.0")
FOLDER = Path(__file__).parents[2] / "build" / "dry-run"


def judge(device, case):
    """Run one case; -> its row."""
    wrong = []
    try:
        with device.counting() as count:
            case.run()
    except Exception as error:
        wrong.append(f"{type(error).__name__}: {error}")
        traceback.print_exc()
        count.launches = count.compiles = 0
    else:
        if case.launches is not None and count.launches > case.launches:
            wrong.append(f"{count.launches} launches, documented {case.launches}")
        if case.compiles is not None and count.compiles > case.compiles:
            wrong.append(f"{count.compiles} compilations, expected {case.compiles}")
        if case.bound is not None and count.bound > case.bound:
            wrong.append(f"{count.bound} launches bound, expected {case.bound}")
        if count.hooked != count.launches:
            wrong.append(f"{count.hooked} of {count.launches} launches seen by Triton's hook")
    return {"case": case.name, "launches": count.launches, "compiles": count.compiles, "wrong": wrong}


def child(capability, everything):
    """Run the matrix in this process; a JSON object a case on stdout."""
    import matrix
    import triton

    device = gpu.Gpu(capability)
    for case in matrix.cases(everything):
        print(json.dumps(judge(device, case)), flush=True)
    missing = [name for name, variants in device.compiled.items() if not variants]
    wrong = [f"never launched: {', '.join(missing)}"] if missing else []
    wrong += [f"{device.bad_launches} launches that no GPU takes"] if device.bad_launches else []
    last = {"case": f"all kernels, Triton {triton.__version__}", "compiles": 0, "launches": 0, "wrong": wrong}
    print(json.dumps(last))


def run(version, capability, everything, verbose):
    """-> rows of the child process for one Triton and one capability; a crash is a row too."""
    environment = gpu.environment(FOLDER, version, capability)
    command = [sys.executable, str(Path(__file__).parent), "--child", capability]
    command += ["--everything"] if everything else []
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    used = f"Triton {version}"
    if done.returncode or not rows or used not in rows[-1]["case"]:
        wrong = [f"exit status {done.returncode} after {len(rows)} cases: {done.stderr.strip()[-1500:]}"]
        rows.append({"case": used, "launches": 0, "compiles": 0, "wrong": wrong})
    failed = [row for row in rows if row["wrong"]]
    state = f"{len(failed)} FAILED" if failed else "ok"
    print(f"Triton {version}, capability {capability}: {len(rows)} cases, {sum(r['launches'] for r in rows)} launches, "
          f"{sum(r['compiles'] for r in rows)} compilations, {state}", flush=True)  # fmt: skip
    for row in rows if verbose else failed:
        print("   ", "FAILED" if row["wrong"] else "ok", row["case"], *row["wrong"], row["launches"], row["compiles"])
    if failed and verbose:
        print(done.stderr)
    return rows


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python tests/dry_run", description=__doc__)
    parser.add_argument("--triton", nargs="+", default=VERSIONS, choices=VERSIONS)
    parser.add_argument("--capabilities", nargs="+", default=list(gpu.DEVICES), choices=list(gpu.DEVICES))
    parser.add_argument("--verbose", action="store_true", help="every case, and tracebacks")
    parser.add_argument("--child", choices=list(gpu.DEVICES), help=argparse.SUPPRESS)
    parser.add_argument("--everything", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.child:
        child(options.child, options.everything)
        return 0
    gpu.build(FOLDER)
    for version in options.triton:
        triton_folder(version)  # installed before any is run
    jobs = [(v, c, c == "9.0", options.verbose) for c in options.capabilities for v in options.triton]
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        rows = [row for result in pool.map(lambda job: run(*job), jobs) for row in result]
    failures = sum(bool(row["wrong"]) for row in rows)
    print(f"{len(jobs)} dry runs, {len(rows)} cases, {sum(r['launches'] for r in rows)} launches, "
          f"{sum(r['compiles'] for r in rows)} compilations, {failures} failures")  # fmt: skip
    return 1 if failures or not rows else 0


if __name__ == "__main__":
    sys.exit(main())
