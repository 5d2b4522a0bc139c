"""Draw what the text describes: entropy after training, the way of the data, the kinds of prompts.

    bash train.sh lab.pictures         after bash train.sh; seconds

    -> out/small/entropy.png (of base, grpo-0 and eggrpo-0), data.png (of the step of lab.one_step,
       with shapes and names from the code), categories.png
"""

import math
import textwrap

import numpy as np
import torch
from matplotlib.figure import Figure

import common
from eggrpo import method_masks
from evaluate import draw_noise, gallery, run_title, sample_images, save_figure
from lab.measure import step_config, token_advantages, training_batch
from lab.figures import WIDTH
from lab.one_step import choose_prompt
from lab.one_step_figure import draw_advantages, draw_bars, draw_borders, draw_entropies, draw_image
from lab.study import load
from model import generate
from objective import entropy_masks, group_advantages, shape_advantages
from rewards import compute_rewards
from scenes import WORLDS, decode_words, encode_scenes, make_scene, render
from tiny_vq.train import stack_images
from tiny_vq.vqvae import VQVAE

POLICIES = {"base": "base + plan", "grpo-0": run_title("grpo-0"), "eggrpo-0": run_title("eggrpo-0")}


def to_pixels(images):
    """Images (n, 3, h, w) in [0, 1] -> what matplotlib draws, (n, h, w, 3)."""
    return images.clamp(0, 1).permute(0, 2, 3, 1).cpu().numpy()


def to_square(tokens):
    """The image tokens of one sequence, (L,), as rows of the image."""
    side = math.isqrt(len(tokens))
    return tokens.view(side, side).cpu().numpy()


def draw_policy(figure, title, rollout, pixels, masks):
    """Draw what one policy samples for two prompts: image, and entropy of its tokens and words."""
    C = rollout.plan.shape[1]
    fields = [rollout.entropy, *masks]
    squares, strips = figure.subfigures(2, 1, height_ratios=(2, 1))
    squares = squares.subplots(1, 2 * len(pixels))
    strips = strips.subplots(1, len(pixels))
    longest = rollout.valid[:, :C].sum(1).max().item()
    for i, strip in enumerate(strips):
        picture, tokens = squares[2 * i : 2 * i + 2]
        draw_image(picture, pixels[i], rollout.codes.shape[1])
        draw_entropies(tokens, *(to_square(x[i, C:]) for x in fields))
        tokens.set_aspect("equal")
        tokens.set_title(f"image, mean {rollout.entropy[i, C:].mean():.3f}", fontsize=9)

        words = decode_words(rollout.plan[i]).split()
        n = len(words)
        draw_entropies(strip, *(x[i, None, :n].cpu().numpy() for x in fields), numbers=False)
        strip.set_xticks(np.arange(n) + 0.5, words, rotation=90, fontsize=8)
        strip.tick_params(length=0)
        strip.set_xlim(0, longest)
        strip.spines[:].set_visible(False)
        strip.set_title(f"plan, mean {rollout.entropy[i, :n].mean():.3f}", fontsize=9)
    figure.suptitle(title, x=0.01, ha="left", weight="bold")


def draw_entropy(path, config):
    """Draw entropy token by token before and after training, of the same prompts and noise."""
    figure = Figure(figsize=(WIDTH, 10.5), layout="constrained")
    parts = figure.subfigures(len(POLICIES), 1)
    for part, (name, title) in zip(parts, POLICIES.items()):
        env, policy, options = load(config, name)
        scenes = [make_scene(env.world, split, 777, 0) for split in ("eval", "rare")]
        prompts, _ = encode_scenes(env.world, scenes)
        noise = draw_noise(policy, len(scenes), "pictures")
        rollout, images = sample_images(env, policy, prompts, noise, **options)
        masks = method_masks(rollout, step_config(config.preset, "eggrpo"))
        draw_policy(part, title, rollout, to_pixels(images), masks)
    usual, rare = (scene.prompt for scene in scenes)
    note = "Entropy, fraction of log V: hatched the lowest 20 %, framed the highest 50 %"
    figure.suptitle(f'{note}\nleft: "{usual}", right: "{rare}" (a rare pair)', fontsize=9)
    save_figure(figure, path)


def draw_words(axis, words):
    text = textwrap.fill(decode_words(words), 20)
    axis.text(0.5, 0.5, text, ha="center", va="center", fontsize=9)


