"""EG-GRPO on Janus-Pro (transformers' JanusForConditionalGeneration) on one GPU.

    python examples/janus.py --model deepseek-community/Janus-Pro-1B \
        --reward openai/clip-vit-large-patch14 --prompts prompts.txt

Needs torch and examples/requirements.txt. Each prompt of the file (one per line) gets G rollouts: a
plan in words, then 576 image codes, sampled and scored by one policy. Reward: a CLIP-format model,
or FILE.py:FUNCTION, given images (B, 3, h, w) in [0, 1] and B prompts, returning (B,). Writes
log.jsonl, images-*.png, policy.pt and final/ to --out; the same command resumes. One update per
batch of rollouts, so the ratio is 1 and nothing is clipped. janus_setup.py: flags, models, files.

Estimates by arithmetic, not measurements (16 rollouts, guidance 5, micro-batch 4, one H100): 1B
LoRA 14 GB, 1B --full 48 GB, 7B LoRA 32 GB; 7B --full fits no single GPU; about 25 s per step for
1B, 45 s for 7B, most of it sampling. Run so far: tiny random models on a CPU. Not run: real
weights, CUDA. On a first real run, look at
1. logp_gap_plan and logp_gap_image in log.jsonl: about 0.02 in bfloat16; more: two policies;
2. images-00001.png and "plan" in the log: if the images do not show the prompts or the plan is not
   English, then weights, tokenizer or chat format are wrong;
3. reward_std above 0, frac_reward_zero_std below 1; kl rises slowly: learning rates are guesses.

Letters: P prompts per step, G rollouts per prompt, B = P * G sequences, S request tokens, C plan
tokens, L image tokens, V vocabulary, D width.
"""

import importlib.util
import time
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor
from tqdm import tqdm

from janus_setup import (
    call_reward,
    check,
    check_out,
    generator,
    load_policy,
    load_reward,
    parse_flags,
    read_prompts,
    restore,
    run,
    save_checkpoint,
    save_images,
    start_log,
    trained_weights,
    write_log,
)

# The mathematics by its file: on the path, the repository would hide packages such as evaluate.
spec = importlib.util.spec_from_file_location(
    "objective", Path(__file__).resolve().parents[1] / "objective.py"
)
objective = importlib.util.module_from_spec(spec)
spec.loader.exec_module(objective)

INSTRUCTION = "Describe in one or two sentences what an image of this shows: {}"


class Rollout(NamedTuple):
    plan_request: Tensor  # (B, S) ids, padded with -1 on the left
    plan: Tensor  # (B, C) ids
    image_request: Tensor  # (B, S') ids, padded with -1 on the left, plan included
    codes: Tensor  # (B, L)
    logp: Tensor  # (B, C + L) when sampled, nats
    entropy: Tensor  # (B, C + L) when sampled, fraction of log V
    valid: Tensor  # (B, C + L) bool; False after a plan's end token

    def rows(self, index):
        """Return some of the sequences."""
        return Rollout(*(x[index] for x in self))


def modality(policy, image):
    """Return embedding and head, of image codes or of words."""
    model = policy.model
    if image:
        return model.prepare_embeddings_for_image_generation, model.model.generation_head
    return model.get_input_embeddings(), model.lm_head


def embed_request(policy, ids, guidance):
    """Embed requests (B, S). With guidance, B unconditional rows follow in which, as transformers
    does it, all but BOS and <begin_of_image> is the pad token. Returns (B or 2B, S, D), mask."""
    mask, ids = ids >= 0, ids.clamp(min=0)
    if guidance != 1:
        keep = (ids == policy.tokenizer.bos_token_id) | (ids == policy.boi)
        ids = torch.cat([ids, ids.where(keep, policy.tokenizer.pad_token_id)])
        mask = mask.repeat(2, 1)
    return policy.model.get_input_embeddings()(ids), mask


