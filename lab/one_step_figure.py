"""Draw the figure of lab.one_step: the rollouts of a prompt, and two of them token by token."""

import textwrap

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.colors import to_rgb

from lab.figures import save

BLUE = "#1f5fa8"  # of positive advantages
ORANGE = "#c25a00"  # of negative ones


def shade(tint, depth):
    """Mix a colour with white. depth: 0 is white, 1 nearly the colour."""
    return 1 - (1 - np.array(to_rgb(tint))) * 0.9 * min(depth, 1)


def write(axis, row, column, value, signed, colour, bold):
    """Write a number into its cell."""
    text = f"{value:+.2f}" if signed else f"{value:.2f}"
    if abs(value) < 1:
        text = text.replace("0.", ".")
    if abs(value) < 0.005:
        text = "0"
    axis.text(
        column + 0.5,
        row + 0.53,
        text,
        ha="center",
        va="center",
        fontsize=7.5,
        color="white" if colour @ (0.3, 0.6, 0.1) < 0.55 else "black",
        weight="bold" if bold else "normal",
    )


def start_cells(axis, values):
    """Prepare a grid of one cell per token. Returns whether there is room for numbers."""
    rows, columns = values.shape
    axis.set(xlim=(0, columns), ylim=(rows, 0), xticks=[], yticks=[])
    return columns <= 24 and rows <= 8


def draw_entropies(axis, values, low, high):
    """Draw entropies in grey, the darker the larger; low tokens hatched, high ones framed."""
    room = start_cells(axis, values)
    for (r, c), value in np.ndenumerate(values):
        colour = shade("#202020", value / 0.5)
        hatch = "///" if low[r, c] else None
        cell = plt.Rectangle((c, r), 1, 1, facecolor=colour, edgecolor="0.7", hatch=hatch)
        axis.add_patch(cell)
        if high[r, c]:
            corner = (c + 0.05, r + 0.05)
            frame = plt.Rectangle(corner, 0.9, 0.9, fill=False, linewidth=2)
            axis.add_patch(frame)
        if room:
            write(axis, r, c, value, False, colour, False)


def draw_advantages(axis, values, plain):
    """Draw advantages: blue if positive, orange if negative; bold if not `plain`, GRPO's."""
    room = start_cells(axis, values)
    largest = 1.5 * abs(plain) or 1.0
    for (r, c), value in np.ndenumerate(values):
        colour = shade(BLUE if value > 0 else ORANGE, abs(value) / largest)
        axis.add_patch(plt.Rectangle((c, r), 1, 1, facecolor=colour, edgecolor="0.7"))
        if room:
            write(axis, r, c, value, True, colour, abs(value - plain) >= 0.005)


def draw_group(figure, data, images):
    """Draw the G rollouts of the prompt: plan, image, reward and advantage."""
    margins = dict(left=0.07, right=0.99, top=0.7, bottom=0.01, hspace=0.3, wspace=0.12)
    axes = figure.subplots(2, len(images), height_ratios=(3, 1.6), gridspec_kw=margins)
    largest = 1.7 * max(map(abs, data["advantages"])) or 1.0
    for k, (top, bar) in enumerate(axes.T):
        top.imshow(images[k])
        plan = " ".join(data["plans"][k]).replace(" <end>", "")
        lines = []
        for phrase in plan.replace(" at ", " ; ").split(" ; "):
            lines += textwrap.wrap(phrase, 17)
        top.set_title("\n".join(lines[:6]), fontsize=8.5)
        top.set(xticks=[], yticks=[])
        top.set_xlabel(f"{data['rewards'][k]:.2f}", fontsize=11)
        shown = k in data["chosen"].values()
        plt.setp(top.spines.values(), linewidth=4 if shown else 0.8)

        advantage = data["advantages"][k]
        positive = advantage > 0
        bar.bar([0], [advantage], color=BLUE if positive else ORANGE)
        bar.axhline(0, color="black", linewidth=0.8)
        bar.set(xlim=(-1, 1), ylim=(-largest, largest), xticks=[], yticks=[])
        plt.setp(bar.spines.values(), visible=False)
        side = "bottom" if positive else "top"
        bar.text(0, advantage, f"{advantage:+.2f}", ha="center", va=side, fontsize=11)
    axes[0, 0].set_ylabel("plan, image,\nreward", fontsize=10)
    axes[1, 0].set_ylabel("advantage", fontsize=10)


def draw_rollout(figure, tokens, image, advantage):
    """Draw the tokens of a rollout: entropy and masks, advantage in GRPO and in EG-GRPO."""
    margins = dict(left=0.07, right=0.99, top=0.84, bottom=0.02, hspace=0.2, wspace=0.06)
    grid = figure.add_gridspec(2, 4, height_ratios=(3.5, 1.5), **margins)
    top = [figure.add_subplot(grid[0, column]) for column in range(4)]
    strips = grid[1, :].subgridspec(3, 1, hspace=0.12)
    bottom = [figure.add_subplot(strips[row]) for row in range(3)]

    side = int(len(tokens["image"]["entropy"]) ** 0.5)
    top[0].imshow(image, extent=(0, side, side, 0))
    top[0].set_xticks(range(side), labels=[])
    top[0].set_yticks(range(side), labels=[])
    top[0].grid(color="white", linewidth=0.5)
    top[0].tick_params(length=0)
    for axes, modality, rows in ((top[1:], "image", side), (bottom, "plan", 1)):
        fields = {name: np.reshape(x, (rows, -1)) for name, x in tokens[modality].items()}
        draw_entropies(axes[0], fields["entropy"], fields["low"], fields["high"])
        draw_advantages(axes[1], fields["grpo"], advantage)
        draw_advantages(axes[2], fields["eggrpo"], advantage)

    heads = ("image, by token", "entropy: hatched low, framed high")
    heads += ("advantage, GRPO", "advantage, EG-GRPO")
    for axis, head in zip(top, heads):
        axis.set_title(head, fontsize=10)
        axis.set_aspect("equal")
    for axis, name in zip(bottom, ("entropy", "GRPO", "EG-GRPO")):
        axis.set_ylabel(name, rotation=0, ha="right", va="center", fontsize=10)
    for column, word in enumerate(tokens["words"]):
        bottom[0].text(column + 0.5, -0.12, word, ha="center", va="bottom", fontsize=9)


def draw(path, data, images):
    """Draw the step: the group, then its best and its worst rollout. images: (G, 3, h, w)."""
    images = images.permute(0, 2, 3, 1).clamp(0, 1).cpu().numpy()
    figure = plt.figure(figsize=(11, 12.6))
    parts = figure.subfigures(3, 1, height_ratios=(3.8, 4.4, 4.4))
    titles = [f'1. {len(images)} rollouts of "{data["prompt"]}"']
    draw_group(parts[0], data, images)
    for number, name in ((2, "good"), (3, "bad")):
        k = data["chosen"][name]
        advantage = data["advantages"][k]
        numbers = f"reward {data['rewards'][k]:.2f}, advantage {advantage:+.2f}"
        titles.append(f"{number}. A {name} rollout: {numbers}")
        draw_rollout(parts[number - 1], data["tokens"][name], images[k], advantage)
    for part, title in zip(parts, titles):
        part.suptitle(title, fontsize=13, x=0.01, y=0.985, ha="left", weight="bold")
    save(path, figure)
