"""The mathematics: hand-worked pins, laws, equivalences, gradients. The guards name the bugs of
other GRPO codes that they catch."""

import doctest
import math
import shutil
import sys
from fractions import Fraction

import pytest
import torch

import objective
from conftest import ROOT, run
from objective import bonus_coefficient, entropy_masks, group_advantages, policy_loss
from objective import shape_advantages, shape_advantages_released, token_entropy


def random_batch(b=6, t=20, seed=0):
    """Advantages (B,), entropies (B, T) and valid (B, T) of sequences that differ in length."""
    g = torch.Generator().manual_seed(seed)
    valid = torch.arange(t) < torch.randint(5, t + 1, (b, 1), generator=g)
    return torch.randn(b, generator=g), torch.rand(b, t, generator=g), valid


def equal(some, others):
    return all(torch.equal(a, b) for a, b in zip(some, others))


def shape(advantage, entropy, valid):
    return shape_advantages(advantage, entropy, *entropy_masks(entropy, valid), valid)


def test_docstrings_are_true():
    assert doctest.testmod(objective).failed == 0 and doctest.testmod(objective).attempted >= 4


def test_advantages_by_hand():
    """Rewards 0, 1, 2, 5: mean 2, squared deviations 4 + 1 + 0 + 9 = 14, std with ddof 1 is sqrt(14
    / 3)."""
    a = group_advantages(torch.tensor([[0.0, 1.0, 2.0, 5.0]]), eps=0.0)
    assert torch.allclose(a, torch.tensor([[-2.0, -1.0, 0.0, 3.0]]) / math.sqrt(14 / 3))


def test_each_group_is_normalised_by_itself():
    """Guard: normalising over the batch instead of the group."""
    r = torch.tensor([[0.0, 1.0, 2.0], [10.0, 11.0, 12.0]])
    a = group_advantages(r, eps=0.0)
    assert torch.allclose(a[0], a[1]) and torch.allclose(a.sum(1), torch.zeros(2), atol=1e-6)
    assert torch.allclose(group_advantages(3 * r + 7, eps=0.0), a, atol=1e-5)


@pytest.mark.parametrize("eps", [1e-4, 1e-8])
def test_a_constant_group_gives_exactly_zero(eps):
    """Guard: 24 equal rewards of 1.1 give advantages up to 0.9 with eps 1e-8 in float32."""
    assert torch.equal(group_advantages(torch.full((2, 24), 1.1), eps), torch.zeros(2, 24))


def test_a_group_of_one_is_refused():
    """Guard: the released code gives NaN."""
    with pytest.raises(ValueError, match="at least 2"):
        group_advantages(torch.ones(4, 1))


def test_entropy_is_that_of_the_full_distribution_as_a_fraction():
    logits = torch.randn(4, 7, requires_grad=True)
    p = logits.softmax(-1)
    entropy = token_entropy(logits)
    assert torch.allclose(entropy, -(p * p.log()).sum(-1) / math.log(7), atol=1e-6)
    assert not entropy.requires_grad and token_entropy(logits.bfloat16()).dtype == torch.float32
    assert token_entropy(torch.tensor([0.0, 0.0, -1e9, -math.inf])) == 0.5


