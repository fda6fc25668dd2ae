"""A picture of a run."""

from matplotlib.figure import Figure

PANELS = {"reward": "reward", "entropy": "entropy (nats a token)", "clip_fraction": "clip fraction", "kl": "KL (nats)"}


def plot_curves(rows, path, title, shown=PANELS):
    """One panel a metric over the steps, a running mean over the raw values; written as a PNG. ``shown``: {metric:
    label}."""
    rows = [r for r in rows if "loss" in r]  # no evaluations
    panels = {k: v for k, v in shown.items() if any(r.get(k) for r in rows)} or dict([*shown.items()][:1])
    figure = Figure(figsize=(4.2 * len(panels), 3.4), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, (name, label) in zip(axes, panels.items()):
        known = [r for r in rows if r.get(name) is not None]
        steps, values = [r["step"] for r in known], [r[name] for r in known]
        axis.plot(steps, values, color="tab:blue", alpha=0.25, linewidth=1)
        axis.plot(steps, running_mean(values, 10), color="tab:blue", linewidth=2)
        axis.set(title=label, xlabel="step")
        axis.grid(alpha=0.3)
    figure.suptitle(title)
    figure.savefig(path, dpi=120)


def running_mean(values, width):
    return [sum(values[max(0, i - width + 1) : i + 1]) / (i + 1 - max(0, i - width + 1)) for i in range(len(values))]
