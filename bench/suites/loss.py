"""The loss head: forward, backward, log-probs alone; memory; sweeps of N, V, D; named shapes; every objective."""

import contextlib
import functools
from dataclasses import replace
from types import SimpleNamespace

from bench import measure, stages
from bench.cases import OBJECTIVES, SEQUENCES, Case, problem, tensors, truth
from bench.real import TEMPERATURES, TOKENS
from bench.worker import Worker

GROUPS = ("base", "models", "N", "V", "D", "objectives")
DENORMALS = 1e-3  # share of the dlogits from which a note says so
SKIPPING = 0.5  # share of the sequences with advantage 0 in the case that shows what skipping them saves


def cases(device):
    return cuda_cases() if device == "cuda" else cpu_cases()


def cpu_cases():
    heads = ("trained", "frozen")
    base, half = Case(1024, 32768, 512), Case(1024, 16384, 512, memory=False)
    return [
        base,
        replace(base, head="frozen"),
        replace(half, zero_share=SKIPPING),
        *(replace(half, profile="flat", head=head) for head in heads),
        *(Case.real(name, 512, group="models", head=head, memory=False) for name in TEMPERATURES for head in heads),
        Case.of("Qwen2.5-0.5B", 256, group="models", memory=False),
        *(Case(n, 8192, 256, group="N", memory=n > 512) for n in (512, 1024, 2048)),
        *(Case(512, v, 256, group="V") for v in (8192, 16384, 32768)),
        *(Case(512, 8192, d, group="D", memory=False) for d in (128, 256, 512)),
        *(Case(512, 4096, 256, objective=o, group="objectives", memory=False) for o in OBJECTIVES),
    ]


def cuda_cases():
    models = ("Qwen2.5-0.5B", "Qwen2.5-1.5B", "Qwen2.5-7B", "Qwen3-0.6B", "Qwen3-4B", "Llama-3-8B", "Gemma-2-2B")
    narrow, wide = Case.of("Qwen2.5-1.5B", 16384, dtype="bf16"), Case.of("Qwen3-8B", 8192, dtype="bf16")
    sweep, heads = {"dtype": "bf16"}, ("trained", "frozen")
    return [
        *(
            replace(case, profile=profile, head=head)
            for profile in ("rl", "flat")
            for case in (narrow, wide)
            for head in heads
        ),
        replace(narrow, zero_share=SKIPPING),
        *(Case.real(name, TOKENS, group="models", head=head, dtype="bf16") for name in TEMPERATURES for head in heads),
        *(Case.of(m, 8192, dtype="bf16", group="models") for m in models),
        *(Case.of("Qwen2.5-1.5B", n, dtype="bf16", group="N") for n in (2048, 4096, 8192, 16384, 32768)),
        *(Case(8192, v, 1536, group="V", **sweep) for v in (32768, 65536, 131072, 262144)),
        *(Case(8192, 131072, d, group="D", memory=False, **sweep) for d in (1024, 2048, 4096)),
        *(Case(4096, 65536, 1536, objective=o, group="objectives", memory=False, **sweep) for o in OBJECTIVES),
    ]


class Runner:
    """Runs cases one after the other; neighbours that differ in head or objective share their data."""

    def __init__(self, options):
        self.options, self.key, self.data = options, None, None

    def __call__(self, case, show):
        if self.key != case.data_key and not (self.options.late or case.why_not()):
            self.data = None  # both at once may not fit
            self.key, self.data = case.data_key, tensors(case, self.options.device)
        return run_case(case, self.data, self.options, show)

    def close(self):
        self.data = None


def make_runner(options):
    """What :class:`bench.worker.Worker` starts in its process."""
    runner = Runner(options)

    def answer(request, say):
        case, options.broken = request
        return runner(case, SimpleNamespace(status=say))

    return answer


class ApartRunner:
    """The same in another process; an entry that takes it down is not tried again, the others are."""

    def __init__(self, options):
        self.options, self.worker, self.at = options, Worker(make_runner, options), None
        self.close = self.worker.close

    def __call__(self, case, show):
        def hear(text):
            self.at = text.rpartition(": ")[2]  # of an entry its name
            show.status(text)

        while True:
            self.at = None
            rows, lost = self.worker.ask((case, self.options.broken), hear)
            if not lost:
                return rows
            names = self.options.names(case)
            if self.at not in names:  # the case itself, before any entry ran
                return [{**common_row(case, self.options), "entry": n, "reason": lost} for n in names]
            self.options.broken[self.at] = f"{lost} ({case.title})"


