"""Train a policy that is sampled under guidance, or at another temperature, and scored without.

    bash train.sh lab.study --only base-0/one-sided/bonus      one run; all: lab/one_sided.json

z are the logits of the scored policy p, u those of its empty branch (no prompt, no plan). Codes are
sampled from q = softmax((u + g (z - u)) / temperature), words from p. A bonus w that depends on the
context only has the expected gradient E_q[w grad_z log p] = w (q - p): it distils the sampler. Here
its parts are separated, see Config; docs/guidance.md has the questions and the results. Letters are
those of eggrpo.py. Divergences are in nats, entropies fractions of log V.
"""

import copy
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import NamedTuple
from unittest import mock

import torch
from torch import Tensor
from tqdm import tqdm

import common
import eggrpo
import evaluate
import runs
from lab.measure import describe, divergence, scores_by_setting, training_batch
from model import Decoder, Rollout, forward_logits, generate, precision, sample_token
from objective import bonus_coefficient, entropy_masks, group_advantages, policy_loss
from objective import shape_advantages_released, token_entropy
from scenes import END, PAD


@dataclass(frozen=True)
class Config(eggrpo.Config):
    method: str = "bonus"  # grpo, exclude, bonus, eggrpo or eggrpo-released
    steps: int = 100  # batches of rollouts
    guidance: float = 2.0  # of sampling; scored at 1
    temperature: float = 1.0  # of sampling codes; scored at 1
    on: str = "both"  # modality with a bonus: both, words or codes
    where: str = "high"  # tokens with a bonus: high, low, as many random ones, or every one alike
    weights: str = "none"  # p / q, at most 2, as a factor: none, of the bonus, or of all advantages
    pull: str = "sampled"  # the bonus: sampled, exact (as a loss), frozen (that of the base)
    empty: str = "moving"  # empty branch of the sampler: moving, or frozen (that of the base)
    kl: str = "k3"  # KL term: k3 or exact
    match: str = "none"  # at the start: hot, cold (KL(q||p) as at guidance 2), pull (as on high)
    reward: str = "mean"  # mean, exact (alone) or noisy (noise of the reward's own std)
    prompts_scored: int = 1200  # held-out prompts; half as many of rare pairs


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


def place_bonus(batch, config, step):
    """Place a bonus by the paper's budget: the mean of w is kappa times that of the |A| which
    exclusion would take away. Returns w, low, high: (B, T)."""
    valid = batch.rollout.valid
    is_word = torch.arange(valid.shape[1], device=valid.device) < batch.words.shape[1]
    low = torch.zeros_like(valid)
    chosen = torch.zeros_like(valid)
    order = batch.entropy
    if config.where == "random":
        draw = common.generator(config.seed, "where", step)
        order = torch.rand(order.shape, generator=draw).to(order.device)
    for name, part in (("words", is_word), ("codes", ~is_word)):  # thresholds of their own
        if config.on not in ("both", name):
            continue
        here = valid & part
        low |= entropy_masks(batch.entropy, here, config.low_frac, config.high_frac)[0]
        lower, upper = entropy_masks(order, here, config.high_frac, config.high_frac)
        chosen |= {"low": lower, "every": here}.get(config.where, upper)
    size = torch.ones_like(order) if config.where == "every" else batch.entropy
    coefficient = bonus_coefficient(batch.advantage, size, low, chosen, valid, config.kappa)
    return torch.where(chosen, coefficient * size, 0.0), low, chosen


@torch.no_grad()
def sample(policy, prompt, noise, guidance, temperature, empty_policy):
    """Sample codes from q, which may be guided against the empty branch of another policy; plans as
    model.generate does. Arguments and result as there; logp and entropy are of q."""
    rollout = generate(policy, prompt, noise)  # its codes are replaced
    words = policy.concat_words(rollout.prompt, rollout.plan)
    pad = torch.full_like(words[:1], PAD)
    no_words = policy.concat_words(pad[:, : policy.S], pad[:, : policy.C])
    with precision(prompt.device):
        decoder = Decoder(policy, words)
        empty_decoder = Decoder(empty_policy, no_words, len(noise))
        for j, t in enumerate(range(policy.C, policy.C + policy.L)):
            z = policy.code_logits(decoder.hidden)
            u = empty_policy.code_logits(empty_decoder.hidden)
            logits = sampler_logits(z, u, guidance, temperature)
            code, rollout.logp[:, t], rollout.entropy[:, t] = sample_token(logits, noise[:, t])
            rollout.codes[:, j] = code
            if decoder.slot < policy.slots:
                decoder.feed_code(code)
                empty_decoder.feed_code(code)
    return rollout


