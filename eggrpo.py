"""Entropy-Guided Group Relative Policy Optimization (EG-GRPO, ICLR 2026, arXiv 2604.02355), from
rewards to a gradient.

    python eggrpo.py --preset cpu                           -> out/cpu/eggrpo-0/
    python eggrpo.py --preset cpu --method grpo --seed 1    -> out/cpu/grpo-1/

Each holds policy.pt, log.jsonl, gallery-*.png and training.gif.

The file reads in the order of the data. First the mathematics: plain tensors in, plain tensors out,
nothing of this project needed, so that it can be used in another trainer. Then one step of the
loop: sample, score, advantages, shape, update. EG-GRPO is GRPO and one function, shape_advantages.

Differences from the paper and its released code:
- Thresholds go by rank, so that the counts are exact where entropies tie; the released code
  compares strictly with the entropies at sorted[int(.2 T)] and sorted[int(.5 T)] (of 576 image
  tokens 115 low and 287 high; by rank 115 and 288).
- Plan statistics go over the valid tokens; the released code takes "entropy > 0" for valid, which
  padding passes.
- Sampling and scoring are one policy: no top-k, and guidance, where used, on both sides. Rollout
  log-probs are held against re-scored ones at every step.
- Probabilities, entropies and ratios are float32, not bf16.
- A group whose rewards are all equal gives advantages of exactly 0, and is counted in the log.
- All weights are trained; the released code freezes image head and embeddings of its 7 B model.

Dimension letters: P prompts a step, G rollouts a prompt, B = P * G sequences, C plan slots, L image
tokens, T = C + L, V vocabulary.
"""

import math
import time
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

import evaluate
import rewards
import runtime
from methods import METHODS, PRESETS, Config
from model import generate, score, token_logp
from pretrain import load_base, word_tensors
from scenes import END, WORLDS, make_scene
from tiny_vq.train import load_tokenizer

# --- the mathematics ------------------------------------------------------------------------------


def group_advantages(rewards, eps=1e-4, divide_by_std=True):
    """Compare each rollout with the others of its prompt: A = (R - mean) / (std + eps), std with
    ddof = 1.

    rewards: (P, G), one row a prompt. divide_by_std=False: A = R - mean (Dr. GRPO). Returns (P, G);
    a row of equal rewards gives exactly 0, whatever rounding does to its mean. Raises ValueError
    for G = 1, where there is nobody to be compared with.

    >>> group_advantages(torch.tensor([[0.0, 1.0]]), eps=0.0)
    tensor([[-0.7071,  0.7071]])
    """
    if rewards.dim() != 2 or rewards.shape[1] < 2:
        raise ValueError(
            f"rewards must be (prompts, 2 rollouts or more), not {tuple(rewards.shape)}"
        )
    rewards = rewards.to(torch.promote_types(rewards.dtype, torch.float32))    # float64 stays
    advantages = rewards - rewards.mean(1, keepdim=True)
    if divide_by_std:
        advantages = advantages / (rewards.std(1, keepdim=True) + eps)
    constant = rewards.amax(1, keepdim=True) == rewards.amin(1, keepdim=True)
    return advantages.masked_fill(constant, 0.0)


def differentiable_entropy(logits):
    """Entropy of the full next-token distribution as a fraction of its maximum: H = -sum_v p(v) log
    p(v) / log V.

    logits: (..., V). Returns (...) in [0, 1], in float32 or better.
    """
    logp = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
    return -(logp.exp() * logp.clamp(min=-1e4)).sum(-1) / math.log(logits.shape[-1])   # 0 log 0 = 0


@torch.no_grad()
def token_entropy(logits):
    """The same without gradient: EG-GRPO's masks and its bonus look at entropy, they do not push
    it."""
    return differentiable_entropy(logits)


