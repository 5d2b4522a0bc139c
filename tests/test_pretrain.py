"""Pretraining: micro-batches change memory, not results."""

import copy

import pytest
import torch

import pretrain
from conftest import tiny_policy
from pretrain import corpus_chunk
from scenes import WORLDS


@pytest.mark.parametrize("micro_batch", [1, 3, 8])
def test_micro_batches_give_the_step_of_the_whole_batch(micro_batch):
    """The denominators are those of the whole batch, though plans differ in length."""
    world = WORLDS["cpu"]
    prompt, plan, _ = corpus_chunk(world, 0, 0.01, range(8))
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
