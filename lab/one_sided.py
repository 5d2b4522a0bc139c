"""Train a policy that is sampled under guidance, or at another temperature, and scored without.

    bash train.sh lab.study --only base-0/one-sided/bonus        one run; the names: lab.study.ONE_SIDED

    -> out/study/base-0/small/one-sided/bonus.json

z are the logits of the scored policy p, u those of its empty branch (no prompt, no plan). Codes are
sampled from q = softmax((u + g (z - u)) / temperature), words from p. A bonus w that depends on the
context only has the expected gradient E_q[w grad_z log p] = w (q - p): it distils the sampler. Here
the parts are separated: where the bonus is, its size and sign; weights p / q, which cancel the
pull; the pull as a loss, without the sampling noise of the bonus; a teacher or an empty branch that
does not move; other KL terms. docs/guidance.md has the questions and the results.

Dimension letters as in eggrpo.py. Divergences are in nats, entropies fractions of log V.
"""

import copy
import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

import common
import eggrpo
import evaluate
from lab.measure import scores_by_setting
from model import Decoder, Rollout, forward_logits, generate, precision, sample_token
from objective import (
    bonus_coefficient,
    entropy_masks,
    group_advantages,
    policy_loss,
    shape_advantages_released,
    token_entropy,
)
from rewards import compute_rewards, encode_targets
from scenes import END, PAD, encode_scenes


@dataclass(frozen=True)
class Config(eggrpo.Config):
    method: str = "bonus"  # grpo, exclude, bonus, eggrpo or eggrpo-released
    steps: int = 100  # batches of rollouts
    guidance: float = 2.0  # of sampling; scored at 1
    temperature: float = 1.0  # of sampling codes; scored at 1
    on: str = "both"  # modality with a bonus: both, words or codes
    where: str = "high"  # tokens with a bonus: high, low, as many random ones, or every one alike
    weights: str = "none"  # p / q, at most 2, as a factor: none, of the bonus, or of all advantages
    pull: str = "sampled"  # the bonus: sampled, exact (the pull as a loss), frozen (that of the base)
    empty: str = "moving"  # empty branch of the sampler: moving, or frozen (that of the base)
    kl: str = "k3"  # KL term: k3, exact or none
    match: str = "none"  # at the start: hot, cold (KL(q||p) as at guidance 2), pull (as on high)
    reward: str = "mean"  # mean, exact (alone) or noisy (noise of the reward's own std)
    prompts_scored: int = 1200  # held-out prompts; half as many of rare pairs
    batch: int = 150  # prompts per forward pass of an evaluation


# --- mechanisms -----------------------------------------------------------------------------------


def sampler_logits(z, u, guidance, temperature=1.0):
    """Logits of q: guidance, then temperature. z, u: (..., V)."""
    return (u + guidance * (z - u)) / temperature


def token_weights(logp, logq):
    """Importance weights p / q of sampled tokens, truncated at 2, without gradient."""
    return (logp.detach() - logq).exp().clamp(max=2.0)


def pull_loss(z, log_q, w):
    """The expectation over q of a bonus w, as a loss: -w sum_v (q_v - p_v) z_v, whose gradient at z
    is -w (q - p). z, log_q: (..., V); w: (...). Returns (...)."""
    difference = log_q.exp() - z.detach().softmax(-1)
    return -w * (difference * z).sum(-1)


def divergence(logits, other):
    """KL(softmax(logits) || softmax(other)), (..., V) each -> (...)."""
    logp = logits.log_softmax(-1)
    return (logp.exp() * (logp - other.log_softmax(-1))).sum(-1)


def sigma(z, log_q):
    """Rate at which the gap grows under a pull, per unit of lr w (g - 1), to first order: d'S^2 d /
    d'S d with d = log q - log p and S = diag(p) - p p'. (..., V) each -> numerator, denominator."""
    logp = z.log_softmax(-1)
    p = logp.exp()
    d = log_q - logp
    moved = p * (d - (p * d).sum(-1, keepdim=True))  # S d
    return moved.square().sum(-1), (d * moved).sum(-1)


