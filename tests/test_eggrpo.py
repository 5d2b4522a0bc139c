"""The step, the methods, the log: equivalences and laws. The guards name the bugs of other GRPO
codes that they catch."""

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

import eggrpo
from common import UserError
from conftest import tiny_policy
from eggrpo import LOGP_DIFF_BOUND, METHODS, Config, check_one_policy, entropy_moments
from eggrpo import method_advantages, method_masks, step_stats
from eggrpo import train_step, training_scenes
from model import Rollout, score
from objective import bonus_coefficient, entropy_masks
from scenes import rare_pairs
from test_objective import equal, random_batch


VARIED = torch.rand(8, generator=torch.Generator().manual_seed(0))  # an untrained tokenizer earns 0
CONFIG = Config(prompts=2, group_size=4)


@pytest.fixture
def step(env, world, monkeypatch):
    """A function: config, rewards (B,) -> the log and the gradients of one step."""
    policy, reference = tiny_policy(world), tiny_policy(world, seed=1)

    def make(config=CONFIG, rewards=VARIED):
        scored = lambda images, targets, world: (rewards, {}, torch.zeros_like(rewards))
        monkeypatch.setattr(eggrpo, "compute_rewards", scored)
        kept = []
        keep = lambda: kept.extend(
            p.grad.clone() for p in policy.parameters() if p.grad is not None
        )
        keeper = SimpleNamespace(step=keep, zero_grad=policy.zero_grad)  # which changes nothing
        return train_step(policy, reference, keeper, env, config, 0), kept

    make.policy = policy
    make.reference = reference
    return make


def test_each_rollout_is_scored_by_the_targets_of_its_own_prompt(policy, env, monkeypatch):
    """Guard: groups that mix prompts."""
    seen = []
    monkeypatch.setattr(eggrpo, "compute_rewards", lambda _, targets, __: seen.append(targets))
    with pytest.raises(TypeError):  # nothing is returned
        train_step(policy, policy, None, env, CONFIG, 5)
    scenes = training_scenes(env.world, CONFIG, 5)
    expected = eggrpo.encode_targets(env.world, [scenes[0]] * 4 + [scenes[1]] * 4)
    assert equal(seen[0], expected)


def test_every_third_scene_has_a_rare_pair_and_no_scene_comes_twice(world):
    config = Config(prompts=4)
    scenes = [scene for step in range(6) for scene in training_scenes(world, config, step)]
    assert [bool(rare_pairs(s.objects)) for s in scenes] == [False, False, True] * 8
    assert len({scene.noise_seed for scene in scenes}) == 24


@pytest.mark.parametrize("micro_batch", [1, 3])
def test_micro_batches_change_neither_loss_nor_gradient_nor_log(step, micro_batch):
    """Guards: a denominator per micro-batch; a reported metric that is the last micro-batch's."""
    whole, expected = step()
    parts, got = step(replace(CONFIG, micro_batch=micro_batch))
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(got, expected))
    assert {"loss", "kl", "grad_norm"} < set(whole)
    assert all(math.isclose(parts[k], whole[k], rel_tol=1e-3, abs_tol=1e-5) for k in whole)


def test_method_grpo_is_one_advantage_a_rollout_bit_for_bit(step, monkeypatch):
    """Guard: a baseline that differs from the method by more than the method. GRPO without the
    shaping function at all gives the same gradient to the bit as the method with nothing masked
    and no bonus."""
    _, grpo = step(replace(CONFIG, method="grpo"))
    assert equal(grpo, step(replace(CONFIG, low_frac=0.0))[1])  # nothing excluded, so no bonus
    assert not equal(grpo, step()[1])
    plain = lambda A, rollout, *rest: A[:, None].expand_as(rollout.entropy)
    monkeypatch.setattr(eggrpo, "method_advantages", plain)
    assert equal(grpo, step()[1])


@pytest.mark.parametrize("method", list(METHODS))
def test_every_method_makes_updates_and_all_but_grpo_differ_from_it(step, method):
    stats, got = step(replace(CONFIG, method=method, **METHODS[method].values))
    assert all(math.isfinite(value) for value in stats.values()) and stats["kl"] > 0
    assert equal(got, step(replace(CONFIG, method="grpo"))[1]) == (method == "grpo")


def test_if_all_rewards_are_equal_only_the_kl_term_moves_the_policy(step):
    equal_rewards = torch.full((8,), 1.1)
    assert all((g == 0).all() for g in step(replace(CONFIG, beta=0.0), equal_rewards)[1])
    assert any((g != 0).any() for g in step(CONFIG, equal_rewards)[1])