class Batch(NamedTuple):
    """A training batch: what was sampled, its rewards, and logits on its contexts."""

    rollout: Rollout
    rewards: Tensor  # (P, G)
    exact: Tensor  # (P, G)
    advantage: Tensor  # (B,)
    words: Tensor  # (B, C, V) logits of the scored policy, with gradient
    z: Tensor  # (B, L, V) of its codes, with gradient
    logp: Tensor  # (B, T) of the scored policy, with gradient
    entropy: Tensor  # (B, T) of the scored policy; 0 at padding
    u: Tensor  # (B, L, V) of the empty branch
    log_q: Tensor  # (B, L, V) log-probs of the sampler
    z_ref: Tensor  # (B, L, V) logits of codes of the base policy
    kl: Tensor  # (B, T) KL(p || base policy) from all logits, with gradient
    k3: Tensor  # (B, T) its estimate from the sampled token, with gradient


class Run:
    """The policies of a run and its environment. config: a Config, which calibrate may change."""

    def __init__(self, config):
        self.config = config
        self.device = common.pick_device(config.device)
        self.env = evaluate.load_env(config, self.device)
        self.reference = evaluate.load_base(config, self.env)
        self.policy = copy.deepcopy(self.reference)
        self.empty_policy = self.reference if config.empty == "frozen" else self.policy

    def sampler(self, temperature):
        """Let evaluate.sample_images sample from q, as a context."""
        own = partial(sample, temperature=temperature, empty_policy=self.empty_policy)
        return mock.patch.object(evaluate, "generate", own)

    def batch(self, step, guidance, temperature):
        """Sample and score the batch of a step of eggrpo.train_step. Returns a Batch."""
        config = self.config
        with self.sampler(temperature):
            drawn = training_batch(self.env, self.policy, replace(config, guidance=guidance), step)
        rewards = drawn.exact if config.reward == "exact" else drawn.rewards
        if config.reward == "noisy":
            draw = common.generator(config.seed, "noisy", step)
            noise = torch.randn(rewards.shape, generator=draw)
            rewards = rewards + rewards.std() * noise.to(self.device)
        rollout = drawn.rollout
        seen = rollout, rewards, drawn.exact, group_advantages(rewards).flatten()

        tokens = rollout.prompt, rollout.plan, rollout.codes
        words, z = forward_logits(self.policy, *tokens)
        logp = token_logp(words, z, rollout)
        entropy = torch.cat([token_entropy(words), token_entropy(z)], 1) * rollout.valid
        with torch.no_grad():
            u = empty_logits(self.empty_policy, rollout)
            log_q = sampler_logits(z, u, config.guidance, config.temperature).log_softmax(-1)
            words_ref, z_ref = forward_logits(self.reference, *tokens)
            logp_ref = token_logp(words_ref, z_ref, rollout)
        log_ratio = logp_ref - logp
        k3 = log_ratio.exp() - log_ratio - 1  # 0 at padding
        kl = torch.cat([divergence(words, words_ref), divergence(z, z_ref)], 1)
        return Batch(*seen, words, z, logp, entropy, u, log_q, z_ref, kl, k3)


def empty_logits(policy, rollout):
    """Logits of a rollout's codes without prompt and plan, (B, L, V)."""
    nothing = torch.full_like(rollout.prompt, PAD), torch.full_like(rollout.plan, PAD)
    return forward_logits(policy, *nothing, rollout.codes)[1]


def token_logp(words, codes, rollout):
    """Log-probs of a rollout's tokens from logits of words and codes, (B, T); 0 at padding."""
    word = (rollout.plan - END).clamp(min=0)[..., None]
    of_words = words.log_softmax(-1).gather(-1, word)[..., 0]
    of_codes = codes.log_softmax(-1).gather(-1, rollout.codes[..., None])[..., 0]
    return torch.cat([of_words, of_codes], 1) * rollout.valid


