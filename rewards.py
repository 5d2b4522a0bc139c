"""Rewards: detect the objects in an image and compare them with what the prompt asks for.

    targets = encode_targets(world, scenes, device)                    what the prompts ask for
    rewards, components, exact = compute_rewards(images, targets, world)

Detection is exact, not learned: assign each pixel to a palette colour (`paint_coverage`), match
every shape and texture against each colour by convolution, keep the local maxima. The background is
not scored. The reward is the mean of the functions in REWARDS, each (B,) in [0, 1], over those that
apply to the prompt (NaN: does not apply; only `relation` returns it). Add your own as one more:

    rewards.REWARDS["red"] = lambda images, detections, targets: images[:, 0].mean(dim=(1, 2))

`exact` is 1 if the image has the right objects, no others, a true relation and no smears. It is
measured, not optimised.

Dimension letters: B images, C colours, K kinds (colour x texture x shape, in this order), M objects
at most, h x w pixels.
"""

from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from common import UserError, check
from scenes import BACKGROUND, shape_mask
from words import COLOURS, RELATIONS, SHAPES

NO_PAINT = 0.25  # contrast with the background, of which less is no paint
FULL_PAINT = 0.6  # contrast of which more is full paint, because objects differ in brightness
MATCH_THRESHOLD = 0.9  # least Dice overlap of paint and template that counts as an object
MAX_OBJECTS = 16  # that an image is searched for: more than any prompt asks for
CLEAN_THRESHOLD = 0.9  # least cleanliness of an exact image


class Targets(NamedTuple):
    counts: Tensor  # (B, K) number of objects of each kind
    relation: Tensor  # (B,) index into RELATIONS, -1 if the prompt names none
    pair: Tensor  # (B, 2) kinds of the relation's subject and object


class Detections(NamedTuple):
    counts: Tensor  # (B, K) number of objects of each kind
    kind: Tensor  # (B, M) kind of each object, best match first, -1 beyond the last
    row: Tensor  # (B, M) centre of each object, in pixels
    column: Tensor  # (B, M)
    paint: Tensor  # (B,) total paint, in pixels
    explained: Tensor  # (B,) paint that lies on a detected object of its colour
    kind_dims: tuple  # (colours, textures, shapes), with K their product
    min_offset: int  # pixels by which two centres must differ for a relation to hold


def kind_index(world, colour, shape, texture):
    """Return the number of a kind, from 0 to K - 1."""
    c, t = list(COLOURS).index(colour), world.textures.index(texture)
    return (c * len(world.textures) + t) * len(SHAPES) + SHAPES.index(shape)


def encode_targets(world, scenes, device="cpu"):
    """Encode what the prompts of scenes ask for. Returns Targets."""
    number = len(world.textures) * len(COLOURS) * len(SHAPES)
    counts, pair = np.zeros((len(scenes), number), np.float32), np.zeros((len(scenes), 2), np.int64)
    for i, scene in enumerate(scenes):
        kinds = [kind_index(world, o.colour, o.shape, o.texture) for o in scene.objects]
        np.add.at(counts[i], kinds, 1)
        if scene.relation:
            pair[i] = kinds[:2]
    relation = [RELATIONS.index(s.relation) if s.relation else -1 for s in scenes]
    return Targets(*(torch.as_tensor(x).to(device) for x in (counts, relation, pair)))


# --- detection ------------------------------------------------------------------------------------


@lru_cache(maxsize=8)
def _palette(device):
    """Background (3,) and the offsets of the palette colours from it (C, 3). Cached, because a copy
    from the host synchronises."""
    background = torch.tensor(BACKGROUND, device=device) / 255
    return background, torch.tensor(list(COLOURS.values()), device=device) / 255 - background


def _saturate(contrast):
    """Map contrast to coverage: 0 below NO_PAINT, 1 above FULL_PAINT, linear in between."""
    return ((contrast - NO_PAINT) / (FULL_PAINT - NO_PAINT)).clamp(0, 1)


