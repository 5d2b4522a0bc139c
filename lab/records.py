"""What the study records of one policy: the images it draws for a prompt, the rare pairs it can
draw, the parts of its gradient. Each function returns a list of dicts, for a file of JSON lines."""

import torch
import torch.nn.functional as F
from torch.nn.utils import parameters_to_vector

import common
import eggrpo
import evaluate
import rewards
from model import forward_logits, token_logp
from rollout import draw_uniform, entropy_moments, make_rollout, sample_images, split_modalities
from rollout import training_scenes
from scenes import RARE_PAIRS, encode_scenes, make_scene, rare_pairs
from words import decode_words


@torch.no_grad()
def record_rows(config, env, policy, scene, number, **options):
    """Draw a prompt's plans and images. Returns a list of dicts, one per image.

    Entropies are those of the distributions that were sampled from, as fractions of log V, over
    valid plan tokens and over image tokens. nll: nats per token. distance: mean root mean square
    difference to the prompt's other images, 0 to 1. The last five say which tokens draw objects (a
    tenth of their patch is painted), and the entropy there and on the background.
    """
    m, n = config.images, config.plans * config.images
    uniform = draw_uniform(policy, n, m, config.seed, "records", number)
    prompt = encode_scenes(env.world, [scene])[0]
    sample, images = sample_images(env, policy, prompt, uniform, **options)
    targets = rewards.encode_targets(env.world, [scene] * n, env.device)
    reward, components, exact = rewards.compute_rewards(images, targets, env.world)
    flat = images.flatten(1)
    distance = torch.cdist(flat, flat).sum(1) / (max(n - 1, 1) * flat.shape[1] ** 0.5)
    columns = dict(reward=reward, exact=exact, **components, distance=distance)
    for part, slots in (("plan", slice(None, policy.C)), ("image", slice(policy.C, None))):
        valid = sample.valid[:, slots]
        mean, std = entropy_moments(sample.entropy[:, slots], valid)
        nll, _ = entropy_moments(-sample.logp[:, slots], valid)
        columns |= {f"{part}_entropy": mean, f"{part}_entropy_std": std, f"{part}_nll": nll}
    h, valid = sample.entropy[:, policy.C :], sample.valid[:, policy.C :]
    paint = rewards.paint_coverage(images).sum(1, keepdim=True)  # (n, 1, h, w)
    painted = F.avg_pool2d(paint, env.world.patch).flatten(1) > 0.1  # (n, L)
    low, high = eggrpo.entropy_masks(h, valid)
    share = lambda of, among: (of & among).sum(1) / among.sum(1).clamp(min=1)
    mean_over = lambda tokens: (h * tokens).sum(1) / tokens.sum(1).clamp(min=1)
    columns |= dict(objects_share=share(painted, valid), low_on_objects=share(painted, low),
                    high_on_objects=share(painted, high), object_entropy=mean_over(painted),
                    background_entropy=mean_over(~painted))  # fmt: skip
    columns = {name: values.tolist() for name, values in columns.items()}
    rows = []
    for i in range(n):
        head = dict(prompt=scene.prompt, number=number, category=scene.category,
                    plan=decode_words(sample.plan[i]), plan_index=i // m)  # fmt: skip
        rows.append(common.to_jsonable(head | {name: v[i] for name, v in columns.items()}))
    return rows


def rare_rows(env, policy, prompts, seed):
    """Score the evaluation prompts with rare pairs by pair. Returns a dict per pair."""
    exact, rows = evaluate.evaluate(env, policy, "rare", prompts, seed=seed).exact, []
    scenes = [make_scene(env.world, "rare", seed, i) for i in range(prompts)]
    for pair in RARE_PAIRS:
        asked = torch.tensor([pair in rare_pairs(scene.objects) for scene in scenes])
        n = int(asked.sum())
        rows.append(dict(pair=" ".join(pair), n=n, exact=exact[asked].mean().item() if n else 0.0))
    return rows


# --- gradients ------------------------------------------------------------------------------------


def gradient_parts(batch, plan_slots):
    """Split the advantages of a Batch of EG-GRPO. Returns {part: (B, T)}: GRPO's; those on low,
    middle and high tokens, which add up to GRPO's; the bonus; EG-GRPO's, with it, without low."""
    a = batch.group_advantage[:, None].expand_as(batch.advantage)
    bonus = torch.where(batch.low, 0.0, batch.advantage - a)
    levels = dict(low=batch.low, middle=~batch.low & ~batch.high, high=batch.high)
    parts, names = {"GRPO": a}, dict(plan="words", image="image tokens")
    for modality, slots in split_modalities(plan_slots).items():
        here = torch.zeros_like(batch.low)
        here[:, slots] = True
        for level, mask in levels.items():
            parts[f"{level} {names[modality]}"] = torch.where(mask & here, a, 0.0)
        parts[f"bonus on {names[modality]}"] = torch.where(here, bonus, 0.0)
    return parts | {"EG-GRPO": batch.advantage}


def part_gradients(policy, batch, advantages, config):
    """Gradient of the reward term, minus eggrpo.policy_loss without KL term, for several advantages
    {part: (B, T)}. Returns (parts, weights)."""
    parameters, total = list(policy.parameters()), 0.0
    for idx in torch.arange(len(batch.plan), device=batch.plan.device).split(config.micro_batch):
        part = eggrpo.Batch(*(x[idx] for x in batch))
        logits = forward_logits(policy, *part[:3], config.guidance)
        logp = token_logp(*logits, part.plan, part.codes)
        gradients = []
        for a in advantages.values():
            loss, _ = eggrpo.policy_loss(
                logp, None, a[idx], part.valid, beta=0.0, sequences=len(batch.plan)
            )
            found = torch.autograd.grad(-loss, parameters, retain_graph=True)
            gradients.append(parameters_to_vector(g.contiguous() for g in found))
        total = total + torch.stack(gradients)
    return total


def gradient_rows(env, policy, config, batches):
    """Measure what the parts of the gradient weigh in GRPO's, over training batches.

    size: norm over that of GRPO's gradient; cosine: with it; means over batches. along: inner
    product with the gradient of GRPO on the other batches, over GRPO's own: what a part adds to the
    progress that a small step makes on prompts it was not made for. Returns a dict per part.
    """
    sums, same, size, cosine = 0.0, 0.0, 0.0, 0.0
    for step in range(batches):
        scenes = training_scenes(env.world, config, step)
        rollout = make_rollout(policy, env, scenes, config, step)
        batch = eggrpo.make_batch(rollout, config)
        parts = gradient_parts(batch, policy.C)
        # of a million products in float32 a sum is off by 3e-4
        g = part_gradients(policy, batch, parts, config).double()  # (parts, weights)
        norm, inner = g.norm(dim=1), g @ g[0]
        sums, same = sums + g, same + inner
        size = size + norm / norm[0].clamp(min=1e-12) / batches
        cosine = cosine + inner / (norm * norm[0]).clamp(min=1e-12) / batches
    along = sums @ sums[0] - same  # over pairs of two batches
    along = along / along[0] if along[0] else along  # without rewards that differ all are 0
    columns = dict(size=size, cosine=cosine, along=along)
    return [common.to_jsonable(dict(part=name, **{k: v[i].item() for k, v in columns.items()}))
            for i, name in enumerate(parts)]  # fmt: skip
