"""Draw the figure of lab.one_step: the rollouts of a prompt, and two of them token by token."""

import textwrap

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.colors import to_rgb

from lab.figures import save


def draw_cells(axis, values, largest, plain=None, low=None, high=None):
    """Draw a grid of numbers, one per token; the darker, the larger. values: (rows, columns).

    With low and high: entropies, in grey; low tokens hatched, high tokens framed. Else advantages:
    blue if positive, orange if negative; bold if it is not `plain`, GRPO's.
    """
    rows, columns = values.shape
    axis.set(xlim=(0, columns), ylim=(rows, 0), xticks=[], yticks=[])
    for r, c in np.ndindex(rows, columns):
        value, tint = values[r, c], "#202020"
        if low is None:
            tint = "#1f5fa8" if value > 0 else "#c25a00"
        colour = 1 - (1 - np.array(to_rgb(tint))) * 0.9 * min(abs(value) / largest, 1)
        hatch = "///" if low is not None and low[r, c] else None
        axis.add_patch(plt.Rectangle((c, r), 1, 1, facecolor=colour, edgecolor="0.7", hatch=hatch))
        if high is not None and high[r, c]:
            axis.add_patch(plt.Rectangle((c + 0.05, r + 0.05), 0.9, 0.9, fill=False, linewidth=2))
        if columns <= 24 and rows <= 8:  # else there is no room for numbers
            text = f"{value:.2f}" if low is not None else f"{value:+.2f}"
            text = "0" if abs(value) < 0.005 else text.replace("0.", ".")
            bold = plain is not None and abs(value - plain) >= 0.005
            axis.text(c + 0.5, r + 0.53, text, ha="center", va="center",
                      fontsize=8.5 if rows == 1 else 7.5,
                      color="white" if colour @ (0.3, 0.6, 0.1) < 0.55 else "black",
                      weight="bold" if bold else "normal")  # fmt: skip


def draw_group(figure, data, images):
    """Draw the G rollouts of the prompt: plan, image, reward and advantage."""
    axes = figure.subplots(2, len(images), height_ratios=(3, 1.6), gridspec_kw=dict(
        left=0.07, right=0.99, top=0.7, bottom=0.01, hspace=0.3, wspace=0.12))  # fmt: skip
    largest = 1.7 * max(map(abs, data["advantages"])) or 1.0
    for k, (top, bar) in enumerate(axes.T):
        top.imshow(images[k])
        phrases = " ".join(data["plans"][k]).replace(" <end>", "").replace(" at ", " ; ")
        lines = [line for phrase in phrases.split(" ; ") for line in textwrap.wrap(phrase, 17)]
        top.set_title("\n".join(lines[:6]), fontsize=8.5)
        top.set(xticks=[], yticks=[])
        top.set_xlabel(f"{data['rewards'][k]:.2f}", fontsize=11)
        plt.setp(top.spines.values(), linewidth=4 if k in data["chosen"].values() else 0.8)
        advantage = data["advantages"][k]
        bar.bar([0], [advantage], color="#1f5fa8" if advantage > 0 else "#c25a00")
        bar.axhline(0, color="black", linewidth=0.8)
        bar.set(xlim=(-1, 1), xticks=[], yticks=[])
        bar.set_ylim(-largest, largest)
        plt.setp(bar.spines.values(), visible=False)
        bar.text(0, advantage, f"{advantage:+.2f}", ha="center", fontsize=11,
                 va="bottom" if advantage > 0 else "top")  # fmt: skip
    axes[0, 0].set_ylabel("plan, image,\nreward", fontsize=10)
    axes[1, 0].set_ylabel("advantage", fontsize=10)


def draw_rollout(figure, tokens, image, advantage):
    """Draw the tokens of a rollout: entropy and masks, advantage in GRPO and in EG-GRPO."""
    side = int(len(tokens["image"]["entropy"]) ** 0.5)
    grid = figure.add_gridspec(2, 4, height_ratios=(3.5, 1.5), left=0.07, right=0.99, top=0.84,
                               bottom=0.02, hspace=0.2, wspace=0.06)  # fmt: skip
    field = lambda m, key: np.array(tokens[m][key]).reshape(side if m == "image" else 1, -1)
    masked = lambda m: (field(m, "entropy"), 0.5, None, field(m, "low"), field(m, "high"))
    shaped = lambda m, key: (field(m, key), 1.5 * abs(advantage) or 1.0, advantage)

    heads = "image, by token", "entropy: hatched low, framed high", "advantage, GRPO"
    top = [figure.add_subplot(grid[0, column]) for column in range(4)]
    for axis, head in zip(top, (*heads, "advantage, EG-GRPO")):
        axis.set_title(head, fontsize=10)
        axis.set_aspect("equal")
    top[0].imshow(image, extent=(0, side, side, 0))
    top[0].set(xticks=range(side), yticks=range(side), xticklabels=[], yticklabels=[])
    top[0].grid(color="white", linewidth=0.5)
    top[0].tick_params(length=0)
    draw_cells(top[1], *masked("image"))
    draw_cells(top[2], *shaped("image", "grpo"))
    draw_cells(top[3], *shaped("image", "eggrpo"))

    strips = grid[1, :].subgridspec(3, 1, hspace=0.12)
    bottom = [figure.add_subplot(strips[row]) for row in range(3)]
    draw_cells(bottom[0], *masked("plan"))
    draw_cells(bottom[1], *shaped("plan", "grpo"))
    draw_cells(bottom[2], *shaped("plan", "eggrpo"))
    for axis, name in zip(bottom, ("entropy", "GRPO", "EG-GRPO")):
        axis.set_ylabel(name, rotation=0, ha="right", va="center", fontsize=10)
    for c, word in enumerate(tokens["words"]):
        bottom[0].text(c + 0.5, -0.12, word, ha="center", va="bottom", fontsize=9)


def draw(path, data, images):
    """Draw the step: the group, then its best and its worst rollout. images: (G, 3, h, w)."""
    images = images.permute(0, 2, 3, 1).clamp(0, 1).cpu().numpy()
    figure = plt.figure(figsize=(11, 12.6))
    parts = figure.subfigures(3, 1, height_ratios=(3.8, 4.4, 4.4))
    titles = [f'1. {len(images)} rollouts of "{data["prompt"]}"']
    draw_group(parts[0], data, images)
    for part, name in zip(parts[1:], ("good", "bad")):
        k = data["chosen"][name]
        reward, advantage = data["rewards"][k], data["advantages"][k]
        number = len(titles) + 1
        titles.append(
            f"{number}. A {name} rollout: reward {reward:.2f}, advantage {advantage:+.2f}"
        )
        draw_rollout(part, data["tokens"][name], images[k], advantage)
    for part, title in zip(parts, titles):
        part.suptitle(title, fontsize=13, x=0.01, y=0.985, ha="left", weight="bold")
    save(path, figure)
