"""Compile every kernel with every tile we ship, for every architecture, without a GPU; fail on a spill, or where a
ceiling on tensor-core use is lower than the one committed (:mod:`fastgrpo.kernels.ceilings`).

``python -m fastgrpo.kernels.report`` (``make kernel-report``). The launchers run on meta tensors with the kernels
replaced by recorders, and Triton's own binder decides what to compile for their arguments, so it is exactly what they
launch. One process an architecture and version of Triton: an LLVM abort takes only its own down.
"""

import argparse
import contextlib
import dataclasses
import importlib.metadata
import json
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from fastgrpo.kernels import ceilings

SHARED_LIMIT = {
    "sm_80": 166912, "sm_86": 101376, "sm_89": 101376, "sm_90": 232448, "sm_100": 232448, "sm_120": 101376,
    "gfx942": 65536,
}  # fmt: skip
GEMMS = tuple(f"{name}_kernel" for name in (
    "forward", "masses", "dlogits", "dhidden", "dweight", "forward_pair", "dlogits_pair"))  # fmt: skip
TENSOR_CORE = re.compile(r"\b(?:mma\.sync|wgmma\.mma_async|tcgen05\.mma)\b|\bv_mfma_")  # in PTX, in AMD's assembly
N, V, RANK, TAKEN = 4096, 152064, 16, 20
DEPTHS = (896, 1536, 2048, 3584, 4096, 5120)  # widths of models
FLOAT16 = ("sm_80", "sm_90")
OTHER_TRITON = "3.6.0"  # what torch 2.10 and 2.11 ship, beside the environment's own


def triton_folder(version):
    """Where a Triton beside the environment's own lies, installed on first use; None for that one."""
    if version == importlib.metadata.version("triton"):
        return None
    folder = Path(sys.prefix) / f"triton-{version}"
    if not (folder / "triton" / "__init__.py").exists():
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", folder]
        subprocess.run([*command, f"triton=={version}"], check=True)
    return folder


def problems(depth, architecture, chunked):
    """-> label, HeadProblem on the meta device, needed gradients."""
    import torch

    from fastgrpo.backends.problem import Gradients, HeadParams, HeadProblem
    from fastgrpo.kernels import tiles

    def make(dtype, full, entropy=False, lora=False, rows=N, workspace=2**27, padding=0, taken=None):
        def empty(*shape, dtype=dtype):
            return torch.empty(shape, dtype=dtype, device="meta")

        params = HeadParams(
            temperature=None if full else 0.7, softcap=30.0 if full else None, logit_scale=0.5 if full else 1.0,
            compute_dtype=dtype, lora_dtype=dtype, entropy=full or entropy, backend="triton", workspace=workspace,
        )  # fmt: skip
        return HeadProblem(
            empty(1, rows, depth), empty(V, depth + padding)[:, :depth], empty(V) if full else None,
            empty(rows, dtype=torch.int64),
            empty(rows, dtype=torch.float32) if full else None, params,
            empty(1, rows, RANK, dtype=torch.float32) if full or lora else None,
            empty(V, RANK) if full or lora else None,
            taken and empty(rows, taken, dtype=torch.int64),
        )  # fmt: skip

    half = (torch.float16,) if architecture in FLOAT16 else ()  # elsewhere bfloat16 stands for it
    for dtype in (torch.bfloat16, *half, torch.float32):
        name = str(dtype).removeprefix("torch.")
        yield f"{name}", make(dtype, full=False), Gradients(True, True)
        yield f"{name} all options", make(dtype, full=True), Gradients(*[True] * 5)
        yield f"{name} top-k", make(dtype, full=False, taken=TAKEN), Gradients(True, True)
        yield f"{name} all options, top-k", make(dtype, full=True, taken=TAKEN), Gradients(*[True] * 5)
        yield f"{name} LoRA", make(dtype, full=False, lora=True), Gradients(True, False, low=True, up=True)
        described = "forward" in tiles.DESCRIBED.get(architecture, ())
        if dtype == torch.bfloat16 and described:  # what descriptors cannot read
            yield f"{name} by pointers", make(dtype, full=False, padding=1), Gradients(True, True)
            yield f"{name} all options, by pointers", make(dtype, full=True, padding=1), Gradients(*[True] * 5)
        if dtype == torch.bfloat16:
            yield f"{name} entropy", make(dtype, full=False, entropy=True), Gradients(False, False)
            yield f"{name} frozen head", make(dtype, full=False), Gradients(True, False)
            if chunked:  # hundreds of launches
                yield f"{name} row chunks", make(dtype, full=False, rows=8 * N, workspace=2**25), Gradients(False, True)


