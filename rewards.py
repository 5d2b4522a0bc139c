"""Rewards: detect the objects in an image and compare them with what the prompt asks for.

    targets = encode_targets(world, scenes, device)                    what the prompts ask for
    rewards, components, exact = compute_rewards(images, targets, world)

Detection is exact, not learned: cut the image into cells, assign each pixel to a palette colour
(`paint_coverage`), match every shape and texture against each colour, keep the best match of each
cell. Stars are too faint to count as paint, so the sky is not scored. The reward is the mean of the
functions in REWARDS, over those that apply to the prompt.

A reward function takes images (B, 3, h, w) in [0, 1], Detections and Targets, and changes none of
them. It returns floats (B,) on the device of images: from 0 to 1, NaN if it does not apply (each
image needs one that does). It runs without gradient, so it may hold a network. Add your own:

    rewards.REWARDS["red"] = lambda images, detections, targets: images[:, 0].mean(dim=(1, 2))

`exact` is 1 if the image has the right objects, no others, a true relation, and at most a trace of
anything else: cleanliness of at least CLEAN_THRESHOLD. It is measured, not optimised.

Shapes: B images of h x w pixels; `colours`, `textures`, `shapes` and `cells` stand for their
counts; a kind is a colour, a texture and a shape, numbered in this order.
"""

import math
from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from common import UserError, check
from scenes import BACKGROUND, COLOURS, RELATIONS, SHAPES, shape_mask

NO_PAINT = 0.25  # contrast with the background below which a pixel counts as unpainted
FULL_PAINT = 0.6  # contrast above which it counts as painted, because objects differ in brightness
MATCH_THRESHOLD = 0.9  # least Dice overlap of paint and template that counts as an object
CLEAN_THRESHOLD = 0.9  # least cleanliness of an exact image


class Targets(NamedTuple):
    counts: Tensor  # (B, kinds) number of objects of each kind
    relation: Tensor  # (B,) index into RELATIONS, -1 if the prompt names none
    pair: Tensor  # (B, 2) kinds of the relation's subject and object


class Detections(NamedTuple):
    counts: Tensor  # (B, kinds) number of objects of each kind
    kind: Tensor  # (B, cells) kind of the object in each cell, -1 in an empty cell
    score: Tensor  # (B, cells) Dice overlap of its paint and template
    paint: Tensor  # (B,) total paint, in pixels
    explained: Tensor  # (B,) paint that lies on a detected object of its colour
    kind_dims: tuple  # (colours, textures, shapes)
    grid: int  # cells per side


def kind_index(world, obj):
    """Return the number of an object's kind."""
    colour = list(COLOURS).index(obj.colour)
    texture = world.textures.index(obj.texture)
    shape = SHAPES.index(obj.shape)
    return (colour * len(world.textures) + texture) * len(SHAPES) + shape


def encode_targets(world, scenes, device="cpu"):
    """Encode what the prompts of scenes ask for. Returns Targets."""
    kinds = len(COLOURS) * len(world.textures) * len(SHAPES)
    counts = torch.zeros(len(scenes), kinds)
    relation = torch.full((len(scenes),), -1)
    pair = torch.zeros(len(scenes), 2, dtype=torch.long)
    for i, scene in enumerate(scenes):
        wanted = [kind_index(world, obj) for obj in scene.objects]
        for kind in wanted:
            counts[i, kind] += 1
        if scene.relation:
            relation[i] = RELATIONS.index(scene.relation)
            pair[i] = torch.tensor(wanted[:2])
    return Targets(counts.to(device), relation.to(device), pair.to(device))


# --- detection ------------------------------------------------------------------------------------


@lru_cache(maxsize=8)
def _palette(device):
    """Background (3,) and the offsets of the palette colours from it (colours, 3). Cached,
    because a copy from the host synchronises."""
    background = torch.tensor(BACKGROUND, device=device) / 255
    colours = torch.tensor(list(COLOURS.values()), device=device) / 255
    return background, colours - background


def _saturate(contrast):
    """Map contrast to coverage: 0 below NO_PAINT, 1 above FULL_PAINT, linear in between."""
    return ((contrast - NO_PAINT) / (FULL_PAINT - NO_PAINT)).clamp(0, 1)


