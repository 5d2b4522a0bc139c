"""Rewards: detect the objects in an image and compare them with what the prompt asks for.

    targets = encode_targets(world, scenes, device)                    what the prompts ask for
    rewards, components, exact = compute_rewards(images, targets, world)

Detection is exact, not learned: cut the image into cells, assign each pixel to a palette colour
(`paint_coverage`), match every shape and texture against each colour, keep the best match of each
cell. Stars are too faint to count as paint, so the sky is not scored. The reward is the mean of the
functions in REWARDS that apply to the prompt.

A reward function takes images (B, 3, h, w) in [0, 1], Detections and Targets, and changes none of
them. It returns (B,) numbers from 0 to 1, NaN where it does not apply (no image may get NaN from
all). It is called without gradient, so it may hold a network. Add your own as one more:

    rewards.REWARDS["red"] = lambda images, detections, targets: images[:, 0].mean(dim=(1, 2))

`exact` is 1 if the image has the right objects, no others, a true relation, and at most a trace of
anything else: cleanliness of at least CLEAN_THRESHOLD. It is measured, not optimised.

Shapes: B images of h x w pixels in rows x columns cells; a kind is a colour, a texture and a shape,
numbered in this order; `kinds`, `colours`, `textures` and `shapes` stand for their numbers.
"""

import itertools
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from common import UserError, check
from scenes import BACKGROUND, COLOURS, RELATIONS, SHAPES, shape_mask

NO_PAINT = 0.25  # contrast with the background below which a pixel counts as unpainted
FULL_PAINT = 0.6  # contrast above which it counts as painted, because objects differ in brightness
MATCH_THRESHOLD = 0.9  # least Dice overlap of paint and template that counts as an object
END_THRESHOLD = 0.7  # paint of a pixel beside an object's box that makes it no object
CLEAN_THRESHOLD = 0.9  # least cleanliness of an exact image


class Targets(NamedTuple):
    counts: Tensor  # (B, kinds) number of objects of each kind
    relation: Tensor  # (B,) index into RELATIONS, -1 if the prompt names none
    pair: Tensor  # (B, 2) kinds of the relation's subject and object


class Detections(NamedTuple):
    counts: Tensor  # (B, kinds) number of objects of each kind
    kind: Tensor  # (B, rows, columns) kind of the object in each cell, -1 in an empty cell
    score: Tensor  # (B, rows, columns) Dice overlap of its paint and template
    paint: Tensor  # (B,) total paint, in pixels
    explained: Tensor  # (B,) paint that lies on a detected object of its colour


def encode_targets(world, scenes, device="cpu"):
    """Encode what the prompts of scenes ask for. Returns Targets."""
    kinds = list(itertools.product(COLOURS, world.textures, SHAPES))
    counts = torch.zeros(len(scenes), len(kinds))
    relation = torch.full((len(scenes),), -1)
    pair = torch.zeros(len(scenes), 2, dtype=torch.long)
    for i, scene in enumerate(scenes):
        wanted = [kinds.index((o.colour, o.texture, o.shape)) for o in scene.objects]
        for kind in wanted:
            counts[i, kind] += 1
        if scene.relation:
            relation[i] = RELATIONS.index(scene.relation)
            pair[i] = torch.tensor(wanted[:2])
    return Targets(counts.to(device), relation.to(device), pair.to(device))


def _saturate(contrast):
    """Map contrast to coverage: 0 below NO_PAINT, 1 above FULL_PAINT, linear in between."""
    span = FULL_PAINT - NO_PAINT
    return ((contrast - NO_PAINT) / span).clamp(0, 1)


def paint_coverage(images):
    """How much of each pixel is painted in each colour, 0 to 1. (B, 3, h, w) -> (B, colours, h, w).
    A pixel is background + contrast * (colour - background); it belongs to the colour that leaves
    the smallest residual."""
    images = images.float()
    background = images.new_tensor(BACKGROUND) / 255  # (3,)
    colours = images.new_tensor(list(COLOURS.values())) / 255  # (colours, 3)
    axes = colours - background
    offset = images - background[:, None, None]
    square = (axes**2).sum(1)[:, None, None]  # (colours, 1, 1)
    dot = torch.einsum("bkhw,ck->bchw", offset, axes)
    contrast = (dot / square).clamp_(0, 1)
    # |offset - contrast axis|^2 without |offset|^2, which is the same for all colours
    residual = (contrast * square - 2 * dot) * contrast
    nearest = residual == residual.amin(1, keepdim=True)
    return _saturate(contrast * nearest)


def object_templates(world):
    """Coverage of every texture and shape at mean brightness, in its place in a cell: (textures *
    shapes, cell, cell)."""
    masks = []
    for texture, shape in itertools.product(world.textures, SHAPES):
        masks.append(torch.tensor(shape_mask(shape, texture, world.object_size)))
    contrast = torch.stack(masks).float() * sum(world.brightness) / 2
    gap = world.cell - world.object_size
    return F.pad(_saturate(contrast), (0, gap, 0, gap))


