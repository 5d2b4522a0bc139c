"""Measure what a bonus leaves of expected gradient, on policies small enough to enumerate.

    python -m lab.bonus             one to two minutes; prints tables (docs/bonus.md)

A bonus that does not depend on the sampled token or on what follows it is a baseline: its expected
gradient is 0. EG-GRPO's depends on both: masks rank a token among later ones, 1 / T_i counts them,
and lambda is of the batch. Tables:

1. the expected gradient of each part, over all batches of one group of 2 sequences of 2 tokens of
   2: at equal lengths, at variable lengths, and drawn under guidance but scored without;
2. the same from samples, at one group of 8 sequences of 10 tokens of 3;
3. training by Adam on sampled groups of 8, on-policy and under that guidance.

A policy is a table of logits, of token t after token t - 1; rewards are random sums over tokens and
pairs of neighbours. The functions of the lesson see one batch at a time, in float64; torch.vmap
runs them over batches, or over the policies that are trained.

Dimension letters: N batches, G sequences per group, B per batch, T tokens, V vocabulary.
"""

import sys
import time
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

import common
from eggrpo import Config, method_advantages, method_masks
from evaluate import markdown_table
from lab.stats import mean_t_ci
from model import Rollout
from objective import group_advantages, normalized_entropy, policy_loss

END = 0  # the token after which nothing is valid, if lengths vary
GUIDANCE = 2.0
GROUP = 8  # sequences, where groups are sampled
ESTIMATES = 10  # of a sampled gradient
BATCHES = 500  # per estimate
GROUPS = 4  # of training, per policy and step
STEPS = 200  # of training
CONSTANT = 0.4  # a lambda that no batch changes, near the mean of EG-GRPO's
ROUNDING = 1e-12
EXACT = dict(low_frac=0.5, high_frac=0.5)  # of 2 tokens
SAMPLED = dict(low_frac=0.2, high_frac=0.5)
METHODS = ("grpo", "eggrpo", "eggrpo-released", "exclude", "bonus")


class Instance(NamedTuple):
    """A random policy, the same policy without its prompt, and rewards."""

    theta: Tensor  # (T, V + 1, V) logits of token t after token v, or, at v = V, after none
    empty: Tensor  # (T, V + 1, V)
    token_reward: Tensor  # (T, V)
    pair_reward: Tensor  # (T, V + 1, V)
    ends: Tensor  # bool: END ends a sequence


def make_instance(seed, vocabulary, length, ends=False):
    """Draw an instance. Deterministic for given arguments."""
    draw = common.generator("bonus", seed)
    table = length, vocabulary + 1, vocabulary
    noise = partial(torch.randn, generator=draw, dtype=torch.float64)
    theta = 1.5 * noise(table)
    empty = 0.5 * theta + 0.5 * noise(table)
    token_reward = noise(length, vocabulary)
    pair_reward = 0.5 * noise(table)
    return Instance(theta, empty, token_reward, pair_reward, torch.tensor(ends))


def contexts(tokens, vocabulary):
    """Return position and previous token of tokens: (T,) and (..., T)."""
    start = torch.full_like(tokens[..., :1], vocabulary)
    previous = torch.cat([start, tokens[..., :-1]], -1)
    return torch.arange(tokens.shape[-1]), previous


def look_up(theta, tokens):
    """Return log-probs of tokens, and entropies as fractions of log V: (..., T) each."""
    row = contexts(tokens, theta.shape[-1])
    logp = theta.log_softmax(-1)
    return logp[*row, tokens], normalized_entropy(logp)[row]


def valid_tokens(instance, tokens):
    """Find the tokens before which there is no END: (..., T) bool."""
    ended = (tokens == END) & instance.ends
    return ended.cumsum(-1) - ended.long() == 0