def run(options, show):
    """-> one row a case and entry."""
    return run_chosen("loss", cases, options, show, objective="dapo")


def run_chosen(suite, own, options, show, **defaults):
    """The cases asked for that belong to a suite, else the suite's own: ``own(device)``."""
    todo = [c for c in (Case(**{"group": "base", **defaults, **c}) for c in options.cases) if c.suite == suite]
    if not options.cases:
        todo = [c for c in own(options.device) if not options.groups or c.group in options.groups]
    with contextlib.closing((ApartRunner if options.apart else Runner)(options)) as runner:
        rows, jobs = run_cases(todo, runner, options, show)
    if jobs:
        show.status(f"{suite}: peak memory of {len(jobs)} cases, a process an entry")
        add_memory(rows, jobs)
        show.rows("peak memory beyond inputs and gradients", [r for r in rows if r.get("peak_mib")], memory_table)
    return rows


def run_cases(todo, runner, options, show):
    """-> rows; (case, data) of those whose memory is to be measured apart, on a CPU"""
    rows, jobs = [], []
    for number, case in enumerate(todo, 1):
        show.status(f"{case.suite} {number}/{len(todo)}: {case.title}")
        known = [r for r in rows if r["title"] == case.title]
        if known:  # a point of two sweeps is measured once
            rows += [{**r, "group": case.group} for r in known]
            continue
        possible = not (options.late or case.why_not())
        new = runner(case, show)
        show.rows(case.title, new, table)
        rows += new
        if case.memory and options.device == "cpu" and not options.apart and possible:
            jobs.append((case, runner.data))
    return rows, jobs


def common_row(case, options):
    return {
        "suite": case.suite,
        "kind": options.device,
        **case.row(),
        "title": case.title,
        "sequences": SEQUENCES,
        "floor_flops": case.gemm_flops,
        "floor_bytes": case.input_bytes,
        "memory_bound_mib": case.memory_bound_mib,
    }


def run_case(case, data, options, show):
    entries, reasons = options.runnable(case)
    common = common_row(case, options)
    rows = {name: {**common, "entry": name, "reason": reason} for name, reason in reasons.items()}
    good = {}
    if entries:
        p = problem(case, data)
        want = truth(p)
        common |= {"loss": float(want.loss), "denormals": want.denormals}
    for name, entry in entries.items():
        show.status(f"{case.suite}: {case.title}: {name}")
        found, reason = measure.attempt(measure.errors, entry, p, want)
        flops, moved = entry.model(case, options.device)
        rows[name] = {**common, "entry": name, "model_flops": flops, "model_bytes": moved}
        rows[name] |= {"reason": reason} if reason else found
        if found and found["correct"]:
            good[name] = entry
    if good:
        show.status(f"{case.suite}: {case.title}: timing")
        repeats = options.repeats or (5 if options.device == "cuda" else 3 if case.gemm_flops < 5e10 else 2)

        def tell(name):
            show.status(f"{case.suite}: {case.title}: timing: {name}")

        samples, gemms, lost = measure.timings(good, p, repeats, tell)
        for name, reason in lost.items():
            rows[name]["reason"] = reason
        for name, values in samples.items():
            rows[name] |= measure.statistics_row(values, gemms, case)
            if options.device == "cuda":
                tell(name)
                rows[name]["wall_seconds"] = measure.from_idle(good[name], p)
            if options.device == "cuda" and case.memory:
                rows[name]["peak_mib"] = measure.peak_cuda(functools.partial(measure.step, good[name], p))
        staged = case.group in ("base", "models") and not case.is_divergence
        if "fastgrpo certified" in samples and options.device == "cpu" and staged:
            rows["fastgrpo certified"]["stages"] = stages.time_certified(p, rows["fastgrpo certified"]["gemm_seconds"])
    return [rows[name] for name in options.names(case)]


