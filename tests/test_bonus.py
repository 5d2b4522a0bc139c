"""What the bonus does: laws where they are laws, on policies whose every sequence is enumerated."""

import pytest
import torch

from lab import bonus
from lab.bonus import Instance, every_sequence, exact_gradients, guided, look_up


@pytest.fixture(autouse=True)
def double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("seed", range(3))
def test_a_bonus_that_ignores_the_sampled_token_has_no_expected_gradient(seed):
    """0.3 H on every token is a baseline: E_a[d * grad log pi(a)] = d * grad sum_a pi(a) = 0."""
    gradients, _, _ = exact_gradients(Instance(seed))
    assert gradients["0.3 H, every token"].abs().max() < 1e-14
    assert gradients["GRPO: A"].abs().max() > 1e-3


@pytest.mark.parametrize("seed", range(3))
def test_the_method_is_grpo_and_its_two_halves(seed):
    g, _, _ = exact_gradients(Instance(seed))
    assert torch.allclose(
        g["bonus where it is 0.3 H"] + g["bonus where it is 0.3 abs(A)"],
        g["bonus: both"],
        atol=1e-14,
    )
    parts = g["GRPO: A"] + g["bonus: both"] + g["exclusion: -A on low"]
    assert torch.allclose(parts, g["EG-GRPO: all of it"], atol=1e-14)


@pytest.mark.parametrize("seed", range(3))
def test_grpos_exact_gradient_is_that_of_expected_reward_over_its_std(seed):
    instance = Instance(seed)
    g, of_reward, _ = exact_gradients(instance)
    tokens = every_sequence()
    p, r = look_up(instance.theta, tokens)[0].sum(1).exp(), instance.rewards(tokens)
    std = (p * (r - (p * r).sum()) ** 2).sum().sqrt()
    assert torch.allclose(g["GRPO: A"], of_reward / std / bonus.T, atol=1e-12)


def test_under_guidance_the_same_bonus_pulls_toward_the_guided_policy():
    """With samples from q and scores from p, E[H grad log p] at a context is P_q(context) H (q -
    p): the logits move toward the guide, which is sharper, and entropy falls (45 of 48
    instances)."""
    for seed in range(3):
        instance = Instance(seed)
        g, _, of_entropy = exact_gradients(instance, guidance=2.0)
        bonus = g["0.3 H, every token"]
        toward = guided(instance, instance.theta, 2.0).softmax(-1) - instance.theta.softmax(-1)
        reached = bonus.abs().sum(-1) > 1e-12
        cosine = torch.nn.functional.cosine_similarity(bonus[reached], toward[reached], dim=-1)
        assert torch.allclose(cosine, torch.ones_like(cosine), atol=1e-6)
        assert (bonus * of_entropy).sum() < 0


def test_the_true_entropy_gradient_raises_entropy():
    for seed in range(4):
        g, _, of_entropy = exact_gradients(Instance(seed))
        assert (g["entropy gradient: H on high"] * of_entropy).sum() > 0


def test_entropies_and_probabilities_are_exact():
    tokens = every_sequence()
    assert tokens.shape == (3**10, 10) and len(tokens.unique(dim=0)) == 3**10
    logp, entropy = look_up(Instance(0).theta, tokens)
    assert abs(logp.sum(1).exp().sum() - 1) < 1e-12 and 0 < entropy.min() and entropy.max() <= 1


def test_the_tables_print(capsys):
    bonus.exact_table(2, 1.0)
    results = bonus.sampled_table(2, 3, 2.0)
    assert "| EG-GRPO: all of it |" in capsys.readouterr().out
    assert not torch.equal(results["eggrpo"][0], results["grpo"][0])
