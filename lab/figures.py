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
from lab.tables import SCORES, label

# a grey, a line and a marker each, so that no figure needs its colours
STYLES = {
    "base, no plan": dict(color="#9e9e9e", linestyle=":", marker="s"),
    "base + plan": dict(color="#e69f00", linestyle="--", marker="^"),
    "GRPO": dict(color="#0072b2", linestyle="-.", marker="o"),
    "EG-GRPO": dict(color="#000000", linestyle="-", marker="D"),
    "eggrpo-released": dict(color="#cc79a7", linestyle=(0, (5, 1)), marker="v"),
    "bonus": dict(color="#d55e00", linestyle=(0, (1, 1)), marker="x"),
    "exclude": dict(color="#009e73", linestyle=(0, (3, 1, 1, 1)), marker="s"),
}


def plain(variant):
    """Name a variant in a figure."""
    return label(variant).replace("`", "")


def save(path, figure):
    """Write a figure as a PNG with a palette of 256 colours, which takes half the bytes."""
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=110, bbox_inches="tight")
    plt.close(figure)
    image = Image.open(drawn).convert("RGB").quantize(256)
    packed = io.BytesIO()
    image.save(packed, "PNG", optimize=True)
    common.write(path, packed.getvalue())


# --- records --------------------------------------------------------------------------------------


def density(points, x_grid, y_grid):
    """Smooth points by a Gaussian of Scott's width, at least a fiftieth of the range. points (n, 2)
    -> (len(y_grid), len(x_grid))."""
    kernels = []
    for values, grid in zip(points.T, (x_grid, y_grid)):
        scott = values.std() * len(values) ** (-1 / 6)
        width = max(scott, (grid[-1] - grid[0]) / 50)
        distance = (grid[:, None] - values) / width
        kernels.append(np.exp(-(distance**2) / 2) / width)
    return kernels[1] @ kernels[0].T / len(points)


def contour_levels(height):
    """Return the heights above which lie nine tenths and half of a density."""
    descending = np.sort(height.ravel())[::-1]
    share = np.cumsum(descending) / descending.sum()
    return sorted({descending[np.searchsorted(share, s)] for s in (0.9, 0.5)})


def draw_joint(path, records, key):
    """Reward against an entropy, as in the paper's figure. The contours hold half and nine tenths
    of the images; histograms at the margins. records: {setting: {base: rows}}, pooled here."""
    pooled = {}
    for setting, of_bases in records.items():
        pooled[setting] = [row for rows in of_bases.values() for row in rows]
    figure, axes = plt.subplots(
        2,
        2,
        figsize=(7, 6),
        sharex="col",
        sharey="row",
        width_ratios=(4, 1),
        height_ratios=(1, 4),
        gridspec_kw=dict(hspace=0.05, wspace=0.05),
    )
    (top, corner), (joint, side) = axes
    every = np.array([row[key] for rows in pooled.values() for row in rows])
    left, right = np.quantile(every, (0.001, 0.999)) + (0, 1e-6)
    x_grid = np.linspace(left, right, 120)
    y_grid = np.linspace(-0.05, 1.1, 120)
    for setting, rows in pooled.items():
        colour = STYLES[setting]["color"]
        line = STYLES[setting]["linestyle"]
        points = np.array([(row[key], row["reward"]) for row in rows])
        height = density(points, x_grid, y_grid)
        levels = contour_levels(height)
        widths = np.linspace(1, 2, len(levels))
        joint.contour(
            x_grid, y_grid, height, levels, colors=colour, linestyles=line, linewidths=widths
        )
        joint.plot([], [], color=colour, linestyle=line, label=setting)
        options = dict(bins=40, density=True, histtype="step", color=colour, linestyle=line)
        entropy, reward = points.T
        top.hist(entropy, range=(left, right), **options)
        side.hist(reward, range=(0, 1), orientation="horizontal", **options)
    name = key.replace("_", " ")
    joint.set(xlabel=f"{name}, fraction of log V", ylabel="reward", ylim=(0, 1.08))
    joint.legend(loc="lower right", frameon=False)
    for axis in (top, side, corner):
        axis.axis("off")
    save(path, figure)


# --- runs -----------------------------------------------------------------------------------------


