"""Audit rules that shape advantages: what each does to the expected gradient of GRPO.

    python -m lab.audit             one to two minutes; prints tables (docs/audit.md)

A rule turns a Batch into one advantage per token; RULES has those that people use. What they add to
GRPO is measured on policies that are tables of logits, of token t after token t - 1, with rewards
that are random sums over tokens and pairs of neighbours: on-policy, and one-sided (drawn under
guidance, scored without). Rules and loss see one batch at a time, in float64; torch.vmap runs them.
Letters: I instances, N batches, R rules, B = P * G sequences (P groups), T tokens, V vocabulary.
"""

import argparse
import math
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

import common
from lab.one_sided import sampler_logits
from lab.stats import mean_t_ci
from lab.tables import show, table, transposed
from objective import entropy_masks, group_advantages, policy_loss
from objective import shape_advantages, shape_advantages_released

END = 0  # the token after which nothing is valid, if lengths vary
GUIDANCE = 2.0
GROUP = 8  # sequences, where groups are sampled
BATCHES = 2500  # of one group each, per sampled gradient
GROUPS = 4  # of training, per policy and step
STEPS = 200  # of training
CONSTANT = 0.4  # a lambda that no batch changes, near the mean of EG-GRPO's


class Batch(NamedTuple):
    """What a rule may look at, without gradient; the first five as in shape_advantages."""

    advantage: Tensor  # (B,)
    entropy: Tensor  # (B, T) as fractions of log V
    low: Tensor  # (B, T) bool, see entropy_masks
    high: Tensor  # (B, T) bool
    valid: Tensor  # (B, T) bool
    nats: Tensor  # (B, T) entropy in nats
    logp: Tensor  # (B, T) of the sampled tokens


def top_entropy(batch):
    """The 80/20 rule (arXiv 2506.01939): only the 20 % of a batch's tokens of highest entropy."""
    entropy = torch.where(batch.valid, batch.entropy, -1.0).flatten()
    rank = entropy.argsort(descending=True, stable=True).argsort().view_as(batch.entropy)
    return torch.where(rank < 0.2 * batch.valid.sum(), batch.advantage[:, None], 0.0)


def entropy_advantage(batch):
    """The entropy advantage (arXiv 2506.14758): A + min(alpha H, |A| / kappa), H in nats."""
    advantage = batch.advantage[:, None]
    return advantage + torch.minimum(0.4 * batch.nats, advantage.abs() / 2.0)


def constant_bonus(batch):
    """A + c H."""
    return batch.advantage[:, None] + CONSTANT * batch.entropy


RULES = {  # the first is what the others are compared with
    "GRPO": lambda batch: batch.advantage[:, None].expand_as(batch.entropy),
    "80/20 rule": top_entropy,
    "entropy advantage": entropy_advantage,
    "EG-GRPO": lambda batch: shape_advantages(*batch[:5]),
    "EG-GRPO, released": lambda batch: shape_advantages_released(*batch[:4]),
    "exclusion only": lambda batch: shape_advantages(*batch[:5], kappa=0.0),
    "bonus only": lambda batch: shape_advantages(*batch[:5], exclude=False),
    "A + c H": constant_bonus,
    "A + c H, high tokens": lambda b: torch.where(b.high, constant_bonus(b), b.advantage[:, None]),
    "A + lambda H": lambda b: shape_advantages(*b._replace(high=b.valid)[:5], exclude=False),
}


class Instance(NamedTuple):
    """A random policy, the same policy without its prompt, and rewards."""

    theta: Tensor  # (T, V + 1, V) logits of token t after token v, or, at v = V, after none
    empty: Tensor  # (T, V + 1, V)
    reward: Tensor  # (T, V + 1, V) of token t after another
    ends: Tensor  # bool: END ends a sequence


