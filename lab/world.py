"""Measure what the world and the base policy offer to EG-GRPO: entropy, its place, its gradient.

    python -m lab.world --preset cpu        after bash train.sh --preset cpu; minutes

-> one line of JSON:

    below_01            share of the image tokens of base + plan with an entropy below .01
    q20                 20 % quantile of their entropy
    background          mean entropy of image tokens on the background
    objects             the same on objects: patches with a pixel that decodes to paint above .3
    low_on_objects      share of the low-entropy image tokens that are on objects
    high_on_objects     the same of the high-entropy ones
    low_gradient        norm of the low image tokens' gradient over that of all tokens (GRPO without
                        KL term), mean over training batches
    ceiling             mean reward of true scenes after encoding and decoding
    ceiling_exact       fraction of them that are exact
    exact_plan          fraction of held-out prompts that base + plan draws exactly right
    exact_no_plan       the same of the base policy without plan

Entropies are fractions of log V.
"""

import contextlib
import json
import sys
from dataclasses import dataclass

import torch
import torch.nn.functional as F

import common
import eggrpo
from evaluate import evaluate
from lab.records import gradient_rows
from model import load_base
from rewards import paint_coverage
from rollout import draw_uniform, load_env, sample_scenes
from scenes import make_scene
from tiny_vq.train import ceiling

OBJECT_PAINT = 0.3  # least paint of a pixel that makes its patch an object


@dataclass(frozen=True)
class Config(common.BaseConfig):
    prompts: int = 1200  # held-out prompts; one image each
    batch: int = 128  # prompts per forward pass
    batches: int = 8  # training batches whose gradients are measured
    scored: int = 420  # true scenes that the ceiling is the mean of


PRESETS = {
    "smoke": dict(prompts=24, batches=1, scored=24),
    "cpu": dict(),
    "gpu": dict(),
}


@torch.no_grad()
def sample_tokens(env, policy, config):
    """Draw one image for each held-out prompt. Returns entropy (n, L) of its tokens and objects
    (n, L) bool: the patches that are painted."""
    scenes = [make_scene(env.world, "eval", config.seed, i) for i in range(config.prompts)]
    uniform = draw_uniform(policy, config.prompts, 1, config.seed, "world")
    entropy = []
    objects = []
    for start in range(0, config.prompts, config.batch):
        rows = slice(start, start + config.batch)
        sample, images = sample_scenes(env, policy, scenes[rows], uniform[rows])
        paint = paint_coverage(images).sum(1, keepdim=True)  # (batch, 1, h, w)
        entropy.append(sample.entropy[:, policy.C :].cpu())
        objects.append(F.max_pool2d(paint, env.world.patch).flatten(1).cpu() > OBJECT_PAINT)
    return torch.cat(entropy), torch.cat(objects)


def entropy_figures(entropy, objects):
    """Describe where entropy is. entropy: (n, L), objects: (n, L) bool. Returns a dict of floats."""
    low, high = eggrpo.entropy_masks(entropy, torch.ones_like(objects))
    figures = dict(
        below_01=(entropy < 0.01).float().mean(),
        q20=entropy.flatten().sort().values[int(0.2 * entropy.numel())],
        background=entropy[~objects].mean(),
        objects=entropy[objects].mean(),
        low_on_objects=objects[low].float().mean(),
        high_on_objects=objects[high].float().mean(),
    )
    return {name: value.item() for name, value in figures.items()}


def low_gradient(env, policy, config):
    """Return the share of the low image tokens in the norm of GRPO's gradient."""
    settings = eggrpo.Config(**{**eggrpo.PRESETS[config.preset], "seed": config.seed})
    rows = gradient_rows(env, policy, settings, config.batches)
    return next(row["size"] for row in rows if row["part"] == "low image tokens")


def main(argv=None):
    config, _ = common.parse("-m lab.world", Config, PRESETS, __doc__, argv)
    with contextlib.redirect_stdout(sys.stderr):  # standard output is the line of JSON
        device = common.pick_device(config.device)
    env = load_env(config.preset, config.out, device)
    policy = load_base(config.preset, config.out, device)
    figures = entropy_figures(*sample_tokens(env, policy, config))
    restored = ceiling(env.tokenizer, env.world, device, config.scored)
    figures |= {name: restored[name] for name in ("ceiling", "ceiling_exact")}
    for name, no_plan in (("exact_plan", False), ("exact_no_plan", True)):
        options = dict(batch=config.batch, seed=config.seed, no_plan=no_plan)
        scores = evaluate(env, policy, "eval", config.prompts, **options)
        figures[name] = scores.exact.mean().item()
    figures["low_gradient"] = low_gradient(env, policy.requires_grad_(True), config)
    print(json.dumps(common.to_jsonable(figures)))


if __name__ == "__main__":
    common.run(main)
