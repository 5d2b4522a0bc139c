"""Measure what each half of EG-GRPO adds to the expected gradient, exactly, on small policies.

    python -m lab.bonus             about a minute; prints tables (docs/bonus.md)

With on-policy sampling a bonus that does not depend on the sampled token is a baseline: E_a[d *
grad log pi(a)] = 0. To see whether the bonus of EG-GRPO still explores, policies over 3 ^ 10
sequences are enumerated in float64. The logits of token t depend on the token before it, so that
entropy differs between contexts; rewards are random sums over tokens and pairs of neighbours. Every
instance has a policy and rewards of its own seed. Tables:

1. the exact expected gradient that each part adds, and the effect of one exact step along it;
2. the same with samples drawn under guidance and scored without (the released code);
3. many steps of Adam on sampled groups of 8, computed by the functions of eggrpo.py.
"""

import sys
import time

import torch

import common
from eggrpo import METHODS, Config, entropy_masks
from eggrpo import group_advantages, policy_loss, shape_advantages
from evaluate import markdown_table
from model import normalized_entropy

V, T = 3, 10  # vocabulary, tokens
SEEDS, STEPS, GROUP, PROMPTS = 48, 200, 8, 4  # instances; Adam steps, rollouts and groups per step
GUIDANCE = 2.0
STEP = 0.1  # length of the exact step along GRPO's gradient


class Instance:
    """A random tabular policy, the same policy without its prompt, and rewards.

    theta, empty: (T, V + 1, V), the logits of token t after token v, or, at v = V, after none.
    """

    def __init__(self, seed):
        def noise(name, *shape):
            draw = common.generator(seed, name)
            return torch.randn(*shape, generator=draw, dtype=torch.float64)

        self.theta = 1.5 * noise("theta", T, V + 1, V)
        self.empty = 0.5 * self.theta + 0.5 * noise("empty", T, V + 1, V)
        self.token_reward, self.pair_reward = noise("token", T, V), 0.5 * noise("pair", T, V + 1, V)

    def rewards(self, tokens):
        """Compute the rewards of sequences: (n, T) -> (n,)."""
        t = torch.arange(T)
        return (self.token_reward[t, tokens] + self.pair_reward[t, previous(tokens), tokens]).sum(1)


def previous(tokens):
    """Shift sequences by one, V standing for the start: (n, T) -> (n, T)."""
    return torch.cat([torch.full_like(tokens[:, :1], V), tokens[:, :-1]], 1)


def every_sequence():
    """Return all sequences, (V ** T, T)."""
    return torch.cartesian_prod(*[torch.arange(V)] * T)


def look_up(theta, tokens):
    """Return the log-probs and the entropies of the tokens of sequences: (n, T) each."""
    context, t = previous(tokens), torch.arange(T)
    table = theta.log_softmax(-1)  # (T, V + 1, V)
    return table[t, context, tokens], normalized_entropy(table)[t, context]


def guided(instance, theta, weight):
    """Return the logits under classifier-free guidance."""
    return instance.empty + weight * (theta - instance.empty)


# --- exact ----------------------------------------------------------------------------------------


def token_weights(advantage, entropy):
    """Return the weight of each token's grad log pi in GRPO, in EG-GRPO, and in what EG-GRPO adds.

    advantage: (n,), entropy: (n, T) -> {name: (n, T)}.
    """
    a, valid = advantage[:, None], torch.ones_like(entropy, dtype=torch.bool)
    low, high = entropy_masks(entropy, valid)
    by_entropy, by_advantage = 0.3 * entropy, 0.3 * a.abs().expand_as(entropy)
    return {
        "GRPO: A": a.expand_as(entropy),
        "0.3 H, every token": by_entropy,
        "0.3 H, high tokens": by_entropy * high,
        "bonus where it is 0.3 H": by_entropy * high * (by_entropy <= by_advantage),
        "bonus where it is 0.3 abs(A)": by_advantage * high * (by_entropy > by_advantage),
        "bonus: both": torch.minimum(by_entropy, by_advantage) * high,
        "exclusion: -A on low": -a * low,
        "EG-GRPO: all of it": shape_advantages(advantage, entropy, low, high),
    }