def paint_coverage(images):
    """How much of each pixel is painted in each colour. (B, 3, h, w) -> (B, colours, h, w), in
    [0, 1].

    A pixel is background + contrast * (colour - background); it belongs to the colour that leaves
    the smallest residual.
    """
    background, axes = _palette(str(images.device))
    offset = images.float() - background[:, None, None]
    square = (axes**2).sum(1)[:, None, None]  # (colours, 1, 1)
    dot = torch.einsum("bkhw,ck->bchw", offset, axes)
    contrast = (dot / square).clamp_(0, 1)
    # |offset - contrast axis|^2 without |offset|^2, which is the same for all colours
    residual = (contrast * square - 2 * dot) * contrast
    nearest = residual == residual.amin(1, keepdim=True)
    return _saturate(contrast * nearest)


@lru_cache(maxsize=8)
def _templates(world, device):
    """Coverage of every texture and shape at mean brightness, in its place in a cell: (textures *
    shapes, cell, cell)."""
    masks = []
    for texture in world.textures:
        for shape in SHAPES:
            masks.append(torch.from_numpy(shape_mask(shape, texture, world.object_size).copy()))
    contrast = torch.stack(masks).float() * sum(world.brightness) / 2
    before = world.margin
    after = world.cell - world.object_size - before
    return F.pad(_saturate(contrast), (before, after, before, after)).to(device)