def token_advantages(batch, config, step):
    """Return advantages without the bonus, and the bonus, by the method: (B, T) each."""
    w, low, high = place_bonus(batch, config, step)
    a = batch.advantage[:, None].expand_as(w)
    if config.method not in ("grpo", "bonus"):
        a = a.masked_fill(low, 0.0)
    if config.method == "eggrpo-released":
        w = shape_advantages_released(batch.advantage, batch.entropy, low, high) - a
    if config.method in ("grpo", "exclude"):
        w = torch.zeros_like(w)
    return a, w


def update(run, optimizer, step):
    """Make one step as eggrpo.train_step does, by the config. Returns what is logged."""
    config = run.config
    batch = run.batch(step, config.guidance, config.temperature)
    c = batch.words.shape[1]
    valid = batch.rollout.valid
    a, w = token_advantages(batch, config, step)
    ratio = torch.ones_like(w)
    if config.weights != "none":  # words are sampled from p
        of_codes = batch.log_q.gather(-1, batch.rollout.codes[..., None])[..., 0]
        ratio[:, c:] = token_weights(batch.logp[:, c:], of_codes)
    shaped = a * ratio if config.weights == "all" else a
    if config.pull == "sampled":
        shaped = shaped + w * ratio
    loss, _ = policy_loss(batch.logp, None, shaped, valid, beta=0.0)
    weight = valid / valid.sum(1, keepdim=True) / len(valid)
    if config.pull != "sampled":
        teacher = batch.log_q
        if config.pull == "frozen":
            u = empty_logits(run.reference, batch.rollout).detach()
            teacher = sampler_logits(batch.z_ref, u, config.guidance, config.temperature)
            teacher = teacher.log_softmax(-1)
        loss = loss + (weight[:, c:] * pull_loss(batch.z, teacher, w[:, c:])).sum()
    kl = batch.kl if config.kl == "exact" else batch.k3
    loss = loss + config.beta * (weight * kl).sum()
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(run.policy.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return describe(batch, w) | dict(grad_norm=norm.item())


@torch.no_grad()
def calibrate(run, batches=4):
    """Match a run's config to the base policy: the temperature to the KL(q||p) of guidance 2 (hot,
    cold), or kappa to the mean of w |q - p|^2 of a bonus on high tokens (pull)."""
    config = run.config
    if config.match == "none":
        return
    guidance = config.guidance if config.match == "pull" else 1.0
    drawn = [run.batch(step, guidance, 1.0) for step in range(batches)]

    if config.match == "pull":
        pulls = []
        for where in ("high", config.where):
            own = replace(config, where=where)
            placed = [place_bonus(batch, own, step)[0] for step, batch in enumerate(drawn)]
            pulls.append(sum(describe(batch, w)["pull"] for batch, w in zip(drawn, placed)))
        run.config = replace(config, kappa=config.kappa * pulls[0] / pulls[1])
        return

    def gap(guidance, temperature):
        logits = [sampler_logits(b.z, b.u, guidance, temperature) for b in drawn]
        return sum(divergence(q, b.z).mean().item() for q, b in zip(logits, drawn))

    target = gap(2.0, 1.0)
    near, far = 1.0, 3.0 if config.match == "hot" else 0.2
    for _ in range(30):  # bisection
        middle = (near + far) / 2
        is_near = gap(1.0, middle) < target
        near, far = (middle, far) if is_near else (near, middle)
    run.config = replace(config, guidance=1.0, temperature=near)


def train(config):
    """Train a policy and score it. Returns its settings, logs (own: contexts of p) and scores."""
    run = Run(config)
    calibrate(run)
    config = run.config
    optimizer = torch.optim.AdamW(run.policy.parameters(), config.lr, (0.9, 0.95), weight_decay=0.0)
    log = []
    own = []
    for step in tqdm(range(config.steps + 1), "one-sided"):
        if step % 20 == 0 or step == config.steps:
            batch = run.batch(step, 1.0, 1.0)
            own.append(dict(step=step, **describe(batch, torch.zeros_like(batch.logp))))
        if step < config.steps:
            rate = config.lr * min((step + 1) / 10, 1 - step / config.steps)
            optimizer.param_groups[0]["lr"] = rate
            log.append(dict(step=step, **update(run, optimizer, step)))
    settings = asdict(config) | dict(out=None, device=str(run.device))
    made = f"{runs.commit()} on {run.device}, torch {torch.__version__}"
    return dict(made=made, config=settings, log=log, own=own, scores=scores_by_setting(run))
