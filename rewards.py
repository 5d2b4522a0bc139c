"""A picture becomes numbers: find the objects in the pixels, compare them with what the prompt asks
for.

    want = make_want(world, scenes, device)           what the prompts ask for
    found = detect(images, world)                     what the pictures show
    rewards, parts, exact = score(images, want, world)

Everything is batched tensor code on the device of the pictures. Detection: paint each pixel in its
palette colour (`ink`), match every shape and texture against each colour's ink by convolution, keep
the local maxima. Sizes are known, so nothing is learned and nothing can be fooled by a drifting
model; what a reward cannot see (the ground) it does not judge.

The reward is the unweighted mean of the functions in REWARDS, each (B,) in [0, 1], over those that
apply to the prompt (NaN means: does not apply; only `relation` uses it). Your own reward is one
more function in that dict:

    rewards.REWARDS["red"] = lambda images, found, want: images[:, 0].mean(dim=(1, 2))

`exact` is strict: the right objects, nothing else, the relation true, the picture clean. It is
measured, never optimised.

Dimension letters: B pictures, C colours, K kinds (colour x texture x shape, in that order), M
objects at most, h x w pixels.
"""

from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from common import UserError
from scenes import COLOURS, BACKGROUND, RELATIONS, SHAPES, stamp

INK_FLOOR = 0.25  # contrast with the background below this is no paint
INK_FULL = 0.6  # contrast above this is full paint: objects differ in brightness
MATCH = 0.75  # least Dice overlap of ink and template that counts as an object
MOST = 16  # objects a picture is searched for; a tokenizer's scene has up to 8
CLEAN = 0.9  # least cleanliness of an exact picture


class Want(NamedTuple):
    kinds: Tensor  # (B, K) how many of each kind
    relation: Tensor  # (B,) index into RELATIONS, -1 where the prompt names none
    pair: Tensor  # (B, 2) kinds of the relation's subject and object


class Found(NamedTuple):
    kinds: Tensor  # (B, K) how many of each kind
    kind: Tensor  # (B, M) kind of each object, the best match first; -1 where there are no more
    row: Tensor  # (B, M) centre of each object, in pixels
    column: Tensor  # (B, M)
    ink: Tensor  # (B,) pixels of palette colour, in pixels
    explained: Tensor  # (B,) those that lie on an object of their colour
    shape: tuple  # (colours, textures, shapes): how K unfolds
    reach: float  # pixels by which centres must differ for a relation to hold


def kind_index(world, colour, shape, texture):
    """Number a kind of object: colour x texture x shape."""
    c, t = list(COLOURS).index(colour), world.textures.index(texture)
    return (c * len(world.textures) + t) * len(SHAPES) + SHAPES.index(shape)


def make_want(world, scenes, device="cpu"):
    """Turn scenes into the tensors that their pictures are scored against."""
    number = len(world.textures) * len(COLOURS) * len(SHAPES)
    kinds, pair = np.zeros((len(scenes), number), np.float32), np.zeros((len(scenes), 2), np.int64)
    for i, scene in enumerate(scenes):
        indices = [kind_index(world, o.colour, o.shape, o.texture) for o in scene.objects]
        np.add.at(kinds[i], indices, 1)
        if scene.relation:
            pair[i] = indices[:2]
    relation = [RELATIONS.index(s.relation) if s.relation else -1 for s in scenes]
    return Want(
        torch.from_numpy(kinds).to(device),
        torch.tensor(relation, device=device),
        torch.from_numpy(pair).to(device),
    )


# --- what the picture shows -----------------------------------------------------------------------


@lru_cache(maxsize=8)
def _palette(device):
    """Put the ground's colour and the way from it to each palette colour on a device, once: a copy
    from the host would wait for the device."""
    ground = torch.tensor(BACKGROUND, device=device) / 255
    return ground, torch.tensor(list(COLOURS.values()), device=device) / 255 - ground