def paint_coverage(images):
    """How much of each pixel is painted in each colour. (B, 3, h, w) -> (B, C, h, w), in [0, 1].

    A pixel is background + contrast * (colour - background); it belongs to the colour that leaves
    the smallest residual.
    """
    background, axes = _palette(str(images.device))
    offset = images.float() - background[:, None, None]
    square = (axes**2).sum(1)[:, None, None]  # (C, 1, 1)
    dot = torch.einsum("bkhw,ck->bchw", offset, axes)
    contrast = (dot / square).clamp_(0, 1)
    # |offset - contrast axis|^2 without |offset|^2, which is the same for all colours
    residual = (contrast * square - 2 * dot) * contrast
    return _saturate(contrast * (residual == residual.amin(1, keepdim=True)))


@lru_cache(maxsize=8)
def _templates(world, device):
    """Coverage of every texture x shape at mean brightness, with an empty margin of one pixel.
    (textures * shapes, n, n)."""
    masks = [shape_mask(s, t, world.object_size) for t in world.textures for s in SHAPES]
    contrast = torch.from_numpy(np.stack(masks)).float() * (1 + world.min_brightness) / 2
    return F.pad(_saturate(contrast), (1, 1, 1, 1)).to(device)


def detect(images, world):
    """Detect the objects in images (B, 3, h, w) in [0, 1]. Returns Detections."""
    b, _, h, w = images.shape
    c, t, s = len(COLOURS), len(world.textures), len(SHAPES)
    templates = _templates(world, str(images.device))  # (t*s, n, n)
    n = templates.shape[-1]
    before, after = (n - 1) // 2, n // 2  # padding that puts a match at its object's centre
    paint = F.pad(paint_coverage(images), (before, after, before, after))
    paint = paint.reshape(b * c, 1, h + n - 1, w + n - 1)
    overlap = F.conv2d(paint, templates[:, None])  # (B*C, t*s, h, w)
    # sums over squares, as products with two banded matrices of ones; without the margin of the
    # templates, where a neighbour of the same colour may be
    band = lambda size: torch.ones(size, size + n - 1, device=images.device).triu(1).tril(n - 2)
    energy = band(h) @ paint**2 @ band(w).t()  # (B*C, 1, h, w)
    # in place: these are the largest tensors here, and allocating costs more than the arithmetic
    dice = overlap.mul_(2).div_(energy + (templates**2).sum((1, 2))[:, None, None])
    dice = dice.view(b, c * t * s, h, w)  # (B, K, h, w)

    best, radius = dice.amax(1), world.object_size // 2  # (B, h, w)
    local_max = F.max_pool2d(best[:, None], 2 * radius + 1, stride=1, padding=radius)[:, 0]
    match_score, index = (best * (best == local_max)).flatten(1).topk(MAX_OBJECTS)  # (B, M)
    kind = dice.flatten(2).gather(2, index[:, None].expand(-1, c * t * s, -1)).argmax(1)  # (B, M)
    detected = match_score > MATCH_THRESHOLD
    counts = torch.zeros(b, c * t * s, device=images.device)
    counts.scatter_add_(1, kind, detected.float())

    # Explained paint: each object's template, dilated by one pixel, placed on its colour's plane.
    cover = F.max_pool2d((templates > 0).float(), 3, stride=1, padding=1)  # (t*s, n, n)
    placed = cover[kind % (t * s)] * detected[:, :, None, None]  # (B, M, n, n)
    side = torch.arange(n, device=images.device)
    y, x = index // w, index % w  # centres, and corners of the templates in the padded image
    rows = (kind // (t * s) * (h + n - 1) + y)[:, :, None, None] + side[:, None]  # (B, M, n, 1)
    pixels = rows * (w + n - 1) + x[:, :, None, None] + side  # (B, M, n, n)
    paint = paint.view(b, -1)
    mask = torch.zeros_like(paint).scatter_add_(1, pixels.flatten(1), placed.flatten(1))
    explained = (paint * mask.clamp(max=1)).sum(1)
    return Detections(counts, kind.masked_fill(~detected, -1), y, x, paint.sum(1), explained,
                      (c, t, s), radius)  # fmt: skip


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
    shape = (-1, *detections.kind_dims)  # (B, colours, textures, shapes)
    found, wanted = detections.counts.reshape(shape), targets.counts.reshape(shape)
    others = [(1, 2), (2, 3)]  # summed out: what is left are shapes, and colours
    if detections.kind_dims[1] > 1:
        others.append((1, 3))  # textures
    return torch.stack([_overlap(found.sum(d), wanted.sum(d)) for d in others]).mean(0)


def count(images, detections, targets):
    """The smaller number of objects over the larger."""
    total = lambda x: x.counts.sum(1, keepdim=True)
    return _overlap(total(detections), total(targets))


def relation(images, detections, targets):
    """1 if both objects are present and placed as the prompt says, else 0; NaN without relation."""
    match = (detections.kind[:, None] == targets.pair[:, :, None]).float()  # (B, 2, M)
    present, first = match.max(2)  # (B, 2) the best match of each
    dy, dx = (x.gather(1, first).diff(dim=1) for x in (detections.row, detections.column))
    offsets = torch.cat([dx, -dx, dy, -dy], 1)  # in the order of RELATIONS
    offset = offsets.gather(1, targets.relation.clamp(min=0)[:, None])[:, 0]
    true = ((present > 0).all(1) & (offset > detections.min_offset)).float()
    return true.masked_fill(targets.relation < 0, float("nan"))


def cleanliness(images, detections, targets):
    """Fraction of the paint that lies on detected objects; 0 without paint."""
    return detections.explained / detections.paint.clamp(min=1)


REWARDS = dict(objects=objects, attributes=attributes, count=count, relation=relation,
               cleanliness=cleanliness)  # fmt: skip


def _call_reward(name, function, images, detections, targets):
    """Call a reward function, which may be the user's. Raises UserError with its name if it fails
    or returns the wrong thing."""
    where = f"the reward function {name!r} in rewards.REWARDS"
    try:
        value = function(images, detections, targets)
    except Exception as error:  # a user's code may raise anything
        raise UserError(f"{where} raised {type(error).__name__}: {error}") from error
    right, got = False, type(value).__name__
    if isinstance(value, Tensor):
        right = value.is_floating_point() and value.shape == (len(images),)
        right = right and value.device == images.device
        got = f"{value.dtype} {tuple(value.shape)} on {value.device}"
    check(right, f"{where} must return floats ({len(images)},) on {images.device}, not {got}")
    return value


def check_rewards(rewards, components):
    """Raise UserError, with the function's name, if a reward is infinite or no component applies.

    Synchronises with the device, so callers do it where they wait anyway. rewards: any shape,
    components: {name: same shape}.
    """
    if not rewards.isfinite().all():
        infinite = [name for name, value in components.items() if value.isinf().any()]
        problem = "all of them returned NaN for some image, as if none applied to it"
        problem = f"{infinite[0]!r} returned an infinite value" if infinite else problem
        raise UserError(f"the reward functions in rewards.REWARDS: {problem}")


def compute_rewards(images, targets, world):
    """Score images (B, 3, h, w) in [0, 1]. Returns rewards (B,), components {name: (B,)} and exact
    (B,), 0 or 1."""
    detections = detect(images, world)
    arguments = images, detections, targets
    components = {name: _call_reward(name, f, *arguments) for name, f in REWARDS.items()}
    rewards = torch.stack(list(components.values())).nanmean(0)
    related = relation(*arguments).nan_to_num(1.0) == 1
    clean = cleanliness(*arguments) >= CLEAN_THRESHOLD
    exact = (detections.counts == targets.counts).all(1) & related & clean
    return rewards, components, exact.float()