def place_bonus(advantage, entropy, valid, words, config, generator=None):
    """Place a bonus by the paper's budget: the mean of w is kappa times that of the |A| which
    exclusion would take away. words: number of word slots. Returns w, low, high: (B, T)."""
    is_word = torch.arange(valid.shape[1], device=valid.device) < words
    low = torch.zeros_like(valid)
    chosen = torch.zeros_like(valid)
    order = entropy
    if config.where == "random":
        order = torch.rand(entropy.shape, generator=generator).to(entropy.device)
    for name, part in (("words", is_word), ("codes", ~is_word)):  # thresholds of their own
        if config.on not in ("both", name):
            continue
        here = valid & part
        low |= entropy_masks(entropy, here, config.low_frac, config.high_frac)[0]
        lower, upper = entropy_masks(order, here, config.high_frac, config.high_frac)
        chosen |= {"low": lower, "every": here}.get(config.where, upper)
    size = torch.ones_like(entropy) if config.where == "every" else entropy
    coefficient = bonus_coefficient(advantage, size, low, chosen, valid, config.kappa)
    return torch.where(chosen, coefficient * size, 0.0), low, chosen


@torch.no_grad()
def sample(policy, prompt, noise, guidance, temperature=1.0, empty_policy=None):
    """Sample codes from q, which may be guided against the empty branch of another policy; plans as
    model.generate does. Arguments and result as there; logp and entropy are of q."""
    drawn = generate(policy, prompt, noise)  # its codes are replaced
    codes, logp, entropy = (x.clone() for x in (drawn.codes, drawn.logp, drawn.entropy))
    words = policy.concat_words(drawn.prompt, drawn.plan)
    no_words = policy.concat_words(
        torch.full_like(prompt[:1], PAD), torch.full_like(drawn.plan[:1], PAD)
    )
    empty_policy = empty_policy or policy
    with precision(prompt.device):
        decoder = Decoder(policy, words)
        empty_decoder = Decoder(empty_policy, no_words, len(noise))
        for j in range(policy.L):
            z = policy.code_logits(decoder.hidden)
            u = empty_policy.code_logits(empty_decoder.hidden)
            t = policy.C + j
            logits = sampler_logits(z, u, guidance, temperature)
            codes[:, j], logp[:, t], entropy[:, t] = sample_token(logits, noise[:, t])
            if j + 1 < policy.L:
                decoder.feed_code(codes[:, j])
                empty_decoder.feed_code(codes[:, j])
    return drawn._replace(codes=codes, logp=logp, entropy=entropy)


# --- a batch --------------------------------------------------------------------------------------


class Batch(NamedTuple):
    """A training batch: what was sampled, its rewards, and logits on its contexts."""

    rollout: Rollout
    advantage: Tensor  # (B,)
    reward: Tensor  # (B,)
    exact: Tensor  # (B,)
    logp: Tensor  # (B, T) of the scored policy, with gradient
    words: Tensor  # (B, C, V) logits of the scored policy, with gradient
    z: Tensor  # (B, L, V) of its codes, with gradient
    u: Tensor  # (B, L, V) of the empty branch
    log_q: Tensor  # (B, L, V) log-probs of the sampler
    reference: tuple  # (B, C, V), (B, L, V) logits of the base policy


class Run:
    """The policies of a run and its environment. config: a Config, whose numbers may be matched to
    those of the base policy, see calibrate."""

    def __init__(self, config):
        self.config = config
        self.device = common.pick_device(config.device)
        self.env = evaluate.load_env(config, self.device)
        self.reference, _ = evaluate.load_base(config, self.env)
        self.policy = copy.deepcopy(self.reference)
        self.empty_policy = self.reference if config.empty == "frozen" else self.policy

    def sample(self, policy, prompt, noise, guidance, temperature):
        return sample(policy, prompt, noise, guidance, temperature, self.empty_policy)

    def batch(self, step, guidance, temperature):
        """Sample and score the batch of a step of eggrpo.train_step. Returns a Batch."""
        config = self.config
        scenes = eggrpo.training_scenes(self.env.world, config, step)
        prompts = encode_scenes(self.env.world, scenes)[0].to(self.device)
        key = config.seed, "rollout", step
        noise = evaluate.draw_noise(self.policy, config.prompts * config.group_size, *key)
        rollout = self.sample(self.policy, prompts, noise.to(self.device), guidance, temperature)

        repeated = [scene for scene in scenes for _ in range(config.group_size)]
        targets = encode_targets(self.env.world, repeated, self.device)
        images = self.env.tokenizer.decode(rollout.codes)
        reward, _, exact = compute_rewards(images, targets, self.env.world)
        if config.reward == "exact":
            reward = exact
        if config.reward == "noisy":
            noise = torch.randn(len(reward), generator=common.generator(config.seed, "noisy", step))
            reward = reward + reward.std() * noise.to(self.device)
        advantage = group_advantages(reward.view(config.prompts, config.group_size)).flatten()

        tokens = rollout.prompt, rollout.plan, rollout.codes
        words, z = forward_logits(self.policy, *tokens)
        with torch.no_grad():
            u = self.empty_logits(self.empty_policy, rollout)
            log_q = sampler_logits(z, u, config.guidance, config.temperature).log_softmax(-1)
            reference = forward_logits(self.reference, *tokens)
        logp = token_logp(words, z, rollout)
        return Batch(rollout, advantage, reward, exact, logp, words, z, u, log_q, reference)

    def empty_logits(self, policy, rollout):
        """Logits of a rollout's codes without prompt and plan, (B, L, V)."""
        nothing = torch.full_like(rollout.prompt, PAD), torch.full_like(rollout.plan, PAD)
        return forward_logits(policy, *nothing, rollout.codes)[1]

    def bonus(self, batch, step):
        """Place the bonus of a batch by the entropy of the scored policy, see place_bonus."""
        entropy = torch.cat([token_entropy(batch.words), token_entropy(batch.z)], 1)
        draw = common.generator(self.config.seed, "where", step)
        valid = batch.rollout.valid
        parts = batch.advantage, entropy * valid, valid, batch.words.shape[1], self.config, draw
        return place_bonus(*parts)