def entropy_masks(entropy, valid, low_frac=0.2, high_frac=0.5, rule="rank"):
    """Find each row's low-entropy and high-entropy tokens, by rank among its valid tokens.

    entropy: (B, T), valid: (B, T) bool, one modality. Of a row's n valid tokens in ascending order
    (of two equal ones the earlier ranks lower), low is the first floor(low_frac * n) and high the
    last floor(high_frac * n). rule="released" compares strictly with thresholds as the released
    code does: low is H < sorted[int(low_frac * n)], high is H > sorted[int((1 - high_frac) * n)],
    which masks nothing where entropies tie. Returns low, high: (B, T) bool. Raises ValueError where
    the fractions leave [0, 1] or overlap.

    >>> entropy = torch.tensor([[.30, .10, .80, .20, .60, .50, .70, .40]])
    >>> valid = torch.ones(1, 8, dtype=torch.bool)
    >>> low, high = entropy_masks(entropy, valid, low_frac=0.25, high_frac=0.5)
    >>> low.nonzero()[:, 1].tolist(), high.nonzero()[:, 1].tolist()
    ([1, 3], [2, 4, 5, 6])
    """
    if not (0 <= low_frac <= 1 and 0 <= high_frac <= 1 and low_frac + high_frac <= 1):
        raise ValueError(
            f"low_frac {low_frac}, high_frac {high_frac}: must lie in [0, 1], add up to at most 1"
        )
    ascending, order = entropy.masked_fill(~valid, float("inf")).sort(dim=1, stable=True)
    n = valid.sum(1, keepdim=True)
    # in float64: in float32, 0.53 * 100 falls short of 53
    count = lambda frac: torch.floor(frac * n.double() + 1e-9).long()
    if rule == "released":
        threshold = lambda frac: ascending.gather(1, torch.minimum(count(frac), n - 1).clamp(min=0))
        return valid & (entropy < threshold(low_frac)), valid & (entropy > threshold(1 - high_frac))
    rank = order.argsort(dim=1)                                   # (B, T); invalid tokens rank last
    return valid & (rank < count(low_frac)), valid & (rank >= n - count(high_frac))


def shape_advantages(advantage, entropy, valid, low_frac=0.2, high_frac=0.5, bonus_coef=0.3,
                     bonus_cap=0.3, rule="rank"):
    """Turn one advantage a rollout into one a token: the whole of EG-GRPO. One modality at a time.

    advantage: (B,), entropy: (B, T) in [0, 1], valid: (B, T) bool. Returns (B, T).
        d_t = min(bonus_cap * |A|, bonus_coef * H_t) on high tokens, 0 elsewhere
        A_t = (A + d_t) * [t not in low]                    d_t never flips the sign of A
    """
    low, high = entropy_masks(entropy, valid, low_frac, high_frac, rule)
    a = advantage[:, None]                                                     # (B, 1)
    bonus = torch.minimum(bonus_cap * a.abs(), bonus_coef * entropy)           # (B, T)
    return (a + torch.where(high, bonus, 0.0)) * ~low


def policy_loss(logp, logp_old, logp_ref, advantage, valid, beta=0.01, clip_low=0.2, clip_high=0.2,
                denominator=None):
    """The clipped objective of GRPO, a mean over valid tokens, with a KL term toward the reference
    on all of them.

        loss    = -sum_valid [ min(ratio_t A_t, clip(ratio_t) A_t) - beta KL_t ] / number of valid
        ratio_t = exp(logp - logp_old)
        KL_t    = exp(ref - logp) - (ref - logp) - 1                   the k3 estimator

    logp, logp_old, logp_ref, advantage: (B, T); valid: (B, T) bool, or weights of at least 0 where
    modalities count differently. logp_ref may be None where beta is 0. denominator: the sum of
    `valid` over the whole batch, where this is a part of it. Returns the loss, a scalar, and a dict
    of scalars without gradient: kl and clipped (this part's share of the batch's mean), ratio_min,
    ratio_max.
    """
    denominator = valid.sum() if denominator is None else denominator
    there = valid > 0                                           # padding may hold anything, NaN too
    ratio = torch.where(there, logp - logp_old, 0.0).exp()
    advantage = torch.where(there, advantage, 0.0)
    surrogate = torch.minimum(ratio * advantage,
                              ratio.clamp(1 - clip_low, 1 + clip_high) * advantage)
    kl = torch.zeros_like(ratio)
    if logp_ref is not None:
        gap = torch.where(there, logp_ref - logp, 0.0)
        kl = gap.exp() - gap - 1
    loss = -((surrogate - beta * kl) * valid).sum() / denominator
    clipped = (ratio < 1 - clip_low) & (advantage < 0) | (ratio > 1 + clip_high) & (advantage > 0)
    stats = dict(kl=(kl * valid).sum() / denominator, clipped=(clipped * valid).sum() / denominator,
                 ratio_min=ratio.min(), ratio_max=ratio.max())
    return loss, {name: value.detach() for name, value in stats.items()}


