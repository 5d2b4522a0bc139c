"""Sampler against learner in bf16 on a CPU, network and cache as on CUDA; a policy trained here.

Shown: that rounding stays far below the bound at which a run stops, and that the bound catches
mismatches. A CPU's bf16 is not a GPU's: other kernels add in another order.
"""

from functools import partial

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import common
import pretrain
from eggrpo import LOGP_DIFF_BOUND, logp_difference
from model import Block, Policy, generate, score
from pretrain import corpus_chunk
from runs import load_model
from scenes import WORLDS

WORLD = WORLDS["small"]
BOUND = LOGP_DIFF_BOUND[torch.bfloat16]


def patch_codes(images):
    """Stand in for a tokenizer: number each patch by its mean colour. (n, h, w, 3) -> (n, L)."""
    n, side = len(images), WORLD.side
    means = images.reshape(n, side, WORLD.patch, side, WORLD.patch, 3).mean((2, 4)) // 86  # 0 to 2
    return torch.from_numpy(means @ np.array([1, 3, 9])).long().flatten(1)


@pytest.fixture(scope="module")
def trained():
    """A policy after some seconds of pretraining, prompts and noise."""
    torch.manual_seed(0)
    prompt, plan, images = corpus_chunk(WORLD, 0, range(128))
    tokens = torch.from_numpy(prompt).long(), torch.from_numpy(plan).long(), patch_codes(images)
    policy = Policy(WORLD, 27, 4, width=64, layers=2, heads=2)
    optimizer = torch.optim.AdamW(policy.parameters(), 5e-3)
    for step in range(120):
        rows = torch.arange(16) + 16 * (step % 8)
        terms = pretrain.update(policy, optimizer, *(x[rows] for x in tokens))
    assert terms["image_nll"] < 0.6 and terms["plan_nll"] < 0.8  # from 3.3 and 4.2: it has learned
    noise = torch.rand(64, policy.C + policy.L, generator=torch.Generator().manual_seed(0))
    return policy, tokens[0][:64], noise


@pytest.fixture
def bf16(monkeypatch):
    """Network and cache in bf16, as on a GPU of compute capability 8 or more."""
    monkeypatch.setattr(common, "network_dtype", lambda device: torch.bfloat16)


def sampled(trained, guidance=1.0):
    policy, prompt, noise = trained
    return generate(policy, prompt, noise, guidance)


@torch.no_grad()
def difference(trained, rollout, guidance=1.0):
    """Score a rollout. Returns the mean absolute difference of log-probs, nats."""
    logp = score(trained[0], rollout.prompt, rollout.plan, rollout.codes, guidance)
    return logp_difference(rollout, logp).item()


@pytest.mark.parametrize("guidance", [1.0, 5.0])
def test_bf16_rounds_to_less_than_a_third_of_the_bound(trained, bf16, monkeypatch, guidance):
    """Guidance multiplies the error of the logits by |g| + |1 - g|, and the bound likewise."""
    rollout = sampled(trained, guidance)
    found = difference(trained, rollout, guidance)
    assert 3 * found < BOUND * (guidance + abs(1 - guidance))
    monkeypatch.undo()
    assert difference(trained, rollout, guidance) > 1e-4  # scored in float32: it was bf16


class CountCasts(TorchDispatchMode):
    """Count conversions to bf16 of what has two dimensions: weights; activations have three."""

    number = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        of_weight = args and isinstance(args[0], torch.nn.Parameter) and args[0].dim() == 2
        self.number += function == torch.ops.aten._to_copy.default and of_weight
        return function(*args, **(kwargs or {}))


def test_a_finished_policy_casts_each_weight_once_a_batch(trained, bf16, tmp_path):
    """Frozen weights are cast again at every slot. Four of a block, and the aligner; heads are
    float32."""
    policy, prompt, noise = trained
    record = dict(model_config=policy.config, model=policy.state_dict(), config=dict(steps=1))
    torch.save(record | dict(origin="", step=1, log=[]), tmp_path / "policy.pt")
    loaded, _ = load_model(partial(Policy, WORLD), tmp_path / "policy.pt", "", "")
    with CountCasts() as casts:
        generate(loaded, prompt, noise)
    assert casts.number == 4 * len(loaded.blocks) + 1


def forgetful_cache(policy, monkeypatch):
    forward = Block.forward

    def forgetful(block, x, mask, cache=None, slot=0):
        out = forward(block, x, mask, cache, slot)
        if slot > 0:
            cache[:, :, :, slot] = 0
        return out

    monkeypatch.setattr(Block, "forward", forgetful)


def shifted_positions(policy, monkeypatch):
    positions = policy.position_embeddings().roll(1, 0)
    monkeypatch.setattr(policy, "position_embeddings", lambda: positions)


@pytest.mark.parametrize("plant", [forgetful_cache, shifted_positions])
def test_a_planted_mismatch_is_outside_of_the_bound(trained, bf16, monkeypatch, plant):
    with monkeypatch.context() as patch:
        plant(trained[0], patch)
        wrong = sampled(trained)
    assert difference(trained, wrong) > BOUND


def test_guidance_on_one_side_is_caught_from_1_05_in_bf16(trained, bf16):
    assert difference(trained, sampled(trained, 1.05)) > BOUND


def test_float32_rounds_to_less_than_a_fifth_of_its_bound_and_guidance_of_1_001_does_not(trained):
    bound = LOGP_DIFF_BOUND[torch.float32]
    assert 5 * difference(trained, sampled(trained)) < bound
    assert difference(trained, sampled(trained, 1.001)) > bound
