"""Figures of a study: one idea each, readable in grey.

Called by lab.analyze. Each function takes the numbers of study.json or records and writes one PNG.
"""

import io

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from PIL import Image

import common
from lab.study import MAIN
from lab.tables import GROUPS, SCORES, grouped, label

# a grey, a line and a marker each, so that no figure needs its colours
STYLES = {
    "base, no plan": ("#9e9e9e", ":", "s"),
    "base + plan": ("#e69f00", "--", "^"),
    "GRPO": ("#0072b2", "-.", "o"),
    "EG-GRPO": ("#000000", "-", "D"),
}


def save(path, figure):
    """Write a figure as a PNG with a palette of 256 colours, which takes half the bytes."""
    drawn, image = io.BytesIO(), io.BytesIO()
    figure.savefig(drawn, dpi=110, bbox_inches="tight")
    plt.close(figure)
    Image.open(drawn).convert("RGB").quantize(256).save(image, "PNG", optimize=True)
    common.write(path, image.getvalue())


# --- records --------------------------------------------------------------------------------------


def density(points, x_grid, y_grid):
    """Smooth points by a Gaussian of Scott's width, at least a fiftieth of the range. points (n, 2)
    -> (len(y_grid), len(x_grid))."""
    kernels = []
    for values, grid in zip(points.T, (x_grid, y_grid)):
        width = max(values.std() * len(values) ** (-1 / 6), (grid[-1] - grid[0]) / 50)
        kernels.append(np.exp(-(((grid[:, None] - values) / width) ** 2) / 2) / width)
    return kernels[1] @ kernels[0].T / len(points)


def draw_joint(path, records, key, title):
    """Reward against an entropy, as in the paper's figure. The contours hold half and nine tenths
    of the images; histograms at the margins."""
    figure, axes = plt.subplots(2, 2, figsize=(7, 6), sharex="col", sharey="row",
                                width_ratios=(4, 1), height_ratios=(1, 4),
                                gridspec_kw=dict(hspace=0.05, wspace=0.05))  # fmt: skip
    (top, corner), (joint, side) = axes
    every = np.array([row[key] for rows in records.values() for row in rows])
    x_grid = np.linspace(np.quantile(every, 0.001), np.quantile(every, 0.999) + 1e-6, 120)
    y_grid = np.linspace(-0.05, 1.1, 120)
    for setting, rows in records.items():
        colour, line, _ = STYLES[setting]
        points = np.array([(row[key], row["reward"]) for row in rows])
        height = density(points, x_grid, y_grid)
        descending = np.sort(height.ravel())[::-1]
        share = np.cumsum(descending) / descending.sum()
        levels = sorted({descending[np.searchsorted(share, s)] for s in (0.9, 0.5)})
        joint.contour(x_grid, y_grid, height, levels, colors=colour, linestyles=line,
                      linewidths=np.linspace(1, 2, len(levels)))  # fmt: skip
        joint.plot([], [], color=colour, linestyle=line, label=setting)
        options = dict(bins=40, density=True, histtype="step", color=colour, linestyle=line)
        top.hist(points[:, 0], range=(x_grid[0], x_grid[-1]), **options)
        side.hist(points[:, 1], range=(0, 1), orientation="horizontal", **options)
    joint.set(xlabel=f"{title}, fraction of log V", ylabel="reward", ylim=(0, 1.08))
    joint.legend(loc="lower right", frameon=False)
    for axis in (top, side, corner):
        axis.axis("off")
    save(path, figure)