def token_logp(words, codes, rollout):
    """Log-probs of a rollout's tokens from logits of words and codes, (B, T); 0 at padding."""
    word = (rollout.plan - END).clamp(min=0)[..., None]
    of_words = words.log_softmax(-1).gather(-1, word)[..., 0]
    of_codes = codes.log_softmax(-1).gather(-1, rollout.codes[..., None])[..., 0]
    return torch.cat([of_words, of_codes], 1) * rollout.valid


# --- training -------------------------------------------------------------------------------------


def token_advantages(batch, w, low, high, config):
    """Turn A into advantages of tokens without the bonus, and the bonus, by the method: (B, T)
    each."""
    a = batch.advantage[:, None].expand_as(w)
    kept = a.masked_fill(low, 0.0) if config.method not in ("grpo", "bonus") else a
    if config.method == "eggrpo-released":
        entropy = torch.cat([token_entropy(batch.words), token_entropy(batch.z)], 1)
        w = shape_advantages_released(batch.advantage, entropy, low, high) - kept
    if config.method in ("grpo", "exclude"):
        w = torch.zeros_like(w)
    return kept, w


def kl_penalty(batch, kind):
    """KL term to the base policy at each token, (B, T): k3, exact (from all logits) or none."""
    logp_ref = token_logp(*batch.reference, batch.rollout)
    log_ratio = logp_ref - batch.logp
    k3 = log_ratio.exp() - log_ratio - 1  # 0 at padding
    if kind == "exact":
        of_words = divergence(batch.words, batch.reference[0])
        return torch.cat([of_words, divergence(batch.z, batch.reference[1])], 1)
    return k3 if kind == "k3" else 0.0 * k3


