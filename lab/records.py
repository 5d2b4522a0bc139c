"""What the study records of one policy: the images that it draws for a prompt, and the parts of its
gradient. Each function returns a list of dicts, for a file of JSON lines."""

import torch
from torch.nn.utils import parameters_to_vector

import common
from eggrpo import entropy_moments, policy_loss
from evaluate import draw_noise, sample_images
from lab.batch import token_advantages, training_batch
from model import score
from rewards import compute_rewards, encode_targets
from scenes import decode_words, encode_scenes


@torch.no_grad()
def record_rows(config, env, policy, scene, number, **options):
    """Draw a prompt's plans, and some images for each plan. Returns a dict per image.

    Entropies are those of the distributions that were sampled from, as fractions of log V.
    distance: mean root mean square difference to the prompt's other images, 0 to 1.
    """
    n = config.plans * config.images
    noise = draw_noise(policy, n, config.seed, "records", number)
    of_plans = noise[:: config.images, : policy.C]
    noise[:, : policy.C] = of_plans.repeat_interleave(config.images, 0)
    prompt, _ = encode_scenes(env.world, [scene])
    rollout, images = sample_images(env, policy, prompt, noise, **options)
    targets = encode_targets(env.world, [scene] * n, env.device)
    reward, _, exact = compute_rewards(images, targets, env.world)

    flat = images.flatten(1)
    total = torch.cdist(flat, flat).sum(1)
    others = max(n - 1, 1)
    distance = total / (others * flat.shape[1] ** 0.5)
    plan = slice(None, policy.C)
    image = slice(policy.C, None)
    plan_entropy, _ = entropy_moments(rollout.entropy[:, plan], rollout.valid[:, plan])
    moments = entropy_moments(rollout.entropy[:, image], rollout.valid[:, image])
    image_entropy, image_entropy_std = moments
    columns = dict(
        reward=reward,
        exact=exact,
        distance=distance,
        plan_entropy=plan_entropy,
        image_entropy=image_entropy,
        image_entropy_std=image_entropy_std,
    )
    columns = {name: values.tolist() for name, values in columns.items()}
    rows = []
    for i in range(n):
        row = dict(
            number=number,
            category=scene.category,
            plan=decode_words(rollout.plan[i]),
            plan_index=i // config.images,
        )
        for name, values in columns.items():
            row[name] = values[i]
        rows.append(common.to_jsonable(row))
    return rows


# --- gradients ------------------------------------------------------------------------------------


def gradient_parts(batch, config):
    """Split the advantages of EG-GRPO. Returns {part: (B, T)}: GRPO's; those on low, middle and high
    tokens, which add up to GRPO's; the bonus; EG-GRPO's, with the bonus and without low."""
    low, high, shaped = token_advantages(batch, config)
    a = batch.advantage[:, None].expand_as(shaped)
    bonus = torch.where(high, shaped - a, 0.0)
    is_plan = torch.zeros_like(low)
    is_plan[:, : batch.rollout.plan.shape[1]] = True
    middle = ~low & ~high
    parts = {"GRPO": a}
    for name, here in (("words", is_plan), ("image tokens", ~is_plan)):
        parts[f"low {name}"] = torch.where(low & here, a, 0.0)
        parts[f"middle {name}"] = torch.where(middle & here, a, 0.0)
        parts[f"high {name}"] = torch.where(high & here, a, 0.0)
        parts[f"bonus on {name}"] = torch.where(here, bonus, 0.0)
    parts["EG-GRPO"] = shaped
    return parts


def part_gradients(policy, batch, parts, config):
    """Gradient of minus policy_loss without KL term, for the advantages (B, T) of each part.
    Returns (parts, weights)."""
    parameters = list(policy.parameters())
    sequences = len(batch.advantage)
    total = 0.0
    for rows in torch.arange(sequences, device=batch.advantage.device).split(config.micro_batch):
        part = batch.rollout.rows(rows)
        logp = score(policy, part.prompt, part.plan, part.codes, config.guidance)
        gradients = []
        for advantage in parts.values():
            loss, _ = policy_loss(logp, None, advantage[rows], part.valid, 0.0, sequences)
            found = torch.autograd.grad(-loss, parameters, retain_graph=True)
            gradients.append(parameters_to_vector(g.contiguous() for g in found))
        total = total + torch.stack(gradients)
    return total


def gradient_rows(env, policy, config, batches):
    """Measure what the parts of EG-GRPO's gradient weigh in GRPO's, over training batches.

    size: norm over that of GRPO's gradient; cosine: with it; means over batches. along: inner
    product with the gradient of GRPO on the other batches, over GRPO's own: what a part adds to the
    progress that a small step makes on prompts it was not made for. Returns a dict per part.
    """
    sums = same = size = cosine = 0.0
    for step in range(batches):
        batch = training_batch(env, policy, config, step)
        parts = gradient_parts(batch, config)
        # of a million products in float32 a sum is off by 3e-4
        g = part_gradients(policy, batch, parts, config).double()  # (parts, weights)
        norm = g.norm(dim=1)
        inner = g @ g[0]
        sums = sums + g
        same = same + inner
        size = size + norm / norm[0].clamp(min=1e-12) / batches
        cosine = cosine + inner / (norm * norm[0]).clamp(min=1e-12) / batches
    along = sums @ sums[0] - same  # over pairs of two batches
    if along[0]:  # else no rewards differ
        along = along / along[0]
    rows = []
    for name, *values in zip(parts, size.tolist(), cosine.tolist(), along.tolist()):
        row = dict(zip(("size", "cosine", "along"), values), part=name)
        rows.append(common.to_jsonable(row))
    return rows
