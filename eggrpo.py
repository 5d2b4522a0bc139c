"""Entropy-Guided Group Relative Policy Optimization (EG-GRPO, ICLR 2026, arXiv 2604.02355).

    python eggrpo.py                            -> out/small/eggrpo-0/
    python eggrpo.py --method grpo --seed 1     -> out/small/grpo-1/

The file reads in the order of the data: Config and methods, one training step from prompts to
optimizer.step, the run. Read objective.py, the mathematics, before it; dimension letters are those
of model.py. What differs from the paper and its released code: docs/method.md.
"""

import copy
import re
import time
from dataclasses import dataclass
from typing import Annotated, NamedTuple

import torch

import common
import evaluate
import objective
from common import check
from model import generate, score
from rewards import REWARDS, compute_rewards, encode_targets
from runs import Run
from scenes import encode_scenes, make_scene


@dataclass(frozen=True)
class Config(common.BaseConfig):
    method: str = "eggrpo"  # what shapes the advantages
    name: str = ""  # of the run's folder; default: <method>-<seed>
    steps: int = 250  # batches of rollouts (released code: 1600)
    prompts: int = 8  # P (released code: 16)
    group_size: Annotated[int, 2, 4096] = 8  # G, which are compared (released code: 8)
    lr: float = 5e-4  # after 10 warm-up steps, linearly to 0 (released code: 1e-6, 7 B parameters)
    beta: float = 0.01  # weight of the KL term (released code: .01)
    low_frac: Annotated[float, 0, 1] = 0.2  # fraction of tokens without reward gradient (paper: .2)
    high_frac: Annotated[float, 0, 1] = 0.5  # fraction of tokens with a bonus (paper: .5)
    kappa: float = 1.0  # bonus as a fraction of what exclusion takes away (paper: in (0, 1])
    guidance: float = 1.0  # classifier-free, of image tokens; 1: none (released: 5, sampling only)
    micro_batch: int = 16  # sequences per forward pass: changes memory, not results
    eval_every: int = 50  # steps between held-out evaluations, each with a gallery
    eval_prompts: int = 192  # per split: usual and rare pairs

    def __post_init__(self):
        fractions = f"--low-frac {self.low_frac}, --high-frac {self.high_frac}"
        check(self.low_frac + self.high_frac <= 1, f"{fractions}: must add up to at most 1")
        # no dot, as in the names of files, nor space, as in the names of the table's other rows
        well_formed = re.fullmatch(r"[\w-]*", self.name)
        check(well_formed, f"--name {self.name!r}: letters, digits, '_' and '-' only")


PRESETS = {
    "smoke": dict(steps=4, prompts=2, group_size=4, eval_every=2, eval_prompts=12),
    "small": dict(),
    "large": dict(steps=400, prompts=16, group_size=16, lr=1e-4, micro_batch=64, eval_prompts=384),
}


class Method(NamedTuple):
    about: str
    values: dict = {}  # of Config's fields
    modalities: tuple = ("plan", "image")  # those that are shaped
    exclude: bool = True  # low tokens lose their advantage
    bonus: bool = True  # high tokens get a bonus


METHODS = {  # all share one step and one loss
    "grpo": Method("one advantage for every token", modalities=(), exclude=False, bonus=False),
    "eggrpo": Method("the paper: exclusion, and a bonus of what it saves"),
    "eggrpo-released": Method("the released code's bonus, min(.3 |A|, .3 H)"),
    "eggrpo-text": Method("the paper's ablation: the plan only", modalities=("plan",)),
    "eggrpo-image": Method("the paper's ablation: the image only", modalities=("image",)),
    "exclude": Method("one half of the method: exclusion without bonus", bonus=False),
    "bonus": Method("the other half: the same bonus without exclusion", exclude=False),
    "top-entropy": Method(
        "the 80/20 rule: reward gradient on the 20 % highest-entropy tokens only",
        values=dict(low_frac=0.8, high_frac=0.2),
        bonus=False,
    ),
}