def test_a_policy_overfits_one_reward(world, env, monkeypatch):
    """Reward the use of one code: 16 steps must raise its share several times, or nothing above
    means anything."""
    policy, reference = tiny_policy(world, scale=2.0), tiny_policy(world, scale=2.0)
    codes_as_images = env._replace(tokenizer=SimpleNamespace(decode=lambda codes: codes))

    def share_of_five(codes, targets, world):
        share = (codes == 5).float().mean(1)
        return share, {}, share

    monkeypatch.setattr(eggrpo, "compute_rewards", share_of_five)
    optimizer = torch.optim.AdamW(policy.parameters(), 1e-2, weight_decay=0.0)
    config = Config(prompts=1, group_size=8, beta=0.0)
    rewards = []
    for i in range(16):
        stats = train_step(policy, reference, optimizer, codes_as_images, config, i)
        rewards.append(stats["reward"])
    assert sum(rewards[-5:]) > 3 * sum(rewards[:5])


def test_a_sampler_that_is_not_the_learner_is_named_and_leaves_the_weights_alone(step, monkeypatch):
    before = [p.clone() for p in step.policy.parameters()]
    with monkeypatch.context() as patch, pytest.raises(UserError, match="not the same policy"):
        patch.setattr(eggrpo, "score", lambda *arguments: score(*arguments) + 0.01)
        step()
    assert equal(before, step.policy.parameters())


def by_hand(method, a, rollout):
    """The advantage of each token, by the definition of each method."""
    h, valid = rollout.entropy, rollout.valid
    low, high = torch.zeros_like(valid), torch.zeros_like(valid)
    fractions = dict(low_frac=0.8, high_frac=0.2) if method == "top-entropy" else {}
    for part, slots in (("text", slice(None, 12)), ("image", slice(12, None))):
        if method in ("eggrpo-text", "eggrpo-image") and not method.endswith(part):
            continue
        low[:, slots], high[:, slots] = entropy_masks(h[:, slots], valid[:, slots], **fractions)
    a = a[:, None].expand(6, 32)
    without_low = torch.where(low, 0.0, a)
    length = valid.sum(1, keepdim=True)
    taken = (a.abs() * low / length).sum()
    given = (h * high / length).sum()
    bonus = torch.where(high, taken / given * h, 0.0)
    return {
        "grpo": a,
        **dict.fromkeys(("eggrpo", "eggrpo-text", "eggrpo-image"), without_low + bonus),
        "eggrpo-released": without_low + torch.where(high, 0.3 * torch.minimum(a.abs(), h), 0.0),
        "exclude": without_low,
        "bonus": a + bonus,
        "top-entropy": without_low,
    }[method]


@pytest.mark.parametrize("method", list(METHODS))
def test_what_a_method_does_to_advantages_and_what_the_log_tells_of_it(method):
    """Plan and image apart: entropies of one modality do not move the thresholds of the other."""
    a, entropy, valid = random_batch(b=6, t=32)
    words = torch.zeros(6, 12, dtype=torch.long)  # plans of 12 slots, images of 20 tokens
    rollout = Rollout(words, words, words, entropy, entropy, valid)
    config = Config(method=method, **METHODS[method].values)
    low, high = method_masks(rollout, config)
    shaped = method_advantages(a, rollout, low, high, config)
    expected = by_hand(method, a, rollout)
    assert torch.allclose(shaped[rollout.valid], expected[rollout.valid], atol=1e-6)
    assert torch.equal(shaped, a[:, None].expand(6, 32)) == (method == "grpo")

    rewards = torch.tensor([[1.0, 1.0, 1.0], [0.1, 0.2, 0.3]])
    stats = step_stats(rollout, rewards, {}, rewards, a, shaped, high)
    turned = sum(a[b] < 0 < shaped[b, t] for b, t in high.nonzero())
    assert stats["turned_signs"] == pytest.approx(turned / max(high.sum().item(), 1))
    assert stats["frac_reward_zero_std"] == 0.5
    if method in ("eggrpo", "eggrpo-text", "eggrpo-image", "bonus"):
        expected = bonus_coefficient(a, rollout.entropy, low, high, rollout.valid)
        assert stats["lambda"] == pytest.approx(expected.item()) and expected > 0
    else:
        assert (stats["lambda"] > 0) == (method == "eggrpo-released")


def test_entropy_statistics_go_over_valid_tokens_only():
    h = torch.tensor([[0.2, 0.4, 9.0, 0.5, 0.7]])
    mean, std = entropy_moments(h, torch.tensor([[True, True, False, False, False]]))
    assert torch.allclose(mean, torch.tensor([0.3])) and torch.allclose(std, torch.tensor([0.1]))


def test_a_sampler_that_is_not_the_learner_stops_the_run():
    """The mean decides, and guidance multiplies what rounding does to it; the largest difference of
    a sound run grows with the logits."""
    device = torch.device("cpu")
    bound = LOGP_DIFF_BOUND[torch.float32]
    check_one_policy(0.5 * bound, Config(), device)
    check_one_policy(2 * bound, Config(guidance=3.0), device)
    with pytest.raises(UserError, match="logp_diff_mean.*not the same policy"):
        check_one_policy(2 * bound, Config(), device)
