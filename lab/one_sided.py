"""Train a policy that is sampled under guidance or another temperature, and scored without.

    bash train.sh lab.one_sided --out out/study --base 0 --run bonus       one run of PLAN
    bash train.sh lab.study                                                all of them, and the rest

    -> out/study/base-0/small/one-sided/bonus.json; needs the base policy, base-0, of lab.study

z are the logits of the scored policy p, u those of its empty branch (no prompt, no plan). Codes are
drawn from q = softmax((u + g (z - u)) / temperature), words from p. A bonus w >= 0 that depends on
the context only then has the expected gradient E_q[w grad_z log p] = w (q - p): it is distillation
of the sampler. This module takes the parts of that apart: where the bonus is, how large, with which
sign; token weights p / q, which remove the pull; the pull as a loss of its own, without the
sampling noise of the bonus; teachers and empty branches that do not move; other KL terms.
docs/guidance.md has the questions and what was seen.
"""

import copy
import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from unittest import mock

import torch
from tqdm import tqdm

import common
import eggrpo
import evaluate
from eggrpo import (
    bonus_coefficient,
    entropy_masks,
    group_advantages,
    policy_loss,
    shape_advantages_released,
    token_entropy,
)
from model import Decoder, Rollout, forward_logits, precision, sample_token
from rewards import compute_rewards, encode_targets
from scenes import END, IMAGE, PAD, encode_scenes

CHOICES = dict(
    on=("both", "words", "codes"),
    where=("high", "low", "random", "every"),
    weights=("none", "bonus", "all"),
    pull=("sampled", "exact", "frozen"),
    empty=("moving", "frozen"),
    kl=("k3", "exact", "none"),
    match=("none", "hot", "cold", "pull"),
    reward=("mean", "exact", "noisy"),
)


@dataclass(frozen=True)
class Config(eggrpo.Config):
    run: str = "bonus"  # a key of PLAN, whose values the flags override
    method: str = "bonus"  # grpo, exclude, bonus, eggrpo or eggrpo-released
    steps: int = 100  # batches of rollouts
    guidance: float = 2.0  # of sampling; scored at 1
    temperature: float = 1.0  # of sampling codes; scored at 1
    on: str = "both"  # tokens with a bonus: both, words or codes
    where: str = "high"  # the high, low or as many random ones, or every token alike
    weights: str = "none"  # p / q, at most 2, times the bonus, or times all advantages
    pull: str = "sampled"  # or exact: -w sum_v (q - p) z for the bonus; frozen: q of the base policy
    empty: str = "moving"  # empty branch of the sampler, or frozen: the base policy's
    kl: str = "k3"  # KL term: k3, exact or none
    match: str = "none"  # hot, cold: temperature whose KL(q||p) is that of guidance; pull: kappa
    reward: str = "mean"  # or exact alone, or with noise of its own std
    batch: int = 150  # prompts per forward pass of an evaluation
    prompts_scored: int = 1200  # held-out prompts; half as many of rare pairs

    def validate(self):  # --kappa may be negative here
        for name, known in CHOICES.items():
            value = getattr(self, name)
            common.check(value in known, f"--{name} {value}: must be one of {', '.join(known)}")
        common.check(self.run in PLAN, f"--run {self.run}: no such run")


