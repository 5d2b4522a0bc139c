"""The method: hand-worked pins, laws, equivalences, gradients. The guards name the bugs of other
GRPO codes that they catch."""

import doctest
import math
import warnings
from dataclasses import replace

import pytest
import torch

import eggrpo
from common import TrainingDiverged, UserError
from conftest import tiny_policy
from eggrpo import (
    METHODS,
    Config,
    bonus_coefficient,
    entropy_masks,
    group_advantages,
    make_batch,
    micro_batch_loss,
    policy_loss,
    shape_advantages,
    shape_advantages_released,
    token_entropy,
    update,
)
from model import Block, Decoder, forward_logits, token_logp
from rollout import (
    LOGP_DIFF_BOUND,
    Rollout,
    check_stats,
    entropy_stats,
    make_rollout,
    rollout_stats,
)
from scenes import make_scene


def random_batch(b=6, t=20, seed=0):
    g = torch.Generator().manual_seed(seed)
    valid = torch.arange(t) < torch.randint(5, t + 1, (b, 1), generator=g)
    return torch.randn(b, generator=g), torch.rand(b, t, generator=g), valid


def shape(advantage, entropy, valid):
    return shape_advantages(advantage, entropy, *entropy_masks(entropy, valid), valid)


def test_docstrings_are_true():
    assert doctest.testmod(eggrpo).failed == 0 and doctest.testmod(eggrpo).attempted >= 4


# --- advantages -----------------------------------------------------------------------------------


def test_advantages_by_hand():
    """Rewards 0, 1, 2, 5: mean 2, squared deviations 4 + 1 + 0 + 9 = 14, std with ddof 1 is sqrt(14
    / 3)."""
    a = group_advantages(torch.tensor([[0.0, 1.0, 2.0, 5.0]]), eps=0.0)
    assert torch.allclose(a, torch.tensor([[-2.0, -1.0, 0.0, 3.0]]) / math.sqrt(14 / 3))


def test_each_group_is_normalised_by_itself():
    """Guard: normalising over the batch instead of the group."""
    r = torch.tensor([[0.0, 1.0, 2.0], [10.0, 11.0, 12.0]])
    a = group_advantages(r)
    assert torch.allclose(a[0], a[1]) and torch.allclose(a.sum(1), torch.zeros(2), atol=1e-6)
    assert torch.allclose(
        group_advantages(3 * r + 7, eps=0.0), group_advantages(r, eps=0.0), atol=1e-5
    )


@pytest.mark.parametrize("eps", [1e-4, 1e-8])
def test_a_constant_group_gives_exactly_zero(eps):
    """Guard: 24 equal rewards of 1.1 give advantages up to 0.9 with eps 1e-8 in float32."""
    assert torch.equal(group_advantages(torch.full((2, 24), 1.1), eps), torch.zeros(2, 24))


def test_a_group_of_one_is_refused():
    """Guard: the released code gives NaN."""
    with pytest.raises(ValueError, match="at least 2"):
        group_advantages(torch.ones(4, 1))


# --- entropy and masks ----------------------------------------------------------------------------


def test_entropy_is_that_of_the_full_distribution_as_a_fraction():
    assert torch.allclose(token_entropy(torch.zeros(3, 512)), torch.ones(3))
    assert torch.allclose(
        token_entropy(torch.tensor([[0.0, 0.0, -1e9, -1e9]])), torch.tensor([0.5])
    )
    assert token_entropy(torch.tensor([[0.0, -float("inf")]])).item() == 0
    logits = torch.randn(4, 7, requires_grad=True)
    p = logits.softmax(-1)
    assert torch.allclose(token_entropy(logits), -(p * p.log()).sum(-1) / math.log(7), atol=1e-6)
    assert (
        not token_entropy(logits).requires_grad
        and token_entropy(logits.bfloat16()).dtype == torch.float32
    )


def test_masks_of_eight_entropies():
    """The worked example of the docstring: .10 and .20 are low, .50 and above are high."""
    entropy = torch.tensor([[0.30, 0.10, 0.80, 0.20, 0.60, 0.50, 0.70, 0.40]])
    low, high = entropy_masks(entropy, torch.ones(1, 8, dtype=torch.bool), 0.25, 0.5)
    assert low.tolist() == [[False, True, False, True, False, False, False, False]]
    assert high.tolist() == [[False, False, True, False, True, True, True, False]]


