"""Score policies on held-out prompts, print the table, draw the galleries.

    python evaluate.py --preset cpu     the base policy without and with plan, every finished run

    -> out/cpu/results.json, results.md (the printed table), before-after.png

`eval` and `rare` prompts never occur in training, not even as paraphrases; every `rare` prompt has
one rare colour-shape pair (scenes.py), and the pairs take turns. In reinforcement learning a third of
the prompts have a rare pair too, in other scenes. All policies answer the same prompts with the same
noise.
"""

import io
import json
import textwrap
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image, ImageDraw
from torch import Tensor
from tqdm import tqdm

import checkpoint
import common
import rewards
from model import load_base, load_policy
from rollout import draw_uniform, load_env, sample_scenes
from scenes import RARE_PAIRS, make_scene, rare_pairs


@dataclass(frozen=True)
class Config(common.BaseConfig):
    prompts: int = 1200  # evaluation prompts; half as many of rare pairs, 100 of each
    batch: int = 128  # prompts per forward pass: changes memory, not results


PRESETS = {"smoke": dict(prompts=24, batch=24), "cpu": dict(), "gpu": dict(prompts=2304, batch=256)}


# --- scoring --------------------------------------------------------------------------------------


BLOCK = 128  # prompts whose noise has one key


class Scores(NamedTuple):
    scenes: list  # (n,) of Scene
    rewards: Tensor  # (n,)
    components: dict  # {name: (n,)}, NaN if a component does not apply
    exact: Tensor  # (n,) 0 or 1


def sample_and_score(env, policy, scenes, uniform, **options):
    """Draw one image for each scene's prompt. uniform: (n, T) noise; options: as for
    model.generate. Returns images (n, 3, h, w), and rewards, components and exact as
    rewards.compute_rewards."""
    _, images = sample_scenes(env, policy, scenes, uniform, **options)
    targets = rewards.encode_targets(env.world, scenes, env.device)
    return images, *rewards.compute_rewards(images, targets, env.world)


def evaluate(env, policy, split, prompts, batch=128, seed=0, title=None, **options):
    """Score one image for each of the first `prompts` scenes of a split. Returns Scores."""
    scenes, scored = [make_scene(env.world, split, seed, i) for i in range(prompts)], []
    keys = [(seed, "evaluate", split, start) for start in range(0, prompts, BLOCK)]
    uniform = torch.cat([draw_uniform(policy, BLOCK, 1, *key) for key in keys])[:prompts]
    for start in tqdm(range(0, prompts, batch), title, disable=title is None, leave=False):
        part = slice(start, start + batch)
        scored.append(sample_and_score(env, policy, scenes[part], uniform[part], **options)[1:])
    reward, components, exact = zip(*scored)
    reward, exact = torch.cat(reward).cpu(), torch.cat(exact).cpu()
    components = {k: torch.cat([c[k] for c in components]).cpu() for k in components[0]}
    rewards.check_rewards(reward, components)
    return Scores(scenes, reward, components, exact)


def mean_and_half_width(values):
    """Mean and half-width of its normal 95 % interval. values: (n,)."""
    half = 1.96 * values.std().item() / len(values) ** 0.5 if len(values) > 1 else float("nan")
    return values.mean().item(), half


def summarize(scores):
    """Reduce Scores to numbers: reward and exact with intervals, components, and both by category
    and by rare pair."""
    reward, reward_half = mean_and_half_width(scores.rewards)
    exact, exact_half = mean_and_half_width(scores.exact)
    return dict(
        n=len(scores.rewards),
        reward=reward,
        reward_half=reward_half,
        exact=exact,
        exact_half=exact_half,
        **{name: values.nanmean().item() for name, values in scores.components.items()},
        categories=summarize_groups(scores, [s.category for s in scores.scenes]),
        rare_pairs=summarize_groups(scores, [rare_pair_name(s) for s in scores.scenes]),
    )


def rare_pair_name(scene):
    """Return for instance "red cross", or None for a scene without a rare pair."""
    return next((" ".join(pair) for pair in rare_pairs(scene.objects)), None)


