"""The benchmarks: their truth, their gate, their rows; no entry is lost, and no wrong figure is shown."""

import json
import os
import sys
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("rich")
pytest.importorskip("matplotlib")

from matplotlib.figure import Figure
from PIL import Image

from bench import __main__ as command
from bench import draw, measure, pages, report, shapes
from bench.cases import DIVERGENCES, OBJECTIVES, Case, Problem, count_denormals, problem, tensors, truth
from bench.divergences import NAMES, entries_of
from bench.entries import ENTRIES, Entry, full_logits, unsloth_module
from bench.show import Show
from bench.suites import Options, accuracy, divergence, fit, loss, parse_case, step
from bench.worker import Worker
from fastgrpo import reference

import processes

SMALL = Case(128, 1000, 64)
QUICK = ("fastgrpo certified", "fastgrpo exact", "full logits", "CCE")


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Real memory: other projects' code runs here too."""


@pytest.fixture
def options(tmp_path):
    return Options("cpu", ["loss"], tmp_path, repeats=1, entries=list(QUICK))


def make(case):
    return problem(case, tensors(case, "cpu"))


@pytest.mark.quick
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("objective", ["dapo", "grpo + kl", "gspo", "dapo + entropy bonus"])
def test_truth_is_autograd_through_the_reference(objective, softcap):
    p = make(replace(SMALL, objective=objective, softcap=softcap))
    found = truth(p, chunk=48)
    hidden, weight = (x.detach().double().requires_grad_() for x in (p.hidden, p.weight))
    want = reference.grpo_loss(
        hidden, weight, p.targets, p.advantages.double(), p.config, mask=p.mask, old_logprobs=p.old.double(),
        ref_logprobs=p.ref.double(), softcap=softcap,
    )  # fmt: skip
    want.loss.backward()
    torch.testing.assert_close(found.loss, want.loss.detach(), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(found.d_hidden, hidden.grad.flatten(0, 1), rtol=1e-8, atol=1e-14)
    torch.testing.assert_close(found.d_weight, weight.grad, rtol=1e-8, atol=1e-14)


@pytest.mark.quick
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("objective", DIVERGENCES)
def test_truth_of_a_divergence(objective, softcap):
    """All rows at once; the head's gradient also along a step, by differences."""
    p = make(replace(SMALL, objective=objective, softcap=softcap))
    found = truth(p, chunk=48)

    def value(hidden, weight):
        heads = (hidden, weight, p.teacher_hidden.double(), p.teacher_weight.double())
        caps = {"softcap": softcap, "teacher_softcap": softcap}
        return reference.linear_divergence(*heads, beta=DIVERGENCES[objective], **caps).divergence.mean()

    hidden, weight = (x.detach().double().requires_grad_() for x in (p.hidden, p.weight))
    d_hidden, d_weight = torch.autograd.grad(value(hidden, weight), (hidden, weight))
    torch.testing.assert_close(found.d_hidden, d_hidden.flatten(0, 1), rtol=1e-8, atol=1e-14)
    torch.testing.assert_close(found.d_weight, d_weight, rtol=1e-8, atol=1e-14)
    step = 1e-6 * torch.randn_like(weight)
    moved = (value(hidden, weight + step) - value(hidden, weight - step)) / 2
    assert float((found.d_weight * step).sum()) == pytest.approx(moved.item(), rel=1e-5)
    assert float(found.loss) == pytest.approx(value(hidden, weight).item(), rel=1e-10)
    assert 0.01 < found.loss < 1
    assert (found.entropy, found.logprobs) == (None, None)


CASES = {
    **{name: replace(SMALL, objective=name) for name in OBJECTIVES},
    "frozen": replace(SMALL, head="frozen"),
    "bf16": replace(SMALL, dtype="bf16"),
    "softcap": replace(SMALL, softcap=30.0),
    "zero": replace(SMALL, zero_share=0.5),
    **{name: replace(SMALL, objective=name) for name in DIVERGENCES},
    "divergence, bf16, frozen": replace(SMALL, objective="JSD", dtype="bf16", head="frozen"),
    "divergence, softcap": replace(SMALL, objective="reverse KL", softcap=30.0),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_every_entry_is_right_or_says_why_not(case):
    # Liger compiles its loss for each setting anew: once shows that what is compiled is right, too.
    with torch.compiler.set_stance("default" if case is CASES["dapo"] else "force_eager"):
        every_entry_is_right(case)


def every_entry_is_right(case):
    p, right = make(case), 0
    want = truth(p)
    for name, entry in entries_of(case).items():
        if "compile" in name or entry.why_not(case, "cpu"):
            continue
        row = measure.errors(entry, p, want)
        assert row["correct"], (name, row)
        right += 1
    assert right >= (3 if case.is_divergence else 4)


@pytest.mark.quick
def test_a_wrong_entry_gets_no_time(options, monkeypatch):
    wrong = {
        "half the gradient": Entry("half the gradient", "torch", None, lambda p: halved(full(p))),
        "old log-probs": Entry("old log-probs", "torch", lambda p, e: (full_logits(p, e)[0] * 1.01, None)),
        "NaN": Entry("NaN", "torch", None, lambda p: full(p) * torch.nan),
        "raises": Entry("raises", "torch", None, lambda p: full(p).no_such_thing),
    }
    for name, entry in wrong.items():
        monkeypatch.setitem(ENTRIES, name, entry)
    options.entries = [*wrong, "full logits"]
    rows = loss.run_case(SMALL, tensors(SMALL, "cpu"), options, SimpleNamespace(status=lambda text: None))
    assert [r["entry"] for r in rows] == options.entries
    for r in rows[:3]:
        assert r["correct"] is False
        assert "gemms" not in r
    assert "no attribute 'no_such_thing'" in rows[3]["reason"]
    assert rows[4]["gemms"] > 0
    cells = loss.table(rows)[1]
    assert [c[1] for c in cells[:3]] == ["wrong"] * 3


@pytest.mark.quick
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_gate_of_divergences(dtype):
    p = make(replace(SMALL, objective="JSD", dtype=dtype))
    want, exact = truth(p), entries_of(p.case)["fastgrpo exact"]
    assert measure.errors(exact, p, want)["correct"]
    off = 1e-2 if dtype == "fp32" else 0.5
    for wrong in (
        lambda p: halved(exact.run_loss(p)),
        lambda p: exact.run_loss(p) + off * want.loss,
        lambda p: exact.run_loss(p) * torch.nan,
    ):
        assert not measure.errors(Entry("wrong", "torch", None, wrong), p, want)["correct"]


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_gate_forgives_rounded_logits_and_no_half_gradient(objective):
    """In bf16 rounding crosses the clip's edge: plain torch is then as far from the truth as half a gradient."""
    p = make(replace(SMALL, dtype="bf16", objective=objective))
    want, half = truth(p), Entry("half", "torch", None, lambda p: halved(full(p)))
    assert measure.errors(ENTRIES["full logits"], p, want)["correct"]
    found = measure.errors(half, p, want)
    assert not found["correct"]
    assert found["far_from_clip"]["d_hidden_error"] == pytest.approx(0.5, abs=0.05)
    exact = measure.errors(ENTRIES["fastgrpo exact"], p, want)
    assert exact["correct"]
    assert "far_from_clip" not in exact


def full(p):
    return ENTRIES["full logits"].run_loss(p)


def halved(x):
    return x / 2 + x.detach() / 2


def test_loss_suite_end_to_end(tmp_path, monkeypatch, capsys):
    """A real run: rows of every entry with figures or a reason, memory from fresh processes, a picture."""
    monkeypatch.setattr("sys.argv", ["bench"])
    arguments = ["--suite", "loss", "--case", "1024,8192,32", "--entries", *QUICK, "--repeats", "2"]
    assert command.main([*arguments, "--output", str(tmp_path)]) == 0
    rows = {r["entry"]: r for r in map(json.loads, (tmp_path / "loss-cpu.jsonl").read_text().splitlines())}
    assert list(rows) == list(QUICK)
    assert rows["CCE"]["reason"] in ("needs a CUDA device", "cut_cross_entropy is not installed")
    for name in QUICK[:3]:
        r = rows[name]
        assert {"device", "torch", "versions", "date", "command", "floor_flops", "floor_bytes", "model_flops"} <= set(r)
        assert r["correct"]
        assert r["forward_low"] <= r["forward_seconds"] <= r["forward_high"]
        assert r["gemms"] == pytest.approx(r["both_seconds"] / r["gemm_seconds"])
    logits = 1024 * 8192 * 4 / measure.MIB
    assert rows["full logits"]["peak_mib"] > 2 * logits
    assert rows["fastgrpo exact"]["peak_mib"] < rows["full logits"]["peak_mib"]
    assert rows["fastgrpo exact"]["peak_mib"] < rows["fastgrpo exact"]["memory_bound_mib"]
    assert (tmp_path / "loss-cpu.png").read_bytes()[:4] == b"\x89PNG"
    assert "bare logits GEMM" in capsys.readouterr().out


@pytest.mark.quick
def test_rows_of_some_cases_go_beside_the_others(tmp_path):
    path = tmp_path / "loss-cpu.jsonl"
    rows = [{"title": t, "entry": e, "group": g, "n": 0} for t, e, g in ("aAx", "aBx", "bAx", "aAy")]
    assert command.beside(path, rows[:1]) == rows[:1]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    more = [{**rows[2], "n": 1}, {**rows[0], "title": "c"}, {**rows[0], "n": 2}]
    assert command.beside(path, more) == [more[2], rows[1], more[0], rows[3], more[1]]


def test_divergence_suite(options, tmp_path):
    """Rows of what computes one, of no other; memory as a fresh process takes it; a picture and README's table."""
    pytest.importorskip("trl")
    options.entries = ["Liger fused JSD", *QUICK, "TRL op"]
    options.cases = [
        {"N": 256, "V": 4096, "D": 128, "head": "frozen", "objective": "JSD", "memory": False},
        {"N": 64, "V": 512, "D": 32, "objective": "gspo"},
    ]
    with Show(quiet=True) as show, torch.compiler.set_stance("force_eager"):
        rows = divergence.run(options, show)
    assert [r["entry"] for r in rows] == ["Liger fused JSD", *QUICK[:3], "TRL op"]
    assert all(r["suite"] == "divergence" and r["gemms"] > 0 and r["correct"] for r in rows)
    assert [r["model_flops"] / r["floor_flops"] for r in rows] == [4, 5, 3, 3, 7]
    rows = [{**measure.machine("cpu", "test"), **r} for r in rows]
    assert list(map(os.path.basename, divergence.charts(rows, str(tmp_path / "d")))) == ["d.png"]
    (tmp_path / "divergence-cpu.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    assert "| distillation | N 256, V 4096, D 128, rl, fp32, frozen head, JSD |" in report.figures(tmp_path)
    case = replace(SMALL, objective="JSD")
    torch.save([(vars(case), tensors(case, "cpu"))], tmp_path / "jobs.pt")
    with torch.compiler.set_stance("force_eager"):
        for name in options.names(case):
            assert measure.child_peaks(name, tmp_path / "jobs.pt")[0] < case.memory_bound_mib


@pytest.mark.quick
def test_cases_of_divergences():
    for device, base in (("cpu", 6), ("cuda", 12)):
        plain = [c for c in divergence.cases(device) if c.group == "base" and c.profile == "rl"]
        assert len({(c.N, c.objective, c.head) for c in plain}) == len(plain) == base
        assert all(c.suite == "divergence" for c in divergence.cases(device))
        assert all(c.suite == "loss" for c in loss.cases(device))
    assert set(NAMES) == {*ENTRIES, *entries_of(plain[0])}


def test_a_suite_that_came_too_late_leaves_the_rows_that_are_there(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["bench"])
    arguments = ["--suite", "loss", "--case", "64,1024,32", "--entries", "full logits", "--output", str(tmp_path)]
    path = tmp_path / "loss-cpu.jsonl"
    assert command.main([*arguments, "--time-limit", "1e-9"]) == 0
    assert "not run" in path.read_text()  # better than nothing
    path.write_text("measured\n")
    assert command.main([*arguments, "--time-limit", "1e-9"]) == 0
    assert path.read_text() == "measured\n"
    assert "kept" in capsys.readouterr().out


def test_sweeps_have_pictures_and_shared_points_are_measured_once(options, tmp_path, monkeypatch):
    monkeypatch.setattr(loss, "cases", lambda device: [
        *(replace(SMALL, N=n, group="N", memory=False) for n in (64, 128)),
        *(replace(SMALL, V=v, group="V", memory=False) for v in (1000, 2000)),
        replace(SMALL, objective="gspo", group="objectives", memory=False),
    ])  # fmt: skip
    counted, plain = [], loss.run_case
    monkeypatch.setattr(loss, "run_case", lambda case, *a: counted.append(case.title) or plain(case, *a))
    with Show(quiet=True) as show:
        rows = loss.run(options, show)
    assert len(counted) == len(set(counted)) == 4
    assert len(rows) == 5 * len(QUICK)
    about = measure.machine("cpu", "test")
    names = {p.name for p in map(type(tmp_path), loss.charts([{**about, **r} for r in rows], str(tmp_path / "x")))}
    assert names >= {"x-time-over-N.png", "x-time-over-V.png", "x-objectives.png"}


def test_a_worker_is_lost_and_replaced():
    heard, worker = [], Worker(processes.make_obedient, silence=120.0)  # seconds that a process may take to start
    for request, said in (("crash", "ended with 3"), ("raise", "an illegal access"), ("hang", "no word in")):
        assert worker.ask("fine", heard.append) == ("fine", None)
        worker.silence = 3.0 if request == "hang" else 120.0
        answer, why = worker.ask(request, heard.append)
        assert answer is None
        assert said in why
        assert heard[-1] == f"at {request}"
    worker.close()


def test_an_entry_that_takes_its_process_down_loses_no_other(options):
    """As on a GPU: the rows come from a worker."""
    options.apart, options.cases = True, [{"N": 64, "V": 512, "D": 32, "head": h} for h in ("trained", "frozen")]
    with Show(quiet=True) as show:
        rows = loss.run(options, show)
    assert [r["entry"] for r in rows] == [*QUICK, *QUICK]
    assert all(r["correct"] and r["gemms"] > 0 for r in rows if r["entry"] != "CCE")

    class Worker:
        """Dies whenever a certain entry runs."""

        def ask(self, request, hear):
            case, broken = request
            for name in (n for n in QUICK if n not in broken):
                hear(f"loss: {case.title}: {name}")
                if name == QUICK[1]:
                    return None, "failed: its process ended with -6"
            return [{"entry": n, "reason": broken.get(n)} for n in QUICK], None

    runner = loss.ApartRunner(options)
    runner.worker = Worker()
    for case in (SMALL, replace(SMALL, head="frozen")):
        reasons = {r["entry"]: r["reason"] for r in runner(case, SimpleNamespace(status=lambda text: None))}
        assert reasons.pop(QUICK[1]) == f"failed: its process ended with -6 ({SMALL.title})"
        assert not any(reasons.values())
    runner.worker = SimpleNamespace(ask=lambda request, hear: (None, "failed: out of memory"))
    assert {r["reason"] for r in runner(SMALL, None)} == {"failed: out of memory"}


def test_an_entry_that_fails_while_it_is_timed_gets_no_time():
    runs = []

    def fails(p):
        runs.append(p)
        if len(runs) > 1:
            raise torch.OutOfMemoryError
        return full(p)

    entries = {"full logits": ENTRIES["full logits"], "fails": Entry("fails", "torch", None, fails)}
    samples, gemms, lost = measure.timings(entries, make(SMALL), 3)
    assert list(samples) == ["full logits"]
    assert lost == {"fails": "out of memory"}
    assert len(samples["full logits"]) == len(gemms) == 3
    assert len(runs) == 2


def test_rows_are_on_disk_before_the_suite_ends(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["bench"])
    plain = loss.run_case

    def stopped(case, *arguments):
        if case.N == 32:
            raise KeyboardInterrupt
        return plain(case, *arguments)

    monkeypatch.setattr(loss, "run_case", stopped)
    arguments = ["--suite", "loss", "--case", "64,512,32", "--case", "32,512,32", "--entries", "full logits"]
    with pytest.raises(KeyboardInterrupt):
        command.main([*arguments, "--output", str(tmp_path)])
    (row,) = map(json.loads, (tmp_path / "loss-cpu.part.jsonl").read_text().splitlines())
    assert row["N"] == 64
    assert row["gemms"] > 0
    assert "device" in row


class FakeEvent:
    """Of a device that is always done."""

    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        self.at = time.perf_counter()

    def elapsed_time(self, later):
        return 1e3 * (later.at - self.at)


def test_gpu_branches_of_a_case(options, monkeypatch):
    """On a made-up card: events, the bare product before each entry, the time from idle, memory."""
    memory = {"memory_allocated": lambda: 0, "max_memory_allocated": lambda: 1 << 30}
    nothing = dict.fromkeys(("synchronize", "reset_peak_memory_stats", "empty_cache"), lambda: None)
    for name, fake in {"Event": FakeEvent, **memory, **nothing}.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(Problem, "device", "cuda")
    monkeypatch.setattr(measure, "FRONT", 3e7)  # two bare products of the case
    options.device, options.repeats, options.entries = "cuda", 3, list(QUICK[:3])
    rows = loss.run_case(SMALL, tensors(SMALL, "cpu"), options, SimpleNamespace(status=lambda text: None))
    for r in rows:
        assert r["correct"]
        assert r["repeats"] == 3
        assert 0 < r["gemm_low"] <= r["gemm_seconds"] <= r["gemm_high"]
        assert r["both_seconds"] > max(r["forward_low"], r["backward_low"])
        assert r["wall_seconds"] > 0
        assert 1000 < r["peak_mib"] < 1024


@pytest.mark.quick
def test_headline_cases_of_a_gpu():
    base = [c for c in loss.cuda_cases() if c.group == "base" and not c.zero_share]
    assert {(c.N, c.V, c.D, c.profile, c.head, c.dtype) for c in base} == {
        (n, 151936, d, profile, head, "bf16")
        for n, d in ((16384, 1536), (8192, 4096)) for profile in ("rl", "flat") for head in ("trained", "frozen")
    }  # fmt: skip
    assert len(base) == 8
    assert {c.group for c in loss.cuda_cases()} == set(loss.GROUPS)


@pytest.mark.quick
def test_accuracy_suite(options, tmp_path):
    options.cases = [{"N": 128, "V": 1000, "D": 64, "dtype": "bf16"}]
    with Show(quiet=True) as show:
        rows = {r["entry"]: r for r in accuracy.run(options, show)}
    ours, theirs = rows["fastgrpo exact"], rows["full logits"]
    assert ours["logp_max_error"] < 1e-5 < theirs["logp_max_error"]  # their logits are rounded to bf16
    assert theirs["outside_ratio"] >= ours["outside_ratio"] == 0
    assert "reason" in rows["CCE"]
    drawn = accuracy.charts([{**measure.machine("cpu", ""), **r} for r in rows.values()], str(tmp_path / "a"))
    assert len(drawn) == 2


TINY = shapes.Shape("tiny", "qwen2", 512, 64, 128, 2, 4, 2, 16, True)


@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_learner_step(options, monkeypatch, tuning):
    if tuning == "lora":
        pytest.importorskip("peft")
    monkeypatch.setitem(shapes.SHAPES, "tiny", TINY)
    monkeypatch.setattr(measure, "child_process", lambda suite, name, *a: step.child(*a))  # it knows no tiny shape
    what = step.Run("tiny", tuning, 4, 16, "fp32")
    rows = {r["entry"]: r for r in step.run_one(what, options, SimpleNamespace(status=lambda text: None))}
    assert rows["fastgrpo certified"]["step_seconds"] > 0
    assert rows["fastgrpo certified"]["tokens_per_second"] > 0
    assert "reason" in rows["CCE"]
    learner = step.Learner(what, "cpu")
    found = truth(learner.leaf_problem()).entropy
    assert (found < 0.1).double().mean() > 0.4, "half of RL's tokens are nearly certain"
    assert found.max() > 1
    before = [p.detach().clone() for p in learner.model.parameters()]
    learner.step(ENTRIES["fastgrpo exact"])
    assert all(torch.equal(a, b) for a, b in zip(before, learner.model.parameters())), "entries see the same weights"


@pytest.mark.quick
def test_shapes_are_the_published_ones():
    published = {"Qwen2.5-0.5B": 494.0, "Qwen2.5-1.5B": 1543.7, "Qwen2.5-7B": 7615.6, "Qwen3-0.6B": 596.0,
                 "Qwen3-4B": 4022.5, "Qwen3-8B": 8190.7, "Llama-3-8B": 8030.3, "Gemma-2-2B": 2614.3}  # fmt: skip
    assert set(published) == set(shapes.SHAPES)
    for name, millions in published.items():
        assert shapes.parameter_count(shapes.SHAPES[name]) / 1e6 == pytest.approx(millions, abs=0.06), name


def test_memory_fits_find_the_law():
    law = {"constant": 5e6, "NV": 6.0, "VD": 4.0, "ND": 4.0}
    jobs = [(case, None) for case in fit.head_cases()]

    def peak(n, v, d):
        return law["constant"] + law["NV"] * n * v + law["VD"] * v * d + law["ND"] * n * d

    head, worst = fit.fit_head(jobs, [peak(c.N, c.V, c.D) / measure.MIB for c, _ in jobs])
    assert worst < 1e-6
    assert head(10000, 151936, 896) == pytest.approx(peak(10000, 151936, 896), rel=1e-5)
    transient, kept = 3000.0, 1800.0
    points = [t * (transient + kept * layers) / measure.MIB for t, layers in fit.DECODER_POINTS]
    assert fit.fit_decoder(points) == pytest.approx((transient, kept))


@pytest.mark.parametrize("guess", [1, 90, 100, 130, 5000, -7])
@pytest.mark.parametrize("most", [0, 1, 100, 1000])
def test_search_under_a_cap(guess, most):
    found = fit.search(lambda n: n <= most, guess, 4000)
    assert most / 1.3 - 1 <= found <= most
    assert fit.largest(lambda n: n <= most, 4000) == most


def test_fit_is_marked_as_computed(options, tmp_path, monkeypatch):
    """Off a GPU: a head whose logits grow with N V must fit fewer tokens than one that holds a workspace."""
    laws = {"full logits": lambda c: 12 * c.N * c.V, "fastgrpo certified": lambda c: 1 << 27}
    options.entries = [*laws, "CCE"]
    monkeypatch.setattr(
        measure, "peaks_cpu", lambda names, jobs: {n: [laws[n](c) / measure.MIB for c, _ in jobs] for n in names}
    )
    monkeypatch.setattr(fit, "tensors", lambda case, device: None)
    monkeypatch.setattr(
        measure, "child_process", lambda suite, name, shape, tokens, layers: tokens * (40 + layers) / 1024
    )
    with Show(quiet=True) as show:
        rows = fit.run(options, show)
    assert all(r["measured"] is False for r in rows if "tokens" in r)
    for question in fit.QUESTIONS:
        mine = {(r["entry"], r["card"]): r["tokens"] for r in rows
                if r["question"] == question and r["shape"] == "Qwen2.5-0.5B" and "tokens" in r}  # fmt: skip
        for card in fit.CARDS:
            assert mine["full logits", card] < mine["fastgrpo certified", card], (question, card)
        tokens = [mine["full logits", card] for card in fit.CARDS]
        assert tokens == sorted(tokens)
        assert tokens[0] > 0
    drawn = fit.charts([{**measure.machine("cpu", ""), **r} for r in rows], str(tmp_path / "f"))
    assert len(drawn) == 2 * len(fit.plans("cpu"))


def test_nothing_is_dropped_when_time_is_over(options):
    options.time_limit, options.cases = -1.0, [{"N": 64, "V": 512, "D": 32}]
    with Show(quiet=True) as show:
        rows = [*loss.run(options, show), *accuracy.run(options, show), *step.run(options, show)]
    assert {r["entry"] for r in rows} == set(QUICK)
    assert all(r["reason"].startswith("not run: the time limit") for r in rows)
    assert all(command.fine(r) for r in rows)


def test_exit_status_tells_of_our_own_failures(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["bench"])
    monkeypatch.setitem(ENTRIES, "fastgrpo exact", replace(ENTRIES["fastgrpo exact"], loss=lambda p: halved(full(p))))
    arguments = ["--suite", "accuracy", "--case", "64,512,32", "--entries", "fastgrpo exact", "--output", str(tmp_path)]
    assert command.main(arguments) == 1
    assert "wrong" in capsys.readouterr().out


def test_bad_arguments_are_refused(capsys):
    for arguments, said in ((["--entries", "Unsloth"], "got Unsloth"), (["--repeats", "0"], "must be >= 1, got 0"),
                            (["--case", "1,2"], "a case is N,V,D")):  # fmt: skip
        with pytest.raises(SystemExit):
            command.main(arguments)
        assert said in capsys.readouterr().err
    assert parse_case("8,16,4,profile=flat,softcap=30") == {"N": 8, "V": 16, "D": 4, "profile": "flat", "softcap": 30.0}


def test_report_shows_reasons_and_wrong_results(tmp_path):
    common = {"device": "x", "torch": "2", "date": "2026-01-01", "versions": {}, "command": "c", "title": "t",
              "group": "base", "gemm_seconds": 0.1}  # fmt: skip
    rows = [
        {**common, "entry": "good", "correct": True, "gemms": 1.25, "peak_mib": 12.0},
        {**common, "entry": "bad", "correct": False},
        {**common, "entry": "absent", "reason": "needs a CUDA device"},
    ]
    (tmp_path / "loss-cpu.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    page = "before\n<!-- figures: written by a test -->\nold\n<!-- end of figures -->\nafter"
    text = pages.fill(page, "figures", report.figures(tmp_path))
    assert text.startswith("before")
    assert text.endswith("after")
    assert "| good | 1.25, 12 MiB |" in text
    assert "| bad | wrong |" in text
    assert "| absent | needs a CUDA device |" in text
    assert "old" not in text
    assert pages.fill(text, "figures", report.figures(tmp_path)) == text
    assert draw.where(rows) in text
    with pytest.raises(ValueError, match="expected one part 'figures', got 0"):
        pages.fill("no such part", "figures", "")


def test_nothing_of_a_picture_is_cut_off(tmp_path):
    """Its ground is opaque, and a title wider than the axes makes it wider."""
    sizes = []
    for title in ("short", "a title that is far longer than the picture is wide, by any count " * 4):
        figure = Figure(figsize=(3, 2))
        figure.subplots().set_title(title)
        image = Image.open(draw.write(figure, tmp_path / "x.png")).convert("RGBA")
        edge = [image.getpixel((x, y)) for x in (0, image.width - 1) for y in range(image.height)]
        assert set(edge) == {(255, 255, 255, 255)}
        sizes.append(image.width)
    assert sizes[1] > 3 * sizes[0]


def test_denormals_are_counted_and_told():
    x = torch.tensor([1.0, 0.0, 1e-38, -1e-39, 2e-45, 1e-46, 1e-300], dtype=torch.float64)
    assert count_denormals(x, torch.float32) == 3
    assert count_denormals(x, torch.bfloat16) == 2
    case = Case(64, 1000, 32, profile="flat")
    assert truth(problem(case, tensors(case, "cpu"))).denormals == 0
    data = tensors(case, "cpu")
    data["hidden"] = data["hidden"] * 20  # logits a hundred nats apart
    p = problem(case, data)
    z = (p.hidden.flatten(0, 1).double() @ p.weight.double().T).detach().requires_grad_()
    logp = z.log_softmax(1).gather(1, p.targets.flatten()[:, None])[:, 0].view(8, 8)
    reference.loss_of_logprobs(
        logp, None, p.mask.bool(), p.advantages.double(), p.config, old_logprobs=p.old.double()
    ).backward()
    share = count_denormals(z.grad, torch.float32) / z.numel()
    assert share > 0.001
    assert truth(p).denormals == pytest.approx(share, rel=0.02)
    rows = [{"kind": "cpu", "title": "a", "denormals": 0.02}, {"kind": "cpu", "title": "b", "denormals": 0.0}]
    assert loss.denormals_note(rows).endswith("on some CPUs: 2.0% (a)")
    assert loss.denormals_note(rows[1:]) is None
    assert loss.denormals_note([{**rows[0], "kind": "cuda"}]) is None


def test_unsloth_is_loaded_from_its_file_alone(tmp_path, monkeypatch):
    """The package itself wants unsloth and a GPU; without it the entry says so."""
    entry = ENTRIES["unsloth_zoo"]
    monkeypatch.setattr("bench.entries.is_installed", lambda package: False)
    assert entry.why_not(Case(64, 512, 32), "cpu") == "unsloth_zoo is not installed"
    home = tmp_path / "unsloth_zoo" / "fused_losses"
    home.mkdir(parents=True)
    (home.parent / "__init__.py").write_text("raise ImportError('Please install Unsloth')")
    (home / "fused_linear.py").write_text(
        "def fused_linear_logprobs(hidden, weight, targets, *, logit_softcapping=0.0, return_entropy=False):\n"
        "    logp = (hidden @ weight.T).log_softmax(-1)\n"
        "    picked = logp.gather(-1, targets[..., None])[..., 0]\n"
        "    return (picked, -(logp.exp() * logp).sum(-1)) if return_entropy else picked\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr("bench.entries.unsloth_module", unsloth_module.__wrapped__)
    monkeypatch.delitem(sys.modules, "unsloth_zoo_fused_linear", raising=False)
    for objective in ("dapo", "dapo + entropy bonus"):
        case = Case(64, 512, 32, objective=objective)
        p = problem(case, tensors(case, "cpu"))
        assert measure.errors(entry, p, truth(p))["correct"]
    assert "unsloth_zoo" not in sys.modules
    sys.modules.pop("unsloth_zoo_fused_linear", None)