def exact_gradients(instance, guidance=1.0):
    """Compute the exact expected gradient of each part of the method, of expected reward and of
    mean entropy. Returns {part: gradient}, gradient, gradient.

    Samples are drawn under `guidance` and scored without; the advantage is that of an infinite
    group.
    """
    tokens, theta = every_sequence(), instance.theta.clone().requires_grad_(True)
    reward = instance.rewards(tokens)
    logp, entropy = look_up(theta, tokens)
    p = logp.sum(1).exp()  # (n,) exact probabilities
    with torch.no_grad():
        drawn = look_up(guided(instance, theta, guidance), tokens)[0].sum(1).exp()
        mean = (drawn * reward).sum()
        advantage = (reward - mean) / (drawn * (reward - mean) ** 2).sum().sqrt()
    gradient = lambda value: torch.autograd.grad(value, theta, retain_graph=True)[0]
    gradients = {
        name: gradient((drawn[:, None] * weight * logp).sum() / T)
        for name, weight in token_weights(advantage, entropy.detach()).items()
    }
    high = entropy_masks(entropy.detach(), torch.ones_like(entropy, dtype=torch.bool))[1]
    gradients["entropy gradient: H on high"] = gradient((drawn[:, None] * high * entropy).sum() / T)
    return gradients, gradient((p * reward).sum()), gradient((p[:, None] * entropy).sum() / T)


@torch.no_grad()
def reward_and_entropy(instance, theta):
    """Return exact expected reward and exact mean entropy of a policy, two scalars."""
    tokens = every_sequence()
    logp, entropy = look_up(theta, tokens)
    p = logp.sum(1).exp()
    return torch.stack([(p * instance.rewards(tokens)).sum(), (p[:, None] * entropy).sum() / T])


def exact_table(seeds, guidance):
    """Print medians over instances: the norm of each part's gradient, its cosine with GRPO's, and
    the change of exact reward and entropy by a step along it. GRPO's step has length STEP, the
    others in proportion. Returns {part: list of (size, cosine, reward, entropy)}."""
    rows, lines = {}, []
    for seed in range(seeds):
        instance = Instance(seed)
        gradients, _, _ = exact_gradients(instance, guidance)
        grpo, before = gradients["GRPO: A"], reward_and_entropy(instance, instance.theta)
        for name, g in gradients.items():
            size, cosine = g.norm() / grpo.norm(), (g * grpo).sum() / (g.norm() * grpo.norm())
            theta = instance.theta + STEP * g / grpo.norm()
            change = reward_and_entropy(instance, theta) - before
            rows.setdefault(name, []).append(torch.stack([size, cosine, *change]))
    grpo_reward = torch.stack(rows["GRPO: A"])[:, 2].abs()
    for name, values in rows.items():
        values = torch.stack(values)
        size, cosine, _, entropy = values.median(0).values.tolist()
        if size < 1e-12:
            lines.append([name, f"{size:.0e}", *"----"])
            continue
        reward = (values[:, 2] / grpo_reward).median()
        rises = f"{(values[:, 3] > 0).sum()} of {seeds}"
        lines.append([name, f"{size:.3f}", f"{cosine:+.2f}", f"{reward:+.3f}", f"{entropy:+.5f}",
                      rises])  # fmt: skip
    head = ["part", "size / GRPO's", "cosine with GRPO", "reward of a step / GRPO's"]
    print(markdown_table([*head, "entropy of a step", "entropy rises in"], lines))
    return rows


# --- sampled --------------------------------------------------------------------------------------


def sample(theta, number, draw):
    """Sample sequences from n policies at once. theta: (n, T, V + 1, V) -> (n, number, T)."""
    tokens, context = [], torch.full((len(theta), number), V)
    for t in range(T):
        rows = context[..., None].expand(-1, -1, V)
        p = theta[:, t].softmax(-1).gather(1, rows)  # (n, number, V)
        context = torch.multinomial(p.flatten(0, 1), 1, generator=draw).view(len(theta), number)
        tokens.append(context)
    return torch.stack(tokens, 2)


