"""Score policies on held-out prompts, print the table, draw the galleries and learning curves.

    python evaluate.py     the base policy without and with plan, and every finished run

    -> out/small/results.json, results.md (the printed table), before-after.png, curves.png

`eval` and `rare` prompts never occur in training, not even as paraphrases; every `rare` prompt
has one rare colour-shape pair (scenes.py). All policies have the same prompts and the same noise.
"""

import contextlib
import io
import json
import math
import textwrap
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from matplotlib.figure import Figure
from PIL import Image
from tqdm import tqdm

import common
from model import Policy, generate
from rewards import REWARDS, compute_rewards, encode_targets
from runs import Unfinished, load_model
from scenes import RARE_PAIRS, WORLDS, World, encode_scenes, make_scene, rare_pairs
from tiny_vq.train import load_tokenizer


@dataclass(frozen=True)
class Config(common.BaseConfig):
    prompts: int = 1200  # evaluation prompts; half as many of rare pairs, 100 of each
    batch: int = 128  # prompts per forward pass: changes memory, not results


PRESETS = {
    "smoke": dict(prompts=24, batch=24),
    "small": dict(),
    "large": dict(prompts=2304, batch=256),
}


class Env(NamedTuple):
    """What turns the codes of a policy into images and rewards."""

    tokenizer: torch.nn.Module
    world: World
    device: torch.device


def load_env(config, device):
    """Read the finished tokenizer of a preset. Returns an Env."""
    return Env(load_tokenizer(config, device), WORLDS[config.preset], device)


def load_base(config, env):
    """Read the base policy of a preset."""
    path = config.folder / "base.pt"
    model_class = partial(Policy, env.world)
    policy, _ = load_model(model_class, path, env.tokenizer.origin, "pretrain", config)
    return policy.to(env.device)


def load_run(path, config, env, base):
    """Read a finished run of eggrpo.py, made from a base policy. Returns the policy, and the
    options of model.generate with which it was trained."""
    model_class = partial(Policy, env.world)
    policy, trained = load_model(model_class, path, base.origin, "eggrpo", config)
    return policy.to(env.device), dict(guidance=trained["guidance"])


BLOCK = 128  # prompts whose noise has one key, so that it depends on neither batch nor number


def draw_noise(policy, number, *key):
    """Draw the noise of sequences, (number, T) in [0, 1). key: as for common.generator."""
    return torch.rand(number, policy.C + policy.L, generator=common.generator(*key))


def sample_images(env, policy, prompts, noise, **options):
    """Sample and decode. prompts: (P, S); noise: (B, T); options: as for model.generate. Returns a
    Rollout of B sequences and images (B, 3, h, w) in [0, 1]."""
    rollout = generate(policy, prompts.to(env.device), noise.to(env.device), **options)
    return rollout, env.tokenizer.decode(rollout.codes)


def sample_and_score(env, policy, scenes, noise, **options):
    """Draw one image for each scene's prompt. Returns images (n, 3, h, w), and rewards, components
    and exact as rewards.compute_rewards."""
    prompts, _ = encode_scenes(env.world, scenes)
    _, images = sample_images(env, policy, prompts, noise, **options)
    targets = encode_targets(env.world, scenes, env.device)
    return images, *compute_rewards(images, targets, env.world)


def evaluate(env, policy, split, prompts, batch=BLOCK, seed=0, **options):
    """Draw and score an image for each of the first `prompts` scenes of a split. Returns a dict:
    means of reward and exact with half-widths of normal 95 % intervals, those of components, and
    of reward and exact by category and by rare pair."""
    scenes = [make_scene(env.world, split, seed, i) for i in range(prompts)]
    blocks = range(0, prompts, BLOCK)
    noise = [draw_noise(policy, BLOCK, seed, "evaluate", split, i) for i in blocks]
    noise = torch.cat(noise)[:prompts]
    scored = []
    for start in range(0, prompts, batch):
        part = slice(start, start + batch)
        _, *scores = sample_and_score(env, policy, scenes[part], noise[part], **options)
        scored.append(scores)
    reward, components, exact = zip(*scored)
    reward = torch.cat(reward).cpu()
    exact = torch.cat(exact).cpu()
    scores = dict(reward=reward, exact=exact)

    means = dict(n=prompts)
    for name, values in scores.items():
        spread = values.std().item() if prompts > 1 else math.nan
        means[name] = values.mean().item()
        means[f"{name}_half"] = 1.96 * spread / prompts**0.5
    means["components"] = {}
    for name in components[0]:
        values = torch.cat([of_batch[name] for of_batch in components]).cpu()
        means["components"][name] = values.nanmean().item()
    categories = [scene.category for scene in scenes]
    pairs = [min(rare_pairs(scene.objects), default=()) for scene in scenes]  # one or none
    pair_names = [" ".join(pair) for pair in pairs]
    means["categories"] = group_means(scores, categories)
    means["rare_pairs"] = group_means(scores, pair_names)
    return means


