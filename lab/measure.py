"""What the study measures of a finished policy beside its scores, and a training run of its own:
sampled with guidance, scored without."""

import contextlib
from unittest import mock

import numpy as np
import torch

import eggrpo
import model
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
    policy.requires_grad_(True)
    sizes = gradient_sizes(env, policy, settings, config.gradient_batches)
    policy.requires_grad_(False)
    return sizes


@contextlib.contextmanager
def scored_without_guidance():
    """Let eggrpo.main sample with its guidance and score without it, as the paper's code does.

    Entropies, and so the masks and the bonus, are those of the scored policy, and so is the KL
    term. That sampler and learner are two policies is logged (logp_diff_mean) and not an error.
    """

    def score(policy, prompt, plan, codes, guidance):
        return model.score(policy, prompt, plan, codes)

    @torch.no_grad()
    def generate(policy, prompt, noise, guidance):
        rollout = model.generate(policy, prompt, noise, guidance)
        logits = model.forward_logits(policy, rollout.prompt, rollout.plan, rollout.codes)
        entropy = torch.cat([token_entropy(modality) for modality in logits], 1)
        return rollout._replace(entropy=entropy * rollout.valid)

    unchecked = mock.patch.object(eggrpo, "check_one_policy", lambda *arguments: None)
    with mock.patch.multiple(eggrpo, score=score, generate=generate), unchecked:
        yield