def draw_plan_entropy(path, plans):
    """Reward of a plan against its entropy, both minus their prompt's mean, within thirds of the
    std of image entropy. plans: {setting: rows of lab.analyze.average_plans}."""
    figure, axes = plt.subplots(1, 3, figsize=(10, 3.4), sharey=True, sharex=True)
    std = np.concatenate([[p["image_entropy_std"] for p in rows] for rows in plans.values()])
    cuts = np.quantile(std, (0, 1 / 3, 2 / 3, 1))
    for setting, rows in plans.items():
        colour, line, marker = STYLES[setting]
        numbers = np.unique([p["number"] for p in rows], return_inverse=True)[1]
        x, y = (np.array([p[key] for p in rows]) for key in ("plan_entropy", "reward"))
        x, y = (v - (np.bincount(numbers, v) / np.bincount(numbers))[numbers] for v in (x, y))
        third = np.searchsorted(cuts[1:3], [p["image_entropy_std"] for p in rows])
        for panel, axis in enumerate(axes):
            inside = np.flatnonzero(third == panel)
            if len(inside) < 10:
                continue
            fifths = np.array_split(inside[np.argsort(x[inside])], 5)
            axis.errorbar([x[f].mean() for f in fifths], [y[f].mean() for f in fifths],
                          [1.96 * y[f].std() / len(f) ** 0.5 for f in fifths], capsize=2,
                          color=colour, linestyle=line, marker=marker, markersize=4)  # fmt: skip
    for i, axis in enumerate(axes):
        axis.set_title(f"std of image entropy {cuts[i]:.3f} to {cuts[i + 1]:.3f}", fontsize=9)
        axis.set_xlabel("plan entropy minus its prompt's mean")
    axes[0].set_ylabel("reward minus its prompt's mean")
    for setting in plans:
        colour, line, marker = STYLES[setting]
        axes[0].plot([], [], color=colour, linestyle=line, marker=marker, label=setting)
    axes[0].legend(frameon=False, fontsize=8)
    save(path, figure)


def draw_spread(path, spread):
    """Spread of what each policy draws for a prompt, with bootstrap intervals over prompts."""
    spread = {setting: x for setting, x in spread.items() if setting in STYLES}
    measures = next(iter(spread.values()))
    figure, axes = plt.subplots(1, len(measures), figsize=(10, 2.6), sharey=True)
    for axis, measure in zip(axes, measures):
        for i, (setting, found) in enumerate(spread.items()):
            x, (colour, _, marker) = found[measure], STYLES[setting]
            half = [[x["value"] - x["low"]], [x["high"] - x["value"]]]
            axis.errorbar([x["value"]], [i], xerr=half, color=colour, marker=marker, capsize=3)
        axis.set(xlabel=f"{measure}, within a prompt", yticks=range(len(spread)))
        axis.set_yticklabels(spread)
        axis.set_xlim(0, 1.1 * max(found[measure]["high"] for found in spread.values()) + 1e-6)
    axes[0].invert_yaxis()
    save(path, figure)


# --- runs -----------------------------------------------------------------------------------------


def draw_curves(path, study):
    """Held-out exact, on usual and rare pairs, against the training step: mean over runs and its
    interval; a column per learning rate and per horizon."""
    columns = [(title, grouped(study, [prefix], MAIN)) for prefix, title in GROUPS.items()]
    columns = [(title, rows) for title, rows in columns[:4] if len(rows) > 1]
    if not columns:
        return
    figure, axes = plt.subplots(2, len(columns), figsize=(2.9 * len(columns), 5.2), sharey="row",
                                sharex="col", squeeze=False)  # fmt: skip
    for (title, rows), (usual, rare) in zip(columns, axes.T):
        for axis, key in ((usual, "exact by step"), (rare, "rare exact by step")):
            for i, (_, variant, numbers) in enumerate(rows):
                colour, line, marker = STYLES[label(variant)]
                steps = np.array([int(step) for step in numbers[key]])
                mean = np.array([x["mean"] for x in numbers[key].values()])
                half = np.array([x["half"] or 0.0 for x in numbers[key].values()])  # None if n = 1
                name = f"{label(variant).strip('`')} ({numbers['runs']})"
                shift = (i - 1) * steps[-1] / 100  # so that intervals do not cover each other
                axis.errorbar(steps + shift, mean, half, color=colour, linestyle=line, label=name,
                              marker=marker, markersize=3, linewidth=1.2, elinewidth=0.8,
                              markevery=5 if len(steps) > 10 else 1,
                              errorevery=5 if len(steps) > 10 else 1)  # fmt: skip
        usual.set_title(title, fontsize=9)
        rare.set_xlabel("step")
        usual.legend(frameon=False, fontsize=7, loc="lower right")
    axes[0, 0].set(ylabel="exact", ylim=(0, 1))  # of few runs, intervals leave the frame
    axes[1, 0].set(ylabel="exact, rare pairs", ylim=(0, 1))
    save(path, figure)