def group_means(scores, names):
    """Average scores, {name: (n,)}, over the scenes of each group. names: n groups, "" for none."""
    groups = {}
    for group in dict.fromkeys(filter(None, names)):
        rows = torch.tensor([name == group for name in names])
        groups[group] = dict(n=int(rows.sum()))
        for name, values in scores.items():
            groups[group][name] = values[rows].mean().item()
    return groups


GROUPS = {"eval": "categories", "rare": "rare_pairs"}  # whose means are shown
NAMES = {"grpo": "GRPO", "eggrpo": "EG-GRPO"}
MARKS = (("✗", "#c8321e", "--"), ("✓", "#1e8c32", "-"))  # of wrong and of exact images


def markdown_table(head, rows):
    """Format rows of cells as a Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    joined = [" | ".join(map(str, line)) for line in lines]
    return "\n".join(f"| {line} |" for line in joined)


def results_table(results):
    """Format {policy: {split: means}} as Markdown tables."""
    rows = []
    grouped = {"eval": [], "rare": []}
    for name, splits in results.items():
        for split, means in splits.items():
            label = name if split == "eval" else f"{name}, rare pairs"
            row = [f"{label} (n = {means['n']})"]
            row.append(f"{means['reward']:.3f} ± {means['reward_half']:.3f}")
            row.append(f"{means['exact']:.3f} ± {means['exact_half']:.3f}")
            row += [f"{value:.3f}" for value in means["components"].values()]
            rows.append(row)
            cells = [name]
            for group in means[GROUPS[split]].values():
                cells.append(f"{group['exact']:.2f}")
            grouped[split].append(cells)
    categories = splits["eval"]["categories"]
    pair_heads = [f"{' '.join(pair)} ({share:.1%})" for pair, share in RARE_PAIRS.items()]
    tables = (
        markdown_table(["held-out prompts", "reward", "exact", *REWARDS], rows),
        markdown_table(["exact, by category", *categories], grouped["eval"]),
        markdown_table(["exact, by rare pair (of corpus)", *pair_heads], grouped["rare"]),
    )
    return "\n\n".join(tables)


def run_title(name):
    """Name a run in pictures: "EG-GRPO, seed 0" for eggrpo-0."""
    method, _, seed = name.rpartition("-")
    return f"{NAMES[method]}, seed {seed}" if method in NAMES else name


def gallery(rows, prompts, titles=(), exact=None):
    """Draw images in a grid, a prompt above each column. rows: list of (n, 3, h, w) in [0, 1];
    titles: a name for each row; exact: list of (n,). Exact images have a solid green frame and a
    tick, others a dashed red frame and a cross. Returns a matplotlib figure."""
    heads = [textwrap.fill(prompt, 13) for prompt in prompts]
    lines = max(len(head.splitlines()) for head in heads)
    width = 0.95 * len(prompts) + (0.7 if titles else 0)  # inches of 100 pixels
    height = 1.13 * len(rows) + 0.15 * lines + 0.1
    figure = Figure(figsize=(width, height), layout="compressed")
    figure.get_layout_engine().set(w_pad=0.025, h_pad=0.02, wspace=0, hspace=0)
    axes = figure.subplots(len(rows), len(prompts), squeeze=False)
    for axis, head in zip(axes[0], heads):
        axis.set_title(head, loc="left", fontsize=8.5)
    for axis, title in zip(axes[:, 0], titles):
        name = textwrap.fill(title, 9)
        axis.set_ylabel(name, rotation=0, ha="right", va="center", fontsize=8.5)
    for row, images in enumerate(rows):
        pixels = images.permute(0, 2, 3, 1).cpu().numpy()  # (n, h, w, 3)
        for column, axis in enumerate(axes[row]):
            axis.imshow(pixels[column], interpolation="nearest")
            axis.set(xticks=[], yticks=[])
            if exact is not None:
                mark, colour, line = MARKS[int(exact[row][column])]
                axis.set_xlabel(mark, color=colour, fontsize=11, labelpad=1)
                axis.spines[:].set(color=colour, linestyle=line, linewidth=2)
    return figure


def draw_gallery(env, policies):
    """Draw the gallery: usual pairs, then as many rare ones, always of the same prompts and noise.
    policies: {name: (policy, sampling options)}. Returns a matplotlib figure."""
    usual = [make_scene(env.world, "eval", 777, i) for i in range(4)]
    rare = [make_scene(env.world, "rare", 777, i) for i in range(4)]
    prompts = [scene.prompt for scene in usual]
    prompts += [f"rare: {scene.prompt}" for scene in rare]
    rows = []
    exact = []
    for policy, options in policies.values():
        noise = draw_noise(policy, len(prompts), "gallery")
        images, _, _, right = sample_and_score(env, policy, usual + rare, noise, **options)
        rows.append(images)
        exact.append(right)
    return gallery(rows, prompts, [run_title(name) for name in policies], exact)


def save_figure(figure, path):
    """Write a figure as a PNG with a palette of 256 colours, whole or not at all."""
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", dpi=100)
    packed = io.BytesIO()
    image = Image.open(drawn).convert("RGB")
    image = image.quantize(method=Image.Quantize.MAXCOVERAGE, kmeans=1)
    image.save(packed, "png", optimize=True)
    common.write(path, packed.getvalue())


def evaluate_in_training(env, policy, config, folder, step):
    """Evaluate a policy in training and save a gallery; after the last step, join the galleries to
    training.gif. config: of eggrpo.py. Returns what is logged."""
    if step == 0:
        for old in folder.glob("gallery-*.png"):
            old.unlink()
    options = dict(guidance=config.guidance)
    batch = config.eval_prompts if env.device.type == "cuda" else BLOCK
    numbers = {}
    for split in ("eval", "rare"):
        means = evaluate(env, policy, split, config.eval_prompts, batch, **options)
        numbers[f"{split}_reward"] = means["reward"]
        numbers[f"{split}_exact"] = means["exact"]
    figure = draw_gallery(env, {f"{folder.name}, step {step}": (policy, options)})
    save_figure(figure, folder / f"gallery-{step:05d}.png")
    if step == config.steps:
        frames = [Image.open(path) for path in sorted(folder.glob("gallery-*.png"))]
        duration = [700] * (len(frames) - 1) + [3000]  # milliseconds
        animation = dict(save_all=True, append_images=frames[1:], duration=duration, loop=0)
        frames[0].save(folder / "training.gif", **animation)
    shown = ", ".join(f"{name} {value:.3f}" for name, value in numbers.items())
    tqdm.write(f"{folder.name}, step {step}: {shown}")
    by_pair = {pair: values["exact"] for pair, values in means["rare_pairs"].items()}
    return numbers | dict(rare_exact_by_pair=by_pair)


def plot_curves(path, logs):
    """Draw learning curves. logs: {name of a run: list of the lines of its log}."""
    panels = dict(
        eval_reward="reward, held-out prompts",
        eval_exact="exact, held-out prompts",
        rare_exact="exact, rare pairs",
        image_entropy="entropy of image tokens",
    )
    figure = Figure(figsize=(8.3, 6), layout="constrained")
    axes = figure.subplots(2, 2).flatten()
    for name, log in logs.items():
        for axis, (key, title) in zip(axes, panels.items()):
            records = [record for record in log if key in record]
            steps = [record["step"] + 1 for record in records]
            values = [record[key] for record in records]
            axis.plot(steps, values, label=run_title(name))
            axis.set(title=title, xlabel="step")
    figure.legend(handles=axes[0].get_lines(), loc="outside lower center", ncols=4)
    save_figure(figure, path)


@common.stage("--batch of evaluate")
def main(argv=None):
    config = common.parse(Config, PRESETS, __doc__, argv)
    folder = config.folder
    device = common.pick_device(config.device)
    env = load_env(config, device)
    base = load_base(config, env)
    runs = {}
    for path in sorted(folder.glob("*/policy.pt")):
        with contextlib.suppress(Unfinished):
            runs[path.parent.name] = load_run(path, config, env, base)
    policies = {"base, no plan": (base, dict(no_plan=True)), "base + plan": (base, {})}
    policies |= runs
    rare = max(config.prompts // 2, len(RARE_PAIRS))
    numbers = {"eval": config.prompts, "rare": rare}
    results = {}
    for name, (policy, options) in tqdm(policies.items(), "evaluation"):
        results[name] = {}
        for split, number in numbers.items():
            means = evaluate(env, policy, split, number, config.batch, config.seed, **options)
            results[name][split] = means
    save_figure(draw_gallery(env, policies), folder / "before-after.png")
    content = json.dumps(common.to_jsonable(results), indent=1)
    common.write(folder / "results.json", content.encode())
    table = results_table(results)
    common.write(folder / "results.md", (table + "\n").encode())
    print(table)
    if runs:
        logs = {name: policy.log for name, (policy, _) in runs.items()}
        plot_curves(folder / "curves.png", logs)
    print("A single pair of runs decides nothing between two methods: see docs/results.md.")
    print(f"pictures: {folder / 'before-after.png'}")


if __name__ == "__main__":
    common.run(main)
