"""Entropy-Guided Group Relative Policy Optimization (EG-GRPO, ICLR 2026, arXiv 2604.02355).

    python eggrpo.py --preset cpu                           -> out/cpu/eggrpo-0/
    python eggrpo.py --preset cpu --method grpo --seed 1    -> out/cpu/grpo-1/

The file reads in the order of the data: Config, the mathematics (plain tensors in and out, usable
in another trainer), one step, the loop. EG-GRPO is GRPO and one function, shape_advantages.

Differences from the paper and its released code:
- Masks go by rank, so that counts are exact if entropies tie; the released code compares strictly
  with the entropies at sorted[int(.2 T)] and sorted[int(.5 T)] (of 576 image tokens 115 low and 287
  high; by rank 115 and 288).
- One update per batch of rollouts, as the released code makes: the ratio is 1, and there is nothing
  to clip, no inner epochs and no minibatches.
- Plan statistics go over the valid tokens; the released code takes "entropy > 0" for valid, which
  padding passes.
- Sampling and scoring use one policy: no top-k, and guidance, if used, on both sides. Rollout
  log-probs are compared with re-scored ones at every step.
- Probabilities, entropies and ratios are float32, not bf16.
- A group of equal rewards gives advantages of exactly 0, and is counted in the log.
- All weights are trained; the released code freezes image head and embeddings of its 7 B model.

Dimension letters: P prompts per step, G rollouts per prompt, B = P * G sequences, S prompt slots, C
plan slots, L image tokens, T = C + L, V vocabulary.
"""

import re
import time
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

import common
import evaluate
import rewards
from checkpoint import Run
from common import check
from model import forward_logits, load_base, normalized_entropy, token_logp
from rollout import check_stats, load_env, make_rollout, rollout_stats
from rollout import split_modalities, training_scenes


@dataclass(frozen=True)
class Config(common.BaseConfig):
    method: str = "eggrpo"  # a key of METHODS, which sets some of the fields below
    name: str = ""  # of the run's folder; default: <method>-<seed>
    steps: int = 250  # batches of rollouts (released code: 1600)
    prompts: int = 8  # P (released code: 16)
    plans_per_prompt: int = 8  # G, with one image each (released code: 8)
    lr: float = 5e-4  # after 10 warm-up steps, linearly to 0 (released code: 1e-6, 7 B parameters)
    beta: float = 0.01  # weight of the KL term (released code: .01)
    low_frac: float = 0.2  # fraction of tokens without reward gradient (paper: .2)
    high_frac: float = 0.5  # fraction of tokens with a bonus (paper: .5)
    kappa: float = 1.0  # bonus as a fraction of what exclusion takes away (paper: in (0, 1])
    guidance: float = 1.0  # of the policy, sampled and scored (released code: 5, sampled only)
    micro_batch: int = 16  # sequences per forward pass: changes memory, not results
    eval_every: int = 50  # steps between held-out evaluations, each with a gallery
    eval_prompts: int = 192  # per split: usual and rare pairs
    save_every: int = 25  # steps

    RANGES = dict(
        plans_per_prompt=(2, common.LARGEST),  # rollouts are compared
        low_frac=(0, 1), high_frac=(0, 1),
    )  # fmt: skip

    def check(self):
        super().check()
        low, high = self.low_frac, self.high_frac
        check(low + high <= 1, f"--low-frac {low}, --high-frac {high}: must add up to at most 1")
        valid = re.fullmatch(r"[\w.-]*\w", self.name or "a")
        check(valid, f"--name {self.name!r}: letters, digits, '_', '-' and '.' only")


PRESETS = {
    "smoke": dict(steps=4, prompts=2, plans_per_prompt=4, eval_every=2, eval_prompts=12),
    "cpu": dict(),
    "gpu": dict(steps=600, prompts=16, plans_per_prompt=16, lr=1e-4, micro_batch=64,
                eval_prompts=384),
}  # fmt: skip


class Method(NamedTuple):
    about: str
    values: dict = {}  # of Config's fields
    modalities: tuple = ("plan", "image")  # those that are shaped
    exclude: bool = True  # low tokens lose their advantage
    bonus: bool = True  # high tokens get a bonus


