"""The policy: what is sampled is what is scored, padding is nothing, the noise decides."""

import pytest
import torch

from conftest import tiny_policy
from eggrpo import LOGP_DIFF_BOUND, logp_difference
from model import forward_logits, generate, precision, sample_token, score
from objective import token_entropy
from scenes import END, IMAGE, PAD, PLAN, encode_words

PROMPTS = [
    "a red circle and a blue square",
    "three green crosses",
    "a shape with three sides in the colour of grass",
]


@pytest.fixture
def prompt(world):
    return torch.tensor([encode_words(p, world.prompt_slots) for p in PROMPTS])


def noise(policy, n, seed=0):
    return torch.rand(n, policy.C + policy.L, generator=torch.Generator().manual_seed(seed))


def rescored(policy, prompt, draw, **how):
    return score(policy, prompt, draw.plan, draw.codes, **how)


@torch.no_grad()
@pytest.mark.parametrize("how", [{}, {"guidance": 3.0}, {"guidance": 0.5}])
@pytest.mark.parametrize("no_plan", [False, True])
def test_cached_sampling_equals_uncached_scoring(policy, prompt, how, no_plan):
    """The uncached forward is the oracle: a wrong cache, mask, slot or guidance on one side only
    would show here. What the bound of training catches is in test_devices.py."""
    draw = generate(policy, prompt, noise(policy, 3), no_plan=no_plan, **how)
    amplified = max(2 * how.get("guidance", 1) - 1, 1)  # what guidance makes of a rounding error
    logp = rescored(policy, prompt, draw, **how)
    assert (logp - draw.logp).abs().max() < 5e-5 * amplified
    assert logp_difference(draw, logp) < 0.2 * LOGP_DIFF_BOUND[torch.float32] * amplified
    assert draw.logp[:, policy.C :].exp().std() > 0.01  # and the distributions are not all alike
    logits = forward_logits(policy, prompt, draw.plan, draw.codes, **how)
    entropy = torch.cat([token_entropy(x) for x in logits], 1).where(draw.valid, 0.0)
    assert (entropy - draw.entropy).abs().max() < 1e-4


@torch.no_grad()
def test_sampling_slot_by_slot_without_cache_gives_the_same_tokens(policy, prompt):
    """The slow obvious sampler: run the whole network for every token."""
    u = noise(policy, 3)
    draw = generate(policy, prompt, u)
    plan, codes = torch.full_like(draw.plan, PAD), torch.zeros_like(draw.codes)
    for j in range(policy.C):
        words, _ = forward_logits(policy, prompt, plan, codes)
        token, _, _ = sample_token(words[:, j], u[:, j])
        plan[:, j] = torch.where((plan == END).any(1), PAD, token + END)
    for j in range(policy.L):
        _, image = forward_logits(policy, prompt, plan, codes)
        codes[:, j], _, _ = sample_token(image[:, j], u[:, policy.C + j])
    assert torch.equal(plan, draw.plan) and torch.equal(codes, draw.codes)


def test_the_stop_token_is_valid_and_what_follows_is_not(world, prompt):
    policy = tiny_policy(world)
    with torch.no_grad():  # plans that stop, most of them early
        size = 0.2 * policy.word_head.weight[1:].abs().mean()
        policy.word_head.weight[0] += size * torch.randn(32)
    draw = generate(policy, prompt.repeat(40, 1), noise(policy, 120))
    stopped = (draw.plan == END).any(1)
    assert 0 < stopped.sum()
    for plan, valid, logp in zip(draw.plan[stopped], draw.valid[stopped], draw.logp[stopped]):
        after = slice((plan == END).nonzero()[0, 0] + 1, policy.C)
        assert valid[: after.start].all() and valid[policy.C :].all() and not valid[after].any()
        assert (plan[after] == PAD).all() and (logp[after] == 0).all()
        assert logp[after.start - 1] != 0
    assert draw.valid[~stopped].all()  # a plan that never stops is valid throughout
    assert draw.plan[draw.valid[:, : policy.C]].min() >= END > max(PAD, PLAN, IMAGE)


def test_padding_changes_nothing(policy, prompt):
    """What stands in the embedding of PAD must not reach any valid token, nor may it make NaN."""
    draw = generate(policy, prompt, noise(policy, 3), no_plan=True)
    before = rescored(policy, prompt, draw)
    with torch.no_grad():
        policy.word_embedding.weight[PAD] += 100
    assert torch.equal(rescored(policy, prompt, draw), before)
    again = generate(policy, prompt, noise(policy, 3), no_plan=True)
    assert torch.equal(again.codes, draw.codes)
    empty = torch.full_like(prompt, PAD)
    assert generate(policy, empty, noise(policy, 3)).logp.isfinite().all()