def make_instance(seed, vocabulary, length, ends=False):
    """Draw an instance. Deterministic for given arguments."""
    draw = common.generator("bonus", seed)
    table = length, vocabulary + 1, vocabulary
    noise = partial(torch.randn, generator=draw, dtype=torch.float64)
    theta = 1.5 * noise(table)
    empty = 0.5 * theta + 0.5 * noise(table)
    reward = noise((length, 1, vocabulary)) + 0.5 * noise(table)
    return Instance(theta, empty, reward, torch.tensor(ends))


def look_up(table, tokens):
    """Look up tokens in a table of token t after token t - 1, (T, V + 1, V). Returns (..., T)."""
    length, _, vocabulary = table.shape
    start = torch.full_like(tokens[..., :1], vocabulary)
    previous = torch.cat([start, tokens[..., :-1]], -1)
    return table[torch.arange(length), previous, tokens]


def logp_and_nats(theta, tokens):
    """Return log-probs of tokens, and entropies in nats: (..., T) each."""
    logp = theta.log_softmax(-1)
    nats = -(logp.exp() * logp).sum(-1, keepdim=True)
    return look_up(logp, tokens), look_up(nats.expand_as(logp), tokens)


def valid_tokens(instance, tokens):
    """Find the tokens before which there is no END: (..., T) bool."""
    ended = (tokens == END) & instance.ends
    return ended.cumsum(-1) - ended.long() == 0


def rewards(instance, tokens):
    """Compute the rewards of sequences, sums over their valid tokens: (..., T) -> (...)."""
    return (look_up(instance.reward, tokens) * valid_tokens(instance, tokens)).sum(-1)


def sample(theta, uniform):
    """Sample sequences by inverting cumulative distributions. uniform: (..., T) in [0, 1)."""
    length, _, vocabulary = theta.shape
    steps = theta.softmax(-1).cumsum(-1)[..., :-1]  # (T, V + 1, V - 1)
    token = torch.full_like(uniform[..., 0], vocabulary, dtype=torch.long)
    tokens = []
    for t in range(length):
        token = (steps[t, token] < uniform[..., t, None]).sum(-1)
        tokens.append(token)
    return torch.stack(tokens, -1)


def every_sequence(instance):
    """Return all sequences, (V ** T, T)."""
    length, _, vocabulary = instance.theta.shape
    return torch.cartesian_prod(*[torch.arange(vocabulary)] * length)


def reward_and_entropy(instance, theta):
    """Return a policy's exact expected reward and mean entropy, two scalars."""
    tokens = every_sequence(instance)
    logp, nats = logp_and_nats(theta, tokens)
    valid = valid_tokens(instance, tokens)
    entropy = (nats * valid).sum(1) / valid.sum(1)
    entropy = entropy / math.log(theta.shape[-1])
    p = logp.sum(1).exp()
    return p @ rewards(instance, tokens), p @ entropy


def rule_loss(theta, instance, tokens, rule):
    """Compute the loss on one batch, and the fraction of turned signs. tokens: (P, G, T)."""
    advantage = group_advantages(rewards(instance, tokens)).flatten()
    tokens = tokens.flatten(0, 1)  # (B, T)
    logp, nats = logp_and_nats(theta, tokens)
    entropy = nats.detach() / math.log(theta.shape[-1])
    valid = valid_tokens(instance, tokens)
    low, high = entropy_masks(entropy, valid, max(0.2, 1 / len(theta)), 0.5)  # at least one is low
    batch = Batch(advantage, entropy, low, high, valid, nats.detach(), logp.detach())
    shaped = rule(batch)
    turned = (shaped * advantage[:, None] < 0) & valid
    logp_ref, _ = logp_and_nats(instance.theta, tokens)
    loss, _ = policy_loss(logp, logp_ref, shaped, valid)
    return loss, turned.sum() / valid.sum()