def pairs(label, problem):
    """-> label, PairProblem: of what is compiled for one head, a choice beside a teacher of half the width."""
    from fastgrpo.backends.pair import PairParams, PairProblem
    from fastgrpo.kernels import tiles

    own, half = {f.name: getattr(problem, f.name) for f in dataclasses.fields(problem)}, problem.hidden.shape[-1] // 2
    params = vars(own.pop("params"))
    teacher = {"teacher_hidden": problem.hidden[..., :half], "teacher_weight": problem.weight[:, :half]}
    alike = {f"teacher_{name}": params[name] for name in ("softcap", "logit_scale", "compute_dtype")}
    betas = {"bfloat16": (0.0, 0.3, 1.0), "bfloat16 all options": (0.3, 1.0), "bfloat16 LoRA": (1.0,),
             "bfloat16 by pointers": (0.0, 0.3, 1.0), "bfloat16 all options, by pointers": (0.3, 1.0),
             "float32": (1.0,), "float32 all options": (0.3,)}  # fmt: skip
    for beta in betas.get(label, ()):
        pair = PairParams(**params, **alike, beta=beta)
        yield f"{label}, beta {beta}", PairProblem(**own, params=pair, **teacher, teacher_bias=problem.bias)
        if label == "bfloat16":  # a teacher that descriptors cannot read, one of another dtype
            padded = teacher | {"teacher_weight": problem.weight.new_empty(V, half + 1)[:, :half]}
            if tiles.has_descriptors(problem.weight.device, "forward_pair"):
                yield f"{label}, beta {beta}, padded teacher", PairProblem(**own, params=pair, **padded)
            wide = {name: x.float() for name, x in teacher.items()}
            pair = dataclasses.replace(pair, teacher_compute_dtype=wide["teacher_weight"].dtype)
            yield f"{label}, beta {beta}, float32 teacher", PairProblem(**own, params=pair, **wide)


class Recorder:
    """Stands in for a kernel: keeps the arguments of each launch."""

    def __init__(self, kernel, launches):
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid):
        return lambda **arguments: self.launches.append((self.kernel, arguments))


def all_kernels():
    """-> [(module, name, kernel)] of every module that launches one."""
    from fastgrpo.kernels import (
        audit,
        backward,
        combine,
        copies,
        divergence,
        divergence_backward,
        flags,
        forward,
        frozen,
        held,
        objective,
        panels,
        plan,
        products,
        row_order,
        row_terms,
        support,
    )

    modules = (forward, flags, combine, frozen, backward, panels, copies, products, objective, support, divergence,
               divergence_backward, held, row_order, row_terms, plan, audit)  # fmt: skip
    return [(m, name, kernel) for m in modules for name, kernel in vars(m).items() if name.endswith("_kernel")]


@contextlib.contextmanager
def replaced(make):
    """Inside, ``make(kernel)`` stands in the place of every kernel."""
    found = all_kernels()
    for module, name, kernel in found:
        setattr(module, name, make(kernel))
    try:
        yield
    finally:
        for module, name, kernel in found:
            setattr(module, name, kernel)


PROCESSORS = 128  # of a device that is not there


class Forgetful(list):
    """Of launches, which hold the memory that they were given."""

    def append(self, launch):
        pass


