"""A distillation's divergence from a teacher: forward and backward, memory; both KLs and the JSD."""

from dataclasses import replace

from bench.cases import DIVERGENCES, Case
from bench.real import TOKENS
from bench.suites import loss

table, charts = loss.table, loss.charts


def cases(device):
    return cuda_cases() if device == "cuda" else cpu_cases()


def each(case):
    return [replace(case, objective=name, head=head) for name in DIVERGENCES for head in ("trained", "frozen")]


def cpu_cases():
    half = Case(1024, 16384, 512, profile="flat", objective="reverse KL", memory=False)
    return [
        *each(Case(1024, 32768, 512)),
        half,
        Case.real("real", 512, group="models", objective="reverse KL", memory=False),
    ]


def cuda_cases():
    narrow, wide = Case.of("Qwen2.5-1.5B", 16384, dtype="bf16"), Case.of("Qwen3-8B", 8192, dtype="bf16")
    return [
        *each(narrow),
        *each(wide),
        replace(narrow, profile="flat", objective="reverse KL"),
        Case.real("real", TOKENS, group="models", dtype="bf16", objective="reverse KL"),
    ]


def run(options, show):
    """-> one row a case and entry."""
    return loss.run_chosen("divergence", cases, options, show, objective="reverse KL")
