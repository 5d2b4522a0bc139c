"""Measure what the world and the base policy offer to EG-GRPO: entropy, its place, its gradient.

    python -m lab.world            after bash train.sh; minutes

-> printed, one line of JSON:

    below_01, q10 to q90         share of image tokens with an entropy below .01 log V; quantiles
    background, objects          mean entropy of image tokens there
    low_, high_on_objects        share of the low- and high-entropy image tokens that are on objects
    gradient                     norm of each part of EG-GRPO's gradient over that of GRPO's
"""

import json
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch.nn.utils import parameters_to_vector

import common
from evaluate import draw_noise, load_base, load_env, sample_images
from lab.measure import step_config, token_advantages, training_batch
from model import score
from objective import entropy_masks, policy_loss
from rewards import paint_coverage
from scenes import WORLDS, encode_scenes, make_scene

OBJECT_PAINT = 0.3  # least paint of a pixel that makes its patch a part of an object


@dataclass(frozen=True)
class Config(common.BaseConfig):
    prompts: int = 1200  # held-out prompts; one image each
    batch: int = 128  # prompts per forward pass
    batches: int = 8  # training batches whose gradients are measured


PRESETS = {name: {} for name in WORLDS} | {"smoke": dict(prompts=24, batches=1)}


def object_tokens(images, world):
    """Find the image tokens that draw objects. images: (B, 3, h, w). Returns (B, L) bool."""
    paint = paint_coverage(images).sum(1, keepdim=True)  # (B, 1, h, w)
    largest = F.max_pool2d(paint, world.patch)  # of each patch
    return largest.flatten(1) > OBJECT_PAINT


@torch.no_grad()
def sample_tokens(env, policy, config):
    """Draw an image per held-out prompt. Returns its tokens' entropy, and which are on objects."""
    scenes = [make_scene(env.world, "eval", config.seed, i) for i in range(config.prompts)]
    prompts, _ = encode_scenes(env.world, scenes)
    noise = draw_noise(policy, config.prompts, config.seed, "world")
    entropy = []
    objects = []
    for rows in torch.arange(config.prompts).split(config.batch):
        rollout, images = sample_images(env, policy, prompts[rows], noise[rows])
        of_image = rollout.entropy[:, policy.C :]
        entropy.append(of_image.cpu())
        objects.append(object_tokens(images, env.world).cpu())
    return torch.cat(entropy), torch.cat(objects)


def entropy_figures(entropy, objects):
    """Describe where entropy is. entropy: (n, L), objects: (n, L) bool. Returns {key: float}."""
    low, high = entropy_masks(entropy, torch.ones_like(objects))
    ascending = entropy.flatten().sort().values
    figures = dict(
        below_01=(entropy < 0.01).float().mean(),
        background=entropy[~objects].mean(),
        objects=entropy[objects].mean(),
        low_on_objects=objects[low].float().mean(),
        high_on_objects=objects[high].float().mean(),
    )
    for percent in (10, 20, 50, 90):
        index = int(percent / 100 * len(ascending))
        figures[f"q{percent}"] = ascending[index]
    return {name: value.item() for name, value in figures.items()}


def gradient_parts(batch, config):
    """Split the advantages of EG-GRPO. Returns {part: (B, T)}: GRPO's; those on low, middle and
    high tokens, which add up to GRPO's; the bonus; EG-GRPO's, with the bonus and without low."""
    low, high, shaped = token_advantages(batch, config)
    a = batch.advantage[:, None].expand_as(shaped)
    bonus = torch.where(high, shaped - a, 0.0)
    is_plan = torch.zeros_like(low)
    is_plan[:, : batch.rollout.plan.shape[1]] = True
    parts = {"GRPO": a}
    for name, here in (("words", is_plan), ("image tokens", ~is_plan)):
        for kind, mask in (("low", low), ("middle", ~low & ~high), ("high", high)):
            parts[f"{kind} {name}"] = torch.where(mask & here, a, 0.0)
        parts[f"bonus on {name}"] = torch.where(here, bonus, 0.0)
    parts["EG-GRPO"] = shaped
    return parts


def part_gradients(policy, batch, parts, config):
    """Gradient of minus policy_loss without KL term, for each part: (parts, weights)."""
    parameters = list(policy.parameters())
    sequences = len(batch.advantage)
    total = 0.0
    for rows in torch.arange(sequences, device=batch.advantage.device).split(config.micro_batch):
        part = batch.rollout.rows(rows)
        logp = score(policy, part.prompt, part.plan, part.codes, config.guidance)
        gradients = []
        for advantage in parts.values():
            loss, _ = policy_loss(logp, None, advantage[rows], part.valid, 0.0, sequences)
            found = torch.autograd.grad(-loss, parameters, retain_graph=True)
            flat = parameters_to_vector(g.contiguous() for g in found)
            gradients.append(flat)
        total = total + torch.stack(gradients)
    return total


def gradient_sizes(env, policy, config, batches):
    """Return {part: norm of its gradient over that of GRPO's}, means over training batches."""
    sizes = []
    for step in range(batches):
        batch = training_batch(env, policy, config, step)
        parts = gradient_parts(batch, config)
        gradients = part_gradients(policy, batch, parts, config)
        norms = gradients.norm(dim=1)
        sizes.append(norms / norms[0].clamp(min=1e-12))
    means = torch.stack(sizes).mean(0)
    return dict(zip(parts, means.tolist()))


@common.stage("--batch of lab.world")
def main(argv=None):
    config = common.parse(Config, PRESETS, __doc__, argv)
    env = load_env(config, common.pick_device(config.device))
    policy = load_base(config, env)
    entropy, objects = sample_tokens(env, policy, config)
    figures = entropy_figures(entropy, objects)
    settings = step_config(config.preset, "eggrpo", config.seed)
    figures["gradient"] = gradient_sizes(env, policy, settings, config.batches)
    print(json.dumps(common.to_jsonable(figures)))


if __name__ == "__main__":
    common.run(main)