@contextlib.contextmanager
def recording(architecture, launches=None):
    from fastgrpo.kernels import grids, tiles

    names, processors = ("architecture", "interpreting", "measured"), grids.processor_count
    launches = [] if launches is None else launches
    plain = {name: getattr(tiles, name) for name in names}
    for name, instead in zip(names, (lambda device: architecture, lambda: False, lambda device: {})):
        setattr(tiles, name, instead)
    grids.processor_count = lambda device: PROCESSORS
    try:
        with replaced(lambda kernel: Recorder(kernel, launches)):
            yield launches
    finally:
        grids.processor_count = processors
        for name, function in plain.items():
            setattr(tiles, name, function)


def recorded_launches(architecture, depths=DEPTHS, only=None):
    """-> (label, kernel, arguments) of everything the launchers would run, duplicates left out later.

    only: label of the one of :func:`problems` that is wanted, with its :func:`pairs`.
    """
    import torch

    from fastgrpo import support
    from fastgrpo.config import GRPOLossConfig
    from fastgrpo.kernels import (
        backward,
        certified_divergence,
        divergence,
        divergence_backward,
        forward,
        frozen,
        held,
        objective,
    )
    from fastgrpo.kernels import certified as certified_kernels
    from fastgrpo.kernels import support as support_kernels

    with recording(architecture) as launches:
        found = [p for depth in depths for p in problems(depth, architecture, depth == depths[0])]
        labels = dict.fromkeys(label for label, *_ in found)
        if only not in (None, *labels):
            raise ValueError(f"only must be one of {', '.join(labels)}, got {only!r}")
        for label, problem, needs in found:
            if only not in (None, label):
                continue
            del launches[:]
            forward.forward(problem)
            forward.partial_forward(problem)
            rows_audited = "row chunks" not in label  # a workspace so small leaves the audit to torch, slowly
            params = dataclasses.replace(problem.params, tolerance=0.03, row_tolerance=0.1 if rows_audited else 1.0)
            certified = dataclasses.replace(problem, params=params)
            forward.certified_forward(certified, None)
            row = torch.empty(problem.targets.shape, device="meta")
            forward.certified_forward(certified, row)
            forward.certified_partial_forward(certified, row, row)
            frozen.frozen_forward(dataclasses.replace(problem, low=None, up=None, taken=None))
            grad = torch.empty(problem.targets.shape, dtype=torch.float32, device="meta")
            stats = problem.new_stats(torch.float32)
            grads = backward.backward(problem, stats, grad, grad if "all" in label else None, needs)
            certificate = forward.certified_forward(certified, row)[1]
            certified_kernels.certified_backward(certified, stats, certificate, grad, needs)
            entries = torch.empty(6 * N, dtype=torch.int64, device="meta")
            offsets = torch.empty(problem.targets.numel() + 1, dtype=torch.int64, device="meta")
            kept = support.Support(entries, entries, offsets, entries, None)
            raw = support_kernels.kept_logits(problem, kept)
            support.backward(problem, kept, support_kernels, stats, raw, grad, None, needs)
            support.pair_gradients(problem, kept, support_kernels, raw, needs, grads)
            yield from ((f"{label}, D {problem.sizes[2]}", *launch) for launch in launches)
            for name, pair in pairs(label, problem):
                name = f"{name}, D {problem.sizes[2]}"
                if problem.sizes[2] != depths[0] and not ceilings.looked_at(name):
                    continue
                del launches[:]
                stats = divergence.forward(pair)
                divergence_backward.backward(pair, stats, grad, needs)
                if pair.is_mixture:
                    roomy = dataclasses.replace(pair, params=dataclasses.replace(pair.params, workspace=2**30))
                    held.forward(roomy)
                    held.frozen_forward(roomy)
                certified = dataclasses.replace(pair, params=dataclasses.replace(pair.params, tolerance=0.03))
                stats, certificate = certified_divergence.certified_forward(certified)
                divergence_backward.certified_backward(certified, stats, certificate, grad, needs)
                yield from ((name, *launch) for launch in launches)
        row = torch.empty(N, device="meta")
        for settings in (
            {"beta": 0.1}, {"loss_type": "cispo", "divergence_mask": "tv"}, {"divergence_mask": "kl", "beta": 0.1},
            {"loss_type": "sapo", "kl_estimator": "k1", "beta": 0.1},
            {"loss_type": "vespo", "kl_estimator": "k2", "use_bias_correction_kl": False, "beta": 0.1},
        ):  # fmt: skip
            del launches[:]
            config = GRPOLossConfig(**settings)
            ref = row if config.beta else None
            objective.objective(config, row, row, ref, row, row if config.loss_type == "vespo" else None, row, row)
            yield from ((" ".join(map(str, settings.values())), *launch) for launch in launches)


