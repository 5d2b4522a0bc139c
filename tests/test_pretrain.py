"""Pretraining: micro-batches change memory, not results."""

import copy

import pytest
import torch

import pretrain
from conftest import tiny_policy
from pretrain import corpus_chunk
from scenes import WORLDS
from words import PAD


@pytest.mark.parametrize("micro_batch", [1, 3, 8])
def test_micro_batches_give_the_step_of_the_whole_batch(micro_batch):
    """The denominators are those of the whole batch, though plans differ in length."""
    world = WORLDS["cpu"]
    prompt, plan, _ = corpus_chunk(world, 0, range(8))
    tokens = [torch.from_numpy(x).long() for x in (prompt, plan)]
    tokens.append(torch.randint(32, (8, world.image_tokens)))
    whole = tiny_policy(world, scale=1.0)
    parts = copy.deepcopy(whole)
    terms = {}
    for policy, size in ((whole, 8), (parts, micro_batch)):
        optimizer = torch.optim.SGD(policy.parameters(), 0.1)
        terms[size] = pretrain.update(policy, optimizer, *tokens, size)
    assert terms[micro_batch] == pytest.approx(terms[8], rel=1e-5)
    for a, b in zip(whole.parameters(), parts.parameters()):
        assert torch.allclose(a, b, atol=1e-6)


def test_one_draw_per_item_drops_the_plan_or_both():
    """Below .10 prompt and plan go together, below .25 the plan alone; four standard errors."""
    world, n = WORLDS["cpu"], 4000
    words = torch.ones(n, world.prompt_slots), torch.ones(n, world.plan_slots)
    corpus = *words, torch.zeros(n, world.image_tokens)
    config = pretrain.Config(items=n, batch=n)
    prompt, plan, _ = pretrain.training_batch(corpus, config, 0, torch.device("cpu"))
    no_prompt, no_plan = (prompt == PAD).all(1), (plan == PAD).all(1)
    assert not (no_prompt & ~no_plan).any()
    assert (prompt == 1).all(1).eq(~no_prompt).all() and (plan == 1).all(1).eq(~no_plan).all()
    for share, expected in ((no_prompt, 0.10), (no_plan, 0.25)):
        error = (expected * (1 - expected) / n) ** 0.5
        assert abs(share.float().mean() - expected) < 4 * error