def test_attention_is_causal(policy, prompt):
    """Changing a token changes no logits at or before its own slot, and some after it."""
    draw = generate(policy, prompt, noise(policy, 3))
    words, codes = forward_logits(policy, prompt, draw.plan, draw.codes)
    changed = draw.codes.clone()
    changed[:, 30] = (changed[:, 30] + 1) % 32
    words2, codes2 = forward_logits(policy, prompt, draw.plan, changed)
    assert torch.equal(words, words2) and torch.allclose(codes[:, :31], codes2[:, :31], atol=1e-5)
    assert not torch.allclose(codes[:, 31], codes2[:, 31], atol=1e-3)


def test_guidance_is_for_image_tokens_only(policy, prompt):
    """Plans do not depend on it, and the empty branch sees neither prompt nor plan: its logits are
    those of padding, whatever the prompt."""
    u = noise(policy, 3)
    free, guided = generate(policy, prompt, u), generate(policy, prompt, u, guidance=2.0)
    c = policy.C
    assert torch.equal(free.plan, guided.plan)
    assert torch.equal(free.logp[:, :c], guided.logp[:, :c])
    assert torch.equal(free.entropy[:, :c], guided.entropy[:, :c])
    assert not torch.equal(free.codes, guided.codes)
    words, image = forward_logits(policy, prompt, free.plan, free.codes)
    empty = torch.full_like(prompt, PAD), torch.full_like(free.plan, PAD)
    _, image_of_nothing = forward_logits(policy, *empty, free.codes)
    words_2, image_2 = forward_logits(policy, prompt, free.plan, free.codes, guidance=2.0)
    assert torch.equal(words_2, words)
    assert torch.allclose(image_2, 2 * image - image_of_nothing, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_heads_are_float32_whatever_the_network_is(policy, dtype, monkeypatch):
    """In bf16 the logits are rounded: by up to .25 nats at logits of 40."""
    monkeypatch.setattr("common.network_dtype", lambda device: dtype)
    x = 4 * torch.randn(5, 32)
    exact = policy.word_logits(x), policy.code_logits(x)
    with precision(x.device):
        inside = policy.word_logits(x), policy.code_logits(x)
    assert all(torch.equal(a, b) and b.dtype == torch.float32 for a, b in zip(exact, inside))


def test_sample_token_samples_the_distribution():
    """At 20,000 draws a share has a standard error of at most .0036; four of them is the bound."""
    logits = torch.tensor([0.5, -1.0, 2.0, 0.0])
    uniform = torch.rand(20000, generator=torch.Generator().manual_seed(0))
    token, logp, _ = sample_token(logits.expand(20000, 4), uniform)
    share = torch.bincount(token, minlength=4) / 20000
    assert (share - logits.softmax(0)).abs().max() < 0.0144
    assert torch.allclose(logp, logits.log_softmax(0)[token])


def test_the_sequences_of_a_prompt_share_one_prefill_and_nothing_else(policy, prompt):
    """A prompt that is continued twice, beside others, is one that stands alone and twice."""
    u = noise(policy, 6)
    shared = generate(policy, prompt, u, guidance=2.0).rows(slice(2, 4))
    alone = generate(policy, prompt[[1, 1]], u[2:4], guidance=2.0)
    assert torch.equal(shared.codes, alone.codes) and torch.equal(shared.plan, alone.plan)
    assert torch.equal(shared.prompt, alone.prompt) and not torch.equal(*shared.codes)


def test_the_noise_at_its_ends_never_chooses_an_impossible_token():
    """Rounding could land beyond the last token, or on one of probability 0."""
    ends = torch.tensor([0.0, 1 - 2.0**-24])
    for seed in range(200):
        logits = 4 * torch.randn(1, 512, generator=torch.Generator().manual_seed(seed))
        logits[0, :5] = logits[0, -5:] = -200.0
        token, logp, _ = sample_token(logits.expand(2, -1), ends)
        assert ((token >= 5) & (token < 507)).all() and logp.isfinite().all()


@torch.no_grad()
def test_codes_with_equal_codebook_vectors_share_embedding_and_logit_but_for_their_own_part(policy):
    """The tokenizer's codebook reaches input and output: what is learned of a code is shared."""
    codebook = torch.randn(32, 4)
    codebook[[7, 9]] = 1.0
    policy.set_codebook(codebook)
    assert abs(policy.codebook.std(0).mean() - 1) < 1e-5
    policy.code_embedding.weight.zero_()
    policy.code_head.weight.zero_()
    embedded = policy.embed_codes(torch.arange(32))
    logits = policy.code_logits(torch.randn(3, 32))
    assert torch.equal(embedded[7], embedded[9]) and not torch.equal(embedded[7], embedded[8])
    assert torch.allclose(logits[:, 7], logits[:, 9]) and logits.std(1).min() > 0
