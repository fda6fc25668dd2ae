"""The pictures of docs/step-by-step.md, from what its code computes."""

import json

import torch
from matplotlib.figure import Figure

from bench.draw import write
from bench.front import PICTURES, THEMES

LIGHT = THEMES["light"]
RIGHT, WRONG = LIGHT["ours"], "#bc4c00"


def draw_steps(scope):
    """Draws all five; -> {file name: the figures it shows}."""
    shown = {}
    for name, draw in PANELS.items():
        figure = Figure(figsize=(9, 3), layout="constrained")
        shown[f"step-{name}.png"] = data = draw(figure, scope)
        write(figure, PICTURES / f"step-{name}.png", dpi=120, metadata={"Description": json.dumps(data)})
    return shown


def colour(answer):
    return RIGHT if answer == "204" else WRONG


def plain(axis, **texts):
    axis.set(**texts)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)


def draw_answers(figure, scope):
    axis = figure.subplots()
    chance = scope["old"].exp()
    axis.imshow(chance, cmap="Blues", vmin=0, vmax=1.6, aspect="auto")
    for i, answer in enumerate(scope["answers"]):
        for t, token in enumerate([*answer, "end"]):
            axis.text(t, i, f"{token}   p = {chance[i, t]:.2f}", ha="center", va="center", fontsize=12)
    axis.set_yticks(range(4), scope["answers"], fontsize=12)
    axis.set_xticks(range(4), [f"token {t + 1}" for t in range(4)])
    axis.set_title("four answers, and how likely each token was when it was drawn", fontsize=11)
    return chance.tolist()


def draw_advantages(figure, scope):
    left, right = figure.subplots(1, 2)
    rewards, advantages = scope["rewards"].tolist(), scope["advantages"].tolist()
    mean = scope["rewards"].mean().item()
    for axis, values, title in ((left, rewards, "reward"), (right, advantages, "advantage")):
        bars = axis.bar(scope["answers"], values, color=[colour(a) for a in scope["answers"]], width=0.6)
        axis.bar_label(bars, [f"{v:.2f}" for v in values], padding=2)
        plain(axis, title=title, ylim=(min(0, 1.5 * min(values)), 1.2 * max(values)))
        axis.axhline(0, color=LIGHT["muted"], lw=1)
    left.axhline(mean, color=LIGHT["muted"], ls=":")
    left.annotate(f"mean {mean:.2f}", (3.3, mean + 0.03), ha="right", color=LIGHT["muted"])
    return [rewards, advantages]


def draw_gradient(figure, scope):
    axes = figure.subplots(1, 2, width_ratios=(3, 2), sharey=True)
    gradient, shown = scope["first_gradient"], []
    for axis, prefix, names in zip(axes, ("2", "20"), (("0", "1", "4"), ("4", "0"))):
        column = gradient[:, scope["prefixes"].index(prefix)]
        pull = [-column[scope["tokens"].index(n)].item() for n in names]
        bars = axis.bar(names, pull, color=[RIGHT if p > 0 else WRONG for p in pull], width=0.5)
        axis.bar_label(bars, [f"{p:+.4f}" for p in pull], padding=2)
        axis.axhline(0, color=LIGHT["muted"], lw=1)
        plain(axis, title=f'logits after "{prefix}"', ylabel="push: minus the gradient")
        shown.append(pull)
    axes[0].set_ylim(-0.11, 0.11)
    return shown


def draw_clip(figure, scope):
    axes = figure.subplots(1, 2)
    x = torch.linspace(0.6, 1.6, 201)
    ratio, advantages = scope["ratio"], scope["advantages"]
    for axis, which, title in zip(axes, (advantages > 0, advantages < 0), ("the right answer", "wrong answers")):
        a = advantages[which][0]
        axis.plot(x, torch.minimum(x * a, x.clamp(0.8, 1.2) * a), color=LIGHT["muted"], lw=2)
        points = ratio[which].flatten()
        values = torch.minimum(points * a, points.clamp(0.8, 1.2) * a)
        axis.scatter(points, values, color=RIGHT if a > 0 else WRONG, zorder=3)
        for edge in (0.8, 1.2):
            axis.axvline(edge, color=LIGHT["muted"], ls=":", lw=1)
        plain(axis, title=f"{title}: advantage {a:+.2f}", xlabel="ratio", ylabel="surrogate")
    return ratio.tolist()


def draw_after(figure, scope):
    axis = figure.subplots()
    pairs = [scope["old"].exp().prod(1).tolist(), scope["now"].prod(1).tolist()]
    for offset, values, alpha in zip((-0.18, 0.18), pairs, (0.45, 1.0)):
        places = [i + offset for i in range(4)]
        bars = axis.bar(places, values, 0.34, color=[colour(a) for a in scope["answers"]], alpha=alpha)
        axis.bar_label(bars, [f"{v:.3f}" for v in values], padding=2)
    axis.set_xticks(range(4), scope["answers"], fontsize=12)
    plain(axis, title="probability of each answer, before (pale) and after two steps", ylim=(0, 0.3))
    return pairs


PANELS = {
    "1-answers": draw_answers,
    "2-advantages": draw_advantages,
    "3-gradient": draw_gradient,
    "4-clip": draw_clip,
    "5-after": draw_after,
}
