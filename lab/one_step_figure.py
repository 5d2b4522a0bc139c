"""Draw the figure of lab.one_step: the rollouts of a prompt, and two of them token by token."""

import math
import textwrap

import numpy as np
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from evaluate import save_figure
from lab.figures import WIDTH

BLUE = "#1f5fa8"  # of positive advantages
ORANGE = "#c25a00"  # of negative ones
WORDS = 8  # of a plan, per row


def shade(tint, depth):
    """Mix a colour with white. depth: 0 is white, 1 nearly the colour."""
    return 1 - (1 - np.array(to_rgb(tint))) * 0.9 * min(depth, 1)


def format_number(value, signed=False):
    """Format a number for a cell: ".12", "+1.60", "0", and "<.01" for what only rounds to 0."""
    if signed and value == 0:
        return "0"
    if abs(value) < 0.005:
        return "<.01"
    text = f"{value:+.2f}" if signed else f"{value:.2f}"
    return text.replace("0.", ".") if abs(value) < 1 else text


def draw_cell(axis, row, column, colour, text, bold=False, hatch=None):
    """Draw the cell of a token, with a text in black or white."""
    cell = Rectangle((column, row), 1, 1, facecolor=colour, edgecolor="0.7", hatch=hatch)
    axis.add_patch(cell)
    axis.text(
        column + 0.5,
        row + 0.53,
        text,
        ha="center",
        va="center",
        fontsize=8.5,
        color="white" if colour @ (0.3, 0.6, 0.1) < 0.55 else "black",
        weight="bold" if bold else "normal",
        bbox=dict(facecolor=colour, edgecolor="none", pad=0.5) if text else None,
    )


def start_cells(axis, values):
    """Prepare a grid of one cell per token. Returns whether there is room for numbers."""
    rows, columns = values.shape
    axis.set(xlim=(0, columns), ylim=(rows, 0), xticks=[], yticks=[])
    return rows <= 8


def draw_entropies(axis, values, low, high, words=None, numbers=True):
    """Draw entropies in grey, low tokens hatched, high ones framed. words: before each number."""
    room = start_cells(axis, values) and numbers
    for (r, c), value in np.ndenumerate(values):
        text = format_number(value) if room else ""
        if words is not None:
            text = f"{words[r, c]} {text}"
        hatch = "///" if low[r, c] else None
        draw_cell(axis, r, c, shade("#202020", value / 0.5), text, hatch=hatch)
        if high[r, c]:
            corner = (c + 0.03, r + 0.05)
            axis.add_patch(Rectangle(corner, 0.94, 0.9, fill=False, linewidth=2))


def draw_advantages(axis, values, plain, numbers=True):
    """Draw advantages: blue if positive, orange if negative; bold if not `plain`, GRPO's."""
    room = start_cells(axis, values) and numbers
    largest = 1.5 * abs(plain) or 1.0
    for (r, c), value in np.ndenumerate(values):
        colour = shade(BLUE if value > 0 else ORANGE, abs(value) / largest)
        text = format_number(value, signed=True) if room else ""
        draw_cell(axis, r, c, colour, text, bold=abs(value - plain) >= 0.005)


def draw_borders(axis, borders):
    """Draw the borders of image tokens."""
    axis.set_xticks(borders, labels=[])
    axis.set_yticks(borders, labels=[])
    axis.tick_params(length=0)
    axis.grid(color="white", linewidth=0.5)


def draw_image(axis, image, tokens):
    """Draw an image with the borders of its tokens."""
    side = math.isqrt(tokens)
    axis.imshow(image, extent=(0, side, side, 0), interpolation="nearest")
    draw_borders(axis, range(side))


def draw_bars(axis, values, chosen, form="%.1f"):
    """Draw a number for each rollout of a prompt, with an outline around the chosen ones."""
    colours = [BLUE if value > 0 else ORANGE for value in values]
    bars = axis.bar(range(len(values)), values, color=colours)
    for k in chosen:
        bars[k].set(edgecolor="black", linewidth=2.5)
    axis.bar_label(bars, fmt=form, fontsize=8, padding=2)
    axis.axhline(0, color="black", linewidth=0.8)
    axis.margins(y=0.25)