def draw_differences(path, study):
    """Each variant minus GRPO under the same conditions: reward, exact, exact on rare pairs. Black:
    95 % interval over pairs; grey: over base policies, where it differs."""
    rows = []
    for prefix in GROUPS:
        compared = [row for row in grouped(study, [prefix]) if row[1] != prefix + "grpo"]
        rows += [row for row in compared if row[2]["reward - grpo"]]
    if not rows:
        return
    figure, axes = plt.subplots(1, 3, figsize=(10, 0.27 * len(rows) + 0.9), sharey=True)
    for axis, score in zip(axes, SCORES):
        found = [numbers[f"{score} - grpo"] for _, _, numbers in rows]
        for y, x in enumerate(found):
            grey, half = x["bases"]["half"], x["half"]
            axis.plot([x["mean"]], [y], "ko" if half is not None else "wo", markersize=4, mec="k")
            if grey is not None and x["bases"]["n"] < x["n"]:
                axis.errorbar([x["mean"]], [y], xerr=grey, color="0.7", elinewidth=4, zorder=0)
            if half is not None:
                axis.errorbar([x["mean"]], [y], xerr=half, color="k", capsize=2, elinewidth=1)
        axis.axvline(0, color="0.5", linewidth=0.8, linestyle="--")
        ends = sorted(abs(x["mean"]) + (x["half"] or 0) for x in found)
        limit = max(ends[int(0.85 * (len(ends) - 1))], *(abs(x["mean"]) for x in found), 0.001)
        axis.set_xlim(-1.15 * limit, 1.15 * limit)  # the widest intervals leave the frame
        axis.locator_params(axis="x", nbins=5)
        axis.set_xlabel(f"{score.replace('rare exact', 'exact on rare pairs')} minus GRPO's")
        for y in range(1, len(rows)):
            if rows[y][0] != rows[y - 1][0]:
                axis.axhline(y - 0.5, color="0.8", linewidth=0.8)
    title = "95 % intervals; black: over pairs (their number in brackets), grey: over base policies"
    figure.suptitle(title, fontsize=9, y=0.91)
    names = [
        f"{label(v).strip('`')} ({numbers['reward - grpo']['n']})" for _, v, numbers in rows
    ]  # fmt: skip
    axes[0].set(yticks=range(len(rows)), yticklabels=names, ylim=(len(rows) - 0.5, -0.5))
    titles = [row[0] for row in rows]
    for title in dict.fromkeys(titles):
        axes[2].text(1.02, titles.index(title), title, fontsize=9, va="center",
                     transform=axes[2].get_yaxis_transform())  # fmt: skip
    save(path, figure)


def draw_all(folder, study, records, plans):
    """Draw every figure that the study has the data for."""
    if records:
        draw_joint(folder / "entropy-mean.png", records, "image_entropy", "mean image entropy")
        draw_joint(folder / "entropy-std.png", records, "image_entropy_std", "std of image entropy")
        draw_spread(folder / "spread.png", study["spread"])
    if plans:
        draw_plan_entropy(folder / "plan-entropy.png", plans)
    draw_curves(folder / "curves.png", study)
    draw_differences(folder / "differences.png", study)
