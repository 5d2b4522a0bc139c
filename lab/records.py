"""What the study records of one policy: the images that it draws for a prompt."""

import torch

from eggrpo import entropy_moments
from evaluate import draw_noise, sample_images
from rewards import compute_rewards, detect, encode_targets
from scenes import decode_words, encode_scenes


@torch.no_grad()
def record_rows(config, env, policy, scene, number, **options):
    """Draw a prompt's plans, and some images for each plan. Returns a dict per image.

    Entropies are those of the distributions that were sampled from, as fractions of log V.
    distance: mean root mean square difference to the prompt's other images, 0 to 1. paint: painted
    fraction of the image.
    """
    n = config.plans * config.images
    noise = draw_noise(policy, n, config.seed, "records", number)
    of_plans = noise[:: config.images, : policy.C]
    noise[:, : policy.C] = of_plans.repeat_interleave(config.images, 0)
    prompt, _ = encode_scenes(env.world, [scene])
    rollout, images = sample_images(env, policy, prompt, noise, **options)
    targets = encode_targets(env.world, [scene] * n, env.device)
    reward, _, exact = compute_rewards(images, targets, env.world)
    pixels = images.shape[2] * images.shape[3]
    paint = detect(images, env.world).paint / pixels

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
        plan=map(decode_words, rollout.plan),
        plan_index=[i // config.images for i in range(n)],
        reward=reward.tolist(),
        exact=exact.tolist(),
        distance=distance.tolist(),
        paint=paint.tolist(),
        plan_entropy=plan_entropy.tolist(),
        image_entropy=image_entropy.tolist(),
        image_entropy_std=image_entropy_std.tolist(),
    )
    of_prompt = dict(number=number, category=scene.category)
    rows = []
    for values in zip(*columns.values()):
        rows.append(of_prompt | dict(zip(columns, values)))
    return rows