def _plan():
    """List the runs: {name: (values of Config, number of base policies)}."""
    core = {
        "start": dict(method="grpo", steps=0),
        "bonus": {},
        "bonus-text": dict(on="words"),
        "bonus-image": dict(on="codes"),
        "weights-bonus": dict(weights="bonus"),
        "weights-all": dict(weights="all"),
        "pull-exact": dict(pull="exact"),
        "frozen-teacher": dict(pull="frozen"),
        "frozen-empty": dict(empty="frozen"),
        "negative": dict(kappa=-1.0),
        "hot": dict(match="hot"),
        "cold": dict(match="cold"),
        "no-kl": dict(kl="none"),
        "exact-kl-.01": dict(kl="exact"),
        "exact-kl-.3": dict(kl="exact", beta=0.3),
    }
    plan = {name: (values, 3) for name, values in core.items()}
    for method in ("grpo", "eggrpo", "eggrpo-released", "exclude"):
        plan[method] = dict(method=method), 5
    for guidance in (1.5, 2.0, 4.0):
        for kappa in (0.2, 0.5, 1.0, 2.0):
            if (guidance, kappa) != (2.0, 1.0):  # that is `bonus`
                dose = dict(guidance=guidance, kappa=kappa)
                plan[f"bonus-g{guidance:g}-kappa{kappa:g}"] = dose, 3
        if guidance != 2.0:
            plan[f"grpo-g{guidance:g}"] = dict(method="grpo", guidance=guidance), 3
    for match in ("none", "pull"):
        for where in ("low", "random", "every"):
            plan[f"{where}-equal-{match.replace('none', 'mean')}"] = dict(where=where, match=match), 3
    plan["eggrpo-released-300"] = dict(method="eggrpo-released", steps=300), 3
    cells = {
        "group-2": dict(group_size=2, prompts=32),
        "group-4": dict(group_size=4, prompts=16),
        "only-exact": dict(reward="exact"),
        "noisy": dict(reward="noisy"),
        "lr-x3": dict(lr=1.5e-3),
        "two-prompts": dict(prompts=2),
        "low-half": dict(low_frac=0.5, kappa=0.2),
    }
    for cell, values in cells.items():  # on-policy: is there a setting in which EG-GRPO is better?
        for method in ("grpo", "eggrpo", "exclude"):
            plan[f"search-{cell}-{method}"] = dict(values, method=method, guidance=1.0), 3
    return plan


PLAN = _plan()


# --- the sampler ----------------------------------------------------------------------------------