def rewards(instance, tokens):
    """Compute the rewards of sequences, sums over their valid tokens: (..., T) -> (...)."""
    t, previous = contexts(tokens, instance.theta.shape[-1])
    reward = instance.token_reward[t, tokens] + instance.pair_reward[t, previous, tokens]
    return (reward * valid_tokens(instance, tokens)).sum(-1)


def guided(instance, theta, guidance):
    """Return the logits under classifier-free guidance; at 1 these are theta."""
    return instance.empty + guidance * (theta - instance.empty)


def sample(theta, uniform):
    """Sample sequences by inverting cumulative distributions. uniform: (..., T) in [0, 1)."""
    cumulative = theta.softmax(-1).cumsum(-1)
    last = theta.shape[-1] - 1
    token = torch.full_like(uniform[..., 0], last + 1, dtype=torch.long)
    tokens = []
    for t in range(len(theta)):
        passed = cumulative[t, token] < uniform[..., t, None]  # (..., V)
        token = passed.sum(-1).clamp(max=last)
        tokens.append(token)
    return torch.stack(tokens, -1)


def every_sequence(instance):
    """Return all sequences, (V ** T, T)."""
    length, _, vocabulary = instance.theta.shape
    return torch.cartesian_prod(*[torch.arange(vocabulary)] * length)


def reward_and_entropy(instance, theta):
    """Return a policy's exact expected reward and mean entropy, two scalars."""
    tokens = every_sequence(instance)
    logp, entropy = look_up(theta, tokens)
    valid = valid_tokens(instance, tokens)
    entropy = (entropy * valid).sum(1) / valid.sum(1)
    p = logp.sum(1).exp()
    return p @ rewards(instance, tokens), p @ entropy


# --- expected gradients ---------------------------------------------------------------------------


def as_rollout(tokens, entropy, valid):
    """Return sequences (B, T) as a Rollout of image tokens only."""
    return Rollout(
        prompt=None, plan=tokens[:, :0], codes=tokens, logp=None, entropy=entropy, valid=valid
    )


def shape(advantage, rollout, config):
    """Shape advantages (B,) as a config's method does. Returns (B, T)."""
    low, high = method_masks(rollout, config)
    return method_advantages(advantage, rollout, low, high, config)


def token_weights(advantage, tokens, entropy, valid, fractions):
    """Return what each part adds to the advantages of one batch: {part: (B, T)}.

    advantage: (B,); tokens, entropy, valid: (B, T); fractions: low_frac and high_frac.
    """
    rollout = as_rollout(tokens, entropy, valid)
    shaped = {}
    for method in METHODS:
        config = Config(method=method, **fractions)
        shaped[method] = shape(advantage, rollout, config)
    config = Config(method="bonus", **fractions)
    low, high = method_masks(rollout, config)
    all_high = method_advantages(advantage, rollout, low, valid, config)
    grpo = shaped["grpo"]
    excluded = shaped["exclude"]
    return {
        "GRPO": grpo,
        "constant lambda, every token": CONSTANT * entropy,
        "constant lambda, high tokens": CONSTANT * torch.where(high, entropy, 0.0),
        "EG-GRPO's lambda, every token": all_high - grpo,
        "EG-GRPO's bonus": shaped["bonus"] - grpo,
        "EG-GRPO's exclusion": excluded - grpo,
        "EG-GRPO": shaped["eggrpo"],
        "the released bonus": shaped["eggrpo-released"] - excluded,
    }


def expected_gradients(instance, tokens, weight, fractions):
    """Compute the mean over batches of each part's gradient of -loss: {part: (T, V + 1, V)}.

    tokens: (N, G, T), one group per batch; weight: (N,), which sums to 1.
    """
    theta = instance.theta.clone().requires_grad_(True)
    logp, entropy = look_up(theta, tokens)  # (N, G, T)
    valid = valid_tokens(instance, tokens)
    advantage = group_advantages(rewards(instance, tokens))  # (N, G)

    def gain(logp, advantage, valid):
        loss, _ = policy_loss(logp, None, advantage, valid, beta=0.0)
        return -loss

    weights = torch.vmap(partial(token_weights, fractions=fractions))
    gradients = {}
    for part, values in weights(advantage, tokens, entropy.detach(), valid).items():
        mean = weight @ torch.vmap(gain)(logp, values, valid)
        gradients[part] = torch.autograd.grad(mean, theta, retain_graph=True)[0]
    return gradients


