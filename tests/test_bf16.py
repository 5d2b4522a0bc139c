"""Sampler against learner in bf16 on a CPU, network and cache as on CUDA; a policy trained here.

Shown: that rounding stays far below the bounds at which a run stops, and what the bounds catch. A
CPU's bf16 is not a GPU's: other kernels add in another order.
"""

import numpy as np
import pytest
import torch

import common
import eggrpo
import pretrain
from common import TrainingDiverged
from model import Block, Policy, forward_logits, generate, token_logp
from pretrain import corpus_chunk
from rollout import LOGP_DIFF_BOUND, check_stats
from scenes import WORLDS
from words import WORDS

WORLD = WORLDS["cpu"]
BOUND = LOGP_DIFF_BOUND[torch.bfloat16]


def patch_codes(images):
    """Stand in for a tokenizer: number each patch by its mean colour. (n, h, w, 3) -> (n, L)."""
    n, side = len(images), WORLD.image_size // WORLD.patch
    means = images.reshape(n, side, WORLD.patch, side, WORLD.patch, 3).mean((2, 4)) // 86  # 0 to 2
    return torch.from_numpy(means @ np.array([1, 3, 9])).long().flatten(1)


@pytest.fixture(scope="module")
def trained():
    """A policy after some seconds of pretraining, prompts and noise."""
    torch.manual_seed(0)
    prompt, plan, images = corpus_chunk(WORLD, 0, range(256))
    tokens = [torch.from_numpy(x).long() for x in (prompt, plan)] + [patch_codes(images)]
    sizes = WORLD.prompt_slots, WORLD.plan_slots, WORLD.image_tokens
    policy = Policy(len(WORDS), 27, 4, *sizes, width=64, layers=2, heads=2)
    optimizer = torch.optim.AdamW(policy.parameters(), 5e-3)
    for step in range(120):
        rows = torch.arange(32) + 32 * (step % 8)
        terms = pretrain.update(policy, optimizer, *(x[rows] for x in tokens), micro_batch=32)
    assert terms["image_nll"] < 0.6 and terms["plan_nll"] < 0.8  # from 3.3 and 4.2: it has learned
    noise = torch.rand(64, policy.C + policy.L, generator=torch.Generator().manual_seed(0))
    return policy, tokens[0][:64], noise


@pytest.fixture
def bf16(monkeypatch):
    """Network and cache in bf16, as on a GPU of compute capability 8 or more."""
    monkeypatch.setattr(common, "network_dtype", lambda device: torch.bfloat16)


@torch.no_grad()
def sampled(trained, guidance=1.0):
    policy, prompt, noise = trained
    return generate(policy, prompt, noise, guidance=guidance)


@torch.no_grad()
def difference(trained, sample, guidance=1.0):
    """Score a sample. Returns the mean absolute difference of log-probs, nats."""
    policy, prompt, _ = trained
    logits = forward_logits(policy, prompt, sample.plan, sample.codes, guidance)
    logp = token_logp(*logits, sample.plan, sample.codes)
    difference = (logp - sample.logp).abs() * sample.valid
    return (difference.sum() / sample.valid.sum()).item()


@pytest.mark.parametrize("guidance", [1.0, 3.0, 5.0])
def test_bf16_rounds_to_less_than_a_third_of_the_bound(trained, bf16, guidance):
    """Guidance multiplies the error of the logits by |g| + |1 - g|, and the bound likewise."""
    found = difference(trained, sampled(trained, guidance), guidance)
    print(guidance, found)
    assert found > 1e-5  # it is bf16: float32 gives 1e-7
    assert 3 * found < BOUND * (guidance + abs(1 - guidance))


def mismatches(policy, monkeypatch):
    """Names of mismatches between sampler and learner, and a function that makes each."""
    step, positions = Block.step, policy.position_embeddings()

    def forgetful_step(self, x, bias, cache, slot):
        out = step(self, x, bias, cache, slot)
        cache[:, :, slot] = 0
        return out

    shifted = lambda: positions.roll(1, 0)
    return {
        "cache rows that are not updated": lambda: monkeypatch.setattr(
            Block, "step", forgetful_step
        ),
        "positions shifted by one": lambda: monkeypatch.setattr(
            policy, "position_embeddings", shifted
        ),
    }


@pytest.mark.parametrize("name", ["cache rows that are not updated", "positions shifted by one"])
def test_a_planted_mismatch_is_outside_of_the_bound_of_the_mean(trained, bf16, monkeypatch, name):
    right = sampled(trained)
    mismatches(trained[0], monkeypatch)[name]()
    wrong = sampled(trained)
    monkeypatch.undo()
    monkeypatch.setattr(common, "network_dtype", lambda device: torch.bfloat16)
    found = difference(trained, wrong)
    print(name, found)
    assert found > BOUND
    assert difference(trained, right) < BOUND


def test_guidance_on_one_side_is_caught_from_1_05_in_bf16_and_from_1_001_in_float32(
    trained, monkeypatch
):
    exact = LOGP_DIFF_BOUND[torch.float32]
    assert difference(trained, sampled(trained)) < exact
    assert difference(trained, sampled(trained, 1.001)) > exact
    monkeypatch.setattr(common, "network_dtype", lambda device: torch.bfloat16)
    found = {g: difference(trained, sampled(trained, g)) for g in (1.0, 1.05)}
    print(found)
    assert found[1.05] > BOUND > 3 * found[1.0]


def test_the_bound_grows_with_guidance(monkeypatch):
    monkeypatch.setattr("rollout.network_dtype", lambda device: torch.bfloat16)
    stats = dict(logp_diff_mean=torch.tensor(2 * BOUND), logp_diff_max=torch.tensor(9.0))
    with pytest.raises(TrainingDiverged, match="not the same policy"):
        check_stats(stats, eggrpo.Config(), torch.device("cpu"))
    check_stats(stats, eggrpo.Config(guidance=3.0), torch.device("cpu"))
