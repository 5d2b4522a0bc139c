"""Score policies on held-out prompts, print the table, draw the galleries.

    python evaluate.py --preset cpu     the base policy (directly, with plan), every finished run

    -> out/cpu/results.json, results.md (the printed table), before-after.png

`eval` and `rare` prompts never occur in training, not even as paraphrases. Every `rare` prompt has a
colour-shape pair that is in 1 % of the pretraining corpus and in a third of the RL prompts. All policies answer the same prompts with
the same noise.
"""

import io
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image, ImageDraw
from torch import Tensor
from tqdm import tqdm

import rewards
import runtime
from model import generate
from pretrain import load_base, load_policy, word_tensors
from scenes import World, WORLDS, decode_words, make_scene, rare_pairs
from tiny_vq.train import load_tokenizer


@dataclass(frozen=True)
class Config:
    preset: str = ""              # smoke, cpu or gpu
    device: str = "auto"
    out: str = "out"
    seed: int = 0
    prompts: int = 1200           # evaluation prompts; a third as many of rare pairs
    batch: int = 128

    def check(self):
        runtime.require_at_least(1, self, "prompts", "batch")
        runtime.require_at_least(0, self, "seed")


PRESETS = {"smoke": dict(prompts=24, batch=24), "cpu": dict(), "gpu": dict(prompts=2100, batch=256)}


class Scores(NamedTuple):
    categories: list   # (n,) of str
    rewards: Tensor    # (n,)
    parts: dict        # {name: (n,)}, NaN where a component does not apply
    exact: Tensor      # (n,) 0 or 1


class Eye(NamedTuple):
    """What is needed to see what a policy draws."""
    tokenizer: torch.nn.Module
    world: World
    device: torch.device


@torch.no_grad()
def draw(eye, policy, scenes, noise, **how):
    """Draw one picture a scene. noise: a generator. how: as for generate. Returns the Draw and
    pictures (B, 3, h, w)."""
    prompt, _ = word_tensors(eye.world, scenes)
    uniforms = torch.rand(len(scenes), policy.C + policy.L, generator=noise)
    drawn = generate(policy, prompt.to(eye.device), uniforms.to(eye.device), **how)
    return drawn, eye.tokenizer.decode(drawn.codes)


def evaluate(eye, policy, split, prompts, batch=128, seed=0, title=None, **how):
    """Score a policy on the first `prompts` scenes of a split, one picture each, the same noise for
    every policy."""
    scenes = [make_scene(eye.world, split, seed, i) for i in range(prompts)]
    found = []
    for start in tqdm(range(0, prompts, batch), title, disable=title is None, leave=False):
        part = scenes[start:start + batch]
        _, images = draw(eye, policy, part, runtime.generator(seed, "evaluate", split, start),
                         **how)
        found.append(
            rewards.score(images.float(), rewards.make_want(eye.world, part, eye.device),
                          eye.world))
    reward, parts, exact = zip(*found)
    parts = {name: torch.cat([p[name] for p in parts]).cpu() for name in parts[0]}
    rewards.require_sound(torch.cat(reward).cpu(), parts)
    return Scores([s.category for s in scenes],
                  torch.cat(reward).cpu(), parts,
                  torch.cat(exact).cpu())


def interval(values):
    """Mean and half-width of its normal 95 % interval. values: (n,)."""
    half = 1.96 * values.std().item() / len(values) ** 0.5 if len(values) > 1 else float("nan")
    return values.mean().item(), half


def summary(scores):
    """Reduce Scores to plain numbers: reward and exact with intervals, every component, every
    category."""
    reward, reward_half = interval(scores.rewards)
    exact, exact_half = interval(scores.exact)
    categories = {}
    for c in dict.fromkeys(scores.categories):
        rows = torch.tensor([category == c for category in scores.categories])
        categories[c] = dict(n=int(rows.sum()), reward=scores.rewards[rows].mean().item(),
                             exact=scores.exact[rows].mean().item())
    parts = {name: values.nanmean().item() for name, values in scores.parts.items()}
    return dict(n=len(scores.rewards), reward=reward, reward_half=reward_half, exact=exact,
                exact_half=exact_half, **parts, categories=categories)