# --- one step -------------------------------------------------------------------------------------

class Rollout(NamedTuple):
    prompt: Tensor     # (B, S) word ids, each prompt G times in a row
    plan: Tensor       # (B, C) word ids
    codes: Tensor      # (B, L)
    logp: Tensor       # (B, T) of the sampled tokens when they were sampled, nats
    entropy: Tensor    # (B, T) of the distributions that they were sampled from, fraction of log V
    valid: Tensor      # (B, T) bool
    images: Tensor     # (B, 3, h, w) in [0, 1]
    rewards: Tensor    # (P, G)
    parts: dict        # {name: (P, G)}, NaN where a component does not apply
    exact: Tensor      # (P, G)


def draw_noise(policy, number, per_plan, *key):
    """Draw the noise of `number` sequences, (number, T): each `per_plan` in a row write the same
    plan, for the same noise writes it. key: as for generator."""
    noise = torch.rand(number, policy.C + policy.L, generator=runtime.generator(*key))
    noise[:, :policy.C] = noise[::per_plan, :policy.C].repeat_interleave(per_plan, 0)
    return noise


@torch.no_grad()
def make_rollout(policy, eye, scenes, config, step):
    """Sample plans and pictures for each scene's prompt and score the pictures. Returns a Rollout.

    What comes from the host is sent first; from then on nothing waits for the device.
    """
    m, each = config.images_per_plan, config.group * config.images_per_plan
    prompt = word_tensors(eye.world, scenes)[0]                                            # (P, S)
    noise = draw_noise(policy, config.sequences, m, config.seed, "rollout", step)
    prompt, noise = prompt.to(eye.device), noise.to(eye.device)
    want = rewards.make_want(eye.world, [s for s in scenes for _ in range(each)], eye.device)

    draw = generate(policy, prompt, noise, guidance=config.guidance)
    images = eye.tokenizer.decode(draw.codes).float()                             # (B, 3, h, w)
    reward, parts, exact = rewards.score(images, want, eye.world)
    reward = exact if config.reward == "exact" else reward
    grouped = lambda x: x.view(len(scenes), each)                                 # (B,) -> (P, G)
    rollout = Rollout(prompt.repeat_interleave(each, 0), draw.plan, draw.codes, draw.logp,
                      draw.entropy, draw.valid, images, grouped(reward),
                      {k: grouped(v) for k, v in parts.items()}, grouped(exact))
    if config.score_guidance:            # the released mismatch: entropy too is that of scoring
        logits = score(policy, rollout.prompt, draw.plan, draw.codes, config.score_guidance)
        rollout = rollout._replace(entropy=torch.cat([token_entropy(x) for x in logits], 1))
    return rollout


class Batch(NamedTuple):
    """What an update needs of each sequence; all (B, ...), so that it can be cut by rows."""
    prompt: Tensor
    plan: Tensor
    codes: Tensor
    logp: Tensor       # (B, T) log-probs when sampled
    valid: Tensor      # (B, T) bool
    advantage: Tensor  # (B, T) shaped
    low: Tensor        # (B, T) bool
    high: Tensor       # (B, T) bool
    weight: Tensor     # (B, T) what the token counts in the loss; 0 at padding
    counted: Tensor    # (B, T) what it counts in the denominator


