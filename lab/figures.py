"""Draw a study: one idea a figure, readable in grey, the data beside it.

Called by lab.analyze. Every function takes records or logs and returns nothing: it writes
figures/<name>.png and, where the data are not another file already, figures/<name>.csv.
"""

import csv
import io
import shutil
import textwrap

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from PIL import Image

import common
from lab.study import read_lines

# a grey, a line and a marker each, so that no figure needs its colours
STYLES = {
    "base": ("#9e9e9e", ":", "s"),
    "base + plan": ("#e69f00", "--", "^"),
    "GRPO": ("#0072b2", "-.", "o"),
    "EG-GRPO": ("#000000", "-", "D"),
}


def save(folder, name, figure, head=None, rows=()):
    """Write a figure and its data."""
    drawn, picture, text = io.BytesIO(), io.BytesIO(), io.StringIO()
    figure.savefig(drawn, dpi=110, bbox_inches="tight")
    plt.close(figure)
    # a palette takes half the bytes
    Image.open(drawn).convert("RGB").quantize(256).save(picture, "PNG", optimize=True)
    common.write(folder / f"{name}.png", picture.getvalue())
    if head:
        csv.writer(text, lineterminator="\n").writerows([head, *rows])
        common.write(folder / f"{name}.csv", text.getvalue().encode())


def density(points, x_grid, y_grid):
    """Smooth points by a Gaussian of Scott's width, at least a fiftieth of the range. points (n, 2)
    -> (len(y_grid), len(x_grid))."""
    kernels = []
    for values, grid in zip(points.T, (x_grid, y_grid)):
        width = max(values.std() * len(values) ** (-1 / 6), (grid[-1] - grid[0]) / 50)
        kernels.append(np.exp(-(((grid[:, None] - values) / width) ** 2) / 2) / width)
    return kernels[1] @ kernels[0].T / len(points)


def joint(folder, name, records, key, label):
    """Reward against an entropy: the paper's figure. Contours hold half and nine tenths of the
    pictures; the margins are the histograms."""
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
    main, top, side = axes[1, 0], axes[0, 0], axes[1, 1]
    axes[0, 1].axis("off")
    every = np.array([row[key] for rows in records.values() for row in rows])
    x_grid = np.linspace(np.quantile(every, 0.001), np.quantile(every, 0.999), 120)
    y_grid, data = np.linspace(-0.05, 1.1, 120), []
    for setting, rows in records.items():
        colour, line, _ = STYLES[setting]
        points = np.array([(row[key], row["reward"]) for row in rows])
        data += [(setting, f"{x:.5g}", f"{y:.5g}") for x, y in points]
        height = density(points, x_grid, y_grid)
        descending = np.sort(height.ravel())[::-1]
        share = np.cumsum(descending) / descending.sum()
        levels = sorted({descending[np.searchsorted(share, s)] for s in (0.9, 0.5)})
        main.contour(
            x_grid,
            y_grid,
            height,
            levels,
            colors=colour,
            linestyles=line,
            linewidths=np.linspace(1, 2, len(levels)),
        )
        main.plot([], [], color=colour, linestyle=line, label=setting)
        how = dict(bins=40, density=True, histtype="step", color=colour, linestyle=line)
        top.hist(points[:, 0], range=(x_grid[0], x_grid[-1]), **how)
        side.hist(points[:, 1], range=(0, 1), orientation="horizontal", **how)
    main.set(xlabel=label, ylabel="reward", ylim=(0, 1.08))
    main.legend(loc="lower left", frameon=False)
    for axis in (top, side):
        axis.axis("off")
    save(folder, name, figure, ("setting", key, "reward"), data)


def plan_entropy(folder, plans):
    """Reward of a plan against its entropy, both less their prompt's mean, within thirds of the
    spread of image entropy."""
    figure, axes = plt.subplots(1, 3, figsize=(10, 3.4), sharey=True, sharex=True)
    spread = np.concatenate([[p["image_entropy_std"] for p in ps] for ps in plans.values()])
    cuts, data, handles = np.quantile(spread, (0, 1 / 3, 2 / 3, 1)), [], []
    for setting, ps in plans.items():
        colour, line, marker = STYLES[setting]
        how = dict(color=colour, linestyle=line, marker=marker, markersize=4)
        handles.append(plt.Line2D([], [], label=setting, **how))
        numbers = np.unique([p["number"] for p in ps], return_inverse=True)[1]
        x, y = (np.array([p[key] for p in ps]) for key in ("plan_entropy", "reward"))
        x, y = (v - (np.bincount(numbers, v) / np.bincount(numbers))[numbers] for v in (x, y))
        third = np.searchsorted(cuts[1:3], [p["image_entropy_std"] for p in ps])
        data += [(setting, t + 1, f"{a:.5g}", f"{b:.5g}") for t, a, b in zip(third, x, y)]
        for panel, axis in enumerate(axes):
            inside = np.flatnonzero(third == panel)
            if len(inside) >= 10:
                fifths = np.array_split(inside[np.argsort(x[inside])], 5)
                axis.errorbar(
                    [x[f].mean() for f in fifths],
                    [y[f].mean() for f in fifths],
                    [1.96 * y[f].std() / len(f) ** 0.5 for f in fifths],
                    capsize=2,
                    **how,
                )
    for panel, axis in enumerate(axes):
        axis.set_title(f"image-entropy std {cuts[panel]:.3f} to {cuts[panel + 1]:.3f}", fontsize=9)
        axis.set_xlabel("plan entropy less its prompt's mean")
    axes[0].set_ylabel("reward less its prompt's mean")
    axes[0].legend(handles=handles, frameon=False, fontsize=8)
    save(folder, "plan-entropy", figure, ("setting", "third", "plan_entropy", "reward"), data)