@torch.autocast("cuda", torch.bfloat16, enabled=torch.cuda.is_available())
def next_logits(policy, image, guidance, embeddings, mask, cache=None, last=1):
    """Compute the logits that are sampled from and scored, at the `last` last positions: float32,
    (B, last, V). embeddings: (B or 2B, N, D), mask: (B or 2B, cached + N) bool."""
    position = (mask.long().cumsum(1) - 1).clamp(min=0)[:, -embeddings.shape[1] :]
    hidden = policy.model.model.language_model(
        inputs_embeds=embeddings,
        attention_mask=mask.long(),
        position_ids=position,
        past_key_values=cache,
        use_cache=cache is not None,
    ).last_hidden_state
    _, head = modality(policy, image)
    logits = head(hidden[:, -last:]).float()
    if guidance == 1:
        return logits
    conditional, unconditional = logits.chunk(2)
    return unconditional + guidance * (conditional - unconditional)


def token_stats(logits, tokens):
    """Return log-probs in nats (B, T) and entropies (B, T) of tokens (B, T), logits (B, T, V)."""
    logp = logits.log_softmax(-1).gather(-1, tokens[..., None])[..., 0]
    return logp, objective.token_entropy(logits)


@torch.no_grad()
def sample(policy, request, length, image, guidance=1.0, noise=None):
    """Sample `length` tokens after each request. noise: (B, length) in [0, 1); None:
    greedy. Returns tokens, logp, entropy, valid, each (B, length)."""
    policy.model.eval()  # in train(), checkpointing would switch the cache off
    end = -1 if image else policy.tokenizer.eos_token_id
    embeddings, mask = embed_request(policy, request, guidance)
    done = torch.zeros_like(request[:, :1], dtype=torch.bool)  # (B, 1)
    cache = transformers.DynamicCache()
    steps = []
    for t in range(length):
        logits = next_logits(policy, image, guidance, embeddings, mask, cache)  # (B, 1, V)
        token = logits.argmax(-1)  # (B, 1)
        if noise is not None:  # invert the distribution function
            total = logits.double().softmax(-1).cumsum(-1)
            threshold = noise[:, t, None, None] * total[..., -1:]
            token = (total <= threshold).sum(-1)
        token = token.masked_fill(done, end)
        logp, entropy = token_stats(logits, token)
        steps.append((token, logp, entropy, ~done))
        done = done | (token == end)
        embed, _ = modality(policy, image)
        embeddings = embed(token.repeat(len(mask) // len(token), 1))
        mask = F.pad(mask, (0, 1), value=True)
    return [torch.cat(column, 1) for column in zip(*steps)]


def score(policy, request, tokens, image, guidance=1.0):
    """Score tokens (B, T) after requests in one pass. Returns logp and entropy, each (B, T)."""
    embeddings, mask = embed_request(policy, request, guidance)
    embed, _ = modality(policy, image)
    inner = embed(tokens[:, :-1].repeat(len(mask) // len(tokens), 1))
    mask = F.pad(mask, (0, inner.shape[1]), value=True)
    embeddings = torch.cat([embeddings, inner], 1)
    length = tokens.shape[1]
    logits = next_logits(policy, image, guidance, embeddings, mask, last=length)
    return token_stats(logits, tokens)


def score_rollout(policy, rollout, guidance):
    """Return the log-probs (B, C + L) of plans and codes."""
    plan, _ = score(policy, rollout.plan_request, rollout.plan, False)
    codes, _ = score(policy, rollout.image_request, rollout.codes, True, guidance)
    return torch.cat([plan, codes], 1)


@torch.no_grad()
def score_reference(policy, rollout, guidance):
    """Return the reference's log-probs (B, C + L): the frozen copy's, or with the adapter off."""
    if policy.reference is not None:
        return score_rollout(policy._replace(model=policy.reference), rollout, guidance)
    policy.model.disable_adapters()
    logp = score_rollout(policy, rollout, guidance)
    policy.model.enable_adapters()
    return logp


def left_pad(rows, device):
    """Pad lists of ids with -1 on the left. Returns (B, S)."""
    width = max(map(len, rows))
    padded = [[-1] * (width - len(row)) + row for row in rows]
    return torch.tensor(padded, device=device)


@torch.no_grad()
def decode_images(policy, codes, micro_batch):
    """Decode codes (B, L) to images (B, 3, h, w) in [0, 1]."""
    parts = [policy.model.decode_image_tokens(part) for part in codes.split(micro_batch)]
    images = torch.cat(parts).float().permute(0, 3, 1, 2)  # from (B, h, w, 3) in [-1, 1]
    return (images / 2 + 0.5).clamp(0, 1)


def make_rollout(policy, prompts, config, noise):
    """Sample a plan and an image per prompt. noise: (B, C + L). Returns a Rollout and images (B,
    3, h, w) in [0, 1]. The plan goes into the image request as ids: decoding may not round-trip."""
    words = lambda text: policy.tokenizer(text, add_special_tokens=False).input_ids
    begin = [policy.tokenizer.bos_token_id]
    answer = words("\n\n<|Assistant|>:")
    requests = []
    for prompt in prompts:
        requests.append(begin + words("<|User|>: " + INSTRUCTION.format(prompt)) + answer)
    plan_request = left_pad(requests, noise.device)
    plan_noise = noise[:, : config.plan_tokens]
    plan = sample(policy, plan_request, config.plan_tokens, False, noise=plan_noise)

    ids, _, _, valid = plan
    kept = valid & (ids != policy.tokenizer.eos_token_id)
    requests = []
    for prompt, row, keep in zip(prompts, ids, kept):
        question = begin + words(f"<|User|>: {prompt}.")
        requests.append(question + row[keep].tolist() + answer + [policy.boi])
    image_request = left_pad(requests, noise.device)
    image_noise = noise[:, config.plan_tokens :]
    length = image_noise.shape[1]
    codes = sample(policy, image_request, length, True, config.guidance, image_noise)

    logp, entropy, valid = (torch.cat(pair, 1) for pair in zip(plan[1:], codes[1:]))
    rollout = Rollout(plan_request, ids, image_request, codes[0], logp, entropy, valid)
    return rollout, decode_images(policy, codes[0], config.micro_batch)


def shape_rollout(rollout, advantage, config):
    """Shape advantages (B,) to (B, C + L). Low and high tokens are found in plan and image apart;
    lambda is one for both, over the whole batch. Returns the shaped advantages and lambda."""
    c = rollout.plan.shape[1]
    masks = []
    for slots in (slice(None, c), slice(c, None)):
        entropy = rollout.entropy[:, slots]
        valid = rollout.valid[:, slots]
        masks.append(objective.entropy_masks(entropy, valid, config.low_frac, config.high_frac))
    low, high = (torch.cat(pair, 1) for pair in zip(*masks))  # (B, C + L)
    shaping = advantage, rollout.entropy, low, high, rollout.valid, config.kappa
    return objective.shape_advantages(*shaping), objective.bonus_coefficient(*shaping)


def update(policy, optimizer, rollout, advantage, config):
    """Make one update from advantages (B, C + L). Returns scalars for the log. Raises UserError,
    before the update, if log-probs are not those of sampling or the gradient is not finite."""
    policy.model.train()  # for checkpointing
    optimizer.zero_grad()
    losses, kls, gaps = [], [], []
    for rows in torch.arange(len(advantage)).split(config.micro_batch):
        part = rollout.rows(rows)
        logp = score_rollout(policy, part, config.guidance)
        logp_ref = score_reference(policy, part, config.guidance) if config.beta else None
        loss, kl = objective.policy_loss(
            logp, logp_ref, advantage[rows], part.valid, config.beta, sequences=len(advantage)
        )
        loss.backward()
        losses.append(loss.detach())
        kls.append(kl)
        gaps.append((logp.detach() - part.logp).abs())
    c = rollout.plan.shape[1]
    gap = torch.cat(gaps)  # (B, C + L)
    plan_gap = gap[:, :c][rollout.valid[:, :c]].mean().item()
    image_gap = gap[:, c:].mean().item()
    bound = config.max_gap or (0.1 if gap.is_cuda else 1e-3)
    excess = f"mean |logp difference| of sampler and learner, plan {plan_gap} and image {image_gap}"
    check(
        plan_gap <= bound and image_gap <= bound,  # NaN is not
        f"{excess}, above {bound:g}: not one policy; no update was made",
    )
    norm = torch.nn.utils.clip_grad_norm_(trained_weights(policy.model).values(), 1.0)
    check(norm.isfinite(), "the gradient is not finite: lower --lr; no update was made")
    optimizer.step()
    return dict(
        loss=sum(losses).item(),
        kl=sum(kls).item(),
        grad_norm=norm.item(),
        logp_gap_plan=plan_gap,
        logp_gap_image=image_gap,
    )


def train_step(policy, optimizer, reward, prompts, config, step):
    """Sample, score, shape and update once. Returns scalars for the log and images (B, 3, h, w)."""
    started = time.time()
    c = config.plan_tokens
    image_tokens = policy.model.config.vision_config.num_image_tokens
    repeated = [prompt for prompt in prompts for _ in range(config.group_size)]  # B
    of_step = generator(config.seed, "noise", step)
    noise = torch.rand(len(repeated), c + image_tokens, generator=of_step)
    rollout, images = make_rollout(policy, repeated, config, noise.to(config.device))
    sampled = time.time()
    rewards = call_reward(reward, images, repeated).view(len(prompts), config.group_size)
    advantage = objective.group_advantages(rewards).flatten()  # (B,)
    advantage, coefficient = shape_rollout(rollout, advantage, config)  # (B, C + L)
    for group in optimizer.param_groups:  # warm-up
        group["lr"] = config.learning_rate * min(1, (step + 1) / 10)
    stats = update(policy, optimizer, rollout, advantage, config)
    valid = rollout.valid[:, :c]
    ended = (rollout.plan == policy.tokenizer.eos_token_id).any(1)
    first = rollout.plan[0][valid[0]]
    return dict(
        reward=rewards.mean().item(),
        reward_std=rewards.std(1).mean().item(),
        frac_reward_zero_std=(rewards.amax(1) == rewards.amin(1)).float().mean().item(),
        **stats,
        **{"lambda": coefficient.item()},
        entropy_plan=rollout.entropy[:, :c][valid].mean().item(),
        entropy_image=rollout.entropy[:, c:].mean().item(),
        plan_length=valid.sum(1).float().mean().item(),
        frac_truncated_plans=1 - ended.float().mean().item(),
        seconds_sampling=sampled - started,
        seconds=time.time() - started,
        prompt=prompts[0],
        plan=policy.tokenizer.decode(first, skip_special_tokens=True),
    ), images


def main(argv=None):
    config = parse_flags(argv, __doc__)
    prompts = read_prompts(config)
    check_out(config)
    reward = load_reward(config)
    some = prompts(0)[:1] * 2
    call_reward(reward, torch.rand(2, 3, 384, 384, device=config.device), some)  # before minutes
    policy = load_policy(config)
    optimizer = torch.optim.AdamW(
        trained_weights(policy.model).values(),
        lr=config.learning_rate,
        betas=(0.9, 0.95),
        weight_decay=0.0,
    )
    first = restore(policy, optimizer, config)
    folder = Path(config.out)
    start_log(config, first)
    with tqdm(total=config.steps, initial=first, desc="eg-grpo") as bar:
        for step in range(first, config.steps):
            stats, images = train_step(policy, optimizer, reward, prompts(step), config, step)
            write_log(config, step=step, **stats)
            if (step + 1) % config.save_every == 0 or step + 1 == config.steps or step == 0:
                save_images(folder / f"images-{step + 1:05}.png", images, config.group_size)
                save_checkpoint(policy, optimizer, config, step + 1)
            bar.set_postfix({key: f"{stats[key]:.3g}" for key in ("reward", "kl", "entropy_image")})
            bar.update()
    for part in (policy.model, policy.tokenizer):
        part.save_pretrained(folder / "final")
    print(f"{config.steps} steps done; weights, images and log in {folder}")


if __name__ == "__main__":
    run(main)