def shape_rollout(rollout, config):
    """Turn rewards and entropies into an advantage and a weight for each token. Returns a Batch.

    Plan and image are shaped each by itself, once a batch of rollouts, however many updates follow.
    """
    a = group_advantages(rollout.rewards, divide_by_std=not config.no_std).flatten()          # (B,)
    c, knobs = rollout.plan.shape[1], (config.low_frac, config.high_frac)
    shaped, low, high = [], [], []
    for name, part in (("plan", slice(None, c)), ("image", slice(c, None))):
        entropy, valid = rollout.entropy[:, part], rollout.valid[:, part]
        entropy = 1 - entropy if config.reverse else entropy
        if config.shaped in ("both", name):
            masks = entropy_masks(entropy, valid, *knobs, config.threshold)
            advantage = shape_advantages(a, entropy, valid, *knobs, config.bonus_coef,
                                         config.bonus_cap, config.threshold)
        else:
            masks, advantage = (torch.zeros_like(valid),) * 2, a[:, None].expand_as(entropy)
        shaped.append(advantage), low.append(masks[0]), high.append(masks[1])
    weight = rollout.valid.float()
    weight[:, :c] *= config.text_weight
    if config.drop_constant:
        varied = rollout.rewards.amax(1) > rollout.rewards.amin(1)                            # (P,)
        weight = weight * varied.repeat_interleave(rollout.rewards.shape[1])[:, None]
    counted = torch.ones_like(weight) if config.constant_denominator else weight
    return Batch(rollout.prompt, rollout.plan, rollout.codes, rollout.logp, rollout.valid,
                 torch.cat(shaped, 1), torch.cat(low, 1), torch.cat(high, 1), weight, counted)


def part_loss(policy, reference, part, denominator, config):
    """Compute the loss of some sequences of a batch. Returns it and what is logged of it,
    scalars."""
    tokens, guidance = part[:3], config.score_guidance or config.guidance
    logits = score(policy, *tokens, guidance)                     # words (B, C, V), codes (B, L, V)
    logp, logp_ref = token_logp(*logits, part.plan, part.codes), None                       # (B, T)
    if config.beta:
        with torch.no_grad():
            logp_ref = token_logp(*score(reference, *tokens, guidance), part.plan, part.codes)
    # with the released mismatch the ratio is 1 by construction, and hides it
    logp_old = logp.detach() if config.score_guidance else part.logp
    loss, stats = policy_loss(logp, logp_old, logp_ref, part.advantage, part.weight, config.beta,
                              config.clip_low, config.clip_high, denominator)
    if config.entropy_coef:
        entropy = torch.cat([differentiable_entropy(x) for x in logits], 1)                 # (B, T)
        bonus = (torch.where(part.high, entropy, 0.0) * part.weight).sum() / denominator
        loss = loss - config.entropy_coef * bonus
    difference = (logp.detach() - part.logp).abs() * part.valid                             # (B, T)
    return loss, stats | dict(
        loss=loss.detach(), logp_diff_mean=difference.sum() / part.valid.sum(),
        logp_diff_max=(difference / (1 + part.logp.abs())).max())


def deal(batch, config, step):
    """Deal a batch's rows to updates: inner_epochs times round, each in `minibatches` parts.
    Returns a list of (n,) row numbers."""
    size, device, dealt = len(batch.plan), batch.plan.device, []
    for epoch in range(config.inner_epochs):
        rows = torch.arange(size, device=device)
        if config.minibatches > 1:
            chance = runtime.generator(config.seed, "minibatch", step, epoch)
            rows = torch.randperm(size, generator=chance).to(device)
        dealt += rows.chunk(config.minibatches)
    return dealt


def merge(records, otherwise):
    """Join records of scalars key by key: extremes stay extremes, all else by `otherwise`."""
    extremes = {"ratio_min": torch.amin, "ratio_max": torch.amax, "logp_diff_mean": torch.amax,
                "logp_diff_max": torch.amax}
    return {k: extremes.get(k, otherwise)(torch.stack([r[k] for r in records]), 0)
            for k in records[0]}