def exact_gradients(instance, draw=None, guidance=1.0):
    """Compute each part's expected gradient over all groups of 2 sequences. draw: not used."""
    sequences = every_sequence(instance)
    index = torch.arange(len(sequences))
    tokens = sequences[torch.cartesian_prod(index, index)]  # (N, 2, T)
    logp, _ = look_up(guided(instance, instance.theta, guidance), tokens)
    return expected_gradients(instance, tokens, logp.sum((1, 2)).exp(), fractions=EXACT)


def sampled_gradients(instance, draw, guidance=1.0):
    """Estimate each part's expected gradient from BATCHES groups of GROUP sequences."""
    theta = guided(instance, instance.theta, guidance)
    tokens = sample(theta, torch.rand(BATCHES, GROUP, len(theta), generator=draw))
    weight = torch.full((BATCHES,), 1 / BATCHES)
    return expected_gradients(instance, tokens, weight, fractions=SAMPLED)


def gradient_table(instances, estimate, estimates):
    """Print each part's gradient, medians over instances, lengths as fractions of GRPO's.

    estimate: instance, generator -> {part: gradient}; estimates: how many of them, 1 if exact. With
    m their mean and s its standard error, size is sqrt(|m|^2 - |s|^2), which noise does not bias.
    """
    found = {}  # {part: [(size, noise, along GRPO's, along entropy's, its standard error), ...]}
    for number, instance in enumerate(instances):
        draw = common.generator("bonus", number, "groups")
        drawn = [estimate(instance, draw) for _ in range(estimates)]
        gradients = {part: torch.stack([g[part].flatten() for g in drawn]) for part in drawn[0]}
        grpo = gradients["GRPO"].mean(0)
        theta = instance.theta.clone().requires_grad_(True)
        _, entropy = reward_and_entropy(instance, theta)
        ascent = torch.autograd.grad(entropy, theta)[0].flatten()
        for part, g in gradients.items():
            g = g / grpo.norm()  # (estimates, T * (V + 1) * V)
            mean = g.mean(0)
            noise = standard_error(g).norm()
            size = (mean.norm() ** 2 - noise**2).clamp(min=0).sqrt()
            along_grpo = mean @ grpo / grpo.norm()
            along = g @ ascent / ascent.norm()  # (estimates,)
            row = size, noise, along_grpo, along.mean(), standard_error(along)
            found.setdefault(part, []).append(row)

    rows = []
    for part, values in found.items():
        size, noise, along_grpo, along, error = torch.tensor(values).T
        lengths = size.median(), size.quantile(0.9), noise.median()
        lengths = [f"{x:.3f}" for x in lengths]
        signed = along_grpo.median(), along.median()
        signed = [f"{x:+.3f}" for x in signed]
        rises = (along > 2 * error + ROUNDING).sum().item()
        falls = (along < -2 * error - ROUNDING).sum().item()
        rows.append([part, *lengths, *signed, rises, falls])
    head = ["part", "size", "upper decile", "noise", "along GRPO's", "along entropy's"]
    print(markdown_table([*head, "entropy rises in", "falls in"], rows))


def standard_error(x):
    """Return the standard error of the mean of n independent rows; 0 if n is 1, for exact ones."""
    n = len(x)
    return (x.var(0, correction=0) / max(n - 1, 1)).sqrt()


# --- training -------------------------------------------------------------------------------------


