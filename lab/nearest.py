"""A second opinion on `exact`: find the rendered scene that is nearest to an image.

    python -m lab.nearest --preset cpu     -> out/cpu/nearest.json, sheet-<policy>.png

The detector of rewards.py matches templates by convolution. This check shares no code with it: an
object of a scene never leaves its cell, so the nearest of all scenes that the renderer can make is
found cell by cell. Each cell is compared, by squared error, with an empty cell and with every kind
of object at every position and its best brightness. The image counts as exact if the objects of
that scene are those that the prompt asks for, its relation holds, and the squared error is a small
fraction of the scene's own energy (what is left over is smear).

The sheets show 64 random images per policy; a frame is green if both checks say exact, red if
neither does, and blue or orange if only the detector or only this check does.
"""

import itertools
import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch

import common
from evaluate import Config as EvaluationConfig
from evaluate import gallery, load_policies, markdown_table, save_image
from rewards import compute_rewards, encode_targets
from rollout import draw_uniform, load_env, sample_scenes
from scenes import BACKGROUND, WORLDS, make_scene, relation_holds, shape_mask
from scenes import Object
from words import COLOURS, SHAPES

MAX_ERROR = 0.2  # of an exact image: squared error over the energy of the nearest scene


@dataclass(frozen=True)
class Config:
    preset: str = ""  # smoke, cpu or gpu
    device: str = "auto"
    out: str = "out"
    seed: int = 9  # of prompts and noise
    prompts: int = 1000  # images per policy, half of them of rare pairs

    def check(self):
        common.check_at_least(64, self, "prompts")
        common.check_at_least(0, self, "seed")


def candidates(world):
    """Render every object that a cell can hold at full brightness, without noise. Returns kinds, a
    list of (colour, shape, texture), and offsets from the background (n, 3 * cell * cell)."""
    room, kinds, offsets = world.cell - world.object_size + 1, [], []
    for colour, shape, texture in itertools.product(COLOURS, SHAPES, world.textures):
        paint = (torch.tensor(COLOURS[colour]) - torch.tensor(BACKGROUND)) / 255
        mask = torch.tensor(shape_mask(shape, texture, world.object_size), dtype=torch.float32)
        for down, right in itertools.product(range(room), range(room)):
            cell = torch.zeros(3, world.cell, world.cell)
            rows, columns = (slice(x, x + world.object_size) for x in (down, right))
            cell[:, rows, columns] = paint[:, None, None] * mask
            kinds.append((colour, shape, texture))
            offsets.append(cell.flatten())
    return kinds, torch.stack(offsets)


def nearest_scenes(images, world):
    """Find the nearest scene of each image (B, 3, h, w) in [0, 1]. Returns a list of B lists of
    Objects, and the squared error over the energy of the scene (B,)."""
    kinds, d = candidates(world)
    offset = images.float().cpu() - torch.tensor(BACKGROUND)[:, None, None] / 255
    cells = offset.unfold(2, world.cell, world.cell).unfold(3, world.cell, world.cell)
    x = cells.permute(0, 2, 3, 1, 4, 5).reshape(len(images), world.grid**2, -1)  # (B, cells, D)
    energy, product = d.square().sum(1), x @ d.t()
    brightness = (product / energy).clamp(world.min_brightness, 1)
    change = (brightness * energy - 2 * product) * brightness  # against an empty cell, whose is 0
    best, index = change.min(2)  # (B, cells)
    error = (x.square().sum(2) + best.clamp(max=0)).sum(1)
    scene_energy = (brightness.square() * energy).gather(2, index[..., None])[..., 0]
    scene_energy = (scene_energy * (best < 0)).sum(1)
    scenes = [
        [
            Object(*kinds[index[i, c]], *divmod(c, world.grid), (0, 0))
            for c in range(world.grid**2)
            if best[i, c] < 0
        ]
        for i in range(len(images))
    ]
    return scenes, error / scene_energy.clamp(min=1e-6)