def draw_group(figure, data, images):
    """Draw the G rollouts of the prompt: plan, image, reward and advantage."""
    chosen = data["chosen"].values()
    top, bottom = figure.subfigures(2, 1, height_ratios=(2, 1))
    for k, axis in enumerate(top.subplots(1, len(images))):
        plan = " ".join(data["plans"][k]).replace(" <end>", "")
        phrases = plan.replace(" at ", " ; ").split(" ; ")
        lines = [line for phrase in phrases for line in textwrap.wrap(phrase, 14)]
        axis.imshow(images[k], interpolation="nearest")
        axis.set_title("\n".join(lines[:6]), fontsize=8)
        axis.set(xticks=[], yticks=[])
        axis.set_xlabel(f"reward {data['rewards'][k]:.2f}", fontsize=9)
        axis.spines[:].set_linewidth(4 if k in chosen else 0.8)
    axis = bottom.subplots()
    draw_bars(axis, data["advantages"], chosen, "%+.2f")
    axis.set(xlim=(-0.5, len(images) - 0.5), xticks=[], yticks=[])
    axis.set_title("advantage", fontsize=9)
    axis.spines[:].set_visible(False)


def draw_rollout(figure, tokens, image, advantage):
    """Draw the tokens of a rollout: entropy and masks, and EG-GRPO's advantage."""
    plan_rows = math.ceil(len(tokens["words"]) / WORDS)
    squares, strips = figure.subfigures(2, 1, height_ratios=(3, 0.6 * plan_rows))
    picture, entropies, advantages = squares.subplots(1, 3)
    side = math.isqrt(len(tokens["image"]["entropy"]))
    of_image = {}
    for name, values in tokens["image"].items():
        of_image[name] = np.reshape(values, (side, side))
    draw_image(picture, image, side**2)
    draw_entropies(entropies, of_image["entropy"], of_image["low"], of_image["high"])
    draw_advantages(advantages, of_image["eggrpo"], advantage)
    picture.set_title("image, by token", fontsize=9)
    entropies.set_title("entropy; hatched: low, framed: high", fontsize=9)
    advantages.set_title(f"advantage; bold: not GRPO's {advantage:+.2f}", fontsize=9)
    for axis in (entropies, advantages):
        axis.set_aspect("equal")

    axes = strips.subplots(2 * plan_rows, 1)
    of_plan = tokens["plan"] | dict(words=tokens["words"])
    for row in range(plan_rows):
        part = slice(row * WORDS, (row + 1) * WORDS)
        fields = {}
        for name, values in of_plan.items():
            fields[name] = np.array([values[part]])
        top, bottom = axes[2 * row : 2 * row + 2]
        draw_entropies(top, fields["entropy"], fields["low"], fields["high"], fields["words"])
        draw_advantages(bottom, fields["eggrpo"], advantage)
        for axis, name in ((top, "entropy"), (bottom, "advantage")):
            axis.set_ylabel(name, rotation=0, ha="right", va="center", fontsize=9)
            axis.set_xlim(0, WORDS)
            axis.spines[:].set_visible(False)


def draw(path, data, images):
    """Draw the step: the group, then its best and its worst rollout. images: (G, 3, h, w)."""
    images = images.permute(0, 2, 3, 1).clamp(0, 1).cpu().numpy()
    longest = max(len(tokens["words"]) for tokens in data["tokens"].values())
    of_rollout = 3.3 + 0.6 * math.ceil(longest / WORDS)  # inches
    figure = Figure(figsize=(WIDTH, 3.2 + 2 * of_rollout), layout="constrained")
    parts = figure.subfigures(3, 1, height_ratios=(3.2, of_rollout, of_rollout))
    titles = [f'1. {len(images)} rollouts of "{data["prompt"]}"']
    draw_group(parts[0], data, images)
    for number, name in ((2, "good"), (3, "bad")):
        k = data["chosen"][name]
        advantage = data["advantages"][k]
        numbers = f"reward {data['rewards'][k]:.2f}, advantage {advantage:+.2f}"
        titles.append(f"{number}. A {name} rollout: {numbers}; EG-GRPO by token")
        draw_rollout(parts[number - 1], data["tokens"][name], images[k], advantage)
    for part, title in zip(parts, titles):
        part.suptitle(title, fontsize=12, x=0.01, ha="left", weight="bold")
    save_figure(figure, path)