def paint_beside(paint, world):
    """Largest paint of any colour on a pixel beside each box. (B, colours, h, w) -> (B, rows,
    columns)."""
    pixel = torch.arange(world.image_size, device=paint.device)
    gap = pixel % world.cell >= world.object_size
    gaps = gap[:, None] | gap  # (h, w), false in all boxes
    largest = paint.amax(1) * gaps
    return F.max_pool2d(largest, world.object_size + 2, stride=world.cell, padding=1)


def detect(images, world):
    """Find at most one object in each cell of images (B, 3, h, w) in [0, 1]. Returns Detections.

    A cell has an object of the kind whose template has the largest Dice overlap with the paint of
    its colour, 2 sum(paint * template) / (sum(paint^2) + sum(template^2)), if that is above
    MATCH_THRESHOLD. sum(paint^2) is over the box that objects fill, where no neighbour's edge is.
    An object ends with its box: a pixel beside the box that has END_THRESHOLD of paint or more, in
    any colour, makes it none. So connected paint is at most one object, however large it is.
    """
    cell, n = world.cell, world.object_size
    templates = object_templates(world).to(images.device)  # (textures * shapes, cell, cell)
    paint = paint_coverage(images)  # (B, colours, h, w)
    cells = paint.unfold(2, cell, cell).unfold(3, cell, cell)
    cells = cells.permute(0, 2, 3, 1, 4, 5)  # (B, rows, columns, colours, cell, cell)

    energy = cells[..., :n, :n].square().sum((4, 5))  # (B, rows, columns, colours)
    overlap = torch.einsum("bijcyx,kyx->bijck", cells, templates)
    size = templates.square().sum((1, 2))  # (textures * shapes,)
    dice = 2 * overlap / (energy[..., None] + size)
    score, kind = dice.flatten(3).max(3)  # (B, rows, columns)
    matches = score > MATCH_THRESHOLD
    ends = paint_beside(paint, world) < END_THRESHOLD
    found = matches & ends
    kinds = F.one_hot(kind, len(COLOURS) * len(templates))  # (B, rows, columns, kinds)
    kinds = kinds * found[..., None]

    # Explained is the paint of an object's colour under its template, dilated by one pixel.
    colour = F.one_hot(kind // len(templates), len(COLOURS)).float()
    dilated = F.max_pool2d((templates > 0).float(), 3, stride=1, padding=1)
    cover = dilated[kind % len(templates)] * found[..., None, None]
    return Detections(
        counts=kinds.sum((1, 2)).float(),
        kind=kind.masked_fill(~found, -1),
        score=score,
        paint=paint.sum((1, 2, 3)),
        explained=torch.einsum("bijcyx,bijyx,bijc->b", cells, cover, colour),
    )


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
    dims = len(COLOURS), -1, len(SHAPES)
    found = detections.counts.unflatten(1, dims)  # (B, colours, textures, shapes)
    wanted = targets.counts.unflatten(1, dims)
    summed_out = [(1, 2), (2, 3)]  # what is left are shapes, and colours
    if found.shape[2] > 1:
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
    columns = detections.kind.shape[2]
    kind = detections.kind.flatten(1)[:, None]  # (B, 1, cells)
    score = detections.score.flatten(1)[:, None]
    same = kind == targets.pair[:, :, None]  # (B, 2, cells)
    score, cell = torch.where(same, score, 0.0).max(2)  # (B, 2)
    dy = (cell // columns).diff(dim=1)  # (B, 1)
    dx = (cell % columns).diff(dim=1)
    offsets = torch.cat([dx, -dx, dy, -dy], 1)  # in the order of RELATIONS
    asked = targets.relation.clamp(min=0)
    offset = offsets.gather(1, asked[:, None])[:, 0]
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


@torch.no_grad()
def compute_rewards(images, targets, world):
    """Score images (B, 3, h, w) in [0, 1]. Returns rewards (B,), components {name: (B,)} and exact
    (B,), 0 or 1. Raises UserError with the name of a user's function that fails or breaks the rules
    of this module's docstring."""
    check(REWARDS, "rewards.REWARDS is empty: there is no reward to learn from")
    detections = detect(images, world)
    shape = (len(images),)
    components = {}
    for name, function in REWARDS.items():
        where = f"the reward function {name!r} in rewards.REWARDS"
        try:
            value = function(images, detections, targets)
            value = torch.as_tensor(value, dtype=torch.float32, device=images.device)
        except Exception as error:  # a user's code may raise anything
            raise UserError(f"{where} raised {type(error).__name__}: {error}") from error
        problem = f"{where} must return {shape} numbers, not {tuple(value.shape)}"
        check(value.shape == shape, problem)
        in_range = (value >= 0) & (value <= 1)
        in_range |= value.isnan()
        check(in_range.all(), f"{where} must return numbers from 0 to 1, or NaN")
        components[name] = value
    rewards = torch.stack(list(components.values())).nanmean(0)
    one_applies = rewards.isfinite().all()
    check(one_applies, "rewards.REWARDS: all functions returned NaN for some image")
    exact = objects(images, detections, targets) == 1
    exact &= relation(images, detections, targets) != 0
    exact &= cleanliness(images, detections, targets) >= CLEAN_THRESHOLD
    return rewards, components, exact.float()