def is_exact(objects, error, scene):
    """Return whether the nearest scene is what the prompt of `scene` asks for."""
    kind = lambda o: (o.colour, o.shape, o.texture)
    if error > MAX_ERROR or Counter(map(kind, objects)) != Counter(map(kind, scene.objects)):
        return False
    if not scene.relation:
        return True
    first, second = (
        [o for o in objects if kind(o) == kind(wanted)] for wanted in scene.objects[:2]
    )
    return any(relation_holds(scene.relation, a, b) for a in first for b in second)


def compare(env, policy, config, **options):
    """Judge one image per prompt by both checks. Returns images (n, 3, h, w), scenes, and exact
    (n,) bool by the detector and by the nearest scene."""
    half = config.prompts // 2
    scenes = [
        make_scene(env.world, s, config.seed, i) for s in ("eval", "rare") for i in range(half)
    ]
    images = []
    for start in range(0, len(scenes), 100):
        part = scenes[start : start + 100]
        uniform = draw_uniform(policy, len(part), 1, config.seed, "nearest", start)
        images.append(sample_scenes(env, policy, part, uniform, **options)[1])
    images = torch.cat(images)
    targets = encode_targets(env.world, scenes, env.device)
    exact = compute_rewards(images, targets, env.world)[2].cpu().bool()
    found, error = nearest_scenes(images, env.world)
    judged = zip(found, error.tolist(), scenes)
    return images, scenes, exact, torch.tensor([is_exact(*x) for x in judged])


def sheet(images, scenes, exact, nearest, size=96):
    """Arrange images eight in a row, the prompt above each. Frame: green if both checks say exact,
    blue if the detector only, orange if the nearest scene only, red if none."""
    frames, colours = 2 * exact.int() + nearest, ("red", "orange", "blue", "green")
    rows = []
    for i in range(0, len(images), 8):
        part, prompts = slice(i, i + 8), [scene.prompt for scene in scenes[i : i + 8]]
        rows.append(gallery([images[part]], prompts, None, [frames[part]], colours, size))
    page, top = rows[0].resize((rows[0].width, sum(r.height for r in rows))), 0
    for row in rows:
        page.paste(row, (0, top))
        top += row.height
    return page


def table(results):
    """Format the content of nearest.json as a Markdown table."""
    head = ["", "images", "exact by the detector", "exact by the nearest scene", "agree",
            "only the detector", "only the nearest scene"]  # fmt: skip
    return markdown_table(head, [
        [name, x["n"], *(f"{x[key]:.3f}" for key in ("detector", "nearest", "agree")),
         x["detector_only"], x["nearest_only"]]
        for name, x in results.items()
    ])  # fmt: skip


def main(argv=None):
    presets = {name: {} for name in WORLDS}
    config, _ = common.parse("-m lab.nearest", Config, presets, __doc__, argv)
    device, folder = common.pick_device(config.device), Path(config.out) / config.preset
    env, results = load_env(config.preset, config.out, device), {}
    policies = load_policies(EvaluationConfig(preset=config.preset, out=config.out), device)
    for name, (policy, options) in policies.items():
        images, scenes, exact, nearest = compare(env, policy, config, **options)
        results[name] = dict(
            n=len(exact),
            detector=exact.float().mean().item(),
            nearest=nearest.float().mean().item(),
            agree=(exact == nearest).float().mean().item(),
            detector_only=(exact & ~nearest).sum().item(),
            nearest_only=(nearest & ~exact).sum().item(),
        )
        chosen = torch.randperm(len(exact), generator=common.generator(config.seed, "sheet"))[:64]
        shown = images[chosen], [scenes[i] for i in chosen], exact[chosen], nearest[chosen]
        path = folder / f"sheet-{name.replace(' ', '-').replace(',', '')}.png"
        save_image(sheet(*shown).quantize(256, method=1), path)  # 1 keeps rare colours
    content = json.dumps(common.to_jsonable(results), indent=1) + "\n"
    common.write(folder / "nearest.json", content.encode())
    print(table(results))


if __name__ == "__main__":
    common.run(main)
