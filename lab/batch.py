"""A training batch of eggrpo.train_step up to GRPO's advantages, for measurements."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

import eggrpo
from evaluate import draw_noise, sample_images
from model import Rollout
from objective import group_advantages
from rewards import compute_rewards, encode_targets
from scenes import encode_scenes


class Batch(NamedTuple):
    scenes: list  # (P,) of Scene
    rollout: Rollout  # of B = P * G sequences
    images: Tensor  # (B, 3, h, w)
    rewards: Tensor  # (P, G)
    components: dict  # {name: (P, G)}, NaN if a component does not apply
    exact: Tensor  # (P, G)
    advantage: Tensor  # (B,)


def step_config(preset, method, seed=0):
    """Return the settings of a run of eggrpo.py."""
    values = eggrpo.PRESETS[preset] | eggrpo.METHODS[method].values
    return eggrpo.Config(preset=preset, method=method, seed=seed, **values)


@torch.no_grad()
def training_batch(env, policy, config, step):
    """Sample and score the rollouts that train_step would at this step. Returns a Batch."""
    scenes = eggrpo.training_scenes(env.world, config, step)
    prompts, _ = encode_scenes(env.world, scenes)
    shape = config.prompts, config.group_size
    noise = draw_noise(policy, math.prod(shape), config.seed, "rollout", step)
    rollout, images = sample_images(env, policy, prompts, noise, guidance=config.guidance)

    repeated = [scene for scene in scenes for _ in range(config.group_size)]
    targets = encode_targets(env.world, repeated, env.device)
    rewards, components, exact = compute_rewards(images, targets, env.world)
    rewards = rewards.view(shape)
    return Batch(
        scenes=scenes,
        rollout=rollout,
        images=images,
        rewards=rewards,
        components={name: values.view(shape) for name, values in components.items()},
        exact=exact.view(shape),
        advantage=group_advantages(rewards).flatten(),
    )


def token_advantages(batch, config):
    """Find the low and high tokens of a method, and shape advantages by it: (B, T) each."""
    low, high = eggrpo.method_masks(batch.rollout, config)
    shaped = eggrpo.method_advantages(batch.advantage, batch.rollout, low, high, config)
    return low, high, shaped