def sampled_loss(theta, start, tokens, reward, config):
    """Compute the loss of a method on samples of n policies; a sum over policies of means over
    tokens. theta, start: (n, T, V + 1, V) logits, now and of the reference; tokens: (n, B, T);
    reward: (n, B)."""
    n, context = len(theta), previous(tokens.flatten(0, 1)).view_as(tokens)
    pick = lambda table: table[torch.arange(n)[:, None, None], torch.arange(T), context]
    token_logp = lambda x: pick(x.log_softmax(-1)).gather(-1, tokens[..., None])[..., 0]
    logp, ref = token_logp(theta).flatten(0, 1), token_logp(start).flatten(0, 1)  # (n * B, T)
    entropy = pick(normalized_entropy(theta.detach().log_softmax(-1))).flatten(0, 1)
    valid = torch.ones_like(logp, dtype=torch.bool)
    advantage = group_advantages(reward.view(-1, GROUP)).flatten()
    low, high = entropy_masks(entropy, valid, config.low_frac, config.high_frac)
    shaped = shape_advantages(advantage, entropy, low, high, config.bonus_coef, config.bonus_cap)
    denominator = logp.numel() / n
    loss, _ = policy_loss(logp, ref, shaped, valid, beta=0.01, denominator=denominator)
    return loss


@torch.no_grad()
def reward_gained(instance, theta):
    """Return what a policy has gained in exact expected reward, in std of the start, and its exact
    mean entropy: (2,)."""
    tokens = every_sequence()
    reward = instance.rewards(tokens)
    logp, entropy = look_up(theta, tokens)
    p, p_old = logp.sum(1).exp(), look_up(instance.theta, tokens)[0].sum(1).exp()
    std = (p_old * (reward - (p_old * reward).sum()) ** 2).sum().sqrt()
    return torch.stack([((p - p_old) * reward).sum() / std, (p[:, None] * entropy).sum() / T])


def train(instances, method, guidance, steps):
    """Train every instance by a method, all in parallel. Returns exact expected reward gained and exact mean entropy: (n,) each."""
    config = Config(**METHODS[method].values)
    theta = torch.stack([i.theta for i in instances]).requires_grad_(True)  # (n, T, V + 1, V)
    empty, start = torch.stack([i.empty for i in instances]), theta.detach().clone()
    optimizer = torch.optim.Adam([theta], 0.03)
    for step in range(steps):
        draw = common.generator("bonus", step)
        with torch.no_grad():
            tokens = sample(empty + guidance * (theta - empty), PROMPTS * GROUP, draw)  # (n, B, T)
            reward = torch.stack([i.rewards(x) for i, x in zip(instances, tokens)])
        optimizer.zero_grad()
        sampled_loss(theta, start, tokens, reward, config).backward()
        optimizer.step()
    results = [reward_gained(i, new) for i, new in zip(instances, theta)]
    return torch.stack(results).unbind(1)


def sampled_table(seeds, steps, guidance):
    """Print the results of each method after Adam on groups of 8: means over instances and 95 %
    half-widths, differences paired with GRPO. Returns {method: (reward gained, entropy)}."""
    instances, results, lines = [Instance(s) for s in range(seeds)], {}, []
    show = lambda x: f"{x.mean():+.3f} ± {1.96 * x.std() / len(x) ** 0.5:.3f}"
    for method in ("grpo", "eggrpo", "bonus", "exclude"):
        results[method] = train(instances, method, guidance, steps)
        pairs = zip(results[method], results["grpo"])
        lines.append([method, *(cell for x, grpo in pairs for cell in (show(x), show(x - grpo)))])
    head = ["method", "reward gained, in std of the start", "minus GRPO's"]
    print(markdown_table([*head, "entropy at the end", "minus GRPO's"], lines))
    return results


def main():
    started = time.time()
    common.check(len(sys.argv) == 1, "usage: python -m lab.bonus")
    torch.set_default_dtype(torch.float64)
    mismatch = f"drawn under guidance {GUIDANCE:g}, scored without"
    training = f"Groups of {GROUP}, {PROMPTS} groups per step, Adam, {STEPS} steps"
    for title, guidance in (("on-policy", 1.0), (mismatch, GUIDANCE)):
        print(f"\nExact expected gradients, {title}; medians over {SEEDS} instances\n")
        exact_table(SEEDS, guidance)
        print(f"\n{training}, {title}; {SEEDS} instances\n")
        sampled_table(SEEDS, STEPS, guidance)
    print(f"\n{time.time() - started:.0f} s")


if __name__ == "__main__":
    common.run(main)