def draw_curves(path, variants):
    """Held-out exact, on usual and rare pairs, against the training step: mean over runs and its
    interval."""
    figure, axes = plt.subplots(1, 2, figsize=(8, 3.2), sharey=True)
    titles = dict(eval_exact="exact, usual pairs", rare_exact="exact, rare pairs")
    for axis, (key, title) in zip(axes, titles.items()):
        for i, (variant, numbers) in enumerate(variants.items()):
            steps = np.array([int(step) for step in numbers[key]])
            mean = [x["mean"] for x in numbers[key].values()]
            half = [x["half"] or 0.0 for x in numbers[key].values()]  # None if n = 1
            shift = (i - 1) * steps[-1] / 100  # so that intervals do not cover each other
            name = f"{plain(variant)} ({numbers['runs']})"
            style = STYLES[plain(variant)]
            axis.errorbar(steps + shift, mean, half, label=name, markersize=3, **style)
        axis.set(title=title, xlabel="step", ylim=(0, 1))
    axes[0].legend(frameon=False, fontsize=8)
    save(path, figure)


def draw_differences(path, variants):
    """Each variant minus GRPO: reward, exact, exact on rare pairs, with 95 % intervals."""
    height = 1 + 0.3 * len(variants)
    figure, axes = plt.subplots(1, 3, figsize=(10, height), sharey=True)
    names = []
    for variant, numbers in variants.items():
        pairs = (numbers["differences"]["reward"] or {}).get("runs", 0)
        names.append(f"{plain(variant)} ({pairs})")
    for axis, score in zip(axes, SCORES):
        for y, numbers in enumerate(variants.values()):
            x = numbers["differences"][score]
            if not x:
                continue
            half = x["half"] or 0.0  # None if n = 1
            axis.errorbar([x["mean"]], [y], xerr=half, color="k", fmt="o", capsize=2)
        axis.axvline(0, color="0.5", linewidth=0.8, linestyle="--")
        axis.set_xlabel(f"{score} minus GRPO's")
        axis.locator_params(axis="x", nbins=4)
    axes[0].set(yticks=range(len(names)), yticklabels=names)
    axes[0].set_ylim(len(names) - 0.5, -0.5)
    save(path, figure)


def draw_discovery(path, variants):
    """Exact of rare pairs against their frequency in the corpus: means over runs, intervals."""
    figure, axis = plt.subplots(figsize=(4.5, 3.2))
    for i, (variant, numbers) in enumerate(variants.items()):
        found = numbers["discovery"]
        frequency = np.array([float(name.rstrip("%")) for name in found])
        shift = 1.03 ** (i - 2)  # so that intervals do not cover each other
        mean = [x["exact"]["mean"] for x in found.values()]
        half = [x["exact"]["half"] or 0.0 for x in found.values()]  # None if n = 1
        name = f"{plain(variant)} ({numbers['runs']})"
        style = STYLES[plain(variant)]
        axis.errorbar(frequency * shift, mean, half, label=name, markersize=3, **style)
    axis.set(xscale="log", ylim=(0, 1), ylabel="exact", xlabel="frequency in the corpus, %")
    axis.set_xticks(frequency, [f"{x:g}" for x in frequency])
    axis.set_xticks([], minor=True)
    axis.legend(frameon=False, fontsize=8, loc="upper left")
    save(path, figure)


def draw_diversity(path, variants):
    """Vendi score against reward: a point per run, grey for those of fewer steps or guidance."""
    figure, axis = plt.subplots(figsize=(4.5, 3.2))
    for variant, numbers in variants.items():
        reward = [*numbers["values"]["reward"].values()]
        vendi = [*numbers["values"]["vendi"].values()]
        name = plain(variant)
        if name in STYLES:
            options = dict(STYLES[name], linestyle="none", label=name, zorder=2)
        else:
            options = dict(color="0.8", linestyle="none", marker=".", zorder=1)
        axis.plot(reward, vendi, markersize=4, **options)
    axis.set(xlabel="reward", ylabel="Vendi score of ten images")
    axis.legend(frameon=False, fontsize=8)
    save(path, figure)


def draw_passes(path, passes):
    """pass@k against k for usual and rare pairs: mean over base policies and its interval."""
    figure, axes = plt.subplots(1, 2, figsize=(8, 3.2), sharey=True)
    titles = dict(eval="usual pairs", rare="rare pairs")
    for axis, (split, title) in zip(axes, titles.items()):
        for setting, found in passes.get(split, {}).items():
            if setting not in STYLES:
                continue  # a difference of two settings
            k = np.array([int(number) for number in found])
            mean = np.array([x["mean"] for x in found.values()])
            half = np.array([x["half"] or 0.0 for x in found.values()])  # None if n = 1
            style = STYLES[setting]
            axis.plot(k, mean, label=setting, markersize=3, **style)
            axis.fill_between(k, mean - half, mean + half, color=style["color"], alpha=0.15)
        axis.set(title=title, xlabel="k", xscale="log", ylim=(0, 1))
    axes[0].set_ylabel("pass@k")
    axes[0].legend(frameon=False, fontsize=8)
    save(path, figure)
