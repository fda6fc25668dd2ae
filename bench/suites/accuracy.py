"""How far log-probs and gradients are from float64 on the same inputs, and what that does to the importance ratio."""

import torch

from bench import draw, measure
from bench.cases import Case, problem, tensors, truth
from bench.real import TOKENS

RATIO = (0.9, 1.1)  # a token outside it by rounding alone looks like a policy that moved


def cases(device):
    if device == "cuda":
        return [Case.of(m, 4096, dtype="bf16", group="accuracy") for m in ("Qwen2.5-1.5B", "Gemma-2-2B")] + [
            Case.of("Qwen2.5-1.5B", 4096, dtype="bf16", profile="flat", group="accuracy"),
            Case.of("Qwen2.5-1.5B", 2048, dtype="fp32", group="accuracy"),
            Case.real("real", TOKENS, dtype="bf16", group="accuracy"),
        ]
    return [
        Case(1024, 32768, 256, dtype="bf16", group="accuracy"),
        Case(1024, 16384, 256, dtype="bf16", softcap=30.0, group="accuracy"),
        Case(1024, 32768, 256, dtype="fp32", group="accuracy"),
        Case.real("real", 512, dtype="bf16", group="accuracy"),
    ]


def run(options, show):
    """-> one row a case and entry."""
    rows = []
    for case in [Case(**{"group": "accuracy", **c}) for c in options.cases] or cases(options.device):
        show.status(f"accuracy: {case.title}")
        entries, reasons = options.runnable(case)
        common = {"suite": "accuracy", **case.row(), "title": case.title}
        found = {name: {**common, "entry": name, "reason": reason} for name, reason in reasons.items()}
        if entries:
            p = problem(case, tensors(case, options.device))
            want = truth(p)
        for name, entry in entries.items():
            show.status(f"accuracy: {case.title}: {name}")
            result, reason = measure.attempt(accuracy, entry, p, want)
            found[name] = {**common, "entry": name, **(result or {"reason": reason})}
        new = [found[name] for name in options.names(case)]
        show.rows(case.title, new, table)
        rows += new
    return rows


def accuracy(entry, p, want):
    """Errors of one entry; the entropy's where it has one."""
    row = measure.errors(entry, p, want)
    if entry.logprobs is None:
        return row
    with torch.no_grad():
        logp, _ = entry.logprobs(p, False)
        difference = logp.reshape(-1).double() - want.logprobs
        ratio = difference.exp()
        row["outside_ratio"] = float(((ratio < RATIO[0]) | (ratio > RATIO[1])).double().mean())
        sure = want.logprobs > -1e-3  # where most tokens of RL live, and where log-probs cancel
        if sure.any():
            row["sure_relative_error"] = float((difference / want.logprobs)[sure].abs().median())
        if entry.entropy:
            entropy = entry.logprobs(p, True)[1]
            row["entropy_max_error"] = float((entropy.reshape(-1).double() - want.entropy).abs().max())
    return row


FIGURES = {
    "logp_rms_error": "log-prob rms",
    "logp_max_error": "log-prob max",
    "sure_relative_error": "rel., p > 0.999",
    "outside_ratio": "outside [0.9, 1.1]",
    "entropy_max_error": "entropy max",
    "loss_error": "loss",
    "d_hidden_error": "dX",
    "d_weight_error": "dW",
}


def table(rows):
    """-> (columns, cells) of one case."""
    cells = []
    for r in rows:
        if "reason" in r:
            cells.append((r["entry"], r["reason"]))
            continue
        figures = [text(k, r[k]) if k in r else "-" for k in FIGURES]
        cells.append((r["entry"], *figures, "ok" if r["correct"] else "wrong"))
    return ("entry", *FIGURES.values(), ""), cells


def text(name, value):
    return f"{value:.2%}" if name == "outside_ratio" else f"{value:.1e}"


def charts(rows, stem):
    """-> paths of the pictures written."""
    good = [r for r in rows if r.get("logp_rms_error")]
    grads = [r for r in rows if r.get("d_hidden_error")]
    paths = []
    if good:
        paths.append(
            draw.bars(good, "logp_rms_error", "rms error of the log-probs (nats)", f"{stem}-logprobs.png", True)
        )
    if grads:
        paths.append(draw.bars(grads, "d_hidden_error", "relative error of dX", f"{stem}-gradients.png", True))
    return paths