def update(policy, reference, optimizer, batch, config, step, known={}):
    """Update the policy on a batch. Returns what is logged of it, floats: means over the step.

    known: what else is logged of the step, scalars. All of it comes to the host in one transfer an
    update, before the weights are touched: the only time that the host waits for the device.
    Raises BadNumbers, the weights as they were.
    """
    logged = []
    for rows in deal(batch, config, step):
        # of the whole update, not of a part of it: micro-batches change nothing
        denominator, parts = batch.counted[rows].sum().clamp(min=1), []
        for some in rows.split(config.micro_batch):
            loss, stats = part_loss(policy, reference, Batch(*(x[some] for x in batch)),
                                    denominator, config)
            loss.backward()
            parts.append(stats)
        stats = known | merge(parts, torch.sum)      # each part holds its share of the mean
        stats["grad_norm"] = torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        if logged:                                       # the learner has moved on from the sampler
            stats["logp_diff_mean"] = stats["logp_diff_max"] = torch.zeros_like(stats["loss"])
        stats = dict(zip(stats, torch.stack([*stats.values()]).cpu()))
        check_numbers(stats, config, batch.plan.device)
        optimizer.step()
        optimizer.zero_grad()
        logged.append(stats)
    return {k: v.item() for k, v in merge(logged, torch.mean).items()}


def entropy_moments(entropy, valid):
    """Mean and std of each row's entropy over its valid tokens. (B, T) -> (B,), (B,)."""
    n = valid.sum(1).clamp(min=1)
    mean = (entropy * valid).sum(1) / n
    return mean, (((entropy - mean[:, None]) ** 2 * valid).sum(1) / n).sqrt()


def entropy_stats(entropy, valid, plan_slots):
    """Average the mean and the std of entropy over a rollout's valid tokens, for plan and image;
    scalars."""
    stats = {}
    for name, part in (("plan", slice(None, plan_slots)), ("image", slice(plan_slots, None))):
        mean, std = entropy_moments(entropy[:, part], valid[:, part])
        stats |= {f"{name}_entropy": mean.mean(), f"{name}_entropy_std": std.mean()}
    return stats


def rollout_stats(rollout, batch, config):
    """What is logged of a batch of rollouts, scalars."""
    c, r, n = rollout.plan.shape[1], rollout.rewards, rollout.valid.sum()
    plain = group_advantages(r, divide_by_std=not config.no_std).flatten()[:, None]         # (B, 1)
    bonus = torch.where(rollout.valid & ~batch.low, batch.advantage - plain, 0.0)
    return dict(
        reward=r.mean(), exact=rollout.exact.mean(),
        **{name: part.nanmean() for name, part in rollout.parts.items()},
        group_std=r.std(1).mean(),
        constant_groups=(r.amax(1) == r.amin(1)).float().mean(),
        plan_length=rollout.valid[:, :c].sum(1).float().mean(),
        unstopped=(rollout.plan != END).all(1).float().mean(),
        low_share=batch.low.sum() / n, high_share=batch.high.sum() / n,
        bonus=bonus.sum() / n, **entropy_stats(rollout.entropy, rollout.valid, c))


# --- the loop -------------------------------------------------------------------------------------

# nats, and a fraction of 1 + |logp|; the README gives the figures they are chosen from
LOGP_DIFF_BOUNDS = {"cpu": dict(logp_diff_mean=5e-6, logp_diff_max=1e-3),
                    "cuda": dict(logp_diff_mean=0.05, logp_diff_max=0.5)}


class BadNumbers(RuntimeError):
    """A number says that the next update would do harm."""


def check_numbers(stats, config, device):
    """Stop before an update that would do harm. Raises BadNumbers.

    Nothing may be NaN or infinite, except components that no prompt of the batch asks for. Sampler
    and learner must be one policy: before the first update the rollout's log-probs equal the
    re-scored ones up to rounding, and the ratio is 1. Two figures are bounded, the mean absolute
    difference and the largest relative to 1 + |logp|, because rounding grows with |logp|. Wider
    bounds on CUDA, where bf16 rounds a whole sequence differently from a single slot.
    """
    for name, value in stats.items():
        if not (value.isfinite() or name in rewards.REWARDS):
            raise BadNumbers(f"{name} is {value.item()}")
    for name, bound in LOGP_DIFF_BOUNDS["cuda" if device.type == "cuda" else "cpu"].items():
        if stats[name] > bound and not config.score_guidance:
            raise BadNumbers(f"{name} is {stats[name]:.1e}, more than {bound:.0e}: sampler and "
                             "learner are not the same policy")