def update(run, optimizer, step):
    """Make one step as eggrpo.train_step does, with the parts of the config. Returns what is
    logged."""
    config = run.config
    batch = run.batch(step, config.guidance, config.temperature)
    c = batch.words.shape[1]
    a, w = token_advantages(batch, *run.bonus(batch, step), config)
    ratio = torch.ones_like(w)  # words are sampled from p
    of_codes = batch.log_q.gather(-1, batch.rollout.codes[..., None])[..., 0]
    ratio[:, c:] = token_weights(batch.logp[:, c:], of_codes)
    shaped = a * ratio if config.weights == "all" else a
    if config.pull == "sampled":
        shaped = shaped + (w if config.weights == "none" else w * ratio)
    valid = batch.rollout.valid
    loss, _ = policy_loss(batch.logp, None, shaped, valid, beta=0.0)
    weight = valid / valid.sum(1, keepdim=True) / len(valid)
    if config.pull != "sampled":
        teacher = batch.log_q
        if config.pull == "frozen":
            u = run.empty_logits(run.reference, batch.rollout).detach()
            teacher = sampler_logits(batch.reference[1], u, config.guidance, config.temperature)
            teacher = teacher.log_softmax(-1)
        loss = loss + (weight[:, c:] * pull_loss(batch.z, teacher, w[:, c:])).sum()
    loss = loss + config.beta * (weight * kl_penalty(batch, config.kl)).sum()
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(run.policy.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return describe(batch, w) | dict(grad_norm=norm.item())


@torch.no_grad()
def describe(batch, w):
    """Log the policies on the contexts of a batch: token means, weighted as in the loss. w: (B, T)
    bonus."""
    c = batch.words.shape[1]
    valid = batch.rollout.valid
    weight = valid / valid.sum(1, keepdim=True)
    mean_words = lambda x: (x * weight[:, :c]).sum() / weight[:, :c].sum().clamp(min=1e-9)
    mean = lambda x: (x * weight[:, c:]).sum() / weight[:, c:].sum()
    z, log_q = batch.z, batch.log_q
    squared = (log_q.exp() - z.softmax(-1)).square().sum(-1)
    over, under = sigma(z, log_q)
    stats = dict(
        reward=batch.reward.mean(),
        exact=batch.exact.mean(),
        kl_q_p=mean(divergence(log_q, z)),
        kl_p_empty=mean(divergence(z, batch.u)),
        kl_ref_words=mean_words(divergence(batch.words, batch.reference[0])),
        kl_ref_codes=mean(divergence(z, batch.reference[1])),
        k3=(weight * kl_penalty(batch, "k3")).sum() / weight.sum(),
        entropy_words=mean_words(token_entropy(batch.words)),
        entropy_codes=mean(token_entropy(z)),
        entropy_q=mean(token_entropy(log_q)),
        entropy_empty=mean(token_entropy(batch.u)),
        sigma=mean(over) / mean(under),
        w_words=mean_words(w[:, :c]),
        w_codes=mean(w[:, c:]),
        w_largest=w.abs().max(),
        pull=mean(w[:, c:] * squared),
    )
    return dict(zip(stats, torch.stack([*stats.values()]).tolist()))


@torch.no_grad()
def calibrate(run, batches=4):
    """Match a run's config to the base policy's numbers: the temperature at which KL(q||p) is that
    of guidance 2 (hot: above 1, cold: below), or the kappa at which the mean of w |q - p|^2 is that
    of a bonus on high tokens (pull)."""
    config = run.config
    if config.match == "pull":
        pulls = []
        for where in ("high", config.where):
            run.config = replace(config, where=where)
            drawn = [run.batch(step, config.guidance, 1.0) for step in range(batches)]
            bonuses = [run.bonus(batch, step)[0] for step, batch in enumerate(drawn)]
            pulls.append(sum(describe(b, w)["pull"] for b, w in zip(drawn, bonuses)))
        run.config = replace(config, kappa=config.kappa * pulls[0] / pulls[1])
    if config.match in ("hot", "cold"):
        drawn = [run.batch(step, 1.0, 1.0) for step in range(batches)]

        def distance(guidance, temperature):
            logits = [sampler_logits(b.z, b.u, guidance, temperature) for b in drawn]
            return sum(divergence(q, b.z).mean().item() for q, b in zip(logits, drawn))

        near, far = 1.0, 3.0 if config.match == "hot" else 0.2
        for _ in range(30):  # bisection
            middle = (near + far) / 2
            if distance(1.0, middle) < distance(2.0, 1.0):
                near = middle
            else:
                far = middle
        run.config = replace(config, guidance=1.0, temperature=near)


def train(config):
    """Train a policy and score it. Returns a record: settings, log on contexts of q at each step,
    and of p every 20 steps, scores by setting of the sampler."""
    run = Run(config)
    calibrate(run)
    config = run.config
    optimizer = torch.optim.AdamW(run.policy.parameters(), config.lr, (0.9, 0.95), weight_decay=0.0)
    log = []
    own = []

    def look(step):
        batch = run.batch(step, 1.0, 1.0)
        own.append(dict(step=step, **describe(batch, torch.zeros_like(batch.logp))))

    for step in tqdm(range(config.steps), "one-sided"):
        if step % 20 == 0:
            look(step)
        optimizer.param_groups[0]["lr"] = config.lr * min((step + 1) / 10, 1 - step / config.steps)
        log.append(dict(step=step, **update(run, optimizer, step)))
    look(config.steps)
    settings = asdict(config) | dict(out=None, device=str(run.device))
    made = f"{common.commit()} on {run.device}, torch {torch.__version__}"
    return dict(made=made, config=settings, log=log, own=own, scores=scores_by_setting(run))