def masks_by_loop(entropy, valid, low_frac, high_frac):
    low, high = torch.zeros_like(valid), torch.zeros_like(valid)
    for row in range(len(entropy)):
        places = sorted(
            (entropy[row, t].item(), t) for t in range(entropy.shape[1]) if valid[row, t]
        )
        n = len(places)
        for _, t in places[: round(100 * low_frac) * n // 100]:
            low[row, t] = True
        for _, t in places[n - round(100 * high_frac) * n // 100 :]:
            high[row, t] = True
    return low, high


@pytest.mark.parametrize(
    "low_frac, high_frac", [(0.2, 0.5), (0.0, 1.0), (1.0, 0.0), (0.0, 0.0), (0.33, 0.29)]
)
def test_masks_equal_the_loop_ties_included(low_frac, high_frac):
    """Guard: strict thresholds mask nothing when many entropies tie."""
    for seed in range(20):
        _, entropy, valid = random_batch(seed=seed)
        for h in (entropy, (entropy * 4).round() / 4, torch.zeros_like(entropy)):
            got, expected = (
                entropy_masks(h, valid, low_frac, high_frac),
                masks_by_loop(h, valid, low_frac, high_frac),
            )
            assert torch.equal(got[0], expected[0]) and torch.equal(got[1], expected[1])
            assert not (got[0] & got[1]).any()


def test_counts_for_the_papers_576_image_tokens():
    low, high = entropy_masks(torch.rand(1, 576), torch.ones(1, 576, dtype=torch.bool))
    assert (low.sum().item(), high.sum().item()) == (115, 288)


def test_counts_are_those_of_exact_fractions():
    """In float32, 0.53 * 100 + 1e-6 falls short of 53: counts are taken in integers."""
    for n in (1, 7, 100, 180, 576, 900):
        valid = torch.ones(1, n, dtype=torch.bool)
        for k in range(101):
            low, high = entropy_masks(torch.rand(1, n), valid, k / 100, 1 - k / 100)
            assert low.sum() == k * n // 100 and high.sum() == (100 - k) * n // 100, (n, k)


def test_masks_do_not_change_when_padding_is_added():
    """Guard: thresholds that depend on the longest plan of the batch."""
    _, entropy, valid = random_batch()
    wide = (
        torch.cat([entropy, torch.full((6, 9), -1.0)], 1),
        torch.cat([valid, torch.zeros(6, 9, dtype=torch.bool)], 1),
    )
    for got, expected in zip(entropy_masks(*wide), entropy_masks(entropy, valid)):
        assert torch.equal(got[:, :20], expected) and not got[:, 20:].any()


@pytest.mark.parametrize("fractions", [(-0.1, 0.5), (0.6, 0.5), (0.2, 1.1)])
def test_fractions_that_overlap_or_leave_the_range_are_refused(fractions):
    with pytest.raises(ValueError, match="at most 1"):
        entropy_masks(torch.rand(1, 4), torch.ones(1, 4, dtype=torch.bool), *fractions)


# --- shaping --------------------------------------------------------------------------------------


def test_the_coefficient_of_the_bonus_by_hand():
    """Two rollouts, four and two tokens long, A = 1 and -2, one low token each: exclusion takes
    1 * 1/4 + 2 * 1/2 = 1.25 of the loss's weight. High tokens have the entropies .4 and .5 (of
    four) and .6 (of two): .9/4 + .6/2 = .525. So lambda is kappa 1.25/.525."""
    a, h = torch.tensor([1.0, -2.0]), torch.tensor([[0.1, 0.4, 0.2, 0.5], [0.3, 0.6, 9.0, 9.0]])
    valid = torch.tensor([[True] * 4, [True, True, False, False]])
    low = torch.tensor([[True, False, False, False], [True, False, False, False]])
    high = torch.tensor([[False, True, False, True], [False, True, False, False]])
    for kappa in (1.0, 0.5, 0.0):
        coefficient = bonus_coefficient(a, h, low, high, valid, kappa)
        assert math.isclose(coefficient, kappa * 1.25 / 0.525, rel_tol=1e-6)
    shaped = shape_advantages(a, h, low, high, valid)
    c = 1.25 / 0.525
    expected = [[0.0, 1 + 0.4 * c, 1.0, 1 + 0.5 * c], [0.0, -2 + 0.6 * c]]
    assert torch.allclose(shaped[0], torch.tensor(expected[0]))
    assert torch.allclose(shaped[1, :2], torch.tensor(expected[1]))
    kept = shape_advantages(a, h, low, high, valid, exclude=False)
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


def test_shaping_equals_the_loop():
    a, h, valid = random_batch()
    low, high = masks_by_loop(h, valid, 0.2, 0.5)
    taken = given = 0.0
    for b, t in zip(*valid.nonzero(as_tuple=True)):
        length = valid[b].sum().item()
        taken += abs(a[b].item()) * low[b, t].item() / length
        given += h[b, t].item() * high[b, t].item() / length
    out = shape(a, h, valid)
    for b, t in zip(*valid.nonzero(as_tuple=True)):
        expected = 0.0 if low[b, t] else a[b].item() + high[b, t].item() * taken / given * h[b, t]
        assert math.isclose(out[b, t].item(), expected, rel_tol=1e-4, abs_tol=1e-6)


def test_where_all_rewards_are_equal_there_is_no_bonus():
    """Also where nothing is high: 0 by the formula, not by a small number in a denominator."""
    a, h, valid = random_batch()
    low, high = entropy_masks(h, valid)
    assert bonus_coefficient(torch.zeros(6), h, low, high, valid) == 0
    assert torch.equal(shape(torch.zeros(6), h, valid), torch.zeros(6, 20))
    assert bonus_coefficient(a, h, low, torch.zeros_like(high), valid) == 0
    assert bonus_coefficient(a, torch.zeros_like(h), low, high, valid) == 0


def test_a_group_of_equal_rewards_beside_others_gets_a_pure_bonus():
    a, h, valid = random_batch()
    a[:3] = 0.0
    low, high = entropy_masks(h, valid)
    out = shape(a, h, valid)
    coefficient = bonus_coefficient(a, h, low, high, valid)
    assert coefficient > 0 and torch.equal(out[:3], torch.where(high, coefficient * h, 0.0)[:3])


def test_the_scale_of_entropy_changes_nothing():
    a, h, valid = random_batch()
    assert torch.allclose(shape(a, h, valid), shape(a, h / 100, valid), rtol=1e-5)


def test_padding_and_its_content_change_no_shaped_advantage():
    a, h, valid = random_batch()
    wide_h = torch.cat([h, torch.full((6, 9), float("nan"))], 1)
    wide_valid = torch.cat([valid, torch.zeros(6, 9, dtype=torch.bool)], 1)
    wide = shape(a, wide_h, wide_valid)
    assert torch.allclose(wide[:, :20][valid], shape(a, h, valid)[valid], rtol=1e-5)


def test_nothing_masked_is_grpo_bit_for_bit():
    """No low token, hence no bonus, whatever is high."""
    a, h, valid = random_batch()
    low, high = entropy_masks(h, valid, low_frac=0.0)
    plain = a[:, None].expand(6, 20)
    assert high.any() and torch.equal(shape_advantages(a, h, low, high, valid), plain)


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


# --- loss -----------------------------------------------------------------------------------------


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


def loss_weights(valid):
    """The weight of each token in the loss, 1 / (B T_i)."""
    return valid / (len(valid) * valid.sum(1, keepdim=True))


def test_the_gradient_is_reinforce():
    """With ratio 1 the gradient with respect to log-probs is -A / (B T_i), though the loss itself is
    -mean(A): why "loss is 0" is right."""
    logp, _ = random_logps()
    a, _, valid = random_batch()
    leaf = logp.clone().requires_grad_(True)
    loss, _ = policy_loss(leaf, None, a[:, None].expand(6, 20), valid, beta=0.0)
    loss.backward()
    assert torch.allclose(leaf.grad, -a[:, None] * loss_weights(valid))
    assert math.isclose(loss.item(), -a.mean(), rel_tol=1e-5)


def test_low_tokens_get_the_gradient_of_the_kl_term_alone():
    """Guard: masked tokens that still get reward gradient. KL holds on all valid tokens, low ones
    too."""
    logp, ref = random_logps()
    a, h, valid = random_batch()
    low, _ = entropy_masks(h, valid)
    leaf = logp.clone().requires_grad_(True)
    policy_loss(leaf, ref, shape(a, h, valid), valid, beta=0.05)[0].backward()
    kl_only = 0.05 * (1 - (ref - logp).exp()) * loss_weights(valid)
    assert torch.allclose(leaf.grad[low], kl_only[low], atol=1e-7)
    assert (leaf.grad[valid & ~low] - kl_only[valid & ~low]).abs().min() > 1e-5


def test_a_sequence_without_valid_tokens_weighs_nothing_and_makes_no_nan():
    logp, ref = random_logps()
    a, h, valid = random_batch()
    valid[2] = False
    shaped = shape(a, h, valid)
    assert shaped.isfinite().all() and policy_loss(logp, ref, shaped, valid)[0].isfinite()


def test_kl_is_zero_for_equal_policies_and_positive_otherwise():
    logp, ref = random_logps()
    valid = torch.ones_like(logp, dtype=torch.bool)
    zero = torch.zeros_like(logp)
    assert policy_loss(logp, logp, zero, valid)[1] == 0
    assert policy_loss(logp, ref, zero, valid)[1] > 0


def test_padding_reaches_neither_loss_nor_gradient():
    logp, ref = random_logps()
    a, _, valid = random_batch()
    nan = torch.tensor(float("nan"))
    leaf, ref_with_nan = (torch.where(valid, x, nan) for x in (logp, ref))
    loss, _ = policy_loss(leaf.requires_grad_(True), ref_with_nan, a[:, None].expand(6, 20), valid)
    loss.backward()
    assert torch.equal(loss, policy_loss(logp, ref, a[:, None].expand(6, 20), valid)[0])
    assert (leaf.grad[~valid] == 0).all() and leaf.grad[valid].isfinite().all()


def test_expected_gradient_equals_the_exact_one_on_an_enumerable_policy():
    """One token of three, reward known: the mean over many groups of GRPO's gradient (no std) is
    the gradient of E[R]."""
    torch.manual_seed(0)
    logits, reward = (
        torch.tensor([0.2, -0.5, 0.8], requires_grad=True),
        torch.tensor([1.0, 0.0, 0.3]),
    )
    (exact,) = torch.autograd.grad((logits.softmax(0) * reward).sum(), logits)
    p, g = 40000, 4
    tokens = torch.multinomial(logits.softmax(0).detach(), p * g, replacement=True)
    r = reward[tokens].view(p, g)
    # the group mean includes the sample itself, which shrinks the gradient by (G - 1) / G
    advantage = ((r - r.mean(1, keepdim=True)) * g / (g - 1)).view(-1, 1)
    logp = logits.log_softmax(0)[tokens][:, None]
    loss, _ = policy_loss(logp, None, advantage, torch.ones(p * g, 1, dtype=torch.bool), beta=0.0)
    (estimate,) = torch.autograd.grad(loss, logits)
    assert torch.allclose(-estimate, exact, atol=0.01)


def test_nan_at_padding_passes_neither_shaping_nor_loss():
    """Other trainers leave anything there."""
    logp, ref = random_logps()
    a, h, valid = random_batch()
    clean, dirty = (
        shape(a, torch.where(valid, h, torch.tensor(x)), valid) for x in (0.0, float("nan"))
    )
    assert torch.equal(clean[valid], dirty[valid])
    dirty = torch.where(valid, dirty, torch.tensor(float("nan")))
    loss = policy_loss(logp, ref, dirty, valid)[0]
    assert torch.equal(loss, policy_loss(logp, ref, clean, valid)[0]) and loss.isfinite()


# --- the step -------------------------------------------------------------------------------------


def logits_of(policy, rollout, config):
    return forward_logits(policy, rollout.prompt, rollout.plan, rollout.codes, config.guidance)


@pytest.fixture
def step(env, world):
    """A rollout of a tiny random policy, and what an update needs."""
    policy, reference = tiny_policy(world), tiny_policy(world, seed=1)
    config = Config(preset="cpu", prompts=2, plans_per_prompt=4)
    scenes = [make_scene(world, "train", 0, i) for i in range(2)]
    rollout = make_rollout(policy, env, scenes, config, 0)
    # an untrained tokenizer earns 0 every time
    varied = torch.rand(2, 4, generator=torch.Generator().manual_seed(0))
    return policy, reference, rollout._replace(rewards=varied), config


class Gradients:
    """Stands for an optimizer that changes nothing and remembers."""

    def __init__(self, policy):
        self.policy, self.param_groups = policy, []

    def step(self):
        self.kept = [p.grad.clone() for p in self.policy.parameters() if p.grad is not None]

    def zero_grad(self):
        self.policy.zero_grad()


def gradients(policy, reference, rollout, config, to_batch=make_batch):
    optimizer = Gradients(policy)
    stats = update(policy, reference, optimizer, to_batch(rollout, config), config)
    return stats, optimizer.kept


def equal(some, others):
    return all(torch.equal(a, b) for a, b in zip(some, others))


def test_rollouts_are_the_learners_own(step):
    """Guard: a sampler that differs from the learner. Log-probs and entropies alike."""
    policy, _, rollout, config = step
    stats, _ = gradients(*step)
    assert stats["logp_diff_mean"] < 1e-5 and stats["logp_diff_max"] < 1e-4
    entropy = torch.cat([token_entropy(x) for x in logits_of(policy, rollout, config)], 1)
    assert ((entropy - rollout.entropy).abs() * rollout.valid).max() < 1e-4
    assert (rollout.entropy[~rollout.valid] == 0).all()


@pytest.mark.parametrize("micro_batch", [1, 3])
def test_micro_batches_change_neither_loss_nor_gradient_nor_log(step, micro_batch):
    """Guards: a denominator per micro-batch; a reported metric that is the last micro-batch's."""
    policy, reference, rollout, config = step
    whole, expected = gradients(policy, reference, rollout, config)
    parts, got = gradients(policy, reference, rollout, replace(config, micro_batch=micro_batch))
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(got, expected))
    assert {"loss", "kl", "grad_norm"} < set(whole)
    assert all(math.isclose(parts[k], whole[k], rel_tol=1e-3, abs_tol=1e-5) for k in whole)


def test_method_grpo_is_one_advantage_a_rollout_bit_for_bit(step):
    """Guard: a baseline that differs from the method by more than the method. GRPO without the
    shaping function at all gives the same gradient to the bit as the method with nothing masked
    and no bonus."""
    policy, reference, rollout, config = step

    def unshaped(rollout, config):
        a = group_advantages(rollout.rewards).flatten()[:, None].expand_as(rollout.entropy)
        return make_batch(rollout, config)._replace(advantage=a)

    grpo = replace(config, method="grpo")
    _, ours = gradients(policy, reference, rollout, grpo)
    assert equal(ours, gradients(policy, reference, rollout, grpo, unshaped)[1])
    off = replace(config, low_frac=0.0)  # of eggrpo: nothing excluded, so no bonus
    assert equal(ours, gradients(policy, reference, rollout, off)[1])
    assert not equal(ours, gradients(policy, reference, rollout, config)[1])


def test_plan_and_image_are_shaped_apart(step):
    """Entropies of one modality must not move the thresholds of the other."""
    policy, _, rollout, config = step
    before = make_batch(rollout, config)
    entropy = rollout.entropy.clone()
    entropy[:, : policy.C] /= 100
    after = make_batch(rollout._replace(entropy=entropy), config)
    assert torch.equal(before.low, after.low) and torch.equal(before.high, after.high)
    assert before.high[:, : policy.C].any() and before.high[:, policy.C :].any()


@pytest.mark.parametrize("method", list(METHODS))
def test_the_log_tells_the_realised_shares_and_the_bonus(step, method):
    policy, _, rollout, config = step
    config = replace(config, method=method, **METHODS[method].values)
    rollout = rollout._replace(rewards=torch.tensor([[0.1, 0.9, 0.3, 0.2], [0.5] * 4]))
    batch = make_batch(rollout, config)
    stats = rollout_stats(rollout, batch)
    a = group_advantages(rollout.rewards).flatten()
    n, low, high, turned, equal = 0, 0, 0, 0, 0.0
    bonus, valid = dict(plan=0.0, image=0.0), dict(plan=0, image=0)
    for b, t in zip(*rollout.valid.nonzero(as_tuple=True)):
        part = "plan" if t < policy.C else "image"
        n, valid[part] = n + 1, valid[part] + 1
        low, high = low + batch.low[b, t].item(), high + batch.high[b, t].item()
        if batch.high[b, t]:
            bonus[part] += (batch.advantage[b, t] - a[b]).item()
            turned += (a[b] < 0 < batch.advantage[b, t]).item()
            equal += batch.advantage[b, t].item() if b >= 4 else 0.0
    assert math.isclose(stats["low_share"], low / n, rel_tol=1e-5)
    assert math.isclose(stats["high_share"], high / n, rel_tol=1e-5)
    for part in bonus:
        expected = bonus[part] / valid[part]
        assert math.isclose(stats[f"{part}_bonus"], expected, rel_tol=1e-4, abs_tol=1e-7)
    assert math.isclose(stats["turned_signs"], turned / max(high, 1), rel_tol=1e-4)
    total = sum(bonus.values())
    assert math.isclose(
        stats["bonus_to_equal_groups"], equal / max(total, 1e-9), rel_tol=1e-4, abs_tol=1e-7
    )
    if method in ("eggrpo", "eggrpo-text", "eggrpo-image", "bonus"):
        masks = batch.low, batch.high, rollout.valid
        coefficient = bonus_coefficient(a, rollout.entropy, *masks)
        assert math.isclose(stats["lambda"], coefficient, rel_tol=1e-4) and coefficient > 0


def test_entropy_statistics_go_over_valid_tokens_only():
    h = torch.tensor([[0.2, 0.4, 9.0, 0.5, 0.7]])
    stats = entropy_stats(h, torch.tensor([[True, True, False, True, True]]), 3)
    assert math.isclose(stats["plan_entropy"], 0.3, rel_tol=1e-5)
    assert math.isclose(stats["plan_entropy_std"], 0.1, rel_tol=1e-5)
    assert math.isclose(stats["image_entropy"], 0.6, rel_tol=1e-5)


def test_a_sampler_that_is_not_the_learner_stops_the_run():
    """The mean decides; the largest difference of a sound run grows with the logits."""
    cpu, bound = torch.device("cpu"), torch.tensor(LOGP_DIFF_BOUND[torch.float32])
    check_stats(dict(logp_diff_mean=0.5 * bound, logp_diff_max=1e6 * bound), Config(), cpu)
    with pytest.raises(TrainingDiverged, match="logp_diff_mean.*not the same policy"):
        check_stats(dict(logp_diff_mean=2 * bound), Config(), cpu)


def guidance_on_one_side(monkeypatch):
    guided = lambda policy, prompt, plan, codes, _: forward_logits(
        policy, prompt, plan, codes, guidance=1.05
    )
    monkeypatch.setattr(eggrpo, "forward_logits", guided)


def wrong_position_embedding(monkeypatch):
    """The sampler embeds the tenth image token as the ninth."""
    init = Decoder.__init__

    def wrong(decoder, policy, *rest):
        init(decoder, policy, *rest)
        slot = policy.S + policy.C + 11
        decoder.positions = decoder.positions.clone()
        decoder.positions[slot] = decoder.positions[slot - 1]

    monkeypatch.setattr(Decoder, "__init__", wrong)


def stale_cache_row(monkeypatch):
    """After one slot of the plan every layer keeps the keys and values of the slot before."""
    step = Block.step

    def stale(block, x, bias, cache, slot):
        result = step(block, x, bias, cache, slot)
        if slot == 20:
            cache[:, :, slot] = cache[:, :, slot - 1]
        return result

    monkeypatch.setattr(Block, "step", stale)


@pytest.mark.parametrize("plant", [guidance_on_one_side, wrong_position_embedding, stale_cache_row])
def test_planted_mismatches_exceed_the_bound_ten_times_and_sound_rollouts_are_far_below(
    env, world, monkeypatch, plant
):
    policy, config = tiny_policy(world), Config(preset="cpu", prompts=2, plans_per_prompt=4)
    scenes = [make_scene(world, "train", 0, i) for i in range(2)]

    def difference():
        batch = make_batch(make_rollout(policy, env, scenes, config, 0), config)
        _, _, logp = micro_batch_loss(policy, policy, batch, 8, config)
        return tuple(eggrpo.sampler_against_learner(batch, logp).values())

    bound = LOGP_DIFF_BOUND[torch.float32]
    mean, largest = difference()
    assert mean < 0.2 * bound and largest < 1e-4
    plant(monkeypatch)
    assert difference()[0] > 10 * bound


def test_bad_numbers_are_named_and_leave_the_weights_alone(step):
    """A poisoned log-prob, a poisoned weight, a sampler that is not the learner."""
    policy, reference, rollout, config = step
    optimizer = torch.optim.AdamW(policy.parameters(), 1e-2)
    batch, before = make_batch(rollout, config), [p.clone() for p in policy.parameters()]
    poison = lambda x, value: x.index_put((torch.tensor(0), torch.tensor(-1)), torch.tensor(value))
    for change, words in (
        (dict(logp_old=poison(batch.logp_old, math.nan)), "logp_diff_mean is nan"),
        (dict(advantage=poison(batch.advantage, math.inf)), "loss is"),
        (dict(logp_old=batch.logp_old + 0.01), "not the same policy"),
    ):
        with pytest.raises(TrainingDiverged, match=words):
            update(policy, reference, optimizer, batch._replace(**change), config)
        policy.zero_grad()
    with pytest.raises(TrainingDiverged, match="reward is nan"):
        update(policy, reference, optimizer, batch, config, dict(reward=torch.tensor(math.nan)))
    assert all(torch.equal(a, b) for a, b in zip(before, policy.parameters()))


def test_a_policy_overfits_one_reward(world, env):
    """Reward the use of one code: forty updates must raise its share several times, or nothing
    above means anything."""
    policy, reference = tiny_policy(world, scale=2.0), tiny_policy(world, scale=2.0)
    config = Config(preset="cpu", prompts=2, plans_per_prompt=8, beta=0.0)
    optimizer = torch.optim.AdamW(policy.parameters(), 3e-3, weight_decay=0.0)
    scenes, share = [make_scene(world, "train", 0, i) for i in range(2)], []
    for i in range(40):
        rollout = make_rollout(policy, env, scenes, config, i)
        reward = (rollout.codes == 5).float().mean(1).view(2, 8)
        share.append(reward.mean().item())
        batch = make_batch(rollout._replace(rewards=reward), config)
        update(policy, reference, optimizer, batch, config)
    assert sum(share[-5:]) > 3 * sum(share[:5])


# --- methods and switches -------------------------------------------------------------------------


def shaped_by(method):
    """Shape the same random rollout, plan of 12 and image of 20 tokens, by a method."""
    a, h, valid = random_batch(b=6, t=32)
    config = Config(method=method, **METHODS[method].values)
    words = torch.zeros(6, 12, dtype=torch.long)
    rollout = Rollout(words, words, None, None, h, valid, None, a.view(2, 3), {}, None)
    plain = group_advantages(a.view(2, 3)).flatten()[:, None]
    return plain.expand(6, 32), valid, make_batch(rollout, config)


def by_hand(method, a, valid, h):
    """The advantage of each token, by the definition of each method, for one batch."""
    low, high = [torch.zeros_like(valid) for _ in range(2)]
    fractions = dict(low_frac=0.8, high_frac=0.2) if method == "top-entropy" else {}
    for part, slots in (("text", slice(None, 12)), ("image", slice(12, None))):
        if method in ("eggrpo-text", "eggrpo-image") and not method.endswith(part):
            continue
        low[:, slots], high[:, slots] = entropy_masks(h[:, slots], valid[:, slots], **fractions)
    without_low = torch.where(low, 0.0, a)
    length = valid.sum(1, keepdim=True)
    taken, given = (a.abs() * low / length).sum(), (h * high / length).sum()
    bonus = torch.where(high, taken / given * h, 0.0)
    return {
        "grpo": a,
        "eggrpo": without_low + bonus,
        "eggrpo-text": without_low + bonus,
        "eggrpo-image": without_low + bonus,
        "eggrpo-released": without_low + torch.where(high, 0.3 * torch.minimum(a.abs(), h), 0.0),
        "exclude": without_low,
        "bonus": a + bonus,
        "top-entropy": without_low,
    }[method]


@pytest.mark.parametrize("method", list(METHODS))
def test_what_a_method_does_to_advantages(method):
    plain, valid, batch = shaped_by(method)
    _, h, _ = random_batch(b=6, t=32)
    expected = by_hand(method, plain, valid, h)
    assert torch.allclose(batch.advantage[valid], expected[valid], atol=1e-6)
    assert torch.equal(batch.advantage, plain) == (method == "grpo")


@pytest.mark.parametrize("method", list(METHODS))
def test_every_method_makes_updates_and_all_but_grpo_differ_from_it(step, method):
    policy, reference, rollout, config = step
    ours, grpo = (replace(config, method=m, **METHODS[m].values) for m in (method, "grpo"))
    stats, got = gradients(policy, reference, rollout, ours)
    _, base = gradients(policy, reference, rollout, grpo)
    assert all(math.isfinite(v) for v in stats.values())
    assert equal(got, base) == (method == "grpo")
    optimizer = torch.optim.AdamW(policy.parameters(), 1e-3)
    stats = update(policy, reference, optimizer, make_batch(rollout, ours), ours)
    assert math.isfinite(stats["grad_norm"]) and stats["kl"] > 0


def test_where_all_rewards_are_equal_only_the_kl_term_moves_the_policy(step):
    policy, reference, rollout, config = step
    rollout = rollout._replace(rewards=torch.full((2, 4), 1.1))
    _, got = gradients(policy, reference, rollout, replace(config, beta=0.0))
    assert all((g == 0).all() for g in got)


def test_guidance_in_rl_is_part_of_the_policy(env, world):
    """What is sampled is what is scored."""
    policy, scenes = tiny_policy(world), [make_scene(world, "train", 0, i) for i in range(2)]
    config = Config(prompts=2, plans_per_prompt=2, guidance=3.0)
    rollout = make_rollout(policy, env, scenes, config, 0)
    logp = token_logp(*logits_of(policy, rollout, config), rollout.plan, rollout.codes)
    assert (logp - rollout.logp).abs().max() < 1e-4


def test_the_rollouts_of_a_prompt_are_one_group(env, world, policy):
    scenes = [make_scene(world, "train", 0, i) for i in range(2)]
    rollout = make_rollout(policy, env, scenes, Config(prompts=2, plans_per_prompt=3), 0)
    assert rollout.rewards.shape == (2, 3)
    assert len({tuple(p.tolist()) for p in rollout.plan}) > 2
    assert torch.equal(rollout.prompt[:3], rollout.prompt[:1].expand(3, -1))


def test_the_reference_is_idle_where_beta_is_zero(step, monkeypatch):
    policy, reference, rollout, config = step
    calls = []
    original = type(reference).forward
    monkeypatch.setattr(reference, "forward", lambda *x: calls.append(1) or original(reference, *x))
    gradients(policy, reference, rollout, config)
    assert len(calls) == 1
    gradients(policy, reference, rollout, replace(config, beta=0.0))
    assert len(calls) == 1


@pytest.mark.parametrize(
    "field, value",
    [
        ("low_frac", 1.2),
        ("high_frac", -0.1),
        ("low_frac", 0.7),
        ("plans_per_prompt", 1),
        ("lr", -1.0),
        ("seed", -1),
        ("beta", float("nan")),
        ("guidance", float("nan")),
        ("kappa", -0.5),
        ("low_frac", -0.2),
        ("eval_prompts", 0),
        ("micro_batch", 0),
    ],
)
def test_bad_values_are_refused_in_one_line(field, value):
    with pytest.raises(UserError, match=f"--{field.replace('_', '-')}") as error:
        Config(**{field: value}).check()
    assert "\n" not in str(error.value)


@pytest.mark.gpu
def test_the_host_waits_for_the_device_once_a_step(env, world):
    """Sampling and scoring never, an update where it reads its numbers."""
    env = env._replace(tokenizer=env.tokenizer.cuda(), device=torch.device("cuda"))
    policy, reference = tiny_policy(world).cuda(), tiny_policy(world).cuda()
    config = Config(prompts=2, plans_per_prompt=4, micro_batch=4)
    scenes = [make_scene(world, "train", 0, i) for i in range(2)]
    optimizer = torch.optim.AdamW(policy.parameters(), 1e-3, fused=True)
    for step in range(2):  # the first one loads kernels
        rollout = make_rollout(policy, env, scenes, config, step)
        batch = make_batch(rollout, config)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("warn")
        with warnings.catch_warnings(record=True) as waits:
            warnings.simplefilter("always")
            update(policy, reference, optimizer, batch, config, rollout_stats(rollout, batch))
        torch.cuda.set_sync_debug_mode("default")
        assert len([w for w in waits if "synchroniz" in str(w.message)]) == 1
