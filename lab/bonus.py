"""What each half of EG-GRPO adds to the gradient, exactly.

    python -m lab.bonus             a minute; prints tables

With on-policy sampling a bonus that does not depend on the sampled token is a baseline: E_a[d *
grad log pi(a)] = 0. So does the bonus of EG-GRPO explore? Here a policy over 3 ^ 10 sequences is
enumerated in float64. Token t depends on the one before, so that entropy differs between contexts;
rewards are random sums over tokens and pairs of neighbours. Every instance (seed) has its own
policy and rewards. The tables:

1. the exact expected gradient that each part adds, and what one exact step along it does;
2. the same with samples drawn under guidance and scored without (the released code);
3. what groups of 8 and Adam make of it after many steps, by the very functions of eggrpo.py.
"""

import sys
import time

import torch

import common
from eggrpo import (
    METHODS,
    Config,
    differentiable_entropy,
    entropy_masks,
    group_advantages,
    policy_loss,
    shape_advantages,
)

V, T = 3, 10  # vocabulary, tokens
SEEDS, STEPS, GROUP, PROMPTS = 48, 200, 8, 4
GUIDANCE, STEP = 2.0, 0.1


class Instance:
    """A random tabular policy, its guide and its rewards. theta: (T, V + 1, V) logits of token t
    after token v, or after none."""

    def __init__(self, seed):
        noise = lambda name, *shape: torch.randn(
            *shape, generator=common.generator(seed, name), dtype=torch.float64
        )
        self.theta = 1.5 * noise("theta", T, V + 1, V)
        # the policy without its prompt
        self.empty = 0.5 * self.theta + 0.5 * noise("empty", T, V + 1, V)
        self.token_reward, self.pair_reward = noise("token", T, V), 0.5 * noise("pair", T, V + 1, V)

    def rewards(self, tokens):
        """(n, T) -> (n,)."""
        before = previous(tokens)
        t = torch.arange(T)
        return (self.token_reward[t, tokens] + self.pair_reward[t, before, tokens]).sum(1)


def previous(tokens):
    """Shift sequences by one: the context of each token, V standing for the start. (n, T) -> (n,
    T)."""
    return torch.cat([torch.full_like(tokens[:, :1], V), tokens[:, :-1]], 1)


def every_sequence():
    """(V ** T, T)."""
    return torch.cartesian_prod(*[torch.arange(V)] * T)


def look_up(theta, tokens):
    """Return log-probs and entropies of sequences: (n, T) each."""
    context, t = previous(tokens), torch.arange(T)
    logp = theta.log_softmax(-1)[t, context, tokens]
    return logp, differentiable_entropy(theta)[t, context]


def guided(instance, theta, weight):
    return instance.empty + weight * (theta - instance.empty)


# --- exact ----------------------------------------------------------------------------------------


def parts_of_the_method(advantage, entropy):
    """Name what the method adds to GRPO's weight A of each token's grad log pi. (n,), (n, T) ->
    {name: (n, T)}."""
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
    """Return {part: gradient}, its entropy gradient included, and the gradients of expected reward
    and of mean entropy.

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
        for name, weight in parts_of_the_method(advantage, entropy.detach()).items()
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
    """Print, over instances, the median size of each part, its angle to GRPO, and what one step of
    the exact policy along it does; GRPO's step has length STEP, the others in proportion."""
    rows = {}
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
    print(
        "| part | size / GRPO's | cosine with GRPO | reward of a step / GRPO's "
        "| entropy of a step | entropy rises in |"
    )
    print("|---|---|---|---|---|---|")
    for name, values in rows.items():
        values = torch.stack(values)
        size, cosine, _, entropy = values.median(0).values.tolist()
        reward = (values[:, 2] / grpo_reward).median()
        effects = (
            f"{cosine:+.2f} | {reward:+.3f} | {entropy:+.5f} "
            f"| {(values[:, 3] > 0).sum()} of {seeds}"
        )
        print(
            f"| {name} | {size:.3f} | {effects} |"
            if size > 1e-12
            else f"| {name} | {size:.0e} | - | - | - | - |"
        )
    return rows


# --- sampled --------------------------------------------------------------------------------------


def sample(theta, number, draw):
    """Sample sequences from several policies at once. theta: (n, T, V + 1, V) -> (n, number, T)."""
    tokens, context = [], torch.full((len(theta), number), V)
    for t in range(T):
        # (n, number, V)
        p = theta[:, t].softmax(-1).gather(1, context[..., None].expand(-1, -1, V))
        context = torch.multinomial(p.flatten(0, 1), 1, generator=draw).view(len(theta), number)
        tokens.append(context)
    return torch.stack(tokens, 2)


