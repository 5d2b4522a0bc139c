"""What a bonus leaves of expected gradient: laws, on policies whose every batch is enumerated."""

import pytest
import torch

from lab import bonus
from lab.bonus import CONSTANT, every_sequence, exact_gradients, guided, look_up
from lab.bonus import make_instance, reward_and_entropy, rewards, sample, train, valid_tokens

SEEDS = pytest.mark.parametrize("seed", range(4))


@pytest.fixture(autouse=True)
def double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def small(seed, ends=False):
    return make_instance(seed, vocabulary=2, length=2, ends=ends)


def with_logits(*logits):
    """An instance of given logits: of the first token; of the second after 0; after 1. Its rewards
    are so large that the 1e-4 in A = (R - mean) / (std + 1e-4) is rounding."""
    first, after_0, after_1 = torch.tensor(logits, dtype=torch.float64)
    unused = torch.zeros(2)
    theta = torch.stack(
        [torch.stack([unused, unused, first]), torch.stack([after_0, after_1, unused])]
    )
    instance = small(0)
    return instance._replace(theta=theta, token_reward=1e9 * instance.token_reward)


@SEEDS
def test_a_bonus_is_a_baseline_if_lambda_is_constant_tokens_are_all_and_lengths_equal(seed):
    """Each condition that is dropped leaves a gradient; the masks' is a test of its own."""
    equal, variable = exact_gradients(small(seed)), exact_gradients(small(seed, ends=True))
    assert equal["GRPO"].norm() > 1e-3
    assert equal["constant lambda, every token"].abs().max() < 1e-15
    assert variable["constant lambda, every token"].abs().max() > 1e-3
    assert equal["EG-GRPO's lambda, every token"].abs().max() > 1e-3


@SEEDS
@pytest.mark.parametrize("ends", (False, True))
def test_the_method_is_grpo_and_its_two_halves(seed, ends):
    g = exact_gradients(small(seed, ends))
    parts = g["GRPO"] + g["EG-GRPO's bonus"] + g["EG-GRPO's exclusion"]
    assert torch.allclose(parts, g["EG-GRPO"], atol=1e-15)


@SEEDS
def test_grpos_gradient_is_that_of_expected_reward_if_rewards_are_0_and_1(seed):
    """Of two samples A = +-c if the rewards differ: A_1 = c (R_1 - R_2), and E[A_1 grad log p] is c
    times the gradient of E[R]; each of T tokens has the weight 1 / T."""
    instance = small(seed)
    instance = instance._replace(
        token_reward=torch.tensor([[0.0, 0.0], [0.0, 1.0]]),
        pair_reward=torch.zeros_like(instance.pair_reward),
    )
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
    g = exact_gradients(instance)["constant lambda, high tokens"]
    p = torch.tensor([1.0, 0.0]).softmax(0)
    entropy = -(p * p.log2()).sum()
    expected = CONSTANT * entropy * p.prod() / 2
    assert torch.allclose(g[0, 2], expected * torch.tensor([-1.0, 1.0]), atol=1e-15)
    assert g[1].abs().max() < 1e-15


def test_masks_leave_nothing_if_the_first_tokens_rank_is_certain():
    instance = with_logits([0.0, 0.0], [1.0, 0.0], [4.0, 0.0])  # the first token is high
    g = exact_gradients(instance)["constant lambda, high tokens"]
    assert g.abs().max() < 1e-15


def test_the_batchs_lambda_pulls_two_samples_apart():
    """Equal samples have A = 0 and lambda = 0, others |A| = c = sqrt(1/2). If all entropies are H,
    lambda H = c / 2: the gradient is c / 8 times that of the probability that samples differ."""
    instance = with_logits([1.0, 0.0], [0.0, 1.0], [1.0, 0.0])
    theta = instance.theta.clone().requires_grad_(True)
    p = look_up(theta, every_sequence(instance))[0].sum(1).exp()
    (of_difference,) = torch.autograd.grad(1 - (p**2).sum(), theta)
    g = exact_gradients(instance)["EG-GRPO's lambda, every token"]
    assert of_difference.norm() > 0.1
    assert torch.allclose(g, 0.5**0.5 / 8 * of_difference, atol=1e-9)


@SEEDS
def test_under_guidance_the_same_bonus_pulls_toward_the_guided_policy(seed):
    """With samples from q and scores from p the gradient in a context is the probability of the
    context under q times lambda H (q - p) / T: the logits move toward the guide."""
    instance = small(seed)
    p = instance.theta.softmax(-1)
    q = guided(instance, instance.theta, 2.0).softmax(-1)
    entropy = -(p * p.log2()).sum(-1, keepdim=True)  # (T, V + 1, 1)
    reached = torch.zeros(2, 3, 1)
    reached[0, 2] = 1.0
    reached[1, :2, 0] = q[0, 2]
    g = exact_gradients(instance, guidance=2.0)["constant lambda, every token"]
    assert g.norm() > 1e-3
    assert torch.allclose(g, reached * CONSTANT * entropy * (q - p) / 2, atol=1e-15)


def test_the_end_is_a_token_and_what_follows_it_changes_nothing():
    ending, full = small(0, ends=True), small(0)
    valid = valid_tokens(ending, every_sequence(ending))
    assert valid.tolist() == [[True, False], [True, False], [True, True], [True, True]]
    after_end = torch.tensor([[0, 0], [0, 1]])
    assert rewards(ending, after_end).unique().numel() == 1
    assert rewards(full, after_end).unique().numel() == 2
    g = exact_gradients(ending)["GRPO"]
    assert g[1, 0].abs().max() < 1e-15
    assert g[1, 1].abs().max() > 1e-3


def test_samples_have_the_probabilities_that_are_looked_up():
    instance = make_instance(0, vocabulary=3, length=3)
    tokens = sample(instance.theta, torch.rand(20_000, 3, generator=torch.Generator()))
    sequences = every_sequence(instance)
    p = look_up(instance.theta, sequences)[0].sum(1).exp()
    assert len(sequences) == 27 and abs(p.sum() - 1) < 1e-12
    found = (tokens[:, None] == sequences).all(-1).double().mean(0)
    assert ((found - p).abs() <= 5 * (p * (1 - p) / 20_000).sqrt() + 1e-4).all()


def test_each_policy_is_trained_by_itself():
    """Lambda is of a policy's own batch: another policy beside it changes nothing."""
    one, other = (make_instance(seed, vocabulary=3, length=5) for seed in range(2))
    alone = train([one], "eggrpo", 1.0, steps=3)
    together = train([one, other], "eggrpo", 1.0, steps=3)
    assert torch.allclose(alone[0], together[0][:1], atol=1e-12)


def test_the_tables_print(capsys):
    instances = [make_instance(seed, vocabulary=3, length=3) for seed in range(2)]
    bonus.gradient_table(instances, bonus.sampled_gradients, estimates=2)
    bonus.training_table(instances, guidance=2.0, steps=2)
    printed = capsys.readouterr().out
    assert "| EG-GRPO's bonus |" in printed and "| eggrpo-released |" in printed
    assert "nan" not in printed