def spread(folder, study):
    """How widely each setting explores a prompt, with bootstrap intervals over prompts."""
    measures = list(next(iter(study.values())))
    figure, axes = plt.subplots(1, len(measures), figsize=(10, 2.6), sharey=True)
    for axis, measure in zip(axes, measures):
        for i, (setting, found) in enumerate(study.items()):
            x = found[measure]
            axis.errorbar(
                [x["value"]],
                [i],
                xerr=[[x["value"] - x["low"]], [x["high"] - x["value"]]],
                color=STYLES[setting][0],
                marker=STYLES[setting][2],
                capsize=3,
            )
        axis.set(
            xlabel=f"{measure}, within a prompt", yticks=range(len(study)), yticklabels=list(study)
        )
    axes[0].invert_yaxis()
    save(
        folder,
        "spread",
        figure,
        ("setting", *measures),
        [(s, *(f[m]["value"] for m in measures)) for s, f in study.items()],
    )


def running_mean(values, steps=10):
    """Average each stretch of `steps` values, or of all where there are fewer."""
    steps = min(steps, len(values))
    return np.convolve(values, np.ones(steps) / steps, "valid")


def curves(folder, runs, names):
    """Training of every method: seeds thin, mean bold, GRPO's mean dotted; all on the same axes.
    Running means of 10 steps."""
    keys = ("reward", "exact", "plan_entropy", "image_entropy", "kl")
    figure, axes = plt.subplots(
        len(keys),
        len(names),
        figsize=(1.35 * len(names) + 1, 7),
        sharex=True,
        sharey="row",
        squeeze=False,
    )
    data, base = [], {}
    for column, name in enumerate(names):
        for row, key in enumerate(keys):
            lines = []
            for run in runs[name].values():
                values = np.array([r[key] for r in run["log"] if r["step"] >= 0], float)
                lines.append(running_mean(values))
                axes[row, column].plot(lines[-1], color="0.65", linewidth=0.6)
            mean = np.mean([line[: min(map(len, lines))] for line in lines], 0)
            base.setdefault(key, mean)
            axes[row, column].plot(mean, color="black", linewidth=1.6)
            axes[row, column].plot(base[key], color="black", linewidth=0.8, linestyle=":")
            axes[row, 0].set_ylabel(key.replace("_", " "), fontsize=8)
            axes[row, column].tick_params(labelsize=6)
            data += [(name, key, step, f"{v:.5g}") for step, v in enumerate(mean) if step % 5 == 0]
        axes[0, column].set_title(name, fontsize=7)
        axes[-1, column].set_xlabel("step", fontsize=7)
    save(folder, "curves", figure, ("method", "key", "step", "mean"), data)


def maps(folder, shown):
    """Pictures, the entropy of their tokens, the masks over it, and the plans by word. shown: the
    rows of records/pictures.jsonl."""
    figure, axes = plt.subplots(
        3, len(shown), figsize=(3 * len(shown), 6.6), squeeze=False, height_ratios=(3, 3, 1)
    )
    for column, row in enumerate(shown):
        entropy = np.array(row["image_entropy"])
        side = int(len(entropy) ** 0.5)
        picture, heat, words = axes[:, column]
        picture.imshow(np.array(row["picture"], dtype=np.uint8))
        picture.set_title(textwrap.fill(row["prompt"], 32), fontsize=7)
        drawn = heat.imshow(entropy.reshape(side, side), cmap="gray", vmin=0, vmax=1)
        for i in range(len(entropy)):
            mark = "x" if row["image_low"][i] else "+" if row["image_high"][i] else ""
            heat.text(
                i % side,
                i // side,
                mark,
                ha="center",
                va="center",
                fontsize=8,
                color="white" if entropy[i] < 0.5 else "black",
            )
        heat.set_title("x low, no gradient; + high, bonus", fontsize=7)
        for axis in (picture, heat):
            axis.set(xticks=[], yticks=[])
        words.axis("off")
        place, line = 0.0, 0.9
        for word, h in zip([*row["plan"].split(), "<end>"], row["plan_entropy"]):
            width = 0.025 * (len(word) + 1)
            if place + width > 1:
                place, line = 0.0, line - 0.28
            words.text(
                place,
                line,
                word,
                fontsize=6,
                transform=words.transAxes,
                family="monospace",
                bbox=dict(facecolor=str(1 - min(h, 0.6)), edgecolor="none", pad=1),
                color="black" if h < 0.35 else "white",
            )
            place += width
    figure.colorbar(drawn, ax=axes[:2], shrink=0.4, label="entropy of an image token / log V")
    save(folder, "maps", figure)


def draw_all(folder, runs, records, plans, study):
    """Draw every figure that the study has the data for."""
    to = folder / "figures"
    joint(to, "entropy-mean", records, "image_entropy", "mean entropy of a picture's tokens")
    joint(to, "entropy-std", records, "image_entropy_std", "std of entropy over a picture's tokens")
    if plans:
        plan_entropy(to, plans)
    spread(to, study["spread"])
    if study["D"]:
        curves(to, runs, list(study["D"]))
    if (folder / "records" / "pictures.jsonl").exists():
        maps(to, read_lines(folder / "records" / "pictures.jsonl"))
    for path in (folder / "before-after.png", folder / "eggrpo-0" / "training.gif"):
        if path.exists():
            shutil.copy(path, to / path.name)