def masks_by_loop(entropy, valid, low_frac, high_frac):
    low, high = torch.zeros_like(valid), torch.zeros_like(valid)
    for row, tokens in enumerate(valid):
        order = sorted(tokens.nonzero()[:, 0].tolist(), key=lambda t: entropy[row, t].item())
        n = len(order)
        low[row, order[: round(100 * low_frac) * n // 100]] = True
        high[row, order[n - round(100 * high_frac) * n // 100 :]] = True
    return low, high


@pytest.mark.parametrize("fractions", [(0.2, 0.5), (0.0, 1.0), (1.0, 0.0), (0.33, 0.29)])
def test_masks_equal_the_loop_ties_included(fractions):
    """Guard: strict thresholds mask nothing when many entropies tie."""
    for seed in range(20):
        _, entropy, valid = random_batch(seed=seed)
        for h in (entropy, (entropy * 4).round() / 4, torch.zeros_like(entropy)):
            low, high = entropy_masks(h, valid, *fractions)
            assert equal((low, high), masks_by_loop(h, valid, *fractions))
            assert not (low & high).any()


def test_counts_are_those_of_exact_fractions():
    """In float32, 0.53 * 100 + 1e-6 falls short of 53: counts are taken in integers."""
    for n in (1, 7, 100, 180, 576):  # 576: the paper's image tokens, of which 115 are low
        valid = torch.ones(1, n, dtype=torch.bool)
        entropy = torch.rand(1, n)
        for part in [Fraction(k, 100) for k in range(101)] + [Fraction(k, 7) for k in range(8)]:
            low, high = entropy_masks(entropy, valid, float(part), float(1 - part))
            assert low.sum() == part * n // 1 and high.sum() == (1 - part) * n // 1, (n, part)


@pytest.mark.parametrize("fractions", [(-0.1, 0.5), (0.6, 0.5), (0.2, 1.1)])
def test_fractions_that_overlap_or_leave_the_range_are_refused(fractions):
    with pytest.raises(ValueError, match="at most 1"):
        entropy_masks(torch.rand(1, 4), torch.ones(1, 4, dtype=torch.bool), *fractions)


def test_the_bonus_by_hand():
    """Two rollouts, four and two tokens long, A = 1 and -2, one low token each: exclusion takes
    1 * 1/4 + 2 * 1/2 = 1.25 of the loss's weight. High tokens have the entropies .4 and .5 (of
    four) and .6 (of two): .9/4 + .6/2 = .525. So lambda is kappa 1.25/.525."""
    a = torch.tensor([1.0, -2.0])
    h = torch.tensor([[0.1, 0.4, 0.2, 0.5], [0.3, 0.6, 9.0, 9.0]])
    valid = torch.tensor([[True] * 4, [True, True, False, False]])
    low = torch.tensor([[True, False, False, False]] * 2)
    high = torch.tensor([[False, True, False, True], [False, True, False, False]])
    for kappa in (1.0, 0.5, 0.0):
        c = kappa * 1.25 / 0.525
        expected = torch.tensor([[0.0, 1 + 0.4 * c, 1.0, 1 + 0.5 * c], [0.0, -2 + 0.6 * c, -2, -2]])
        shaped = shape_advantages(a, h, low, high, valid, kappa)
        assert torch.allclose(shaped[valid], expected[valid])
        kept = shape_advantages(a, h, low, high, valid, kappa, exclude=False)
        assert torch.allclose(kept[:, 0], a) and torch.equal(kept[~low], shaped[~low])


@pytest.mark.parametrize("kappa", [0.3, 1.0, 2.0])
def test_the_bonus_spends_kappa_times_what_exclusion_takes_away(kappa):
    """The budget identity, in the weights that the loss gives to tokens."""
    a, h, valid = random_batch()
    low, high = entropy_masks(h, valid)
    logp = torch.zeros(6, 20, requires_grad=True)

    def weight(shaped):
        (gradient,) = torch.autograd.grad(policy_loss(logp, None, shaped, valid)[0], logp)
        return -gradient

    plain = weight(a[:, None].expand(6, 20))
    shaped = weight(shape_advantages(a, h, low, high, valid, kappa))
    spent = (shaped - plain)[high].sum()
    assert math.isclose(spent, kappa * plain[low].abs().sum(), rel_tol=1e-5) and spent > 0.01
    assert torch.equal(shaped[~high & ~low], plain[~high & ~low]) and (shaped[low] == 0).all()


def test_without_something_to_spend_there_is_no_bonus():
    """Equal rewards, no high token, no entropy: 0 by the formula, not by a small denominator. The
    scale of entropy changes nothing."""
    a, h, valid = random_batch()
    low, high = entropy_masks(h, valid)
    assert torch.equal(shape(torch.zeros(6), h, valid), torch.zeros(6, 20))
    assert bonus_coefficient(a, h, low, torch.zeros_like(high), valid) == 0
    assert bonus_coefficient(a, torch.zeros_like(h), low, high, valid) == 0
    assert torch.allclose(shape(a, h, valid), shape(a, h / 100, valid), rtol=1e-5)


def test_padding_and_its_content_change_no_mask_and_no_shaped_advantage():
    """Guard: thresholds that depend on the longest plan of the batch."""
    a, h, valid = random_batch()
    wide_h = torch.cat([torch.where(valid, h, math.nan), torch.full((6, 9), math.nan)], 1)
    wide_valid = torch.cat([valid, torch.zeros(6, 9, dtype=torch.bool)], 1)
    for wide, narrow in zip(entropy_masks(wide_h, wide_valid), entropy_masks(h, valid)):
        assert torch.equal(wide[:, :20], narrow) and not wide[:, 20:].any()
    wide = shape(a, wide_h, wide_valid)
    assert torch.allclose(wide[wide_valid], shape(a, h, valid)[valid], rtol=1e-5)


def test_the_released_rule_by_hand():
    """A = -1, low .2, high .5 of five tokens: one is excluded, the top two get min(.3 * 1, .3 * H)
    = .3 H. With A = .5 the bonus is .3 * .5, less than .3 * .7. It never turns a sign."""
    h, valid = torch.tensor([[0.9, 0.1, 0.5, 0.7, 0.3]]), torch.ones(1, 5, dtype=torch.bool)
    masks = entropy_masks(h, valid)
    out = shape_advantages_released(torch.tensor([-1.0]), h, *masks)
    assert torch.allclose(out, torch.tensor([[-1 + 0.27, 0.0, -1.0, -1 + 0.21, -1.0]]))
    capped = shape_advantages_released(torch.tensor([0.5]), h, *masks)
    assert torch.allclose(capped, torch.tensor([[0.65, 0.0, 0.5, 0.65, 0.5]]))
    a, h, valid = random_batch()
    out = shape_advantages_released(a, h, *entropy_masks(h, valid))
    assert (out * a[:, None] >= 0).all()


def random_logps(seed=0, b=6, t=20, spread=0.1):
    g = torch.Generator().manual_seed(seed)
    logp = -torch.rand(b, t, generator=g) * 3
    return logp, logp + spread * torch.randn(b, t, generator=g)


def test_the_loss_equals_the_loop():
    """A mean over sequences of means over their valid tokens, the KL term likewise."""
    logp, ref = random_logps(spread=0.3)
    a, _, valid = random_batch()
    total = kl_total = 0.0
    for b, t in zip(*valid.nonzero(as_tuple=True)):
        gap = (ref[b, t] - logp[b, t]).item()
        kl = math.exp(gap) - gap - 1
        weight = 1 / (6 * valid[b].sum().item())
        total += weight * (a[b].item() - 0.05 * kl)  # the ratio is 1
        kl_total += weight * kl
    loss, kl = policy_loss(logp, ref, a[:, None].expand(6, 20), valid, 0.05)
    assert math.isclose(loss.item(), -total, rel_tol=1e-5)
    assert math.isclose(kl, kl_total, rel_tol=1e-4)


def test_the_gradient_is_that_of_reinforce_and_of_the_kl_term():
    """With ratio 1 the gradient with respect to log-probs is -A / (B T_i), though the loss itself
    is -mean(A): why "loss is 0" is right. Guard: masked tokens that still get reward gradient; KL
    holds on all valid tokens, low ones too."""
    logp, ref = random_logps()
    a, h, valid = random_batch()
    low, _ = entropy_masks(h, valid)
    for beta, advantage in ((0.0, a[:, None].expand(6, 20)), (0.05, shape(a, h, valid))):
        leaf = logp.clone().requires_grad_(True)
        loss, _ = policy_loss(leaf, ref if beta else None, advantage, valid, beta)
        loss.backward()
        kl = beta * (1 - (ref - logp).exp())
        expected = (kl - advantage) / (6 * valid.sum(1, keepdim=True))
        assert torch.allclose(leaf.grad, expected.where(valid, 0.0), atol=1e-7)
        assert beta or math.isclose(loss.item(), -a.mean(), rel_tol=1e-5)
    assert (advantage[low] == 0).all() and (leaf.grad[low] != 0).all()


def test_a_reference_that_is_far_away_is_no_matter_if_beta_is_zero():
    """Guard: a KL that overflows, times a beta of 0, is NaN."""
    logp, _ = random_logps()
    a, _, valid = random_batch()
    plain = a[:, None].expand(6, 20)
    alone, _ = policy_loss(logp, None, plain, valid, beta=0.0)
    for far in (logp + 100, logp - math.inf, logp * math.nan):
        leaf = logp.clone().requires_grad_(True)
        loss, kl = policy_loss(leaf, far, plain, valid, beta=0.0)
        loss.backward()
        assert loss == alone and leaf.grad.isfinite().all() and not kl < 1e3


def test_padding_reaches_neither_loss_nor_gradient():
    """Other trainers leave anything there, even NaN, and sequences of padding alone."""
    logp, ref = random_logps()
    a, h, valid = random_batch()
    valid[2] = False
    assert shape(a, h, valid).isfinite().all()
    plain = a[:, None].expand(6, 20)
    leaf, dirty_ref, dirty_a = (torch.where(valid, x, math.nan) for x in (logp, ref, plain))
    loss, kl = policy_loss(leaf.requires_grad_(True), dirty_ref, dirty_a, valid)
    loss.backward()
    assert (loss, kl) == policy_loss(logp, ref, plain, valid)
    assert (leaf.grad[~valid] == 0).all() and leaf.grad[valid].isfinite().all()
    assert policy_loss(logp, logp, plain, valid)[1] == 0 < kl  # equal policies have no KL


def test_it_can_be_copied_into_a_project_with_files_of_the_same_names(tmp_path):
    """Guard: with its functions in eggrpo.py, the project's model.py was imported instead of
    ours."""
    shutil.copy(objective.__file__, tmp_path)
    for path in ROOT.glob("*.py"):
        if path.name != "objective.py":
            (tmp_path / path.name).write_text("raise ImportError(__name__)\n")
    run(sys.executable, "-c", "from objective import policy_loss", cwd=tmp_path)