def ink(images):
    """Say how much of each pixel is paint of each palette colour. (B, 3, h, w) in [0, 1] -> (B, C,
    h, w) in [0, 1].

    A pixel is background + a * (colour - background) with contrast a; it belongs to the colour that
    leaves the least residue.
    """
    ground, axes = _palette(str(images.device))  # (3,), (C, 3)
    offset = images.float() - ground[:, None, None]
    square = (axes**2).sum(1)[:, None, None]  # (C, 1, 1)
    dot = torch.einsum("bkhw,ck->bchw", offset, axes)
    cover = (dot / square).clamp_(0, 1)
    # |offset - a axis|^2 less |offset|^2, the same for all colours
    residue = (cover * square - 2 * dot) * cover
    mine = residue == residue.amin(1, keepdim=True)
    return _saturate(cover * mine)


def _saturate(contrast):
    """Map contrast to coverage: 0 below INK_FLOOR, 1 above INK_FULL, linear in between."""
    return ((contrast - INK_FLOOR) / (INK_FULL - INK_FLOOR)).clamp(0, 1)


@lru_cache(maxsize=8)
def _templates(world, device):
    """Draw every texture x shape as ink at mean brightness, with a margin of one pixel that must be
    empty. (textures * shapes, n, n)."""
    stamps = [np.asarray(stamp(s, t, world.object_size)) for t in world.textures for s in SHAPES]
    cover = F.pad(torch.from_numpy(np.stack(stamps)).float() / 255, (1, 1, 1, 1))
    return _saturate(cover * (1 + world.min_brightness) / 2).to(device)