@torch.no_grad()
def sample(policy, prompt, noise, guidance=1.0, temperature=1.0, empty_policy=None):
    """Sample as model.generate does, codes also at a temperature, and guided against the empty
    branch of another policy. Returns a Rollout, whose logp are the sampler's."""
    batch, device = len(noise), prompt.device
    plan = prompt.new_full((batch, policy.C), PAD)
    codes = prompt.new_zeros(batch, policy.L)
    logp, entropy = torch.zeros_like(noise), torch.zeros_like(noise)
    no_plans = prompt.new_full((len(prompt), policy.C), PAD)
    with precision(device):
        words = policy.concat_words(prompt, no_plans)[:, : policy.S + 1]
        decoder = Decoder(policy, words, batch // len(prompt))
        running = torch.ones_like(plan[:, 0], dtype=torch.bool)
        for j in range(policy.C):
            word, word_logp, _ = sample_token(policy.word_logits(decoder.hidden), noise[:, j])
            plan[:, j] = torch.where(running, word + END, PAD)
            logp[:, j] = word_logp * running
            running = running & (plan[:, j] != END)
            decoder.feed_word(plan[:, j])
        decoder.feed_word(torch.full_like(plan[:, 0], IMAGE))
        decoders = [(policy, decoder)]
        if guidance != 1.0:
            empty_policy = empty_policy or policy
            nothing = torch.full_like(prompt[:1], PAD), torch.full_like(no_plans[:1], PAD)
            words = empty_policy.concat_words(*nothing)
            decoders.append((empty_policy, Decoder(empty_policy, words, batch)))
        for j in range(policy.L):
            raw = [one.code_logits(its.hidden) for one, its in decoders]
            logits = sampler_logits(raw[0], raw[-1], guidance, temperature)
            t = policy.C + j
            codes[:, j], logp[:, t], entropy[:, t] = sample_token(logits, noise[:, t])
            if j + 1 < policy.L:
                for _, its in decoders:
                    its.feed_code(codes[:, j])
    valid = torch.cat([plan != PAD, torch.ones_like(codes, dtype=torch.bool)], 1)
    prompt = prompt.repeat_interleave(batch // len(prompt), 0)
    return Rollout(prompt, plan, codes, logp, entropy, valid)


def sampler_logits(z, u, guidance, temperature):
    """Logits of q: guidance, then temperature. (..., V) each."""
    return (u + guidance * (z - u)) / temperature


# --- the mechanisms: plain tensors ----------------------------------------------------------------


def token_weights(logp, logq):
    """Importance weights p / q of sampled tokens, truncated at 2, without gradient."""
    return (logp.detach() - logq).exp().clamp(max=2.0)


def pull_loss(z, log_q, w):
    """What a bonus w does in expectation over q, as a loss: -w sum_v (q_v - p_v) z_v, whose gradient
    at z is -w (q - p). z, log_q: (..., V); w: (...). Returns (...)."""
    difference = log_q.exp() - z.detach().softmax(-1)
    return -w * (difference * z).sum(-1)


def divergence(logits, other):
    """KL(softmax(logits) || softmax(other)) in nats. (..., V) each -> (...)."""
    log_p = logits.log_softmax(-1)
    return (log_p.exp() * (log_p - other.log_softmax(-1))).sum(-1)


def bonus(advantage, entropy, valid, words, config, generator=None):
    """The bonus w of each token, by the paper's budget: the mean of w is kappa times that of the |A|
    that exclusion would take away. words: the first slots of the T. Returns w, low, high: (B, T)."""
    is_word = torch.arange(valid.shape[1], device=valid.device) < words
    here = {"both": valid, "words": valid & is_word, "codes": valid & ~is_word}[config.on]
    low = torch.zeros_like(valid)
    chosen = torch.zeros_like(valid)
    size = torch.ones_like(entropy) if config.where == "every" else entropy
    noise = entropy
    if config.where == "random":
        noise = torch.rand(entropy.shape, generator=generator).to(entropy.device)
    for part in (here & is_word, here & ~is_word):  # each modality has its own thresholds
        low |= entropy_masks(entropy, part, config.low_frac, config.high_frac)[0]
        if config.where == "low":
            chosen |= entropy_masks(entropy, part, config.high_frac, config.high_frac)[0]
        else:
            chosen |= entropy_masks(noise, part, config.low_frac, config.high_frac)[1]
    if config.where == "every":
        chosen = here
    coefficient = bonus_coefficient(advantage, size, low, chosen, valid, config.kappa)
    return torch.where(chosen, coefficient * size, 0.0), low, chosen


# --- one batch ------------------------------------------------------------------------------------


class Run:
    """The policies of a run, and what a batch of rollouts is scored with."""

    def __init__(self, config):
        self.device = common.pick_device(config.device)
        self.env = evaluate.load_env(config, self.device)
        self.reference, _ = evaluate.load_base(config, self.env)
        self.policy = copy.deepcopy(self.reference).requires_grad_(True)
        self.empty_policy = self.reference if config.empty == "frozen" else self.policy

    def generate(self, config, policy, prompt, noise, guidance=None, temperature=None):
        """Sample at the run's guidance and temperature unless others are given."""
        guidance = config.guidance if guidance is None else guidance
        temperature = config.temperature if temperature is None else temperature
        return sample(policy, prompt, noise, guidance, temperature, self.empty_policy)

    def rollout(self, config, step, **options):
        """Sample the batch of a step of eggrpo.train_step. Returns a Rollout and its scenes."""
        scenes = eggrpo.training_scenes(self.env.world, config, step)
        prompts = encode_scenes(self.env.world, scenes)[0].to(self.device)
        key = config.seed, "rollout", step
        noise = evaluate.draw_noise(self.policy, config.prompts * config.group_size, *key)
        drawn = self.generate(config, self.policy, prompts, noise.to(self.device), **options)
        return drawn, [scene for scene in scenes for _ in range(config.group_size)]

    def logits(self, policy, rollout, empty_policy):
        """Logits of words (B, C, V) and codes (B, L, V), and without gradient the codes' of the
        empty branch."""
        words, codes = forward_logits(policy, rollout.prompt, rollout.plan, rollout.codes)
        with torch.no_grad():
            nothing = torch.zeros_like(rollout.prompt), torch.zeros_like(rollout.plan)  # PAD
            empty = forward_logits(empty_policy, *nothing, rollout.codes)[1]
        return words, codes, empty

    def teacher(self, config, rollout, z, u):
        """Log-probabilities of q at a rollout's codes, (B, L, V): of the policy, or of the base."""
        if config.pull == "frozen":
            _, z, u = self.logits(self.reference, rollout, self.reference)
        return sampler_logits(z, u, config.guidance, config.temperature).log_softmax(-1)

    def advantage(self, config, rollout, scenes, step):
        """Score the images of a rollout. Returns advantages (B,), rewards (B,) and exact (B,)."""
        images = self.env.tokenizer.decode(rollout.codes)
        targets = encode_targets(self.env.world, scenes, self.device)
        reward, _, exact = compute_rewards(images, targets, self.env.world)
        if config.reward == "exact":
            reward = exact
        if config.reward == "noisy":
            noise = torch.randn(len(reward), generator=common.generator(config.seed, "noisy", step))
            reward = reward + reward.std() * noise.to(self.device)
        grouped = reward.view(config.prompts, config.group_size)
        return group_advantages(grouped).flatten(), reward, exact


def means(values, weight):
    """Average (B, n) values by token weights (B, n). Returns a float tensor."""
    return (values * weight).sum() / weight.sum().clamp(min=1e-9)


def describe(rollout, words, z, u, log_q, reference):
    """Log policies on the contexts of a rollout: divergences in nats, entropies as fractions of
    log V. words, z, u: logits of p and of its empty branch; log_q: of the sampler; reference:
    (words, codes) logits of the base policy."""
    c = words.shape[1]
    weight = rollout.valid / rollout.valid.sum(1, keepdim=True)  # as the loss weighs tokens
    on_words, on_codes = weight[:, :c], weight[:, c:]
    log_p = z.log_softmax(-1)
    delta = log_q - log_p
    p = log_p.exp()
    centred = p * (delta - (p * delta).sum(-1, keepdim=True))  # Sigma_p delta
    quadratic = (delta * centred).sum(-1)
    return {
        "kl_q_p": means(divergence(log_q, z), on_codes),
        "kl_p_empty": means(divergence(z, u), on_codes),
        "kl_ref_words": means(divergence(words, reference[0]), on_words),
        "kl_ref_codes": means(divergence(z, reference[1]), on_codes),
        "entropy_words": means(token_entropy(words), on_words),
        "entropy_codes": means(token_entropy(z), on_codes),
        "entropy_q": means(token_entropy(log_q), on_codes),
        "entropy_empty": means(token_entropy(u), on_codes),
        "sigma": means(centred.square().sum(-1), on_codes) / means(quadratic, on_codes),
    }


def update(run, config, optimizer, step):
    """Make one step as eggrpo.train_step does, with the parts of the config. Returns what is
    logged."""
    rollout, scenes = run.rollout(config, step)
    A, reward, exact = run.advantage(config, rollout, scenes, step)
    words, z, u = run.logits(run.policy, rollout, run.empty_policy)
    with torch.no_grad():
        log_q = sampler_logits(z, u, config.guidance, config.temperature).log_softmax(-1)
        reference = forward_logits(run.reference, rollout.prompt, rollout.plan, rollout.codes)
        teacher = run.teacher(config, rollout, z, u)
    c = run.policy.C
    valid = rollout.valid
    entropy = torch.cat([token_entropy(words), token_entropy(z)], 1) * valid
    w, low, high = bonus(A, entropy, valid, c, config, common.generator(config.seed, "where", step))
    a = A[:, None].expand_as(entropy)  # (B, T)
    if config.method == "eggrpo-released":
        w = shape_advantages_released(A, entropy, low, high) - a.masked_fill(low, 0.0)
    if config.method in ("eggrpo", "eggrpo-released", "exclude"):
        a = a.masked_fill(low, 0.0)
    if config.method in ("grpo", "exclude"):
        w = torch.zeros_like(w)
    word = (rollout.plan - END).clamp(min=0)[..., None]
    word_logp = words.log_softmax(-1).gather(-1, word)[..., 0]
    code_logp = z.log_softmax(-1).gather(-1, rollout.codes[..., None])[..., 0]
    logp = torch.cat([word_logp, code_logp], 1) * valid
    log_q_token = log_q.gather(-1, rollout.codes[..., None])[..., 0]
    ratio = token_weights(logp, torch.cat([logp[:, :c].detach(), log_q_token], 1))
    shaped = a * ratio if config.weights == "all" else a
    sampled = w * ratio if config.weights != "none" else w
    if config.pull != "sampled":
        sampled = torch.zeros_like(w)
    loss, k3 = policy_loss(logp, None, shaped + sampled, valid, beta=0.0)
    weight = valid / valid.sum(1, keepdim=True) / len(valid)
    if config.pull != "sampled":
        loss = loss + (weight[:, c:] * pull_loss(z, teacher, w[:, c:])).sum()
    kl = torch.cat([divergence(words, reference[0]), divergence(z, reference[1])], 1)
    word_ref = reference[0].log_softmax(-1).gather(-1, word)[..., 0]
    code_ref = reference[1].log_softmax(-1).gather(-1, rollout.codes[..., None])[..., 0]
    log_ratio = torch.where(valid, torch.cat([word_ref, code_ref], 1) - logp, 0.0)
    k3 = log_ratio.exp() - log_ratio - 1
    penalty = {"k3": k3, "exact": torch.where(valid, kl, 0.0), "none": 0.0 * k3}[config.kl]
    loss = loss + config.beta * (weight * penalty).sum()
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(run.policy.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    with torch.no_grad():
        p, q = z.softmax(-1), log_q.exp()
        pull = w[:, c:] * (q - p).square().sum(-1)
        stats = describe(rollout, words, z, u, log_q, reference) | dict(
            reward=reward.mean(),
            exact=exact.mean(),
            gap=means(log_q_token - code_logp, weight[:, c:]),
            k3=(weight * k3).sum(),
            w_words=means(w[:, :c], weight[:, :c]),
            w_codes=means(w[:, c:], weight[:, c:]),
            w_largest=w.abs().max(),
            pull=means(pull, weight[:, c:]),  # w |q - p|^2
            grad_norm=norm,
        )
    return dict(zip(stats, torch.stack([*stats.values()]).tolist()))


@torch.no_grad()
def on_own_contexts(run, config, step):
    """Log the policies on contexts of p: sampled without guidance at temperature 1."""
    rollout, scenes = run.rollout(config, step, guidance=1.0, temperature=1.0)
    _, reward, exact = run.advantage(config, rollout, scenes, step)
    words, z, u = run.logits(run.policy, rollout, run.empty_policy)
    log_q = sampler_logits(z, u, config.guidance, config.temperature).log_softmax(-1)
    reference = forward_logits(run.reference, rollout.prompt, rollout.plan, rollout.codes)
    stats = describe(rollout, words, z, u, log_q, reference)
    stats |= dict(reward=reward.mean(), exact=exact.mean())
    return dict(step=step, **{name: value.item() for name, value in stats.items()})


@torch.no_grad()
def calibrate(run, config, batches=4):
    """Match a run to the base policy's numbers at its start. Returns the config with the temperature
    at which KL(q||p) is that of guidance 2, or with the kappa at which the mean of w |q - p|^2 is
    that of a bonus on high tokens."""
    if config.match == "none":
        return config
    if config.match == "pull":
        pulls = []
        for where in ("high", config.where):
            part = replace(config, where=where)
            pulls.append(sum(mean_pull(run, part, step) for step in range(batches)))
        return replace(config, kappa=config.kappa * pulls[0] / pulls[1])
    own = replace(config, guidance=1.0, temperature=1.0)
    drawn = []
    for step in range(batches):
        rollout, _ = run.rollout(own, step)
        _, z, u = run.logits(run.policy, rollout, run.policy)
        drawn.append((z, u))
    distance = lambda g, t: sum(
        divergence(sampler_logits(z, u, g, t), z).mean().item() for z, u in drawn
    )
    target = distance(2.0, 1.0)
    near, far = 1.0, 3.0 if config.match == "hot" else 0.2
    for _ in range(30):  # bisection
        middle = (near + far) / 2
        near, far = (middle, far) if distance(1.0, middle) < target else (near, middle)
    return replace(own, temperature=near, match=config.match)


def mean_pull(run, config, step):
    """Mean of w |q - p|^2 over the codes of a training batch of the base policy."""
    rollout, scenes = run.rollout(config, step)
    A, _, _ = run.advantage(config, rollout, scenes, step)
    words, z, u = run.logits(run.policy, rollout, run.policy)
    entropy = torch.cat([token_entropy(words), token_entropy(z)], 1) * rollout.valid
    c = run.policy.C
    draw = common.generator(config.seed, "where", step)
    w, _, _ = bonus(A, entropy, rollout.valid, c, config, draw)
    q = sampler_logits(z, u, config.guidance, config.temperature).softmax(-1)
    weight = rollout.valid / rollout.valid.sum(1, keepdim=True)
    pull = w[:, c:] * (q - z.softmax(-1)).square().sum(-1)
    return means(pull, weight[:, c:]).item()


def scores(run, config):
    """Score the policy at guidance 1, at the training guidance and at twice it, and at the training
    temperature. Returns {setting: {split: summary}}."""
    settings = {f"guidance {g:g}": (g, 1.0) for g in (1.0, config.guidance, 2 * config.guidance)}
    if config.temperature != 1.0:
        settings[f"temperature {config.temperature:.3g}"] = 1.0, config.temperature
    numbers = {"eval": config.prompts_scored, "rare": max(config.prompts_scored // 2, 6)}
    found = {}
    for name, (guidance, temperature) in settings.items():
        draw = lambda policy, prompt, noise: run.generate(
            config, policy, prompt, noise, guidance, temperature
        )
        with mock.patch.object(evaluate, "generate", draw):
            found[name] = {
                split: evaluate.summarize(
                    evaluate.evaluate(run.env, run.policy, split, number, config.batch, 0)
                )
                for split, number in numbers.items()
            }
    return found


def result_path(config):
    return Path(config.out) / config.preset / "one-sided" / f"{config.run}.json"


def main(argv=None):
    name = common.parse(Config, eggrpo.PRESETS, __doc__, argv).run
    presets = {preset: of | PLAN[name][0] for preset, of in eggrpo.PRESETS.items()}
    config = common.parse(Config, presets, __doc__, argv)  # flags override the plan
    run = Run(config)
    config = calibrate(run, config)
    optimizer = torch.optim.AdamW(run.policy.parameters(), config.lr, (0.9, 0.95), weight_decay=0.0)
    log, own = [], []
    for step in tqdm(range(config.steps), config.run):
        optimizer.param_groups[0]["lr"] = config.lr * min((step + 1) / 10, 1 - step / config.steps)
        if step % 20 == 0:
            own.append(on_own_contexts(run, config, step))
        log.append(dict(step=step, **update(run, config, optimizer, step)))
    own.append(on_own_contexts(run, config, config.steps))
    settings = {k: v for k, v in asdict(config).items() if k not in ("out", "device")}
    made = f"{common.commit()} on {run.device}, torch {torch.__version__}"
    record = dict(made=made, config=settings, scores=common.to_jsonable(scores(run, config)))
    record["log"] = [common.to_jsonable(line) for line in log]
    record["own"] = [common.to_jsonable(line) for line in own]
    common.write(result_path(config), json.dumps(record).encode())


if __name__ == "__main__":
    common.run(main)