def table(results):
    """Lay results {policy: {"eval": summary, "rare": summary}} out as two Markdown tables."""
    lines = [
        "| held-out prompts | reward | exact | " + " | ".join(rewards.REWARDS) + " |",
        "|---" * (len(rewards.REWARDS) + 3) + "|"
    ]
    for name, splits in results.items():
        for split, s in splits.items():
            label = name if split == "eval" else f"{name}, rare pairs"
            lines.append(
                f"| {label} (n = {s['n']}) | {s['reward']:.3f} ± {s['reward_half']:.3f} "
                f"| {s['exact']:.3f} ± "
                f"{s['exact_half']:.3f} | " + " | ".join(f"{s[r]:.3f}"
                                                         for r in rewards.REWARDS) + " |")
    categories = list(next(iter(results.values()))["eval"]["categories"])
    lines += [
        "", "| exact, by category | " + " | ".join(categories) + " |",
        "|---" * (len(categories) + 1) + "|"
    ]
    for name, splits in results.items():
        by = splits["eval"]["categories"]
        lines.append(f"| {name} | " + " | ".join(f"{by[c]['exact']:.2f}"
                                                 for c in categories) + " |")
    return "\n".join(lines)


# --- pictures -------------------------------------------------------------------------------------

def _wrap(text, width):
    lines, line = [], ""
    for word in text.split():
        if line and len(line) + 1 + len(word) > width:
            lines, line = [*lines, line], ""
        line = f"{line} {word}".strip()
    return [*lines, line]