def train(instances, method, guidance, steps, **change):
    """Train every instance by a method, all in parallel. Returns exact expected reward gained and
    exact mean entropy: (n,) each."""
    config = Config(**{**METHODS[method].values, **change})
    theta = torch.stack([i.theta for i in instances]).requires_grad_(True)  # (n, T, V + 1, V)
    empty, start = torch.stack([i.empty for i in instances]), theta.detach().clone()
    optimizer, n, t = torch.optim.Adam([theta], 0.03), len(instances), torch.arange(T)
    for step in range(steps):
        draw = common.generator("bonus", step)
        with torch.no_grad():
            tokens = sample(empty + guidance * (theta - empty), PROMPTS * GROUP, draw)  # (n, 32, T)
            reward = torch.stack([i.rewards(x) for i, x in zip(instances, tokens)])
        context = previous(tokens.flatten(0, 1)).view_as(tokens)
        which = torch.arange(n)[:, None, None]
        pick = lambda table: table[which, t, context]
        # (n * 32, T)
        logp = pick(theta.log_softmax(-1)).gather(-1, tokens[..., None])[..., 0].flatten(0, 1)
        ref = pick(start.log_softmax(-1)).gather(-1, tokens[..., None])[..., 0].flatten(0, 1)
        entropy = pick(differentiable_entropy(theta)).flatten(0, 1)
        valid = torch.ones_like(logp, dtype=torch.bool)
        advantage = group_advantages(reward.view(-1, GROUP)).flatten()
        low, high = entropy_masks(entropy.detach(), valid, config.low_frac, config.high_frac)
        shaped = shape_advantages(
            advantage, entropy.detach(), low, high, config.bonus_coef, config.bonus_cap
        )
        loss, _ = policy_loss(
            logp, logp.detach(), ref, shaped, valid, beta=0.01, denominator=logp.numel() / n
        )
        if config.entropy_coef:
            loss = loss - config.entropy_coef * (entropy * high).sum() / (logp.numel() / n)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    tokens = every_sequence()
    with torch.no_grad():
        results = []
        for instance, new in zip(instances, theta):
            reward = instance.rewards(tokens)
            logp, entropy = look_up(new, tokens)
            p, p_old = logp.sum(1).exp(), look_up(instance.theta, tokens)[0].sum(1).exp()
            spread = (p_old * (reward - (p_old * reward).sum()) ** 2).sum().sqrt()
            gained = ((p - p_old) * reward).sum() / spread
            results.append(torch.stack([gained, (p[:, None] * entropy).sum() / T]))
    return torch.stack(results).unbind(1)


def sampled_table(seeds, steps, guidance):
    """Print what groups of 8 and Adam make of each method: mean over seeds and 95 % half-width,
    paired with GRPO."""
    instances = [Instance(s) for s in range(seeds)]
    print(
        "| method | reward gained, in std of the start | minus GRPO's "
        "| entropy at the end | minus GRPO's |"
    )
    print("|---|---|---|---|---|")
    base, results = None, {}
    strong = dict(entropy_coef=0.1)  # the positive control: ten times the default
    for name, method, change in (
        *((m, m, {}) for m in ("grpo", "eggrpo", "bonus", "exclude", "eggrpo-gradient")),
        ("eggrpo-gradient, c = .1", "eggrpo-gradient", strong),
        ("entropy-coef", "entropy-coef", {}),
        ("entropy-coef, c = .1", "entropy-coef", strong),
    ):
        results[name] = train(instances, method, guidance, steps, **change)
        base = base or results[name]
        show = lambda x: f"{x.mean():+.3f} ± {1.96 * x.std() / len(x) ** 0.5:.3f}"
        (reward, entropy), (reward0, entropy0) = results[name], base
        print(
            f"| {name} | {show(reward)} | {show(reward - reward0)} "
            f"| {show(entropy)} | {show(entropy - entropy0)} |"
        )
    return results


def main():
    started = time.time()
    common.check(len(sys.argv) == 1, "usage: python -m lab.bonus")
    torch.set_default_dtype(torch.float64)
    mismatch = f"drawn under guidance {GUIDANCE:g}, scored without"
    for title, guidance in (("on-policy", 1.0), (mismatch, GUIDANCE)):
        print(f"\nExact expected gradients, {title}; medians over {SEEDS} instances\n")
        exact_table(SEEDS, guidance)
        print(
            f"\nGroups of {GROUP}, {PROMPTS} groups a step, Adam, {STEPS} steps, {title}; "
            f"{SEEDS} instances\n"
        )
        sampled_table(SEEDS, STEPS, guidance)
    print(f"\n{time.time() - started:.0f} s")


if __name__ == "__main__":
    common.run(main)