class Target:
    """Triton's idea of the current device: one that need not be there."""

    def __init__(self, architecture):
        from triton.backends.compiler import GPUTarget

        hip = architecture.startswith("gfx")
        self.target = GPUTarget("hip", architecture, 64) if hip else GPUTarget("cuda", int(architecture[3:]), 32)

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


def compile_all(architecture, disassemble, only=None):
    """-> one row a compiled kernel, then one a hot kernel of what :mod:`fastgrpo.kernels.ceilings` reads. only: as of
    :func:`recorded_launches`."""
    import triton

    triton.runtime.driver.set_active(Target(architecture))
    usage = amd_usage if architecture.startswith("gfx") else nvidia_usage
    seen, hot = set(), {}
    for label, kernel, arguments in recorded_launches(architecture, only=only):
        compiled = kernel.warmup(**arguments, grid=(1,))
        if disassemble:
            ceilings.collect(hot, label, kernel, arguments, compiled)
        if compiled.hash in seen:
            continue
        seen.add(compiled.hash)
        blocks = [v for k, v in arguments.items() if k.startswith("BLOCK")]
        options = {k: arguments[k] for k in ("num_warps", "num_stages") if k in arguments}
        yield {
            "architecture": architecture, "triton": triton.__version__, "kernel": kernel.fn.__name__, "variant": label,
            "tile": "x".join(map(str, blocks)), **options, "shared": compiled.metadata.shared, **usage(compiled),
        }  # fmt: skip
    yield from ceilings.measure(architecture, hot)


def nvidia_usage(compiled):
    text = ceilings.cuobjdump(compiled, "-res-usage")
    numbers = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", text))
    spills = int(numbers["STACK"]) + int(numbers["LOCAL"])
    tensor_core = len(TENSOR_CORE.findall(compiled.asm["ptx"]))
    return {"registers": int(numbers["REG"]), "spill_bytes": spills, "tensor_core": tensor_core}


def amd_usage(compiled):
    text = compiled.asm["amdgcn"]

    def number(name):
        return int(re.search(rf"\.{name}:\s+(\d+)", text).group(1))

    return {
        "registers": number("vgpr_count"),
        "spill_bytes": number("private_segment_fixed_size") + 4 * number("vgpr_spill_count"),
        "tensor_core": len(TENSOR_CORE.findall(text)),
    }


def complaints(row):
    """What is wrong with one compiled kernel, as text."""
    found = []
    if row["spill_bytes"]:
        found.append(f"spills {row['spill_bytes']} bytes")
    if row["shared"] > SHARED_LIMIT[row["architecture"]]:
        found.append(f"{row['shared']} bytes of shared memory, limit {SHARED_LIMIT[row['architecture']]}")
    if row["kernel"] in GEMMS and "float32" not in row["variant"] and not row["tensor_core"]:
        found.append("no tensor-core instruction")
    return found


def environment(version):
    """Of a process that compiles with this Triton, outside the interpreter."""
    inherited = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    path = filter(None, (triton_folder(version), inherited.get("PYTHONPATH")))
    return {**inherited, "PYTHONPATH": os.pathsep.join(map(str, path))}