def batch_gradients(instance, tokens):
    """Compute each rule's gradient of -loss in each batch, (N, R, T, V + 1, V), and its fraction of
    turned signs, (N, R). tokens: (N, G, T). The KL term's gradient is 0."""
    gradients = []
    turned = []
    for rule in RULES.values():
        of_batch = torch.func.grad(partial(rule_loss, rule=rule), has_aux=True)
        of_batches = torch.vmap(of_batch, (None, None, 0), chunk_size=500)
        gradient, fraction = of_batches(instance.theta, instance, tokens[:, None])
        gradients.append(-gradient)
        turned.append(fraction.double())
    return torch.stack(gradients, 1), torch.stack(turned, 1)


def enumerate_groups(number, instance, guidance):
    """Return all groups of 2 sequences for audit_instance. number: not used."""
    sequences = every_sequence(instance)
    index = torch.arange(len(sequences))
    tokens = sequences[torch.cartesian_prod(index, index)]  # (N, 2, T)
    logits = sampler_logits(instance.theta, instance.empty, guidance)
    logp = look_up(logits.log_softmax(-1), tokens)
    return tokens, logp.sum((1, 2)).exp(), math.inf


def sample_groups(number, instance, guidance):
    """Sample groups for audit_instance. number: of the instance, a seed."""
    draw = common.generator("bonus", number, "groups")
    shape = BATCHES, GROUP, len(instance.theta)
    uniform = torch.rand(shape, generator=draw, dtype=torch.float64)
    tokens = sample(sampler_logits(instance.theta, instance.empty, guidance), uniform)
    return tokens, torch.full((BATCHES,), 1 / BATCHES, dtype=torch.float64), BATCHES


def audit_instance(instance, tokens, weight, draws):
    """Measure what all rules add to the gradient of GRPO. tokens, weight, draws: groups, (N, G, T),
    their probabilities, (N,), and the number of independent samples. Returns {name: (R,)}."""
    gradients, turned = batch_gradients(instance, tokens)
    gradients = gradients.flatten(2)  # (N, R, parameters)
    mean = lambda values: torch.tensordot(weight, values, 1)  # over batches
    expected = mean(gradients)
    variance = mean((gradients - expected).square().sum(2))
    theta = instance.theta.clone().requires_grad_(True)
    _, entropy = reward_and_entropy(instance, theta)
    ascent = torch.autograd.grad(entropy, theta)[0].flatten()
    grpo = expected[0]

    added = (gradients - gradients[:, :1]) / grpo.norm()
    bias = mean(added)  # (R, parameters)
    squared_noise = mean((added - bias).square().sum(2)) / draws
    along_ascent = added @ (ascent / ascent.norm())  # (N, R)
    drift = mean(along_ascent)
    error = (mean((along_ascent - drift).square()) / draws).sqrt()
    return {  # by the names of columns; lengths are fractions of the norm of GRPO's gradient
        "bias": (bias.square().sum(1) - squared_noise).clamp(min=0).sqrt(),  # without noise
        "noise": squared_noise.sqrt(),  # the norm of bias's standard error; 0 if exact
        "along GRPO's": bias @ grpo / grpo.norm(),  # the component along GRPO's gradient
        "drift": drift,  # the component along the exact gradient of mean entropy
        "rises/falls": drift.sign() * (drift.abs() > 2 * error + 1e-12),  # 1e-12: rounding
        "turned signs": mean(turned),  # fraction of the tokens whose advantage changes its sign
        "variance": variance / variance[0],  # of a batch's whole gradient, over that of GRPO's
    }


def audit(instances, draw_groups, guidance=1.0):
    """Measure all rules on instances, by enumerate_groups or sample_groups: {name: (I, R)}."""
    audits = []
    for number, instance in enumerate(instances):
        audits.append(audit_instance(instance, *draw_groups(number, instance, guidance)))
    return {name: torch.stack([one[name] for one in audits]) for name in audits[0]}