def training_scenes(world, config, step):
    """Make the P scenes of a step. Every third has a rare pair."""
    scenes, seed = [], 1000 + config.seed
    for i in range(step * config.prompts, (step + 1) * config.prompts):
        rare = i % 3 == 2
        split, index = ("rare-train", i // 3) if rare else ("train", i - i // 3)
        scenes.append(make_scene(world, split, seed, index))
    return scenes


def main(argv=None):
    config, maker = runtime.parse("eggrpo.py", Config, PRESETS, __doc__, argv, METHODS)
    name = config.name or f"{config.method}-{config.seed}"
    folder = Path(config.out) / config.preset / name
    path = folder / "policy.pt"
    claim = runtime.lock(path)                                      # until main returns
    record = runtime.resume(path, config, maker)
    if record and record["step"] == config.steps:
        return print(f"{config.method}: finished earlier, {path}")
    device, world = runtime.pick_device(config.device), WORLDS[config.preset]
    eye = evaluate.Eye(load_tokenizer(config.preset, config.out, device), world, device)
    reference = load_base(config.preset, config.out, device)
    policy = load_base(config.preset, config.out, device).requires_grad_(True)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=config.lr, betas=(0.9, 0.95),
                                  weight_decay=0.0, fused=device.type == "cuda")
    if record:
        runtime.restore(policy, record, path, maker)
        optimizer.load_state_dict(record["optimizer"])
    first, started = (record["step"] if record else 0), time.time()
    log = runtime.Log(folder / "log.jsonl", config, device, first)
    look = lambda step: evaluate.look(eye, policy, config.eval_prompts, folder, step,
                                      config.guidance)
    if not first:
        for old in folder.glob("gallery-*.png"):
            old.unlink()
        log(step=-1, **look(0))
    if config.score_guidance:
        print(f"note: sampled under guidance {config.guidance:g}, scored under "
              f"{config.score_guidance:g}: logp_diff_mean in the log says how far apart they are")

    scenes = training_scenes(world, config, first)
    with runtime.Interruptible() as stop:
        bar = tqdm(range(first, config.steps), config.method, initial=first, total=config.steps)
        for step in bar:
            tick = time.time()
            rollout = make_rollout(policy, eye, scenes, config, step)
            scenes = training_scenes(world, config, step + 1)      # while the device is sampling
            batch = shape_rollout(rollout, config)            # <- the only line that makes it EG
            for group in optimizer.param_groups:
                group["lr"] = config.lr * min(1, (step + 1) / 10)
            try:
                stats = update(policy, reference, optimizer, batch, config, step,
                               rollout_stats(rollout, batch, config))
            except BadNumbers as error:
                rewards.require_sound(rollout.rewards, rollout.parts)      # a user's, perhaps
                runtime.refuse(step, str(error), path, batch._asdict())
            stats["seconds"] = time.time() - tick
            bar.set_postfix({k: f"{stats[k]:.2f}" for k in ("reward", "exact", "kl")})
            ended = step + 1 == config.steps
            if ended or (step + 1) % config.eval_every == 0:
                stats |= look(step + 1)
                tqdm.write(f"step {step + 1}: held-out reward {stats['eval_reward']:.3f}, exact "
                           f"{stats['eval_exact']:.3f}, of rare pairs {stats['rare_exact']:.3f}")
            log(step=step, **stats)
            if ended:
                evaluate.animate(folder)
            # the first save comes early: a step that is refused costs the steps since the last one
            if ended or stop.signal or step == 0 or (step + 1) % config.save_every == 0:
                runtime.save_stage(path, "policy", config, step + 1, policy, optimizer)
                if stop.signal:
                    stop.leave(path, maker)
    print(f"{config.method}: held-out reward {stats['eval_reward']:.3f}, "
          f"exact {stats['eval_exact']:.3f}, of rare pairs {stats['rare_exact']:.3f}, after "
          f"{config.steps} steps, "
          f"{time.time() - started:.0f} s; pictures in {folder}")


if __name__ == "__main__":
    runtime.run(main)
