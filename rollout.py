"""One batch of rollouts: sample plans and images, compute rewards, statistics for the log.

Dimension letters as in eggrpo.py: P prompts, G rollouts per prompt, B = P * G, T = C + L.
"""

from typing import NamedTuple

import torch
from torch import Tensor

import common
import rewards
from common import TrainingDiverged, network_dtype
from model import generate
from scenes import WORLDS, World, encode_scenes, make_scene
from words import END
from tiny_vq import load_tokenizer


def draw_uniform(policy, count, images_per_plan, *key):
    """Draw noise, (count, T) in [0, 1). Each `images_per_plan` sequences in a row share the noise
    of the plan, hence the plan. key: as for common.generator."""
    uniform = torch.rand(count, policy.C + policy.L, generator=common.generator(*key))
    plans = uniform[::images_per_plan, : policy.C]
    uniform[:, : policy.C] = plans.repeat_interleave(images_per_plan, 0)
    return uniform


class Env(NamedTuple):
    """What turns the codes of a policy into images and rewards."""

    tokenizer: torch.nn.Module
    world: World
    device: torch.device


def load_env(preset, out, device):
    return Env(load_tokenizer(preset, out, device), WORLDS[preset], device)


def sample_images(env, policy, prompt, uniform, **options):
    """Sample and decode. prompt: (P, S); uniform: (B, T); options: as for model.generate. Returns a
    Sample of B sequences and images (B, 3, h, w) in [0, 1]."""
    sample = generate(policy, prompt.to(env.device), uniform.to(env.device), **options)
    return sample, env.tokenizer.decode(sample.codes).float()


def sample_scenes(env, policy, scenes, uniform, **options):
    """Draw one image for each scene's prompt. uniform: (n, T) noise. Returns as sample_images."""
    prompt = encode_scenes(env.world, scenes)[0]
    return sample_images(env, policy, prompt, uniform, **options)


