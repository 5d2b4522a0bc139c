"""Tables of a study for lab.analyze: the numbers of study.json as Markdown, and their names."""

from evaluate import markdown_table

HEAD = """# Tables of the study

Written by `bash train.sh lab.analyze`; the same numbers are in study.json. Intervals (±) are 95 %
by Student's t over base policies, of the means of each one's runs. A dash: not measured, or it does
not vary. KL is k3 on a run's own samples: no estimate of it where another policy samples.
The findings in words: [results.md](results.md). Runs of these commits:

{made}
"""
SCORES = ("reward", "exact", "rare exact")
FELL = 0.05  # of held-out exact, from its best evaluation in training to its last
FOUND = 0.3  # exact of a rare pair, above which in two evaluations a run has found it
NAMES = {
    "base-no-plan": "base, no plan",
    "base": "base + plan",
    "grpo": "GRPO",
    "eggrpo": "EG-GRPO",
}
MAIN_ROWS = (*NAMES, "eggrpo-released")
PREFIXES = {  # of variants that are compared with a GRPO of their own
    "short-": "fewer steps",
    "guided-": "fewer steps, guidance 2",
    "mixed-": "fewer steps, sampled at guidance 2, scored at 1",
}


def label(variant):
    """Name a variant in tables and figures."""
    for prefix, remark in PREFIXES.items():
        if variant.startswith(prefix):
            return f"{label(variant.removeprefix(prefix))}, {remark}"
    return NAMES.get(variant, f"`{variant}`")


def counterpart(variant):
    """Name the variant of GRPO that a variant is compared with."""
    prefix = next((p for p in PREFIXES if variant.startswith(p)), "")
    return f"{prefix}grpo"


def show(x, signed=False):
    """Format an interval, a number or a text; "-" for what is missing."""
    if isinstance(x, dict):
        mean = show(x["mean"], signed)
        if x["mean"] is None or x["n"] == 1:
            return mean
        return f"{mean} ± {x['half']:.3f}"
    if isinstance(x, float):
        return format(x, "+.3f" if signed else ".3f")
    if x is None:
        return "-"
    return str(x)


def table(head, rows, signed=False):
    """Lay out {row: {column: cell}} as Markdown. head: of the column of names."""
    columns = dict.fromkeys(column for cells in rows.values() for column in cells)
    lines = []
    for name, cells in rows.items():
        shown = [show(cells.get(column), signed) for column in columns]
        lines.append([name, *shown])
    return markdown_table([head, *columns], lines)


def transposed(columns):
    """{column: {row: cell}} -> {row: {column: cell}}."""
    rows = {}
    for column, cells in columns.items():
        for row, cell in cells.items():
            rows.setdefault(row, {})[column] = cell
    return rows


def show_found(x):
    """Say how many rare pairs were found, and at which step in the mean; "-" of a base policy."""
    if "found" not in x:
        return "-"
    at = "" if x["step"] is None else f", step {x['step']:.0f}"
    return f"{x['found']} of {x['of']}{at}"


def main_table(variants):
    """Lay out the scores of the base policy and the main methods, as Markdown."""
    rows = {}
    for variant in MAIN_ROWS:
        if variant not in variants:
            continue
        x = variants[variant]
        pairs = x["discovery"].values()
        found = sum(pair.get("found", 0) for pair in pairs)
        possible = sum(pair.get("of", 0) for pair in pairs)
        rows[label(variant)] = {
            "runs": x["runs"],
            "reward": x["measures"]["reward"],
            "exact": x["measures"]["exact"],
            "exact, minus GRPO's": show(x["differences"].get("exact"), signed=True),
            "exact, rare pairs": x["measures"]["rare exact"],
            "rare pairs found": f"{found} of {possible}" if possible else "-",
            "Vendi score": x["measures"]["vendi"],
            "image entropy": x["measures"].get("image entropy"),
            "KL": x["measures"].get("KL"),
        }
    return table("", rows)


def run_tables(variants):
    """Lay out the numbers of runs. Returns {title: Markdown}."""
    scores = {}
    differences = {}
    categories = {}
    pairs = {}
    discovery = {}
    gradient = {}
    steps = {}
    stability = {}
    for variant, x in variants.items():
        name = label(variant)
        numbers = {"runs": x["runs"], "base policies": x["bases"]}
        scores[name] = numbers | x["measures"]
        categories[name] = x["categories"]
        pairs[name] = x["rare_pairs"]
        for frequency, found in x["discovery"].items():
            cells = discovery.setdefault(name, {})
            cells[f"exact, {frequency} of corpus"] = found["exact"]
            cells[f"found, {frequency}"] = show_found(found)
        if "fell" not in x:  # base policies
            continue
        steps[name] = {f"step {step}": ci for step, ci in x["rare_exact"].items()}
        stability[name] = {
            "runs": x["runs"],
            "worst reward": x["worst_reward"],
            f"exact fell by more than {FELL}": x["fell"],
            "largest fall": x["largest_fall"],
        }
        if x["gradient"]:
            gradient[name] = x["gradient"]
        for measure in (*SCORES, "rare exact over training", "vendi"):
            difference = x["differences"].get(measure)
            if difference:
                cells = differences.setdefault(name, dict(pairs=difference["runs"]))
                cells[measure] = difference
    return {
        "Scores and entropies at the end of training": table("", scores),
        "Differences to GRPO, paired": table("minus GRPO", differences, signed=True),
        "Exact by category": table("", categories),
        "Exact by rare pair": table("", pairs),
        f"Discovery by frequency; found: above {FOUND} in two evaluations in succession": table(
            "", discovery
        ),
        "Exact on rare pairs during training": table("", steps),
        "Stability: the worst run, and falls of exact to the end": table("", stability),
        "Norm of each part of EG-GRPO's gradient over that of GRPO's, at the end": table(
            "", gradient
        ),
    }


def pass_tables(study):
    """Lay pass@k out, and where curves cross. Returns {title: Markdown}."""
    tables = {}
    for split, kind in (("eval", "usual"), ("rare", "rare")):
        rows = {}
        for setting, values in study["passes"].get(split, {}).items():
            rows[setting] = {f"k = {k}": interval for k, interval in values.items()}
        title = f"pass@k, {kind} pairs: the fraction of prompts that k images solve"
        tables[title] = table("", rows)
    title = "Least k with which base + plan solves more prompts than the trained policy"
    tables[title] = table("", transposed(study["crossings"]))
    return tables


def report(study):
    """Lay all tables out, as study.md."""
    tables = {"The main methods": main_table(study["variants"])}
    tables |= run_tables(study["variants"]) | {
        "Interactions: both - one - other + neither": table("", study["interactions"], signed=True),
        **pass_tables(study),
    }
    correlations = transposed(study["correlations"])
    correlations = table("correlation with, or slope on", correlations, signed=True)
    tables["Reward against entropy"] = correlations
    spread = table("", transposed(study["spread"]))
    tables["What is drawn for a prompt: means over prompts"] = spread
    sections = [HEAD.format(made="\n".join(f"- {line}" for line in study["made"]))]
    sections += [f"## {title}\n\n{content}\n" for title, content in tables.items()]
    return "\n".join(sections)