def detect(images, world):
    """Find the objects in pictures. images: (B, 3, h, w) in [0, 1]."""
    b, _, h, w = images.shape
    c, t, s = len(COLOURS), len(world.textures), len(SHAPES)
    templates = _templates(world, str(images.device))  # (t*s, n, n)
    n = templates.shape[-1]
    before, after = (n - 1) // 2, n // 2  # pads so that a match stands at its object's centre
    paint = F.pad(ink(images), (before, after, before, after)).reshape(
        b * c, 1, h + n - 1, w + n - 1
    )
    overlap = F.conv2d(paint, templates[:, None])  # (B*C, t*s, h, w)
    # the sum of n x n squares, as products with two matrices whose bands are ones
    band = lambda size: torch.ones(size, size + n - 1, device=images.device).triu().tril(n - 1)
    energy = band(h) @ paint**2 @ band(w).t()  # (B*C, 1, h, w)
    # in place: these are the largest tensors here, and new memory costs more than arithmetic
    dice = overlap.mul_(2).div_(energy + (templates**2).sum((1, 2))[:, None, None])
    dice = dice.view(b, c * t * s, h, w)  # (B, K, h, w)

    best, radius = dice.amax(1), world.object_size // 2  # (B, h, w)
    summit = F.max_pool2d(best[:, None], 2 * radius + 1, stride=1, padding=radius)[:, 0]
    height, place = (best * (best == summit)).flatten(1).topk(MOST)  # (B, M)
    kind = dice.flatten(2).gather(2, place[:, None].expand(-1, c * t * s, -1)).argmax(1)  # (B, M)
    there = height > MATCH
    kinds = torch.zeros(b, c * t * s, device=images.device).scatter_add_(1, kind, there.float())

    # What the objects explain: stamp each one's template, one pixel wider, into its colour's ink.
    cover = F.max_pool2d((templates > 0).float(), 3, stride=1, padding=1)  # (t*s, n, n)
    stamps = cover[kind % (t * s)] * there[:, :, None, None]  # (B, M, n, n)
    side = torch.arange(n, device=images.device)
    y, x = place // w, place % w  # centres; in the padded picture, the stamps' corners
    rows = (kind // (t * s) * (h + n - 1) + y)[:, :, None, None] + side[:, None]  # (B, M, n, 1)
    index = rows * (w + n - 1) + x[:, :, None, None] + side  # (B, M, n, n)
    paint = paint.view(b, -1)
    mine = torch.zeros_like(paint).scatter_add_(1, index.flatten(1), stamps.flatten(1)).clamp(max=1)
    return Found(
        kinds,
        kind.masked_fill(~there, -1),
        y,
        x,
        paint.sum(1),
        (paint * mine).sum(1),
        (c, t, s),
        radius,
    )


# --- the components of the reward -----------------------------------------------------------------


def _overlap(found, want):
    """Compare two histograms: the common part over the larger whole, 0 for two empty ones."""
    larger = torch.maximum(found.sum(1), want.sum(1))
    return torch.minimum(found, want).sum(1) / larger.clamp(min=1)


def objects(images, found, want):
    """Right objects over all objects, wanted or drawn: a missing, surplus or duplicate one
    costs."""
    return _overlap(found.kinds, want.kinds)


def attributes(images, found, want):
    """The same for each attribute by itself (colours, shapes, textures), averaged: credit for
    half-right objects."""
    f, w = (k.reshape(-1, *found.shape) for k in (found.kinds, want.kinds))  # (B, c, t, s)
    sums = [(1, 2), (2, 3)] + [(1, 3)] * (found.shape[1] > 1)  # shapes, colours, textures
    return torch.stack([_overlap(f.sum(dims), w.sum(dims)) for dims in sums]).mean(0)


def count(images, found, want):
    """The smaller number of objects over the larger."""
    return _overlap(found.kinds.sum(1, keepdim=True), want.kinds.sum(1, keepdim=True))


def relation(images, found, want):
    """1 where both objects are there and stand as the prompt says, else 0; NaN where it names no
    relation."""
    at = (found.kind[:, None] == want.pair[:, :, None]).float()  # (B, 2, M)
    here, first = at.max(2)  # (B, 2) best match of each
    dy, dx = found.row.gather(1, first).diff(dim=1), found.column.gather(1, first).diff(dim=1)
    # in the order of RELATIONS: left of, right of, above, below
    offsets = torch.cat([dx, -dx, dy, -dy], 1)
    offset = offsets.gather(1, want.relation.clamp(min=0)[:, None])[:, 0]
    true = ((here > 0).all(1) & (offset > found.reach)).float()
    return true.masked_fill(want.relation < 0, float("nan"))


def cleanliness(images, found, want):
    """Share of the paint that lies on found objects: smears and fragments cost, and so does a
    picture with no paint."""
    return found.explained / found.ink.clamp(min=1)


REWARDS = {
    "objects": objects,
    "attributes": attributes,
    "count": count,
    "relation": relation,
    "cleanliness": cleanliness,
}


def call(name, function, images, found, want):
    """Call a reward function, which may be the user's: what is wrong with it is said in its
    name."""
    yours = f"the reward function {name!r} in rewards.REWARDS, which is yours to mend,"
    try:
        part = function(images, found, want)
    except Exception as error:  # a user's code may raise anything
        raise UserError(f"{yours} raised {type(error).__name__}: {error}") from error
    wanted = f"must return floats ({len(images)},) on {images.device}, not"
    if not isinstance(part, Tensor):
        raise UserError(f"{yours} {wanted} {type(part).__name__}")
    here = part.device == images.device and part.is_floating_point()
    if not here or part.shape != (len(images),):
        raise UserError(f"{yours} {wanted} {part.dtype} {tuple(part.shape)} on {part.device}")
    return part


def require_sound(rewards, parts):
    """Raise UserError, naming the function, where a reward is infinite or none applies.

    It waits for the device, so score leaves it to callers, where they wait anyway. rewards: any
    shape, parts: {name: the same}.
    """
    if not rewards.isfinite().all():
        wrong = [name for name, part in parts.items() if part.isinf().any()]
        fault = (
            f"an infinite value came from {wrong[0]!r}"
            if wrong
            else ("every one of them was NaN for some picture, as if none applied to it")
        )
        raise UserError(f"the reward functions in rewards.REWARDS are yours to mend: {fault}")


def score(images, want, world):
    """Score pictures. images (B, 3, h, w) in [0, 1] -> rewards (B,), parts {name: (B,)}, exact
    (B,)."""
    found = detect(images, world)
    parts = {name: call(name, function, images, found, want) for name, function in REWARDS.items()}
    rewards = torch.stack(list(parts.values())).nanmean(0)
    related = relation(images, found, want).nan_to_num(1.0) == 1
    exact = (
        (found.kinds == want.kinds).all(1) & related & (cleanliness(images, found, want) >= CLEAN)
    )
    return rewards, parts, exact.float()
