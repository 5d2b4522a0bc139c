"""Numbers, table and figures of the runs of lab.one_sided, for lab.analyze and docs/guidance.md."""

import json
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from evaluate import save_figure
from lab.stats import average, changes

SERIES = ("kl_q_p", "exact", "entropy_codes", "entropy_q", "entropy_words", "kl_ref_codes")
DECADE = 10  # steps that a point of a series is the mean of
PREDICTED = {  # runs made after the dose had been chosen
    *(f"bonus-g3-kappa{kappa}" for kappa in (0.2, 0.35, 0.5, 0.8)),
    "every-g3-kappa1",
    "every-g1.5-kappa2",
}
CURVES = {  # of the first figure
    "grpo": ("GRPO", "#0072b2", "-."),
    "bonus": ("bonus", "#000000", "-"),
    "pull-exact": ("the pull as a loss", "#d55e00", (0, (1, 1))),
    "frozen-empty": ("frozen empty branch", "#cc79a7", (0, (5, 1))),
    "frozen-teacher": ("frozen teacher", "#009e73", "--"),
    "weights-bonus": ("weights p / q", "#e69f00", (0, (3, 1, 1, 1))),
}


def reduce_run(record):
    """Reduce a run to numbers: scores, ends, growth of the gap, dose, series by tens of steps."""
    config = record["config"]
    own = f"guidance {config['guidance']:g}"
    if config["temperature"] != 1.0:
        own = f"temperature {config['temperature']:.3g}"
    settings = {"1": "guidance 1", "own": own, "twice": f"guidance {2 * config['guidance']:g}"}
    numbers = {}
    for name, setting in settings.items():
        scores = record["scores"][setting]
        numbers[f"exact at {name}"] = scores["eval"]["exact"]
        numbers[f"rare at {name}"] = scores["rare"]["exact"]
    log = record["log"]
    if not log:
        return dict(numbers=numbers, series={})
    mean = lambda key, part: float(np.mean([line[key] for line in part]))
    for key in (*SERIES, "grad_norm", "k3"):
        numbers[key] = mean(key, log[-10:])
    numbers["kl_q_p on p"] = record["own"][-1]["kl_q_p"]
    numbers["w on codes"] = mean("w_codes", log[:5])
    numbers["w, largest"] = max(line["w_largest"] for line in log[:5])
    half = len(log) // 2
    middle = mean("kl_q_p", log[max(half - 5, 0) : half + 5])
    rates = [config["lr"] * min((s + 1) / 10, 1 - s / len(log)) for s in range(len(log))]
    if config["guidance"] > 1 and log[0]["kl_q_p"] > 0 and numbers["w on codes"] > 0:
        numbers["growth"] = float(np.log(middle / log[0]["kl_q_p"]))
        numbers["D0"] = sum(rates) * mean("pull", log[:5])
        slope = config["guidance"] - 1
        numbers["R0"] = sum(rates) * numbers["w on codes"] * slope * mean("sigma", log[:5])
        numbers["dose"] = numbers["D0"] / slope  # separates runs that fail: docs/guidance.md
    tens = range(0, len(log), DECADE)
    series = {key: [round(mean(key, log[i : i + DECADE]), 4) for i in tens] for key in SERIES}
    return dict(numbers=numbers, series=series, kappa=config["kappa"], made=record["made"])


def read_one_sided(folder, preset):
    """Read the finished runs of a study: {name: {base: reduced run}}."""
    runs = {}
    for path in sorted(Path(folder).glob(f"*/{preset}/one-sided/*.json")):
        reduced = reduce_run(json.loads(path.read_text()))
        if path.stem not in CURVES:
            del reduced["series"]
        runs.setdefault(path.stem, {})[path.parts[-4]] = reduced
    return runs


def describe_one_sided(runs):
    """Average runs, {name: {base: reduced run}}, and their differences to GRPO of the same base."""
    numbers = {}
    for name, of_bases in runs.items():
        numbers[name] = {(base, 0): run["numbers"] for base, run in of_bases.items()}
    found = {}
    for name, own in numbers.items():
        grpo = numbers.get(rival(name), {}) if name != rival(name) else {}
        minus = average(changes(grpo, own))
        found[name] = {"numbers": average(own), "minus GRPO": minus, "runs": runs[name]}
    return found


def rival(name):
    """Name the run of GRPO that a run is compared with: of its guidance, or of its cell."""
    if name.startswith(("search-", "test-")):
        cell, _, _ = name.rpartition("-")
        return f"{cell}-grpo"
    guidance = next((part for part in name.split("-") if part in ("g1.5", "g3", "g4")), "")
    return f"grpo-{guidance}" if guidance else "grpo"


def draw_gap(path, found):
    """KL(q || p), exact and image entropy against the step: means over base policies."""
    figure = Figure(figsize=(8.3, 3.6), layout="constrained")
    panels = dict(kl_q_p="KL(q || p), nats", exact="exact", entropy_codes="image entropy")
    curves = {name: style for name, style in CURVES.items() if name in found}
    for axis, (key, title) in zip(figure.subplots(1, 3), panels.items()):
        for name, (label, colour, dashes) in curves.items():
            series = [run["series"][key] for run in found[name]["runs"].values()]
            mean = np.mean(series, 0)
            steps = DECADE * np.arange(len(mean)) + DECADE / 2
            axis.plot(steps, mean, color=colour, linestyle=dashes, label=label)
        axis.set(title=title, xlabel="step")
        if key == "kl_q_p":
            ticks = [0.02, 0.05, 0.1, 0.2, 0.5]
            axis.set(yscale="log", yticks=ticks, yticklabels=ticks)
            axis.set_yticks([], minor=True)
    figure.legend(handles=axis.get_lines(), loc="outside lower center", ncols=3, frameon=False)
    save_figure(figure, path)


def draw_dose(path, found):
    """Exact at the training guidance minus GRPO's, against the dose: a point per run."""
    figure = Figure(figsize=(8.3, 4), layout="constrained")
    axis = figure.subplots()
    marks = {"bonus": "o", "every": "s", "random": "^", "low": "v", "eggrpo": "D"}
    for name, run in found.items():
        kind = name.split("-")[0]
        if kind not in marks or name.endswith("300"):
            continue
        grpo = found.get(rival(name), found["grpo"])["runs"]
        for base, own in run["runs"].items():
            if "dose" in own["numbers"] and base in grpo:
                exact = own["numbers"]["exact at own"] - grpo[base]["numbers"]["exact at own"]
                fill = "full" if name in PREDICTED else "none"
                axis.plot(own["numbers"]["dose"], exact, "k" + marks[kind], fillstyle=fill)
    for kind, mark in marks.items():
        label = {"bonus": "on high tokens", "eggrpo": "EG-GRPO, both rules"}.get(kind, f"on {kind}")
        axis.plot([], [], "k" + mark, fillstyle="none", label=label)
    axis.plot([], [], "ko", label="filled: predicted by the dose")
    axis.axhline(0, color="0.6", linewidth=0.8)
    xlabel = "dose: (sum of lr) x mean of w |q - p|² / (g - 1), at the start"
    axis.set(xscale="log", xlabel=xlabel, ylabel="exact minus GRPO's")
    axis.legend(frameon=False, loc="lower left")
    save_figure(figure, path)