def audit_table(audits, columns_of):
    """Lay out audits, {setting: audit}, as Markdown: medians over instances; of "rises/falls" how
    many instances' entropy rises and falls beyond 2 errors. columns_of: {name: settings}."""
    columns = {}
    for name, settings in columns_of.items():
        for setting in settings:
            values = audits[setting][name]  # (I, R)
            cells = values.median(0).values.tolist()
            if name == "rises/falls":
                rises = (values > 0).sum(0).tolist()
                falls = (values < 0).sum(0).tolist()
                cells = zip(rises, falls)
            columns[f"{name}, {setting}"] = dict(zip(RULES, cells))
    return table("rule", transposed(columns))


def train(instances, rule, guidance, steps):
    """Train the policies of instances, each by itself. Returns exact reward and entropy, (2, I)."""
    stacked = Instance(*map(torch.stack, zip(*instances)))
    theta = stacked.theta.clone().requires_grad_(True)  # (I, T, V + 1, V)
    optimizer = torch.optim.Adam([theta], 0.03)
    losses = torch.vmap(partial(rule_loss, rule=rule))  # lambda is per policy
    for step in range(steps):
        draw = common.generator("bonus", step)
        shape = len(theta), GROUPS, GROUP, theta.shape[1]
        uniform = torch.rand(shape, generator=draw, dtype=torch.float64)
        with torch.no_grad():
            logits = sampler_logits(theta, stacked.empty, guidance)
            tokens = torch.vmap(sample)(logits, uniform)
        optimizer.zero_grad()
        loss, _ = losses(theta, stacked, tokens)
        loss.sum().backward()
        optimizer.step()

    with torch.no_grad():
        pairs = map(reward_and_entropy, instances, theta)
        return torch.tensor(list(pairs)).T


def training_table(instances, settings):
    """Lay out training as Markdown: GRPO, and other rules minus it. settings: {name: guidance}."""
    columns = {}
    for setting, guidance in settings.items():
        results = [train(instances, rule, guidance, STEPS) for rule in RULES.values()]
        reward, entropy = torch.stack(results, 1)  # (R, I) each
        for name, values in (("reward", reward), ("entropy", entropy)):
            values[1:] -= values[0]
            cells = []
            for of_rule in values.numpy():
                cells.append(show(mean_t_ci(of_rule), signed=True))
            columns[f"{name}, {setting}"] = dict(zip(RULES, cells))
    return table("rule", transposed(columns))


@common.stage()
def main(argv=None):
    style = argparse.RawDescriptionHelpFormatter
    argparse.ArgumentParser(description=__doc__, formatter_class=style).parse_args(argv)
    small = [make_instance(seed, vocabulary=2, length=2) for seed in range(200)]
    ending = [make_instance(seed, vocabulary=2, length=2, ends=True) for seed in range(200)]
    large = [make_instance(seed, vocabulary=3, length=10) for seed in range(32)]
    settings = {"on-policy": 1.0, "one-sided": GUIDANCE}

    print(f"Sampled: {len(large)} instances, {BATCHES} batches of {GROUP} x 10 tokens of 3\n")
    audits = {name: audit(large, sample_groups, guidance) for name, guidance in settings.items()}
    of_both = dict.fromkeys(("bias", "drift", "rises/falls"), audits)
    of_one = dict.fromkeys(("along GRPO's", "turned signs", "variance", "noise"), ["on-policy"])
    print(audit_table(audits, of_both | of_one))

    print(f"\nExact: {len(small)} instances, all batches of 2 x 2 tokens of 2\n")
    audits = {
        "equal lengths": audit(small, enumerate_groups),
        "variable lengths": audit(ending, enumerate_groups),
        "one-sided": audit(small, enumerate_groups, GUIDANCE),
    }
    print(audit_table(audits, dict.fromkeys(("bias", "rises/falls"), audits)))

    print(f"\nTraining: {STEPS} steps, {len(large)} instances; the rules minus GRPO\n")
    print(training_table(large, settings))


if __name__ == "__main__":
    common.run(main)