def training_loss(theta, instance, tokens, method):
    """Compute the loss of one policy on its batch. tokens: (B, T) in groups of GROUP."""
    logp, entropy = look_up(theta, tokens)
    logp_ref, _ = look_up(instance.theta, tokens)
    valid = valid_tokens(instance, tokens)
    reward = rewards(instance, tokens).view(-1, GROUP)
    advantage = group_advantages(reward).flatten()  # (B,)
    rollout = as_rollout(tokens, entropy.detach(), valid)
    shaped = shape(advantage, rollout, Config(method=method))
    return policy_loss(logp, logp_ref, shaped, valid)[0]


def train(instances, method, guidance, steps):
    """Train the policies of n instances, each by itself. Returns exact reward gained and entropy,
    (n,) each."""
    stacked = Instance(*map(torch.stack, zip(*instances)))
    theta = stacked.theta.clone().requires_grad_(True)  # (n, T, V + 1, V)
    optimizer = torch.optim.Adam([theta], 0.03)
    losses = torch.vmap(partial(training_loss, method=method))  # lambda is per policy
    for step in range(steps):
        draw = common.generator("bonus", step)
        uniform = torch.rand(len(theta), GROUPS * GROUP, theta.shape[1], generator=draw)
        with torch.no_grad():
            tokens = torch.vmap(sample)(guided(stacked, theta, guidance), uniform)
        optimizer.zero_grad()
        losses(theta, stacked, tokens).sum().backward()
        optimizer.step()

    with torch.no_grad():
        start = [reward_and_entropy(i, i.theta) for i in instances]
        end = [reward_and_entropy(i, new) for i, new in zip(instances, theta)]
    gained = torch.tensor(end) - torch.tensor(start)
    return gained[:, 0], torch.tensor(end)[:, 1]


def training_table(instances, guidance, steps):
    """Print what each method gains: means over instances, 95 % half-widths, paired differences."""
    results = {method: train(instances, method, guidance, steps) for method in METHODS}
    grpo_reward, grpo_entropy = results["grpo"]
    rows = []
    for name, (reward, entropy) in results.items():
        columns = reward, reward - grpo_reward, entropy, entropy - grpo_entropy
        intervals = [mean_t_ci(column.numpy()) for column in columns]
        cells = [f"{i['mean']:+.3f} ± {i['half']:.3f}" for i in intervals]
        rows.append([name, *cells])
    head = ["method", "reward gained", "minus GRPO's", "entropy at the end", "minus GRPO's"]
    print(markdown_table(head, rows))


def main():
    started = time.time()
    common.check(len(sys.argv) == 1, "usage: python -m lab.bonus")
    torch.set_default_dtype(torch.float64)
    small = [make_instance(seed, vocabulary=2, length=2) for seed in range(200)]
    ending = [make_instance(seed, vocabulary=2, length=2, ends=True) for seed in range(200)]
    large = [make_instance(seed, vocabulary=3, length=10) for seed in range(32)]
    mismatch = f"drawn under guidance {GUIDANCE:g}, scored without"
    settings = ("on-policy", 1.0), (mismatch, GUIDANCE)

    print(f"\nExact, variable lengths, on-policy; {len(ending)} instances\n")
    gradient_table(ending, exact_gradients, estimates=1)
    for title, guidance in settings:
        print(f"\nExact, equal lengths, {title}; {len(small)} instances\n")
        gradient_table(small, partial(exact_gradients, guidance=guidance), estimates=1)
    for title, guidance in settings:
        print(f"\nSampled, {title}; {len(large)} instances of {ESTIMATES} x {BATCHES} batches\n")
        gradient_table(large, partial(sampled_gradients, guidance=guidance), ESTIMATES)
    for title, guidance in settings:
        print(f"\nTraining, {title}; {STEPS} steps, {len(large)} instances\n", flush=True)
        training_table(large, guidance, STEPS)
    print(f"\n{time.time() - started:.0f} s")


if __name__ == "__main__":
    common.run(main)