def add_memory(rows, jobs):
    """Peak memory on a CPU: every entry measures its cases in a fresh process of its own."""
    titles = [case.title for case, _ in jobs]
    names = list(dict.fromkeys(r["entry"] for r in rows if r.get("correct") and r["title"] in titles))
    for name, found in measure.peaks_cpu(names, jobs).items():
        for title, mib in zip(titles, found):
            for row in rows:
                if row["entry"] == name and row["title"] == title and row.get("correct"):
                    row["peak_mib"] = mib


def table(rows):
    """-> (columns, cells) of one case."""
    columns = (
        "entry",
        "log-probs",
        "forward",
        "backward",
        "both",
        "GEMMs",
        "by design",
        "x ours",
        "peak MiB",
        "error dX",
    )
    mine = next((r["gemms"] for r in rows if r["entry"].startswith("fastgrpo") and "gemms" in r), None)
    cells = []
    for r in rows:
        if "gemms" not in r:
            cells.append((r["entry"], r.get("reason", "wrong")))
            continue
        seconds = [f"{r[k] * 1e3:.1f} ms" if k in r else "-" for k in SECONDS]
        against = f"{r['gemms'] / mine:.2f}" if mine else "-"
        memory = f"{r['peak_mib']:.0f}" if r.get("peak_mib") is not None else "-"
        design = f"{r['model_flops'] / r['floor_flops']:.1f}"
        cells.append((r["entry"], *seconds, f"{r['gemms']:.2f}", design, against, memory, f"{r['d_hidden_error']:.0e}"))
    floor = next((r for r in rows if "gemm_seconds" in r), None)
    if floor:
        rate = floor["floor_flops"] / floor["gemm_seconds"] / 1e9
        cells.append(
            ("bare logits GEMM", "", f"{floor['gemm_seconds'] * 1e3:.1f} ms", "", "", "1.00", "1.0", "", "", "")
        )
        cells.append((f"  {floor['floor_flops'] / 1e9:.0f} GFLOP, {rate:.0f} GFLOP/s",))
    note = denormals_note(rows)
    return columns, cells + ([(f"  {note}",)] if note else [])


def denormals_note(rows):
    """A line on the cases whose dlogits slow a CPU's GEMMs, in every entry that hands them all over, or None."""
    shares = {r["title"]: r["denormals"] for r in rows if r.get("kind") == "cpu" and "denormals" in r}
    found = [f"{share:.1%} ({title})" for title, share in shares.items() if share >= DENORMALS]
    if not found:
        return None
    return (
        "denormal numbers among the dlogits, which make the GEMMs of entries that keep them many times slower on "
        f"some CPUs: {'; '.join(found)}"
    )


SECONDS = ("logprobs_seconds", "forward_seconds", "backward_seconds", "both_seconds")


def memory_table(rows):
    cells = [
        (r["title"], r["entry"], f"{r['peak_mib']:.0f}", f"{r['memory_bound_mib']:.0f}" if "fast" in r["entry"] else "")
        for r in rows
    ]
    return ("case", "entry", "peak MiB", "bound MiB"), cells


def charts(rows, stem):
    """-> paths of the pictures written."""
    from bench import draw

    paths = []
    base = [r for r in rows if r["group"] in ("base", "models") and "gemms" in r]
    if base:
        paths.append(draw.stacked_bars(base, f"{stem}.png", "forward and backward, in bare logits GEMMs"))
    for group, what, unit in (
        ("N", "gemms", "bare logits GEMMs"),
        ("N", "both_seconds", "seconds"),
        ("N", "peak_mib", "MiB beyond inputs and gradients"),
        ("V", "both_seconds", "seconds"),
        ("V", "peak_mib", "MiB beyond inputs and gradients"),
        ("D", "both_seconds", "seconds"),
    ):
        mine = [r for r in rows if r["group"] == group and r.get(what) is not None]
        if len({r[group] for r in mine}) > 1:
            name = {"gemms": "floor", "both_seconds": "time", "peak_mib": "memory"}[what]
            paths.append(draw.lines(mine, group, what, unit, f"{stem}-{name}-over-{group}.png"))
    objectives = [r for r in rows if r["group"] == "objectives" and "gemms" in r]
    if objectives:
        paths.append(draw.grid(objectives, "objective", "gemms", f"{stem}-objectives.png"))
    return paths