METHODS = {  # all share one loop and one loss
    "grpo": Method("one advantage for every token", modalities=()),
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


# --- the mathematics ------------------------------------------------------------------------------


def group_advantages(rewards, eps=1e-4):
    """Compare each rollout with the others of its prompt: A = (R - mean) / (std + eps), ddof 1.

    rewards: (P, G). Returns (P, G); a row of equal rewards gives exactly 0, whatever rounding does
    to its mean. Raises ValueError if G < 2.

    >>> group_advantages(torch.tensor([[0.0, 1.0]]), eps=0.0)
    tensor([[-0.7071,  0.7071]])
    """
    if rewards.dim() != 2 or rewards.shape[1] < 2:
        raise ValueError(f"rewards must be (P, G) with G of at least 2: {tuple(rewards.shape)}")
    rewards = rewards.to(torch.promote_types(rewards.dtype, torch.float32))  # float64 stays
    advantages = (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + eps)
    equal = rewards.amax(1, keepdim=True) == rewards.amin(1, keepdim=True)
    return advantages.masked_fill(equal, 0.0)


@torch.no_grad()
def token_entropy(logits):
    """Entropy of the full next-token distribution as a fraction of log V, its maximum, without
    gradient. logits: (..., V). Returns (...) in [0, 1], in float32 or better."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return normalized_entropy(logits.log_softmax(-1))


def entropy_masks(entropy, valid, low_frac=0.2, high_frac=0.5):
    """Find each row's low-entropy and high-entropy tokens among its n valid ones; one modality.

    entropy: (B, T), valid: (B, T) bool. Of the tokens in ascending order, earlier ones first among
    equals, low is the first floor(low_frac * n) and high the last floor(high_frac * n). Returns
    low, high: (B, T) bool. Raises ValueError if the fractions overlap.

    >>> entropy = torch.tensor([[.30, .10, .80, .20, .60, .50, .70, .40]])
    >>> low, high = entropy_masks(entropy, torch.ones(1, 8, dtype=torch.bool), low_frac=0.25)
    >>> low.nonzero()[:, 1].tolist(), high.nonzero()[:, 1].tolist()
    ([1, 3], [2, 4, 5, 6])
    """
    if not (0 <= low_frac <= 1 and 0 <= high_frac <= 1 and low_frac + high_frac <= 1):
        fractions = f"low_frac {low_frac}, high_frac {high_frac}"
        raise ValueError(f"{fractions}: must lie in [0, 1] and add up to at most 1")
    order = entropy.masked_fill(~valid, float("inf")).argsort(dim=1, stable=True)
    n = valid.sum(1, keepdim=True)  # (B, 1)

    def count(fraction):  # in integers: in float32, 0.53 * 100 is less than 53
        exact = Fraction(fraction).limit_denominator(10**6)
        return n * exact.numerator // exact.denominator

    rank = order.argsort(dim=1)  # (B, T); invalid tokens rank last
    return valid & (rank < count(low_frac)), valid & (rank >= n - count(high_frac))


def bonus_coefficient(advantage, entropy, low, high, valid, kappa=1.0):
    """Calibrate the bonus: a fraction kappa of what exclusion takes away is spent on it.

        lambda = kappa * sum_i |A_i| n_low,i / T_i  /  sum_i (1 / T_i) sum_{t high} H_t

    The sums go over the sequences i of a step's whole batch, in the weights of the loss: T_i counts
    the valid tokens of sequence i, n_low,i those that are low. Arguments: as for shape_advantages.
    Returns a scalar, 0 if no token is high.

    >>> entropy = torch.tensor([[.1, .4, .2, .5], [.3, .6, .0, .0]])
    >>> low = torch.tensor([[True, False, False, False], [True, False, False, False]])
    >>> high = torch.tensor([[False, True, False, True], [False, True, False, False]])
    >>> valid = torch.tensor([[True, True, True, True], [True, True, False, False]])
    >>> bonus_coefficient(torch.tensor([1.0, -2.0]), entropy, low, high, valid)  # 1.25 / .525
    tensor(2.3810)
    """
    length = valid.sum(1).clamp(min=1)  # (B,)
    excluded = (advantage.abs() * low.sum(1) / length).sum()
    entropy_of_high = (torch.where(high, entropy, 0.0).sum(1) / length).sum()
    return torch.where(entropy_of_high > 0, kappa * excluded / entropy_of_high, 0.0)


def shape_advantages(advantage, entropy, low, high, valid, kappa=1.0, exclude=True):
    """Turn one advantage per rollout into one per token: the whole of EG-GRPO.

        A_t = [t not low] A + [t high] lambda H_t                 lambda: see bonus_coefficient

    advantage: (B,); entropy: (B, T) in [0, 1], when the tokens were sampled; low, high, valid: (B,
    T) bool. The rows are a step's whole batch. kappa: at least 0 (paper: in (0, 1]). exclude: False
    leaves low tokens their advantage. Returns (B, T).
    """
    coefficient = bonus_coefficient(advantage, entropy, low, high, valid, kappa)
    a = advantage[:, None].expand_as(entropy)  # (B, T)
    if exclude:
        a = a.masked_fill(low, 0.0)
    return a + torch.where(high, coefficient * entropy, 0.0)


def shape_advantages_released(advantage, entropy, low, high, bonus_coef=0.3, bonus_cap=0.3):
    """Shape advantages as the released code does, which is not the paper's rule.

        d_t = min(bonus_cap |A|, bonus_coef H_t) on high tokens, 0 elsewhere
        A_t = (A + d_t) [t not low]                               d_t never turns the sign of A

    Arguments and result as for shape_advantages.
    """
    a = advantage[:, None]  # (B, 1)
    bonus = torch.minimum(bonus_cap * a.abs(), bonus_coef * entropy)  # (B, T)
    return (a + torch.where(high, bonus, 0.0)).masked_fill(low, 0.0)


def policy_loss(logp, logp_ref, advantage, valid, beta=0.01, sequences=None):
    """The objective of GRPO: a mean over sequences of means over tokens, with a KL term on all.

        loss    = -(1/B) sum_i (1/T_i) sum_t [ ratio_t A_t - beta KL_t ]
        ratio_t = exp(logp - logp_old), which is 1 here; its gradient is that of logp
        KL_t    = exp(ref - logp) - (ref - logp) - 1                   the k3 estimator

    logp, logp_ref, advantage: (B, T); valid: (B, T) bool, of which row i has T_i. logp_ref may be
    None if beta is 0. sequences: number of those of the whole batch, if this is a micro-batch of
    it. Returns the loss and kl, this micro-batch's shares of the batch's means, scalars; kl has no
    gradient. The paper's, and the first GRPO's (arXiv 2402.03300); the released code pools all
    tokens of a batch, as DAPO does, so that long sequences weigh more.
    """
    sequences = len(valid) if sequences is None else sequences
    weight = valid / (valid.sum(1, keepdim=True).clamp(min=1) * sequences)  # (B, T)
    # One update per batch of rollouts: sampler and learner are one policy, and logp_old is logp
    # itself. That this is so is checked where logp is compared with the rollout's log-probs.
    ratio = torch.where(valid, logp - logp.detach(), 0.0).exp()  # padding may be anything, even NaN
    advantage = torch.where(valid, advantage, 0.0)
    kl = torch.zeros_like(ratio)
    if logp_ref is not None:
        log_ratio_ref = torch.where(valid, logp_ref - logp, 0.0)
        kl = log_ratio_ref.exp() - log_ratio_ref - 1
    loss = -((ratio * advantage - beta * kl) * weight).sum()
    return loss, (kl.detach() * weight).sum()


# --- one step -------------------------------------------------------------------------------------


class Batch(NamedTuple):
    """What an update needs of each sequence; every field has B rows."""

    prompt: Tensor  # (B, S)
    plan: Tensor  # (B, C)
    codes: Tensor  # (B, L)
    logp_old: Tensor  # (B, T) log-probs when sampled
    valid: Tensor  # (B, T) bool
    group_advantage: Tensor  # (B,) of GRPO
    advantage: Tensor  # (B, T) shaped
    low: Tensor  # (B, T) bool
    high: Tensor  # (B, T) bool


def make_batch(rollout, config):
    """Turn rewards and entropies into an advantage per token. Returns a Batch."""
    a = group_advantages(rollout.rewards).flatten()  # (B,)                GRPO stops here
    low, high = modality_masks(rollout, config)  # (B, T)
    shaping = a, rollout.entropy, low, high
    method = METHODS[config.method]
    if config.method == "eggrpo-released":
        shaped = shape_advantages_released(*shaping)  # (B, T)
    else:
        kappa = config.kappa if method.bonus else 0.0
        shaped = shape_advantages(
            *shaping, rollout.valid, kappa, method.exclude
        )  # (B, T)   EG-GRPO
    return Batch(rollout.prompt, rollout.plan, rollout.codes, rollout.logp, rollout.valid, a,
                 shaped, low, high)  # fmt: skip


def modality_masks(rollout, config):
    """Find low and high tokens, plan and image each by itself. Returns low, high: (B, T) bool."""
    masks = []
    for name, part in split_modalities(rollout.plan.shape[1]).items():
        arguments = rollout.entropy[:, part], rollout.valid[:, part]
        low, high = entropy_masks(*arguments, config.low_frac, config.high_frac)
        shaped = name in METHODS[config.method].modalities
        masks.append((low & shaped, high & shaped))
    return [torch.cat(mask, 1) for mask in zip(*masks)]


def micro_batch_loss(policy, reference, part, sequences, config):
    """Compute the loss of some rows of a Batch. Returns it, kl and log-probs (B, T)."""
    tokens = part[:3]  # prompt, plan, codes
    logits = forward_logits(policy, *tokens, config.guidance)  # words (B, C, V), codes (B, L, V)
    logp, logp_ref = token_logp(*logits, part.plan, part.codes), None  # (B, T)
    if config.beta:
        with torch.no_grad():
            ref_logits = forward_logits(reference, *tokens, config.guidance)
            logp_ref = token_logp(*ref_logits, part.plan, part.codes)
    loss, kl = policy_loss(logp, logp_ref, part.advantage, part.valid, config.beta, sequences)
    return loss, kl, logp.detach()


def sampler_against_learner(batch, logp):
    """Compare log-probs (B, T) with those of sampling, before the update: sampler and learner must
    be one policy. Returns the mean difference in nats and the largest over 1 + |logp|."""
    difference = (logp - batch.logp_old).abs() * batch.valid
    return dict(
        logp_diff_mean=difference.sum() / batch.valid.sum(),
        logp_diff_max=(difference / (1 + batch.logp_old.abs())).max(),
    )


def update(policy, reference, optimizer, batch, config, extra_stats=None):
    """Update the policy on a batch of rollouts, once. Returns floats to log.

    extra_stats: other scalars to log. All scalars come to the host in one transfer, before the
    weights change; the host waits for the device only there. Raises TrainingDiverged.
    """
    sequences = len(batch.plan)  # of the whole batch: micro-batches change nothing
    losses, kls, logps = [], [], []
    for idx in torch.arange(sequences, device=batch.plan.device).split(config.micro_batch):
        part = Batch(*(x[idx] for x in batch))
        loss, kl, logp = micro_batch_loss(policy, reference, part, sequences, config)
        loss.backward()
        losses.append(loss.detach())
        kls.append(kl)
        logps.append(logp)
    stats = dict(extra_stats or {})
    stats["kl"] = torch.stack(kls).sum()
    stats["loss"] = torch.stack(losses).sum()
    stats |= sampler_against_learner(batch, torch.cat(logps))
    stats["grad_norm"] = torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
    stats = dict(zip(stats, torch.stack([*stats.values()]).cpu()))
    check_stats(stats, config, batch.plan.device)
    optimizer.step()
    optimizer.zero_grad()
    return {name: value.item() for name, value in stats.items()}


# --- the loop -------------------------------------------------------------------------------------


def main(argv=None):
    config, command = common.parse("eggrpo.py", Config, PRESETS, __doc__, argv, METHODS)
    folder = Path(config.out) / config.preset / (config.name or f"{config.method}-{config.seed}")
    run = Run("policy", folder / "policy.pt", folder / "log.jsonl", config, command)
    if run.finished:
        return print(f"{config.method}: finished earlier, {run.path}")
    device, started = common.pick_device(config.device), time.time()
    env = load_env(config.preset, config.out, device)
    reference = load_base(config.preset, config.out, device)
    policy = load_base(config.preset, config.out, device).requires_grad_(True)
    optimizer = torch.optim.AdamW(policy.parameters(), config.lr, (0.9, 0.95), weight_decay=0.0,
                                  fused=device.type == "cuda")  # fmt: skip
    run.start(device, policy, optimizer)
    held_out = lambda step: evaluate.evaluate_and_save_gallery(env, policy, config, folder, step)
    if not run.first_step:
        run.log(step=-1, **held_out(0))

    scenes = training_scenes(env.world, config, run.first_step)
    with run.progress(config.method) as bar:
        for step in bar:
            step_started = time.time()
            rollout = make_rollout(policy, env, scenes, config, step)
            scenes = training_scenes(env.world, config, step + 1)  # while the device is sampling
            batch = make_batch(rollout, config)
            lr = config.lr * min((step + 1) / 10, 1 - step / config.steps)
            optimizer.param_groups[0]["lr"] = lr
            explain = lambda: rewards.check_rewards(rollout.rewards, rollout.components)
            with run.guard(step, batch._asdict(), explain):
                extra = rollout_stats(rollout, batch)
                stats = update(policy, reference, optimizer, batch, config, extra)
            stats["seconds"] = time.time() - step_started
            bar.set_postfix({k: f"{stats[k]:.2f}" for k in ("reward", "exact", "kl")})
            if step + 1 == config.steps or (step + 1) % config.eval_every == 0:
                stats |= held_out(step + 1)
            run.log(step=step, **stats)
            run.save(step, policy, optimizer)
    print(f"{config.method}: {config.steps} steps, {time.time() - started:.0f} s; see {folder}")


if __name__ == "__main__":
    common.run(main)
