"""What rules add to the expected gradient: laws, on policies whose every batch is enumerated."""

import re

import pytest
import torch

import eggrpo
from conftest import ROOT
from lab import audit
from lab.audit import CONSTANT, RULES, every_sequence, logp_and_nats
from lab.audit import make_instance, reward_and_entropy, rewards, train
from model import Rollout

SEEDS = pytest.mark.parametrize("seed", range(2))


@pytest.fixture(autouse=True)
def double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def small(seed, ends=False):
    return make_instance(seed, vocabulary=2, length=2, ends=ends)


def exact_gradients(instance, guidance=1.0):
    """Each rule's expected gradient over all groups of 2 sequences, {rule: (T, V + 1, V)}."""
    tokens, weight, _ = audit.enumerate_groups(0, instance, guidance)
    gradients, _ = audit.batch_gradients(instance, tokens)
    return dict(zip(RULES, torch.tensordot(weight, gradients, 1)))


def added(instance, rule, guidance=1.0):
    """What a rule adds to the expected gradient of GRPO."""
    gradients = exact_gradients(instance, guidance)
    return gradients[rule] - gradients["GRPO"]


def with_logits(*logits):
    """An instance of given logits: of the first token; of the second after 0; after 1. Its rewards
    are so large that the 1e-4 in A = (R - mean) / (std + 1e-4) is rounding."""
    first, after_0, after_1 = torch.tensor(logits, dtype=torch.float64)
    unused = torch.zeros(2)
    theta = torch.stack(
        [torch.stack([unused, unused, first]), torch.stack([after_0, after_1, unused])]
    )
    instance = small(0)
    return instance._replace(theta=theta, reward=1e9 * instance.reward)


@SEEDS
def test_a_bonus_is_a_baseline_if_lambda_is_constant_tokens_are_all_and_lengths_equal(seed):
    """Each condition that is dropped leaves a gradient; the masks' is a test of its own."""
    equal, variable = small(seed), small(seed, ends=True)
    assert exact_gradients(equal)["GRPO"].norm() > 1e-3
    assert added(equal, "A + c H").abs().max() < 1e-15
    assert added(variable, "A + c H").abs().max() > 1e-3
    assert added(equal, "A + lambda H").abs().max() > 1e-3


@SEEDS
@pytest.mark.parametrize("ends", (False, True))
def test_the_method_is_grpo_and_its_two_halves(seed, ends):
    g = exact_gradients(small(seed, ends))
    parts = g["bonus only"] + g["exclusion only"] - g["GRPO"]
    assert torch.allclose(parts, g["EG-GRPO"], atol=1e-15)


@SEEDS
def test_grpos_gradient_is_that_of_expected_reward_if_rewards_are_0_and_1(seed):
    """Of two samples A = +-c if the rewards differ: A_1 = c (R_1 - R_2), and E[A_1 grad log p] is c
    times the gradient of E[R]; each of T tokens has the weight 1 / T."""
    instance = small(seed)
    reward = torch.zeros(2, 3, 2)
    reward[1, :, 1] = 1.0
    instance = instance._replace(reward=reward)
    theta = instance.theta.clone().requires_grad_(True)
    reward, _ = reward_and_entropy(instance, theta)
    (of_reward,) = torch.autograd.grad(reward, theta)
    c = 0.5 / (0.5**0.5 + 1e-4)
    assert of_reward.norm() > 1e-3
    assert torch.allclose(exact_gradients(instance)["GRPO"], c * of_reward / 2, atol=1e-15)


def test_masks_pull_the_first_token_toward_the_surer_context():
    """H of the first token is less than that after 0, more than that after 1: it is high if it is
    1. E[1[x = 1] lambda H grad log p(x)] / T = lambda H p(1) p(0) / 2."""
    instance = with_logits([1.0, 0.0], [0.0, 0.0], [4.0, 0.0])
    g = added(instance, "A + c H, high tokens")
    p = torch.tensor([1.0, 0.0]).softmax(0)
    entropy = -(p * p.log2()).sum()
    expected = CONSTANT * entropy * p.prod() / 2
    assert torch.allclose(g[0, 2], expected * torch.tensor([-1.0, 1.0]), atol=1e-15)
    assert g[1].abs().max() < 1e-15


def test_the_batchs_lambda_pulls_two_samples_apart():
    """Equal samples have A = 0 and lambda = 0, others |A| = c = sqrt(1/2). If all entropies are H,
    lambda H = c / 2: the gradient is c / 8 times that of the probability that samples differ."""
    instance = with_logits([1.0, 0.0], [0.0, 1.0], [1.0, 0.0])
    theta = instance.theta.clone().requires_grad_(True)
    p = logp_and_nats(theta, every_sequence(instance))[0].sum(1).exp()
    (of_difference,) = torch.autograd.grad(1 - (p**2).sum(), theta)
    g = added(instance, "A + lambda H")
    assert of_difference.norm() > 0.1
    assert torch.allclose(g, 0.5**0.5 / 8 * of_difference, atol=1e-9)