def summarize_groups(scores, names):
    """Average reward and exact over the scenes of each name. names: (n,) of str or None."""
    groups = {}
    for name in dict.fromkeys(filter(None, names)):
        rows = torch.tensor([other == name for other in names])
        mean, exact = scores.rewards[rows].mean().item(), scores.exact[rows].mean().item()
        groups[name] = dict(n=int(rows.sum()), reward=mean, exact=exact)
    return groups


def markdown_table(head, rows):
    """Format rows of cells as a Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def results_table(results):
    """Format {policy: {"eval": summary, "rare": summary}} as three Markdown tables; "-" for None."""
    show = lambda value: "-" if value is None else f"{value:.3f}"
    rows, by_category, by_pair = [], [], []
    for name, splits in results.items():
        for split, s in splits.items():
            label = f"{name}{'' if split == 'eval' else ', rare pairs'} (n = {s['n']})"
            intervals = [f"{show(s[k])} ± {show(s[f'{k}_half'])}" for k in ("reward", "exact")]
            rows.append([label, *intervals, *(show(s[k]) for k in rewards.REWARDS)])
        categories, pairs = splits["eval"]["categories"], splits["rare"]["rare_pairs"]
        by_category.append([name, *(f"{c['exact']:.2f}" for c in categories.values())])
        by_pair.append([name, *(f"{c['exact']:.2f}" for c in pairs.values())])
    percent = lambda pair: f"{pair} ({RARE_PAIRS[tuple(pair.split())]:.1%})"
    tables = (
        markdown_table(["held-out prompts", "reward", "exact", *rewards.REWARDS], rows),
        markdown_table(["exact, by category", *categories], by_category),
        markdown_table(["exact, by rare pair (of corpus)", *map(percent, pairs)], by_pair),
    )
    return "\n\n".join(tables)


# --- images ---------------------------------------------------------------------------------------


def gallery(rows, prompts, titles=None, exact=None, colours=("#c83232", "#28a03c"), size=144):
    """Arrange images in a grid, a prompt above each column. Returns a PIL image.

    rows: list of (n, 3, h, w) in [0, 1]; titles: a name for each row; exact: list of (n,), which of
    the colours an image's frame has: red if 0, green if 1; size: of an image, in pixels.
    """
    wrap = partial(textwrap.wrap, break_long_words=False, break_on_hyphens=False)
    pad, head, side = 6, 62, 96 if titles else 0
    width, height = side + len(prompts) * (size + pad) + pad, head + len(rows) * (size + pad)
    sheet = Image.new("RGB", (width, height), "white")
    pen = ImageDraw.Draw(sheet)
    for column, prompt in enumerate(prompts):
        for i, line in enumerate(wrap(prompt, size // 6)[:4]):
            pen.text((side + pad + column * (size + pad), 4 + 14 * i), line, fill="black")
    for row, images in enumerate(rows):
        top = head + row * (size + pad)
        for i, line in enumerate(wrap(titles[row], 14) if titles else []):
            pen.text((pad, top + size // 2 - 8 + 14 * i), line, fill="black")
        pixels = (images.float().clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
        for column, image in enumerate(pixels):
            left = side + pad + column * (size + pad)
            if exact is not None:
                frame = left - 3, top - 3, left + size + 2, top + size + 2
                pen.rectangle(frame, fill=colours[int(exact[row][column])])
            sheet.paste(Image.fromarray(image).resize((size, size), Image.NEAREST), (left, top))
    return sheet


def gallery_scenes(world, number=8):
    """The fixed prompts of every gallery: usual pairs, then as many rare ones."""
    splits = ("eval", "rare")
    return [make_scene(world, split, 777, i) for split in splits for i in range(number // 2)]


def gallery_titles(world):
    return [("rare: " if rare_pairs(s.objects) else "") + s.prompt for s in gallery_scenes(world)]


def gallery_row(env, policy, **options):
    """Draw the gallery, always with the same noise. Returns images (n, 3, h, w) and exact (n,)."""
    scenes = gallery_scenes(env.world)
    uniform = draw_uniform(policy, len(scenes), 1, "gallery")
    scored = sample_and_score(env, policy, scenes, uniform, **options)
    return scored[0], scored[-1].cpu()


def save_image(image, path, **options):
    """Write a PIL image in the format that the name ends with, whole or not at all."""
    buffer = io.BytesIO()
    image.save(buffer, Path(path).suffix[1:], **options)
    common.write(path, buffer.getvalue())


def evaluate_and_save_gallery(env, policy, config, folder, step):
    """Evaluate a policy in training and save a gallery; after the last step join all galleries to
    training.gif. config: of eggrpo.py. Returns what is logged."""
    if step == 0:
        for old in folder.glob("gallery-*.png"):
            old.unlink()
    draw = dict(guidance=config.guidance)
    scores = [evaluate(env, policy, s, config.eval_prompts, **draw) for s in ("eval", "rare")]
    usual, rare = map(summarize, scores)
    images, exact = gallery_row(env, policy, **draw)
    sheet = gallery([images], gallery_titles(env.world), [f"step {step}"], [exact])
    save_image(sheet, folder / f"gallery-{step:05d}.png")
    if step == config.steps:
        paths = sorted(folder.glob("gallery-*.png"))
        frames = [Image.open(p).convert("P", palette=Image.ADAPTIVE) for p in paths]
        duration = [700] * (len(frames) - 1) + [3000]  # milliseconds
        save_image(frames[0], folder / "training.gif", save_all=True, append_images=frames[1:],
                   duration=duration, loop=0)  # fmt: skip
    numbers = dict(eval_reward=usual["reward"], eval_exact=usual["exact"],
                   rare_reward=rare["reward"], rare_exact=rare["exact"])  # fmt: skip
    tqdm.write(f"step {step}: " + ", ".join(f"{k} {v:.3f}" for k, v in numbers.items()))
    by_pair = {pair: values["exact"] for pair, values in rare["rare_pairs"].items()}
    return numbers | dict(rare_exact_by_pair=by_pair)


def load_policies(config, device):
    """Load the base policy and every finished run. Returns {name: (policy, options)}."""
    base = load_base(config.preset, config.out, device)
    policies = {"base, no plan": (base, dict(no_plan=True)), "base + plan": (base, {})}
    folder = Path(config.out) / config.preset
    command = common.command_for("eggrpo.py", config.preset, config.out)
    for path in sorted(folder.glob("*/policy.pt")):
        record = checkpoint.load(path, command)
        if record["step"] == record["steps"]:
            policy, trained = load_policy(path, "policy", config.preset, command, device)
            policies[path.parent.name] = policy, dict(guidance=trained["guidance"])
    if len(policies) == 2:
        print(f"no finished run in {folder}: only the base policy is scored; make one: `{command}`")
    return policies


def main(argv=None):
    config, _ = common.parse("evaluate.py", Config, PRESETS, __doc__, argv)
    folder, started = Path(config.out) / config.preset, time.time()
    device = common.pick_device(config.device)
    env = load_env(config.preset, config.out, device)
    policies = load_policies(config, device)
    counts = {"eval": config.prompts, "rare": max(config.prompts // 2, len(RARE_PAIRS))}
    results, rows = {}, []
    for name, (policy, options) in policies.items():
        results[name] = {}
        for split, n in counts.items():
            arguments = (n, config.batch, config.seed, f"{name}, {split}")
            scores = evaluate(env, policy, split, *arguments, **options)
            results[name][split] = summarize(scores)
        rows.append(gallery_row(env, policy, **options))
    images, exact = zip(*rows)
    sheet = gallery(images, gallery_titles(env.world), list(policies), exact)
    save_image(sheet, folder / "before-after.png")
    results = common.to_jsonable(results)  # rounded, so that the table is that of the file
    common.write(folder / "results.json", json.dumps(results, indent=1).encode())
    common.write(folder / "results.md", (results_table(results) + "\n").encode())
    print(results_table(results))
    print(f"evaluated in {time.time() - started:.0f} s; images in {folder / 'before-after.png'}")


if __name__ == "__main__":
    common.run(main)
