"""Measurements: a training batch, a policy's images and scores, the batches of lab.one_sided."""

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

import eggrpo
from evaluate import draw_noise, evaluate, sample_and_score, sample_images
from model import Rollout
from objective import group_advantages, token_entropy
from rewards import compute_rewards, detect, encode_targets
from scenes import RARE_PAIRS, decode_words, encode_scenes, make_scene

DIVERSITY_SEED = 6000  # of the prompts


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


def vendi_score(kinds):
    """Vendi score of n images (Friedman and Dieng, 2022), the effective number of different ones:
    exp of the entropy of the eigenvalues of K / n. kinds: (n, cells), what is detected. K, the
    similarity of two images, is the fraction of equal cells."""
    kinds = np.asarray(kinds)
    similarity = (kinds[:, None] == kinds).mean(2)
    eigenvalues = np.linalg.eigvalsh(similarity / len(kinds))
    eigenvalues = eigenvalues[eigenvalues > 1e-12]
    entropy = -(eigenvalues * np.log(eigenvalues)).sum()
    return float(np.exp(entropy))


@torch.no_grad()
def diversity(env, policy, config, **options):
    """Draw images of held-out prompts. Returns means of vendi_score and of the std of reward."""
    n = config.plans
    vendi = []
    spread = []
    for start in range(0, config.diverse_prompts, 10):
        numbers = range(start, min(start + 10, config.diverse_prompts))
        scenes = [make_scene(env.world, "eval", DIVERSITY_SEED, i) for i in numbers]
        repeated = [scene for scene in scenes for _ in range(n)]
        noise = draw_noise(policy, len(repeated), config.seed, "diversity", start)
        images, rewards, _, _ = sample_and_score(env, policy, repeated, noise, **options)
        kinds = detect(images, env.world).kind.cpu()
        kinds = kinds.view(len(scenes), n, -1)  # (prompts, n, cells)
        vendi += [vendi_score(of_prompt) for of_prompt in kinds]
        spread += rewards.view(-1, n).std(1).tolist()
    means = np.mean([vendi, spread], 1).tolist()
    return dict(zip(("vendi", "reward_std"), means))


def score(env, policy, prompts, **options):
    """Summarize a policy on held-out prompts, half as many of rare pairs. options: of evaluate."""
    numbers = {"eval": prompts, "rare": max(prompts // 2, len(RARE_PAIRS))}
    scores = {}
    for split, number in numbers.items():
        scores[split] = evaluate(env, policy, split, number, **options)
    return scores


@torch.no_grad()
def record_rows(config, env, policy, scene, number, **options):
    """Draw a prompt's plans, and some images for each plan. Returns a dict per image. distance is
    the mean root mean square difference to the others, 0 to 1; paint the painted fraction."""
    n = config.plans * config.images
    noise = draw_noise(policy, n, config.seed, "records", number)
    of_plans = noise[:: config.images, : policy.C]
    noise[:, : policy.C] = of_plans.repeat_interleave(config.images, 0)
    prompt, _ = encode_scenes(env.world, [scene])
    rollout, images = sample_images(env, policy, prompt, noise, **options)
    targets = encode_targets(env.world, [scene] * n, env.device)
    reward, _, exact = compute_rewards(images, targets, env.world)
    pixels = images.shape[2] * images.shape[3]
    paint = detect(images, env.world).paint / pixels

    flat = images.flatten(1)
    total = torch.cdist(flat, flat).sum(1)
    others = max(n - 1, 1)
    distance = total / (others * flat.shape[1] ** 0.5)
    plan = slice(None, policy.C)
    image = slice(policy.C, None)
    plan_entropy, _ = eggrpo.entropy_moments(rollout.entropy[:, plan], rollout.valid[:, plan])
    moments = eggrpo.entropy_moments(rollout.entropy[:, image], rollout.valid[:, image])
    image_entropy, image_entropy_std = moments
    columns = dict(
        plan=map(decode_words, rollout.plan),
        plan_index=[i // config.images for i in range(n)],
        reward=reward.tolist(),
        exact=exact.tolist(),
        distance=distance.tolist(),
        paint=paint.tolist(),
        plan_entropy=plan_entropy.tolist(),
        image_entropy=image_entropy.tolist(),
        image_entropy_std=image_entropy_std.tolist(),
    )
    of_prompt = dict(number=number, category=scene.category)
    rows = []
    for values in zip(*columns.values()):
        rows.append(of_prompt | dict(zip(columns, values)))
    return rows


def scores_by_setting(run):
    """Score a lab.one_sided.Run at guidance 1, its own and twice that, and at its temperature."""
    config = run.config
    settings = {}
    for guidance in (1.0, config.guidance, 2 * config.guidance):
        settings[f"guidance {guidance:g}"] = guidance, 1.0
    if config.temperature != 1.0:
        settings[f"temperature {config.temperature:.3g}"] = 1.0, config.temperature
    scores = {}
    for name, (guidance, temperature) in settings.items():
        with run.sampler(temperature):
            scores[name] = score(run.env, run.policy, config.prompts_scored, guidance=guidance)
    return scores


def divergence(logits, other):
    """KL(softmax(logits) || softmax(other)), (..., V) each -> (...)."""
    logp = logits.log_softmax(-1)
    difference = logp - other.log_softmax(-1)
    return (logp.exp() * difference).sum(-1)


def sigma(z, log_q):
    """Rate at which the gap grows under a pull, per unit of lr w (g - 1), to first order: d'S^2 d /
    d'S d with d = log q - log p and S = diag(p) - p p'. (..., V) each -> numerator, denominator."""
    logp = z.log_softmax(-1)
    p = logp.exp()
    d = log_q - logp
    mean = (p * d).sum(-1, keepdim=True)
    moved = p * (d - mean)  # S d
    over = moved.square().sum(-1)
    under = (d * moved).sum(-1)
    return over, under


def token_mean(x, weight):
    """Mean over some tokens of sequences, weighted: two scalars from (B, n) each."""
    total = weight.sum().clamp(min=1e-9)  # there may be no words
    return (x * weight).sum() / total


@torch.no_grad()
def describe(batch, w):
    """Log a Batch of lab.one_sided: token means, weighted as in the loss. w: (B, T) bonus."""
    c = batch.words.shape[1]
    valid = batch.rollout.valid
    weight = valid / valid.sum(1, keepdim=True)
    stats = dict(
        reward=batch.rewards.mean(),
        exact=batch.exact.mean(),
        k3=token_mean(batch.k3, weight),
        w_largest=w.abs().max(),
    )
    difference = batch.log_q.exp() - batch.z.softmax(-1)
    squared = difference.square().sum(-1)
    over, under = sigma(batch.z, batch.log_q)
    of_codes = dict(
        kl_q_p=divergence(batch.log_q, batch.z),
        kl_p_empty=divergence(batch.z, batch.u),
        entropy_q=token_entropy(batch.log_q),
        entropy_empty=token_entropy(batch.u),
        pull=w[:, c:] * squared,
        over=over,
        under=under,
    )
    of_both = dict(kl_ref=batch.kl, entropy=batch.entropy, w=w)
    for name, x in of_both.items():
        stats[f"{name}_words"] = token_mean(x[:, :c], weight[:, :c])
        of_codes[f"{name}_codes"] = x[:, c:]
    for name, x in of_codes.items():
        stats[name] = token_mean(x, weight[:, c:])
    stats["sigma"] = stats.pop("over") / stats.pop("under")
    values = torch.stack([*stats.values()])
    return dict(zip(stats, values.tolist()))