def test_each_policy_is_trained_by_itself():
    """Lambda is of a policy's own batch: another policy beside it changes nothing."""
    one, other = (make_instance(seed, vocabulary=3, length=5) for seed in range(2))
    alone = train([one], RULES["EG-GRPO"], 1.0, steps=3)
    together = train([one, other], RULES["EG-GRPO"], 1.0, steps=3)
    assert torch.allclose(alone[0], together[0, :1], atol=1e-12)


def random_batch():
    """Four sequences of 5 tokens, of which the last has 3 valid ones."""
    valid = torch.arange(5) < torch.tensor([5, 5, 5, 3])[:, None]
    entropy = torch.rand(4, 5, generator=torch.Generator())
    low, high = audit.entropy_masks(entropy, valid)
    advantage = torch.tensor([1.0, -0.5, 0.2, -0.7])
    return audit.Batch(advantage, entropy, low, high, valid, entropy * 0.7, -entropy)


def test_rules_with_the_name_of_a_method_are_that_method():
    batch = random_batch()
    codes = torch.zeros(4, 5, dtype=torch.long)
    rollout = Rollout(None, codes[:, :0], codes, None, batch.entropy, batch.valid)
    methods = "grpo eggrpo eggrpo-released exclude bonus".split()
    names = "GRPO", "EG-GRPO", "EG-GRPO, released", "exclusion only", "bonus only"
    for rule, method in zip(names, methods):
        config = eggrpo.Config(method=method)
        low, high = eggrpo.method_masks(rollout, config)
        shaped = eggrpo.method_advantages(batch.advantage, rollout, low, high, config)
        assert torch.equal(RULES[rule](batch) * batch.valid, shaped * batch.valid)


def test_the_rules_of_other_papers_by_hand():
    """80/20: 4 of 18 valid tokens (20 %, rounded up), wherever they are. Entropy advantage: A = 1
    gets .4 H up to 1 / 2, and A = -.1 at most .05, so that no sign turns."""
    batch = random_batch()
    kept = batch.valid & (RULES["80/20 rule"](batch) != 0)
    ranked = batch.entropy[batch.valid].sort().values
    assert kept.sum() == 4 and (batch.entropy[kept] >= ranked[-4]).all()
    batch = batch._replace(nats=torch.tensor([[0.5, 2.0]]), advantage=torch.tensor([1.0, -0.1]))
    expected = torch.tensor([[1.2, 1.5], [-0.05, -0.05]])
    assert torch.allclose(RULES["entropy advantage"](batch), expected)


def test_turned_signs_and_variance_by_hand(monkeypatch):
    """|A| turns one of two sequences if their rewards differ; 2 A has four times the variance."""
    grpo = RULES["GRPO"]
    rules = {"GRPO": grpo, "2 A": lambda b: 2 * grpo(b), "|A|": lambda b: grpo(b).abs()}
    monkeypatch.setattr(audit, "RULES", rules)
    found = audit.audit([small(0)], audit.enumerate_groups)
    tokens, weight, _ = audit.enumerate_groups(0, small(0), 1.0)
    first, second = rewards(small(0), tokens).T
    differ = weight @ (first != second).double()
    turned = torch.stack([0 * differ, 0 * differ, differ / 2])
    assert torch.allclose(found["turned signs"][0], turned)
    assert torch.allclose(found["variance"][0, 1], torch.tensor(4.0))
    assert torch.allclose(found["bias"][0, 1], torch.tensor(1.0))


def test_the_tables_have_a_rule_that_is_added_as_the_page_says(monkeypatch):
    monkeypatch.setattr(audit, "BATCHES", 20)
    monkeypatch.setattr(audit, "STEPS", 2)
    monkeypatch.setattr(audit, "RULES", dict(RULES))
    monkeypatch.setattr(audit, "main", lambda argv: None)
    page = (ROOT / "docs" / "audit.md").read_text()
    exec(re.search(r"```python\n(.*?)```", page, re.S)[1], {})
    instances = [make_instance(seed, vocabulary=3, length=3) for seed in range(2)]
    found = audit.audit(instances, audit.sample_groups)
    printed = audit.audit_table({"on-policy": found}, dict.fromkeys(found, ["on-policy"]))
    printed += audit.training_table(instances, {"one-sided": 2.0})
    assert printed.count("\n| mine |") == 2 and printed.count("\n| EG-GRPO |") == 2
    assert "nan" not in printed
