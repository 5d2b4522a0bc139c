"""lab.one_sided: each mechanism on tabular policies against enumeration, and a run of each kind."""

import pytest
import torch

from lab import measure, one_sided, study
from lab.one_sided import pull_loss, sampler_logits, token_weights

GUIDANCE = 3.0
SEEDS = pytest.mark.parametrize("seed", range(3))


def table(seed):
    """Logits of a scored policy and of its empty branch in one context, (V,) each, float64."""
    draw = torch.Generator().manual_seed(seed)
    z, u = torch.randn(2, 6, generator=draw, dtype=torch.float64)
    return z.requires_grad_(True), u


def expected_gradient(z, log_q, value):
    """Sum over tokens s of q(s) value(s) grad_z log p(s)."""
    logp = z.log_softmax(-1)
    return torch.autograd.grad((log_q.exp().detach() * value * logp).sum(), z)[0]


@SEEDS
def test_a_bonus_pulls_toward_the_sampler_as_its_loss_does(seed):
    z, u = table(seed)
    w = torch.tensor(0.7, dtype=torch.float64)
    log_q = sampler_logits(z, u, GUIDANCE).log_softmax(-1).detach()
    sampled = expected_gradient(z, log_q, w)
    assert torch.allclose(sampled, w * (log_q.exp() - z.softmax(-1)))
    loss = torch.autograd.grad(pull_loss(z, log_q, w), z)[0]
    assert torch.allclose(-loss, sampled) and sampled.abs().max() > 0.01


@SEEDS
def test_weights_cancel_the_pull_where_they_are_not_truncated(seed):
    z, u = table(seed)
    log_q = sampler_logits(z, u, 1.2).log_softmax(-1).detach()
    weights = token_weights(z.log_softmax(-1), log_q)
    assert weights.max() < 2 and not weights.requires_grad
    assert expected_gradient(z, log_q, weights).abs().max() < 1e-12
    assert token_weights(z, z.detach() - 5).unique() == 2


@SEEDS
def test_grpo_under_guidance_has_one_gth_of_the_guided_policys_gradient(seed):
    """Where the mean advantage of the context is 0; the empty branch is held constant."""
    z, u = table(seed)
    value = torch.linspace(-1, 1, 6, dtype=torch.float64)
    log_q = sampler_logits(z, u, GUIDANCE).log_softmax(-1)
    value = value - (log_q.exp() * value).sum().detach()
    one_sided_gradient = expected_gradient(z, log_q, value)
    on_policy = torch.autograd.grad((log_q.exp().detach() * value * log_q).sum(), z)[0]
    assert torch.allclose(one_sided_gradient, on_policy / GUIDANCE)


def test_sigma_is_the_rate_of_the_gap_to_first_order():
    """A step of the pull moves d = z - u by (g - 1) S d; S is held constant."""
    z, u = (x.detach() for x in table(0))
    guidance = 1 + 1e-4
    log_q = sampler_logits(z, u, guidance).log_softmax(-1)
    over, under = measure.sigma(z, log_q)
    p = z.softmax(-1)
    S = torch.diag(p) - torch.outer(p, p)
    d = z - u
    moved = d + 1e-3 * (log_q.exp() - p)
    grown = (moved @ S @ moved) / (d @ S @ d) - 1
    rate = (guidance - 1) * (over / under)
    assert grown.item() == pytest.approx(2e-3 * rate.item(), rel=1e-2)


@pytest.fixture
def run(env, policy, monkeypatch):
    """Make a Run on a tiny random policy: settings -> Run."""
    brightness = lambda images, *_: (images.mean((1, 2, 3)), {}, torch.zeros(len(images)))
    monkeypatch.setattr(measure, "compute_rewards", brightness)  # differs from image to image
    monkeypatch.setattr(one_sided.evaluate, "load_env", lambda config, device: env)
    monkeypatch.setattr(one_sided.evaluate, "load_base", lambda config, env: policy)

    def make(**settings):
        sizes = dict(device="cpu", prompts=2, group_size=4, steps=1, prompts_scored=6)
        return one_sided.Run(one_sided.Config(**sizes | settings))

    return make


def batch_and_bonus(run):
    batch = run.batch(0, run.config.guidance, run.config.temperature)
    return batch, *one_sided.place_bonus(batch, run.config, 0)


def test_at_guidance_one_the_sampler_is_the_scored_policy(run):
    batch, *_ = batch_and_bonus(run(guidance=1.0))
    assert torch.allclose(batch.logp, batch.rollout.logp, atol=1e-4)
    guided, *_ = batch_and_bonus(run(guidance=2.0))
    assert not torch.allclose(guided.logp, guided.rollout.logp, atol=1e-2)
    words = slice(0, guided.words.shape[1])  # which are never guided
    assert torch.allclose(guided.logp[:, words], guided.rollout.logp[:, words], atol=1e-4)


def test_placements_have_their_tokens_and_the_same_budget(run):
    means = {}
    for where in ("high", "low", "random", "every"):
        batch, w, low, chosen = batch_and_bonus(run(where=where))
        valid = batch.rollout.valid
        means[where] = (w * valid / valid.sum(1, keepdim=True)).sum().item()
        assert ((w > 0) <= chosen).all() and (chosen <= valid).all()
    assert len({round(mean, 4) for mean in means.values()}) == 1 and means["high"] > 0
    batch, w, *_ = batch_and_bonus(run(on="words"))
    assert (w[:, batch.words.shape[1] :] == 0).all() and w.sum() > 0
    _, negative, *_ = batch_and_bonus(run(on="words", kappa=-1.0))
    assert torch.equal(negative, -w)


KINDS = [
    dict(method="grpo"),
    dict(method="eggrpo-released"),
    dict(weights="all"),
    dict(pull="frozen"),
    dict(empty="frozen"),
    dict(kl="exact", reward="noisy"),
    dict(match="hot"),
    dict(where="every", match="pull"),
]


@pytest.mark.parametrize("settings", KINDS, ids=str)
def test_each_kind_of_run_trains_and_is_scored(run, monkeypatch, settings):
    own = run(**settings)
    monkeypatch.setattr(one_sided, "Run", lambda config: own)
    if "match" not in settings:  # two settings are scored, which takes longer than to train
        monkeypatch.setattr(one_sided, "scores_by_setting", lambda run: {"guidance 1": 0, "": 0})
    record = one_sided.train(own.config)
    assert len(record["log"]) == 1 and len(record["own"]) == 2
    assert record["log"][0]["grad_norm"] > 0
    assert "guidance 1" in record["scores"] and len(record["scores"]) >= 2


def test_every_planned_run_is_a_config():
    for name, values in study.ONE_SIDED.items():
        one_sided.Config(**values)
    assert len(study.ONE_SIDED) == 79