def training_scenes(world, config, step):
    """Make the P scenes of a step. Every third has a rare pair."""
    scenes = []
    seed = 1000 + config.seed  # other scenes than the corpus has
    for i in range(step * config.prompts, (step + 1) * config.prompts):
        if i % 3 == 2:
            scenes.append(make_scene(world, "rare-train", seed, i // 3))
        else:
            scenes.append(make_scene(world, "train", seed, i - i // 3))  # numbered without gaps
    return scenes


def method_masks(rollout, config):
    """Find the low and high tokens that a method shapes, plan and image each by itself. Returns
    low, high: (B, T) bool."""
    c = rollout.plan.shape[1]
    masks = []
    for modality, slots in (("plan", slice(None, c)), ("image", slice(c, None))):
        is_shaped = modality in METHODS[config.method].modalities
        candidates = rollout.valid[:, slots] & is_shaped  # none of a modality that is not shaped
        entropy = rollout.entropy[:, slots]
        fractions = config.low_frac, config.high_frac
        masks.append(objective.entropy_masks(entropy, candidates, *fractions))
    low, high = (torch.cat(pair, 1) for pair in zip(*masks))
    return low, high


def method_advantages(advantage, rollout, low, high, config):
    """Turn advantages (B,) into one per token, (B, T), by the method of a config."""
    if config.method == "eggrpo-released":
        return objective.shape_advantages_released(advantage, rollout.entropy, low, high)
    method = METHODS[config.method]
    kappa = config.kappa if method.bonus else 0.0
    tokens = rollout.entropy, low, high, rollout.valid
    return objective.shape_advantages(advantage, *tokens, kappa, method.exclude)


def train_step(policy, reference, optimizer, env, config, step):
    """Make one step of reinforcement learning, from prompts to optimizer.step. Returns a dict of
    floats to log. Raises UserError, with the weights unchanged, if a reward is not finite or
    sampler and learner are not one policy."""
    P, G = config.prompts, config.group_size
    B = P * G
    tokenizer, world, device = env

    # Sample G plans, and an image for each, for each of P prompts.
    scenes = training_scenes(world, config, step)
    prompts = encode_scenes(world, scenes)[0].to(device)  # (P, S)
    targets = encode_targets(world, [scene for scene in scenes for _ in range(G)], device)
    noise = evaluate.draw_noise(policy, B, config.seed, "rollout", step)  # (B, T)
    rollout = generate(policy, prompts, noise.to(device), config.guidance)  # B sequences
    images = tokenizer.decode(rollout.codes)  # (B, 3, h, w)

    # Score the images, and compare each with the others of its prompt.
    rewards, components, exact = compute_rewards(images, targets, world)  # (B,) each
    # GRPO stops here, and gives A to every token of a rollout.
    A = objective.group_advantages(rewards.view(P, G)).flatten()  # (B,)

    # EG-GRPO goes on: each token has an advantage of its own, by its entropy. With the method grpo
    # no token is low or high, and A_t is A everywhere.
    low, high = method_masks(rollout, config)  # (B, T) each
    A_t = method_advantages(A, rollout, low, high, config)  # (B, T)

    # Add up the gradients of micro-batches.
    parts = []
    for rows in torch.arange(B, device=device).split(config.micro_batch):
        part = rollout.rows(rows)
        tokens = part.prompt, part.plan, part.codes
        logp = score(policy, *tokens, config.guidance)  # (len(rows), T)
        logp_ref = None
        if config.beta:
            with torch.no_grad():
                logp_ref = score(reference, *tokens, config.guidance)
        loss, kl = objective.policy_loss(logp, logp_ref, A_t[rows], part.valid, config.beta, B)
        loss.backward()
        parts.append((loss.detach(), kl, logp.detach()))
    grad_norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)  # clips in place

    # Look at the numbers, then update.
    losses, kls, logps = zip(*parts)
    stats = dict(
        **step_stats(rollout, rewards.view(P, G), components, exact, A, A_t, high),
        loss=torch.stack(losses).sum(),
        kl=torch.stack(kls).sum(),
        logp_diff_mean=logp_difference(rollout, torch.cat(logps)),
        grad_norm=grad_norm,
    )
    # All numbers come to the host in one transfer.
    stats = dict(zip(stats, torch.stack([*stats.values()]).tolist()))
    check_one_policy(stats["logp_diff_mean"], config, device)
    optimizer.step()
    optimizer.zero_grad()
    return stats


def entropy_moments(entropy, valid):
    """Mean and std of each row's entropy over its valid tokens. (B, T) -> (B,), (B,)."""
    n = valid.sum(1).clamp(min=1)
    mean = (entropy * valid).sum(1) / n
    return mean, (((entropy - mean[:, None]) ** 2 * valid).sum(1) / n).sqrt()


def step_stats(rollout, rewards, components, exact, A, A_t, high):
    """Describe rewards (P, G), their components, entropies and bonus. Returns a dict of scalars."""
    c = rollout.plan.shape[1]
    equal = rewards.amax(1) == rewards.amin(1)  # (P,)
    plan_entropy, _ = entropy_moments(rollout.entropy[:, :c], rollout.valid[:, :c])
    image_entropy, image_std = entropy_moments(rollout.entropy[:, c:], rollout.valid[:, c:])
    bonus = torch.where(high, A_t - A[:, None], 0.0)  # (B, T); high tokens are never low
    entropy_of_high = torch.where(high, rollout.entropy, 0.0)
    turned = high & (A[:, None] < 0) & (A_t > 0)
    return {
        "reward": rewards.mean(),
        "exact": exact.mean(),
        **{f"reward/{name}": value.nanmean() for name, value in components.items()},
        "reward_std": rewards.std(1).mean(),
        "frac_reward_zero_std": equal.float().mean(),
        "plan_entropy": plan_entropy.mean(),
        "image_entropy": image_entropy.mean(),
        "image_entropy_std": image_std.mean(),
        # the coefficient; for eggrpo-released a mean; 0 without bonus
        "lambda": bonus.sum() / entropy_of_high.sum().clamp(min=1e-9),
        "turned_signs": turned.sum() / high.sum().clamp(min=1),
    }


def logp_difference(rollout, logp):
    """Compare log-probs (B, T) with those of sampling, before the update. Returns the mean of the
    absolute difference over the valid tokens, nats."""
    difference = (logp - rollout.logp).abs() * rollout.valid
    return difference.sum() / rollout.valid.sum()


# Bounds of logp_diff_mean in nats, by common.network_dtype; measured in docs/reproducibility.md.
LOGP_DIFF_BOUND = {torch.float32: 5e-6, torch.bfloat16: 5e-3}


def check_one_policy(difference, config, device):
    """Raise UserError if sampler and learner are not one policy: their log-probs differ by more
    than rounding does, which guidance g multiplies by up to |g| + |1 - g|. NaN passes: a run that
    has diverged is stopped in main."""
    bound = LOGP_DIFF_BOUND[common.network_dtype(device)]
    bound *= abs(config.guidance) + abs(1 - config.guidance)
    excess = f"logp_diff_mean is {difference:.1e}, more than {bound:.0e}"
    check(not difference > bound, f"{excess}: sampler and learner are not the same policy")


@common.stage("--micro-batch of eggrpo, then --prompts")
def main(argv=None):
    config = common.parse(Config, PRESETS, __doc__, argv, METHODS)
    name = config.name or f"{config.method}-{config.seed}"
    folder = config.folder / name
    device = common.pick_device(config.device)
    env = evaluate.load_env(config, device)
    reference = evaluate.load_base(config, env)
    names = f"{name}/policy.pt", f"{name}/log.jsonl"
    script = f"eggrpo --method {config.method} --name {name}"
    run = Run(*names, config, device, reference.origin, script, rewards=", ".join(REWARDS))
    if not run.steps:
        return
    policy = copy.deepcopy(reference)
    optimizer = torch.optim.AdamW(policy.parameters(), betas=(0.9, 0.95), weight_decay=0.0)
    if run.steps.start == 0:
        # steps count from 0 in the log; -1 is before training
        run.log(-1, **evaluate.evaluate_in_training(env, policy, config, folder, 0))
    bar = run.progress(config.method, policy, optimizer)
    for step in bar:
        started = time.time()
        rate = config.lr * min((step + 1) / 10, 1 - step / config.steps)
        optimizer.param_groups[0]["lr"] = rate
        stats = train_step(policy, reference, optimizer, env, config, step)
        stats["seconds"] = time.time() - started
        bar.set_postfix({name: f"{stats[name]:.2f}" for name in ("reward", "exact", "kl")})
        done = step + 1
        if done % config.eval_every == 0 or done == config.steps:
            stats |= evaluate.evaluate_in_training(env, policy, config, folder, done)
        run.log(step, **stats)
        run.save(step, policy, optimizer)
    print(f"{config.method}: {config.steps} steps; see {folder}")


if __name__ == "__main__":
    common.run(main)
