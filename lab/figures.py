"""Figures of a study for lab.analyze: from numbers of study.json or records to a PNG each."""

import numpy as np
from matplotlib.figure import Figure

from evaluate import save_figure
from lab.stats import PASS_AT
from lab.tables import SCORES, label

WIDTH = 8.3  # inches of 100 pixels: GitHub's pages show 830 pixels
INTERVALS = "95 % intervals over base policies"
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


def density(points, x_grid, y_grid):
    """Smooth points (n, 2) by a Gaussian of Scott's width, at least a fiftieth of the range. Those
    whose y is near 1, the largest reward, are reflected there: no density is lost above it."""
    x, y = points.T
    x = np.concatenate([x, x])
    y = np.concatenate([y, 2 - y])
    kernels = []
    for values, grid in ((x, x_grid), (y, y_grid)):
        scott = values.std() * len(values) ** (-1 / 6)
        width = max(scott, (grid[-1] - grid[0]) / 50)
        distance = (grid[:, None] - values) / width
        kernels.append(np.exp(-(distance**2) / 2) / width)
    return kernels[1] @ kernels[0].T / len(x)


def draw_setting(top, joint, setting, points, x_grid):
    """Draw the contours of the densest half and nine tenths of points (n, 2), a histogram above."""
    colour = STYLES[setting]["color"]
    dashes = STYLES[setting]["linestyle"]
    y_grid = np.linspace(0, 1, 120)
    height = density(points, x_grid, y_grid)
    descending = np.sort(height.ravel())[::-1]
    share = np.cumsum(descending) / descending.sum()
    index = np.searchsorted(share, (0.9, 0.5))
    levels = np.unique(descending[index])
    joint.contour(
        x_grid,
        y_grid,
        height,
        levels,
        colors=colour,
        linestyles=dashes,
        linewidths=(1, 2.2),
    )
    joint.plot([], [], color=colour, linestyle=dashes, label=setting)
    bins = np.linspace(x_grid[0], x_grid[-1], 41)
    top.hist(points[:, 0], bins, histtype="step", color=colour, linestyle=dashes)


def draw_joint(path, records):
    """Reward against image entropy, as in the paper's figure, for successive pairs of settings."""
    pooled = {}
    for setting, of_bases in records.items():
        rows = [row for rows in of_bases.values() for row in rows]
        pairs = [(row["image_entropy"], row["reward"]) for row in rows]
        pooled[setting] = np.array(pairs)
    bases = len(set().union(*records.values()))
    settings = list(pooled)
    panels = list(zip(settings, settings[1:])) or [settings]
    entropies = np.concatenate([*pooled.values()])[:, 0]
    left, right = np.quantile(entropies, (0.001, 0.999))
    x_grid = np.linspace(left, right + 1e-6, 120)
    figure = Figure(figsize=(WIDTH, 4.4), layout="constrained")
    share = dict(sharex=True, sharey="row", height_ratios=(1, 4))
    axes = figure.subplots(2, len(panels), squeeze=False, **share)
    for panel, (top, joint) in zip(panels, axes.T):
        for setting in panel:
            draw_setting(top, joint, setting, pooled[setting], x_grid)
        joint.set(xlabel="fraction of log V", ylim=(0, 1))
        joint.legend(loc="upper center", bbox_to_anchor=(0.5, -0.15), frameon=False)
        top.axis("off")
    axes[1, 0].set_ylabel("reward")
    note = "half of the images inside the thick line, nine tenths inside the thin one"
    figure.suptitle(f"image entropy; {note}; base policies: {bases}", fontsize=9)
    save_figure(figure, path)


def draw_lines(path, panels, note, size, xlabel, ylabel="", ticks=None):
    """Draw means with their intervals: {title of a panel: {"style (remark)": {x: interval}}}. With
    ticks, x is logarithmic."""
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axis, (title, lines) in zip(axes, panels.items()):
        for i, (name, points) in enumerate(lines.items()):
            intervals = points.values()
            x = np.array([float(number) for number in points])
            shift = i - len(lines) // 2  # so that intervals do not cover each other
            x = x * 1.03**shift if ticks else x + shift * x[-1] / 100
            mean = [interval["mean"] for interval in intervals]
            half = [interval["half"] or 0.0 for interval in intervals]  # None if n = 1
            style, _, _ = name.partition(" (")
            axis.errorbar(x, mean, half, label=name, markersize=3, **STYLES[style])
        axis.set(title=title, xlabel=xlabel, ylim=(0, 1))
        if ticks:
            axis.set_xscale("log")
            axis.set_xticks(ticks, [f"{number:g}" for number in ticks], fontsize=9)
            axis.set_xticks([], minor=True)
    axes[0].set_ylabel(ylabel)
    lines, names = axes[0].get_legend_handles_labels()
    place = dict(loc="outside lower center", ncols=3, frameon=False)
    figure.legend(lines, names, title=f"bars: {INTERVALS}{note}", **place)
    save_figure(figure, path)


def draw_curves(path, variants):
    """Held-out exact against the training step: mean over runs and its interval."""
    panels = {"exact, usual pairs": {}, "exact, rare pairs": {}}
    for variant, numbers in variants.items():
        name = f"{plain(variant)} ({numbers['runs']})"
        usual, rare = panels.values()
        usual[name] = numbers["eval_exact"]
        rare[name] = numbers["rare_exact"]
    draw_lines(path, panels, "; in brackets: runs", (WIDTH, 3.8), "step")


def draw_discovery(path, variants):
    """Exact of rare pairs against their frequency in the corpus: means over runs, intervals."""
    lines = {}
    for variant, numbers in variants.items():
        exact = {}
        for frequency, found in numbers["discovery"].items():
            exact[frequency.rstrip("%")] = found["exact"]
        lines[f"{plain(variant)} ({numbers['runs']})"] = exact
    ticks = [float(frequency) for frequency in exact]
    labels = dict(xlabel="frequency in the corpus, %", ylabel="exact")
    draw_lines(path, {"": lines}, "; in brackets: runs", (6, 4), ticks=ticks, **labels)


def draw_passes(path, passes):
    """pass@k against k for usual and rare pairs: mean over base policies and its interval."""
    panels = {}
    for split, title in (("eval", "usual pairs"), ("rare", "rare pairs")):
        of_split = passes.get(split, {})
        panels[title] = {name: of for name, of in of_split.items() if name in STYLES}
    draw_lines(path, panels, "", (WIDTH, 3.8), "k", "pass@k", ticks=PASS_AT)


def draw_differences(path, variants):
    """Each variant minus GRPO: reward, exact, exact on rare pairs, with 95 % intervals."""
    figure = Figure(figsize=(WIDTH, 1.2 + 0.28 * len(variants)), layout="constrained")
    axes = figure.subplots(1, 3, sharey=True)
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
        axis.locator_params(axis="x", nbins=3)
    axes[0].set_yticks(range(len(names)), names, fontsize=9)
    axes[0].set_ylim(len(names) - 0.5, -0.5)
    figure.supxlabel(f"bars: {INTERVALS}; in brackets: pairs of runs", fontsize=9)
    save_figure(figure, path)
