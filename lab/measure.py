"""What the study measures of a finished policy beside its scores."""

from functools import partial
from unittest import mock

import numpy as np
import torch

import evaluate
from evaluate import draw_noise, sample_and_score
from lab.batch import step_config
from lab.world import gradient_sizes
from objective import token_entropy
from rewards import detect
from scenes import make_scene

DIVERSITY_SEED = 6000  # of the prompts


def vendi_score(kinds):
    """Vendi score of n images (Friedman and Dieng, 2022): the effective number of different ones.

    kinds: (n, cells), what is detected in each cell. The similarity K of two images is the fraction
    of cells with equal detections; the score is exp of the entropy of the eigenvalues of K / n.
    """
    kinds = np.asarray(kinds)
    similarity = (kinds[:, None] == kinds).mean(2)
    eigenvalues = np.linalg.eigvalsh(similarity / len(kinds))
    eigenvalues = eigenvalues[eigenvalues > 1e-12]
    entropy = -(eigenvalues * np.log(eigenvalues)).sum()
    return float(np.exp(entropy))


@torch.no_grad()
def diversity(env, policy, config, **options):
    """Draw several images for each of some held-out prompts, each with a plan of its own. Returns
    means over prompts: vendi, and reward_std, the spread of rewards within a prompt."""
    n = config.diverse_images
    vendi = []
    spread = []
    for start in range(0, config.diverse_prompts, 10):
        numbers = range(start, min(start + 10, config.diverse_prompts))
        scenes = [make_scene(env.world, "eval", DIVERSITY_SEED, i) for i in numbers]
        repeated = [scene for scene in scenes for _ in range(n)]
        noise = draw_noise(policy, len(repeated), config.seed, "diversity", start)
        images, rewards, _, _ = sample_and_score(env, policy, repeated, noise, **options)
        kinds = detect(images, env.world).kind.view(len(scenes), n, -1).cpu()  # (prompts, n, cells)
        vendi += [vendi_score(of_prompt) for of_prompt in kinds]
        spread += rewards.view(-1, n).std(1).tolist()
    return dict(vendi=float(np.mean(vendi)), reward_std=float(np.mean(spread)))


def gradient(env, policy, config):
    """Return {part: norm of its gradient over that of GRPO's} of a policy, see lab.world."""
    settings = step_config(config.preset, "eggrpo", config.seed)
    return gradient_sizes(env, policy, settings, config.gradient_batches)


def scores_by_setting(run):
    """Score the policy of a lab.one_sided.Run at guidance 1, at its own and at twice its own, and at
    its temperature if that is not 1. Returns {setting: {split: summary}}."""
    config = run.config
    settings = {f"guidance {g:g}": (g, 1.0) for g in (1.0, config.guidance, 2 * config.guidance)}
    if config.temperature != 1.0:
        settings[f"temperature {config.temperature:.3g}"] = 1.0, config.temperature
    numbers = {"eval": config.prompts_scored, "rare": max(config.prompts_scored // 2, 6)}
    scores = {}
    for name, (guidance, temperature) in settings.items():
        sampler = partial(run.sample, guidance=guidance, temperature=temperature)
        scores[name] = {}
        with mock.patch.object(evaluate, "generate", sampler):
            for split, number in numbers.items():
                scored = evaluate.evaluate(run.env, run.policy, split, number, config.batch)
                scores[name][split] = evaluate.summarize(scored)
    return scores