def draw_codes(axis, codes):
    rows, columns = codes.shape
    axis.set(xlim=(0, columns), ylim=(rows, 0))
    for (r, c), code in np.ndenumerate(codes):
        axis.text(c + 0.5, r + 0.5, code, ha="center", va="center", fontsize=8)


def draw_data(path, config):
    """Draw what a training step computes: tensors, shapes, functions. Contents: of one rollout."""
    env, policy, _ = load(config, "base")
    settings = step_config(config.preset, "eggrpo", config.seed)
    batch = training_batch(env, policy, settings, 0)
    low, high, shaped = token_advantages(batch, settings)
    rollout = batch.rollout
    P, G = batch.rewards.shape
    A = batch.advantage.view(P, G)
    cards = [  # name and letters of a tensor, the tensor, the function that makes it
        ("prompt (P, S)", rollout.prompt[::G], encode_scenes),
        ("plan (B, C)", rollout.plan, generate),
        ("codes (B, L)", rollout.codes, generate),
        ("images (B, 3, h, w)", batch.images, VQVAE.decode),
        ("rewards (B,)", batch.rewards.flatten(), compute_rewards),
        ("A (P, G)", A, group_advantages),
        ("low, high (B, T)", low, entropy_masks),
        ("A_t (B, T)", shaped, shape_advantages),
    ]
    figure = Figure(figsize=(WIDTH, 5.6), layout="compressed")
    figure.get_layout_engine().set(wspace=0.12)
    axes = figure.subplots(2, 4).flatten()
    for number, (axis, (name, tensor, function)) in enumerate(zip(axes, cards), 1):
        axis.set_title(f"{number}. {name}\n{tuple(tensor.shape)}", fontsize=10)
        file = function.__module__.replace(".", "/")
        axis.set(xticks=[], yticks=[])
        axis.set_xlabel(f"{function.__name__}\n({file}.py)", fontsize=9)
        axis.set_box_aspect(1)
        if number % 4:
            arrow = dict(arrowstyle="->", linewidth=1.5)
            axis.annotate("", (1.16, 0.5), (1.01, 0.5), "axes fraction", arrowprops=arrow)

    i = choose_prompt(batch)
    k = int(batch.rewards[i].argmax())
    row = i * G + k
    draw_words(axes[0], rollout.prompt[row])
    draw_words(axes[1], rollout.plan[row])
    draw_codes(axes[2], to_square(rollout.codes[row]))
    draw_image(axes[3], to_pixels(batch.images)[row], env.world.image_tokens)
    draw_bars(axes[4], batch.rewards[i].tolist(), [k])
    draw_bars(axes[5], A[i].tolist(), [k])
    image = slice(policy.C, None)
    entropy, low, high = (to_square(x[row, image]) for x in (rollout.entropy, low, high))
    draw_entropies(axes[6], entropy, low, high)
    draw_advantages(axes[7], to_square(shaped[row, image]), A[i, k].item(), numbers=False)
    save_figure(figure, path)


def draw_categories(path, config):
    """Draw a scene of each category with the borders of its tokens, and its reconstruction."""
    env, _, _ = load(config, "base")
    categories = env.world.categories
    scenes = [make_scene(env.world, "eval", 0, 0, category) for category in categories]
    images = stack_images([render(env.world, scene) for scene in scenes]).to(env.device) / 255
    restored = env.tokenizer.decode(env.tokenizer.encode(images))
    heads = [f"{scene.category}: {scene.prompt}" for scene in scenes]
    figure = gallery([images, restored], heads, ["scene", "its codes, decoded"])
    borders = np.arange(env.world.side) * env.world.patch - 0.5  # of image tokens, in pixels
    for axis in figure.axes:
        draw_borders(axis, borders)
    save_figure(figure, path)


@torch.no_grad()
@common.stage()
def main(argv=None):
    config = common.parse(common.BaseConfig, {name: {} for name in WORLDS}, __doc__, argv)
    folder = config.folder
    drawings = dict(entropy=draw_entropy, data=draw_data, categories=draw_categories)
    for name, draw in drawings.items():
        draw(folder / f"{name}.png", config)
        print(f"picture: {folder / name}.png")


if __name__ == "__main__":
    common.run(main)