def detect(images, world):
    """Find at most one object in each cell of images (B, 3, h, w) in [0, 1]. Returns Detections.

    A cell has an object of the kind whose template has the largest Dice overlap with the paint of
    its colour, 2 sum(paint * template) / (sum(paint^2) + sum(template^2)), if that is above
    MATCH_THRESHOLD. sum(paint^2) is over the box that objects fill, where no neighbour's edge is.

    An object ends with its box: a pixel beside the box that is painted by half or more, in any
    colour, makes it none. So paint that is connected is at most one object, however large it is.
    """
    grid = world.grid
    templates = _templates(world, str(images.device))  # (textures * shapes, cell, cell)
    paint = paint_coverage(images)  # (B, colours, h, w)
    cells = paint.unflatten(3, (grid, world.cell)).unflatten(2, (grid, world.cell))
    cells = cells.permute(0, 2, 4, 1, 3, 5).flatten(1, 2)  # (B, cells, colours, cell, cell)

    box = slice(world.margin, world.margin + world.object_size)
    energy = cells[..., box, box].square().sum((3, 4))  # (B, cells, colours)
    overlap = torch.einsum("bmcyx,kyx->bmck", cells, templates)
    size = templates.square().sum((1, 2))  # (textures * shapes,)
    dice = 2 * overlap / (energy[..., None] + size)  # (B, cells, colours, textures * shapes)
    score, kind = dice.flatten(2).max(2)  # (B, cells)
    gap = torch.arange(world.image_size, device=images.device) % world.cell >= world.object_size
    gaps = paint.amax(1) * (gap[:, None] | gap)  # (B, h, w), 0 in all boxes
    beside = F.max_pool2d(gaps, world.object_size + 2, world.cell, padding=1)  # (B, rows, columns)
    found = (score > MATCH_THRESHOLD) & (beside.flatten(1) < 0.5)
    kind_dims = len(COLOURS), len(world.textures), len(SHAPES)
    counts = F.one_hot(kind, math.prod(kind_dims)) * found[..., None]  # (B, cells, kinds)

    # Explained is the paint of an object's colour under its template, dilated by one pixel.
    colour = F.one_hot(kind // len(templates), len(COLOURS)).float()  # (B, cells, colours)
    dilated = F.max_pool2d((templates > 0).float(), 3, stride=1, padding=1)
    cover = dilated[kind % len(templates)] * found[..., None, None]  # (B, cells, cell, cell)
    return Detections(
        counts=counts.sum(1).float(),
        kind=kind.masked_fill(~found, -1),
        score=score,
        paint=paint.sum((1, 2, 3)),
        explained=torch.einsum("bmcyx,bmyx,bmc->b", cells, cover, colour),
        kind_dims=kind_dims,
        grid=grid,
    )


# --- the components of the reward -----------------------------------------------------------------


def _overlap(found, wanted):
    """Intersection of two histograms (B, n) over the larger total; 0 if both are empty."""
    larger = torch.maximum(found.sum(1), wanted.sum(1))
    return torch.minimum(found, wanted).sum(1) / larger.clamp(min=1)


def objects(images, detections, targets):
    """Right objects over all objects: missing, surplus and duplicate objects lower it."""
    return _overlap(detections.counts, targets.counts)


def attributes(images, detections, targets):
    """The same for each attribute by itself (shapes, colours, textures), averaged: partial credit
    for an object of the right colour and the wrong shape."""
    found = detections.counts.unflatten(1, detections.kind_dims)  # (B, colours, textures, shapes)
    wanted = targets.counts.unflatten(1, detections.kind_dims)
    summed_out = [(1, 2), (2, 3)]  # what is left are shapes, and colours
    if detections.kind_dims[1] > 1:
        summed_out.append((1, 3))  # textures
    overlaps = [_overlap(found.sum(dims), wanted.sum(dims)) for dims in summed_out]
    return torch.stack(overlaps).mean(0)


def count(images, detections, targets):
    """The smaller number of objects over the larger."""
    found = detections.counts.sum(1, keepdim=True)
    wanted = targets.counts.sum(1, keepdim=True)
    return _overlap(found, wanted)


def relation(images, detections, targets):
    """1 if both objects are present and their cells lie as the prompt says, else 0; NaN without
    relation. Of several objects of a kind the one with the highest score counts."""
    same = detections.kind[:, None] == targets.pair[:, :, None]  # (B, 2, cells)
    score, cell = torch.where(same, detections.score[:, None], 0.0).max(2)  # (B, 2)
    dy = (cell // detections.grid).diff(dim=1)  # (B, 1)
    dx = (cell % detections.grid).diff(dim=1)
    offsets = torch.cat([dx, -dx, dy, -dy], 1)  # in the order of RELATIONS
    offset = offsets.gather(1, targets.relation.clamp(min=0)[:, None])[:, 0]
    true = (score > 0).all(1) & (offset > 0)
    return true.float().masked_fill(targets.relation < 0, float("nan"))


def cleanliness(images, detections, targets):
    """Fraction of the paint that lies on detected objects; 0 without paint."""
    fraction = detections.explained / detections.paint.clamp(min=1)
    return fraction.clamp(max=1)  # the two sums are rounded in different orders


REWARDS = {
    "objects": objects,
    "attributes": attributes,
    "count": count,
    "relation": relation,
    "cleanliness": cleanliness,
}


def call_reward(name, function, images, detections, targets):
    """Call a reward function, which may be the user's. Returns (B,) float32. Raises UserError with
    its name if it fails or breaks the rules of this module's docstring."""
    where = f"the reward function {name!r} in rewards.REWARDS"
    try:
        value = function(images, detections, targets)
    except Exception as error:  # a user's code may raise anything
        raise UserError(f"{where} raised {type(error).__name__}: {error}") from error
    right = isinstance(value, Tensor) and value.is_floating_point()
    right = right and value.shape == (len(images),) and value.device == images.device
    got = type(value).__name__
    if isinstance(value, Tensor):
        got = f"{value.dtype} {tuple(value.shape)} on {value.device}"
    check(right, f"{where} must return floats ({len(images)},) on {images.device}, not {got}")
    in_range = (value >= 0) & (value <= 1) | value.isnan()
    check(in_range.all(), f"{where} must return values from 0 to 1, or NaN")
    return value.float()


@torch.no_grad()
def compute_rewards(images, targets, world):
    """Score images (B, 3, h, w) in [0, 1]. Returns rewards (B,), components {name: (B,)} and exact
    (B,), 0 or 1."""
    check(REWARDS, "rewards.REWARDS is empty: there is no reward to learn from")
    detections = detect(images, world)
    components = {}
    for name, function in REWARDS.items():
        components[name] = call_reward(name, function, images, detections, targets)
    rewards = torch.stack(list(components.values())).nanmean(0)
    check(rewards.isfinite().all(), "rewards.REWARDS: all functions returned NaN for some image")
    right_objects = (detections.counts == targets.counts).all(1)
    related = relation(images, detections, targets).nan_to_num(1.0) == 1
    clean = cleanliness(images, detections, targets) >= CLEAN_THRESHOLD
    return rewards, components, (right_objects & related & clean).float()