def reads_ceilings(architecture, version):
    return version == importlib.metadata.version("triton") and architecture in ceilings.DEVICES


def child(architecture, version, only=None):
    """Compile in a process of its own; -> rows, error text or None."""
    command = [sys.executable, "-m", "fastgrpo.kernels.report", "--child", architecture]
    if only is not None:
        command += ["--only", only]
    elif reads_ceilings(architecture, version):
        command.append("--disassemble")
    done = subprocess.run(command, capture_output=True, text=True, env=environment(version))
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    error = None if done.returncode == 0 else f"exit status {done.returncode}: {done.stderr.strip()[-2000:]}"
    if any(row["triton"] != version for row in rows):
        error = f"compiled with Triton {rows[0]['triton']}"
    return rows, error


def table(rows):
    from rich.table import Table

    out = Table(title="Compiled ahead of time, no GPU needed")
    columns = ("architecture", "triton", "kernel", "variant", "tile", "num_warps", "num_stages", "registers",
               "spill_bytes", "shared", "tensor_core")  # fmt: skip
    for name in columns:
        out.add_column(name.replace("num_", "").replace("_", " "), justify="left" if name in columns[:5] else "right")
    for row in rows:
        out.add_row(*(str(row.get(name, "")) for name in columns), style="red" if complaints(row) else None)
    return out


def main(argv=None):
    from rich.console import Console

    from fastgrpo.kernels.tiles import ARCHITECTURES

    own = importlib.metadata.version("triton")
    parser = argparse.ArgumentParser(prog="python -m fastgrpo.kernels.report", description=__doc__)
    parser.add_argument("--architectures", nargs="+", default=ARCHITECTURES, choices=ARCHITECTURES)
    parser.add_argument("--triton", nargs="+", default=[own, OTHER_TRITON], help="versions; installed where missing")
    parser.add_argument("--only", help="one problem's kernels, such as 'bfloat16 frozen head'; no ceilings then")
    parser.add_argument("--json", type=Path, help="also write the rows here, one JSON object a line")
    parser.add_argument("--update", action="store_true", help=f"write the ceilings to {ceilings.COMMITTED.name}")
    parser.add_argument("--child", choices=ARCHITECTURES, help=argparse.SUPPRESS)
    parser.add_argument("--disassemble", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.update and options.only is not None:
        parser.error("--update writes the ceilings of all kernels, --only compiles some")
    if options.child:
        for row in compile_all(options.child, options.disassemble, options.only):
            print(json.dumps(row), flush=True)
        return 0
    for version in options.triton:
        triton_folder(version)  # installed before any is run
    jobs = [(a, v) for v in dict.fromkeys(options.triton) for a in options.architectures
            if v != OTHER_TRITON or not a.startswith("gfx")]  # fmt: skip
    rows, shares, disassembled, failures = [], [], [], []
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        for (architecture, version), (found, error) in zip(jobs, pool.map(lambda job: child(*job, options.only), jobs)):
            name = f"{architecture}, Triton {version}"
            ceiling, found = ([r for r in found if ("ceiling" in r) == hot] for hot in (True, False))
            print(f"{name}: {len(found)} kernels compiled{', FAILED' if error else ''}", flush=True)
            rows += found
            shares += ceiling
            if error or not found:
                failures.append(f"{name}: {error or 'nothing was compiled'}")
            elif options.only is None and reads_ceilings(architecture, version):
                disassembled.append(architecture)
    if options.update:
        ceilings.save(shares)
    Console(width=170).print(table(rows), ceilings.table(shares))
    failures += ceilings.complaints(shares, ceilings.load(), disassembled)
    failures += [
        f"{r['architecture']} {r['kernel']} ({r['variant']}, Triton {r['triton']}): {c}"
        for r in rows
        for c in complaints(r)
    ]
    if options.json:
        options.json.write_text("".join(json.dumps(r) + "\n" for r in rows))
    for failure in failures:
        print("FAILED", failure)
    print(f"{len(rows)} kernels compiled, {len(failures)} failures")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
