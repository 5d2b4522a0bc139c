"""Small things that many tests share: a tiny random policy and tokenizer, no weights and no
network."""

import pytest
import torch

from evaluate import Eye
from model import Policy
from scenes import WORDS, WORLDS
from tiny_vq.vqvae import VQVAE


def pytest_collection_modifyitems(items):
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no CUDA"))


@pytest.fixture
def world():
    return WORLDS["cpu"]


def tiny_policy(world, codes=32, seed=0, scale=8.0):
    """A random policy whose distributions are far from uniform, so that mistakes show."""
    torch.manual_seed(seed)
    policy = Policy(len(WORDS), codes, world.prompt_slots, world.plan_slots, world.image_tokens,
                    width=32, layers=2, heads=2)
    for parameter in policy.parameters():
        if parameter.dim() > 1:
            parameter.data *= scale
    return policy


@pytest.fixture
def policy(world):
    return tiny_policy(world)


@pytest.fixture
def eye(world):
    torch.manual_seed(0)
    return Eye(VQVAE(world.patch, width=16, blocks=1, codes=32, dim=4), world, torch.device("cpu"))