def gallery(rows, prompts, titles=None, exact=None, size=144):
    """Lay pictures out in a grid, a prompt above each column.

    rows: list of (n, 3, h, w) in [0, 1]; titles: a name for each row; exact: list of (n,), a green
    frame where 1, red where 0. Returns a PIL image.
    """
    pad, head, side = 6, 62, 96 if titles else 0
    sheet = Image.new("RGB",
                      (side + len(prompts) * (size + pad) + pad, head + len(rows) * (size + pad)),
                      "white")
    pen = ImageDraw.Draw(sheet)
    for column, prompt in enumerate(prompts):
        for i, line in enumerate(_wrap(prompt, 24)[:4]):
            pen.text((side + pad + column * (size + pad), 4 + 14 * i), line, fill="black")
    for row, images in enumerate(rows):
        top = head + row * (size + pad)
        for i, line in enumerate(_wrap(titles[row], 14) if titles else []):
            pen.text((pad, top + size // 2 - 8 + 14 * i), line, fill="black")
        pixels = (images.float().clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
        for column, picture in enumerate(pixels):
            left = side + pad + column * (size + pad)
            if exact is not None:
                colour = (40, 160, 60) if exact[row][column] > 0.5 else (200, 50, 50)
                pen.rectangle((left - 3, top - 3, left + size + 2, top + size + 2), fill=colour)
            sheet.paste(Image.fromarray(picture).resize((size, size), Image.NEAREST), (left, top))
    return sheet


def gallery_scenes(world, number=8):
    """The fixed prompts of every gallery: usual pairs, then as many rare ones, of a seed kept for
    this."""
    half = number // 2
    return [make_scene(world, split, 777, i) for split in ("eval", "rare") for i in range(half)]


def gallery_titles(world):
    return [("rare: " if rare_pairs(s.objects) else "") + s.prompt for s in gallery_scenes(world)]


def gallery_row(eye, policy, **how):
    """Draw the gallery's prompts with the gallery's noise. Returns pictures (n, 3, h, w), exact
    (n,) and plans."""
    scenes = gallery_scenes(eye.world)
    drawn, images = draw(eye, policy, scenes, runtime.generator("gallery"), **how)
    _, _, exact = rewards.score(images.float(), rewards.make_want(eye.world, scenes, eye.device),
                                eye.world)
    return images, exact.cpu(), [decode_words(p) for p in drawn.plan]


def save_image(image, path, **options):
    """Write a PIL image in the format that the name ends with, whole or not at all."""
    buffer = io.BytesIO()
    image.save(buffer, Path(path).suffix[1:], **options)
    runtime.write(path, buffer.getvalue())


def look(eye, policy, prompts, folder, step, guidance):
    """Evaluate in the midst of training and draw the gallery of a step. Returns what is logged."""
    result = summary(evaluate(eye, policy, "eval", prompts, guidance=guidance))
    images, exact, _ = gallery_row(eye, policy, guidance=guidance)
    rare = summary(evaluate(eye, policy, "rare", prompts, guidance=guidance))
    titles = gallery_titles(eye.world)
    sheet = gallery([images], titles, [f"step {step}"], [exact])
    save_image(sheet, folder / f"gallery-{step:05d}.png")
    return dict(eval_reward=result["reward"], eval_exact=result["exact"],
                rare_reward=rare["reward"], rare_exact=rare["exact"])


def animate(folder):
    """Join the galleries to training.gif, the last one held."""
    paths = sorted(folder.glob("gallery-*.png"))
    frames = [Image.open(p).convert("P", palette=Image.ADAPTIVE) for p in paths]
    save_image(frames[0], folder / "training.gif", save_all=True, append_images=frames[1:],
               duration=[700] * (len(frames) - 1) + [3000], loop=0)


# --- command --------------------------------------------------------------------------------------

def finished_runs(folder):
    """List the (name, path, guidance) of the finished reinforcement-learning runs in a folder."""
    paths = sorted(folder.glob("*/policy.pt"))
    records = [(p, runtime.load(p, "python eggrpo.py")) for p in paths]
    return [(p.parent.name, p, r["settings"].get("guidance", 1.0)) for p, r in records
            if r["step"] == r["steps"]]


def main(argv=None):
    config, _ = runtime.parse("evaluate.py", Config, PRESETS, __doc__, argv)
    folder, started = Path(config.out) / config.preset, time.time()
    device, maker = runtime.pick_device(config.device), runtime.maker_of("eggrpo.py", config.preset,
                                                                         config.out)
    eye = Eye(load_tokenizer(config.preset, config.out, device), WORLDS[config.preset], device)
    base = load_base(config.preset, config.out, device)
    policies = {"base, direct": (base, dict(direct=True)), "base + plan": (base, {})}
    for name, path, guidance in finished_runs(folder):
        policy = load_policy(path, maker, "policy", config.preset, device)
        policies[name] = policy, dict(guidance=guidance)
    if len(policies) == 2:
        print(f"no finished run in {folder}: only the base policy is scored (make one with "
              f"`{maker}`)")

    results, rows, marks = {}, [], []
    for name, (policy, how) in policies.items():
        results[name] = {}
        for split, n in (("eval", config.prompts), ("rare", max(config.prompts // 3, 1))):
            scores = evaluate(eye, policy, split, n, config.batch, config.seed,
                              f"{name}, {split}", **how)
            results[name][split] = summary(scores)
        images, exact, _ = gallery_row(eye, policy, **how)
        rows.append(images)
        marks.append(exact)
    sheet = gallery(rows, gallery_titles(eye.world), list(policies), marks)
    save_image(sheet, folder / "before-after.png")
    runtime.write(folder / "results.json", json.dumps(runtime.plain(results), indent=1).encode())
    runtime.write(folder / "results.md", (table(results) + "\n").encode())
    print(table(results))
    print(
        f"evaluated in {time.time() - started:.0f} s; pictures in {folder / 'before-after.png'} "
        "(green frame: exact)"
    )


if __name__ == "__main__":
    runtime.run(main)