def training_scenes(world, config, step):
    """Make the P scenes of a step. Every third has a rare pair."""
    scenes, seed = [], 1000 + config.seed
    for i in range(step * config.prompts, (step + 1) * config.prompts):
        split, index = ("rare-train", i // 3) if i % 3 == 2 else ("train", i - i // 3)
        scenes.append(make_scene(world, split, seed, index))
    return scenes


class Rollout(NamedTuple):
    prompt: Tensor  # (B, S) word ids, each prompt G times in a row
    plan: Tensor  # (B, C) word ids
    codes: Tensor  # (B, L)
    logp: Tensor  # (B, T) of the sampled tokens when they were sampled, nats
    entropy: Tensor  # (B, T) of the distributions that they were sampled from, fraction of log V
    valid: Tensor  # (B, T) bool
    images: Tensor  # (B, 3, h, w) in [0, 1]
    rewards: Tensor  # (P, G)
    components: dict  # {name: (P, G)}, NaN if a component does not apply
    exact: Tensor  # (P, G)


@torch.no_grad()
def make_rollout(policy, env, scenes, config, step):
    """Sample plans and images for each scene's prompt and score the images. Returns a Rollout."""
    g = config.plans_per_prompt
    prompt = encode_scenes(env.world, scenes)[0].to(env.device)  # (P, S)
    key = config.seed, "rollout", step
    uniform = draw_uniform(policy, len(scenes) * g, 1, *key)
    targets = rewards.encode_targets(env.world, [s for s in scenes for _ in range(g)], env.device)
    # prompt, noise and targets are the five tensors that a rollout copies to the device, at its
    # start; after that the host does not wait for the device
    sample, images = sample_images(env, policy, prompt, uniform, guidance=config.guidance)
    reward, components, exact = rewards.compute_rewards(images, targets, env.world)
    prompt = prompt.repeat_interleave(g, 0)  # (B, S)
    grouped = lambda x: x.view(len(scenes), g)  # (B,) -> (P, G)
    components = {name: grouped(value) for name, value in components.items()}
    return Rollout(prompt, *sample, images, grouped(reward), components, grouped(exact))


# --- statistics for the log -----------------------------------------------------------------------


def split_modalities(plan_slots):
    """Slices of a sequence's sampled tokens, T = C + L."""
    return {"plan": slice(None, plan_slots), "image": slice(plan_slots, None)}


def entropy_moments(entropy, valid):
    """Mean and std of each row's entropy over its valid tokens. (B, T) -> (B,), (B,)."""
    n = valid.sum(1).clamp(min=1)
    mean = (entropy * valid).sum(1) / n
    return mean, (((entropy - mean[:, None]) ** 2 * valid).sum(1) / n).sqrt()


def entropy_stats(entropy, valid, plan_slots):
    """Average the moments of entropy over a batch, for plan and image. Returns scalars."""
    stats = {}
    for name, part in split_modalities(plan_slots).items():
        mean, std = entropy_moments(entropy[:, part], valid[:, part])
        stats |= {f"{name}_entropy": mean.mean(), f"{name}_entropy_std": std.mean()}
    return stats


def bonus_stats(rollout, batch):
    """Describe the bonus of a batch. Returns a dict of scalars to log; all are 0 without bonus."""
    c = rollout.plan.shape[1]
    a = batch.group_advantage[:, None]  # (B, 1)
    bonus = torch.where(batch.high, batch.advantage - a, 0.0)  # (B, T); high tokens are never low
    entropy = torch.where(batch.high, rollout.entropy, 0.0)
    turned = batch.high & (a < 0) & (batch.advantage > 0)
    equal = rollout.rewards.amax(1) == rollout.rewards.amin(1)  # (P,)
    of_equal = bonus * equal.repeat_interleave(rollout.rewards.shape[1])[:, None]
    share = lambda part, whole: part.sum() / whole.sum().clamp(min=1e-9)
    return {
        "lambda": share(bonus, entropy),
        "plan_bonus": share(bonus[:, :c], rollout.valid[:, :c]),
        "image_bonus": share(bonus[:, c:], rollout.valid[:, c:]),
        "turned_signs": share(turned, batch.high),
        "bonus_to_equal_groups": share(of_equal, bonus),
    }


def rollout_stats(rollout, batch):
    """Describe a Rollout and its eggrpo.Batch. Returns a dict of scalars to log."""
    c, r, n = rollout.plan.shape[1], rollout.rewards, rollout.valid.sum()
    return dict(
        reward=r.mean(), exact=rollout.exact.mean(),
        **{name: value.nanmean() for name, value in rollout.components.items()},
        reward_std=r.std(1).mean(), frac_reward_zero_std=(r.amax(1) == r.amin(1)).float().mean(),
        plan_length=rollout.valid[:, :c].sum(1).float().mean(),
        frac_truncated_plans=(rollout.plan != END).all(1).float().mean(),
        low_share=batch.low.sum() / n, high_share=batch.high.sum() / n,
        **bonus_stats(rollout, batch), **entropy_stats(rollout.entropy, rollout.valid, c),
    )  # fmt: skip


# of logp_diff_mean, in nats, by common.network_dtype; docs/reproducibility.md has the measurements
LOGP_DIFF_BOUND = {torch.float32: 5e-6, torch.bfloat16: 5e-3}


def check_stats(stats, config, device):
    """Raise TrainingDiverged if a value is not finite or sampler and learner are not one policy.

    Before the update of a step the rollout's log-probs equal the re-scored ones up to rounding. In
    bf16 a whole sequence is rounded differently from a single slot, and guidance g multiplies
    differences by up to |g| + |1 - g|. The largest difference of a sound run grows with the logits:
    it is logged, and no bound on it holds. A component that no prompt of the batch asks for is NaN.
    """
    for name, value in stats.items():
        if not (value.isfinite() or name in rewards.REWARDS):
            raise TrainingDiverged(f"{name} is {value.item()}")
    bound = LOGP_DIFF_BOUND[network_dtype(device)]
    bound *= abs(config.guidance) + abs(1 - config.guidance)
    if stats["logp_diff_mean"] > bound:
        excess = f"logp_diff_mean is {stats['logp_diff_mean']:.1e}, more than {bound:.0e}"
        raise TrainingDiverged(f"{excess}: sampler and learner are not the same policy")
