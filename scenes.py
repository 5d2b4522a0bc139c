"""The toy world: a prompt describes a scene, and a scene is rendered to an image.

    scene = make_scene(WORLDS["small"], "train", seed=0, index=3)      deterministic
    scene.prompt    "a green triangle left of a blue circle"
    scene.plan      "green triangle at row 1 column 1 ; blue circle at row 2 column 3"
    render(world, scene)                                             (h, w, 3) uint8

Prompt categories follow the paper's benchmarks (T2I-CompBench and WISE):

    colour     a red circle and a blue square
    shape      a circle and a square both red
    texture    a striped red circle and a blue square
    numeracy   three red circles
    spatial    a red circle left of a blue square
    complex    a red circle above a blue square and a green cross
    knowledge  a shape with three sides in the colour of grass

The background is a dark sky in which a patch may hold one faint star, more often towards the top.
Objects stand at the top left of their cell, and each patch of them has a brightness of its own. The
prompt leaves stars and light open, so that image tokens are uncertain everywhere: least in the calm
sky at the bottom, most on objects.

Splits: a hash of what a scene asks for decides, so that no paraphrase of a `train` prompt is in
`eval`. The colour-shape pairs of RARE_PAIRS occur in neither; scenes with one of them are split
into `rare-train` and `rare` in the same way. Scene number i of these has pair i mod 6.

The corpus is noisy, like captions from the web; reinforcement learning corrects what it teaches.
"""

import difflib
import itertools
import zlib
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw

from common import UserError, check

COLOURS = {
    "red": (225, 50, 50),
    "green": (60, 190, 70),
    "blue": (60, 105, 245),
    "yellow": (240, 215, 50),
    "purple": (180, 70, 220),
    "white": (245, 245, 245),
}
SHAPES = ("circle", "square", "triangle", "diamond", "cross")
RELATIONS = ("left of", "right of", "above", "below")
MIRRORED = {"right of": "left of", "below": "above"}  # "a right of b" is "b left of a"
NUMBERS = ("one", "two", "three", "four")
COLOUR_DESCRIPTIONS = {
    "red": ("blood", "tomatoes"),
    "green": ("grass", "leaves"),
    "blue": ("oceans", "sapphires"),
    "yellow": ("lemons", "bananas"),
    "purple": ("violets", "plums"),
    "white": ("snow", "milk"),
}
SHAPE_DESCRIPTIONS = {
    "circle": ("with no corners", "like a wheel"),
    "square": ("with four equal sides", "like a chessboard"),
    "triangle": ("with three sides", "like a pyramid"),
    "diamond": ("like a kite", "like a square on its tip"),
    "cross": ("like a plus sign", "with four arms"),
}

CATEGORIES = ("colour", "shape", "texture", "numeracy", "spatial", "complex", "knowledge")
BACKGROUND = (40, 44, 50)  # 0 to 255
RARE_PAIRS = {  # (colour, shape): fraction of the corpus that has it, before caption faults
    ("red", "cross"): 0.01,
    ("yellow", "circle"): 0.01,
    ("purple", "triangle"): 0.005,
    ("green", "square"): 0.005,
    ("blue", "diamond"): 0.002,
    ("white", "cross"): 0.002,
}
# In others a rare pair leaves at most 4 canonical forms to hold out; `texture` is in `large` only.
RARE_CATEGORIES = ("colour", "spatial", "complex")
CAPTION_FAULTS = 0.25  # fraction of the corpus whose image and plan contradict the prompt
PLAN_FAULTS = 0.20  # fraction of the rest whose plan contradicts prompt and image
HELD_OUT = 6  # one canonical form in six is held out for evaluation


def _vocabulary():
    words = set("a and both shape in the colour of at row column ; 1 2 3 4".split())
    words |= {"solid", "striped", "hollow", *COLOURS, *SHAPES, *NUMBERS}
    words |= {plural(shape, 2) for shape in SHAPES}
    for phrases in (RELATIONS, *COLOUR_DESCRIPTIONS.values(), *SHAPE_DESCRIPTIONS.values()):
        words |= {word for phrase in phrases for word in phrase.split()}
    return ("<pad>", "<plan>", "<image>", "<end>", *sorted(words))


def plural(shape, number):
    return shape if number == 1 else shape + ("es" if shape.endswith("s") else "s")


WORDS = _vocabulary()
PAD, PLAN, IMAGE, END = range(4)  # the first three are placed, never sampled
GRAMMAR = (
    'grammar: "a red circle [left of|right of|above|below|and] a blue square [and a green '
    'cross]", "three red circles", "a circle and a square both red", "a shape with three '
    'sides in the colour of grass"'
)


def encode_words(text, slots, end=False):
    """Encode text as a list of `slots` word ids, padded with PAD; end: after the end token. Raises
    UserError if the text is empty, too long, or has an unknown word."""
    words = text.lower().split()
    check(words, f"the prompt is empty; {GRAMMAR}")
    known = WORDS[END + 1 :]
    for word in words:
        if word not in known:
            near = ", ".join(difflib.get_close_matches(word[:40], known, cutoff=0))
            raise UserError(f"unknown word {word[:40]!r} (nearest known: {near}); {GRAMMAR}")
    ids = [WORDS.index(word) for word in words] + [END] * end
    free = slots - len(ids)
    check(free >= 0, f"{len(words)} words are too many: at most {slots - end} fit; {GRAMMAR}")
    return ids + [PAD] * free


def decode_words(ids):
    """Decode word ids to text, up to the end token and without padding."""
    kept = itertools.takewhile(lambda i: i != END, ids)
    return " ".join(WORDS[i] for i in kept if i != PAD)


@dataclass(frozen=True)
class World:
    """Sizes of a preset, in pixels unless stated otherwise."""

    image_size: int = 30
    patch: int = 5  # one token stands for patch x patch pixels
    grid: int = 3  # cells per side; a cell is a whole number of patches
    object_size: int = 9  # less than a cell, whose right and bottom edges an object leaves free
    textures: tuple = ("solid",)
    max_objects: int = 3
    prompt_slots: int = 13  # longest prompt in words
    plan_slots: int = 24  # longest plan in words, its end token included
    brightness: tuple = (0.65, 1.0)  # of an object: uniform between these, drawn for each patch
    noise_std: float = 5.0  # of an object's pixels, in grey levels of 255
    star_probability: float = 0.2  # mean over patches; it falls from top to bottom
    star_brightness: float = 45.0  # grey levels; too faint to count as paint (rewards.py)

    @property
    def cell(self):
        return self.image_size // self.grid

    @property
    def side(self):
        """Patches per side of an image."""
        return self.image_size // self.patch

    @property
    def image_tokens(self):
        return self.side**2

    def origin(self):
        """Describe this world, for the files that are made from it."""
        return repr((self, BACKGROUND, COLOURS, RARE_PAIRS, CAPTION_FAULTS, PLAN_FAULTS))

    @property
    def categories(self):
        return tuple(c for c in CATEGORIES if c != "texture" or len(self.textures) > 1)


WORLDS = {
    "smoke": World(),
    "small": World(),
    "large": World(
        image_size=48,
        patch=4,
        grid=4,
        object_size=11,
        textures=("solid", "striped", "hollow"),
        max_objects=4,
        prompt_slots=20,
        plan_slots=36,
    ),
}


class Object(NamedTuple):
    colour: str
    shape: str
    texture: str
    row: int  # cell, from 0 at the top
    column: int  # cell, from 0 at the left


class Scene(NamedTuple):
    category: str
    objects: tuple  # of Object; the first two are subject and object of the relation
    relation: str  # one of RELATIONS, or ""
    prompt: str
    plan: str
    noise_seed: int  # of stars, brightness and noise


def encode_scenes(world, scenes):
    """Encode the words of scenes: prompts (B, S), plans (B, C), int64 tensors."""
    prompts = torch.tensor([encode_words(s.prompt, world.prompt_slots) for s in scenes])
    plans = torch.tensor([encode_words(s.plan, world.plan_slots, end=True) for s in scenes])
    return prompts, plans


def _name(obj):
    """Name an object as prompts and plans do; "solid" is omitted."""
    name = f"{obj.colour} {obj.shape}"
    return name if obj.texture == "solid" else f"{obj.texture} {name}"


def plan_text(objects):
    """Write the plan of a scene: each object with its attributes and its cell, in raster order as
    the image tokens (in the order of the prompt the policy learned more slowly, docs/notes.md)."""
    objects = sorted(objects, key=lambda o: (o.row, o.column))
    return " ; ".join(f"{_name(o)} at row {o.row + 1} column {o.column + 1}" for o in objects)


def _rng(*key):
    """Return a generator for a key. RandomState, because NumPy never changes its stream."""
    return np.random.RandomState([zlib.crc32(k.encode()) if isinstance(k, str) else k for k in key])


def _pick(rng, options):
    return options[rng.randint(len(options))]


def relation_holds(relation, a, b):
    """Return whether `a relation b` is true of two objects."""
    return {
        "left of": a.column < b.column,
        "right of": a.column > b.column,
        "above": a.row < b.row,
        "below": a.row > b.row,
    }[relation]


def _sample_kinds(world, category, rng, rare_pair=None):
    """Sample (colour, shape, texture) for each object of a scene of this category. rare_pair:
    (colour, shape) of one of them, in RARE_CATEGORIES."""
    colours = tuple(COLOURS)
    textures = world.textures
    pair = lambda: (_pick(rng, colours), _pick(rng, SHAPES))
    if category == "shape":
        colour = _pick(rng, colours)
        return [(colour, SHAPES[i], "solid") for i in rng.permutation(len(SHAPES))[:2]]
    if category == "texture":
        first, second = rng.permutation(len(textures))[:2]
        return [(*pair(), textures[i]) for i in (first, second)]
    if category == "numeracy":
        return [(*pair(), "solid")] * rng.randint(1, world.max_objects + 1)
    if category == "knowledge":
        return [(*pair(), "solid")]
    number = rng.randint(3, world.max_objects + 1) if category == "complex" else 2
    while True:
        kinds = []
        for _ in range(number):
            texture = _pick(rng, textures) if category == "complex" else "solid"
            kinds.append((*pair(), texture))
        if rare_pair:
            kinds[rng.randint(number)] = (*rare_pair, "solid")
        distinct = {colour for colour, _, _ in kinds} if category == "colour" else set(kinds)
        if len(distinct) == number:
            return kinds


def _place(world, kinds, rng):
    """Place objects of these kinds in cells of their own."""
    cells = rng.permutation(world.grid**2)[: len(kinds)].tolist()
    return tuple(Object(*kind, *divmod(cell, world.grid)) for kind, cell in zip(kinds, cells))


def _prompt(category, objects, relation, rng):
    names = [f"a {_name(o)}" for o in objects]
    first = objects[0]
    if category == "shape":
        return f"a {first.shape} and a {objects[1].shape} both {first.colour}"
    if category == "numeracy":
        n = len(objects)
        return f"{NUMBERS[n - 1]} {first.colour} {plural(first.shape, n)}"
    if category == "knowledge":
        shape = _pick(rng, SHAPE_DESCRIPTIONS[first.shape])
        return f"a shape {shape} in the colour of {_pick(rng, COLOUR_DESCRIPTIONS[first.colour])}"
    if relation:
        return f"{names[0]} {relation} " + " and ".join(names[1:])
    return " and ".join(names)


def canonical_form(objects, relation):
    """Return what a scene asks for as a string, equal for paraphrases and mirrored relations."""
    names = [_name(o) for o in objects]
    if not relation:
        return str(sorted(names))
    first, second, *others = names
    if relation in MIRRORED:
        return f"{second} {MIRRORED[relation]} {first} / {sorted(others)}"
    return f"{first} {relation} {second} / {sorted(others)}"


def rare_pairs(objects):
    """Return the set of (colour, shape) pairs of these objects that are in RARE_PAIRS."""
    return {(o.colour, o.shape) for o in objects}.intersection(RARE_PAIRS)


def split_of(objects, relation):
    """Return the split of a scene: train, eval, rare-train or rare."""
    held_out = zlib.crc32(canonical_form(objects, relation).encode()) % HELD_OUT == 0
    if rare_pairs(objects):
        return "rare" if held_out else "rare-train"
    return "eval" if held_out else "train"


@lru_cache(maxsize=4096)  # all policies answer the prompts of one evaluation
def make_scene(world, split, seed, index, category=None, rare_pair=None):
    """Make scene number `index` of a split. Categories alternate unless one is given, and so do the
    rare pairs of the splits `rare-train` and `rare`, whose scenes have one rare pair each."""
    rng = _rng("scene", split, seed, index)
    if split in ("rare-train", "rare"):
        rare_pair = rare_pair or tuple(RARE_PAIRS)[index % len(RARE_PAIRS)]
        category = category or RARE_CATEGORIES[index // len(RARE_PAIRS) % len(RARE_CATEGORIES)]
    category = category or world.categories[index % len(world.categories)]
    while True:
        kinds = _sample_kinds(world, category, rng, rare_pair)
        relation = _pick(rng, RELATIONS) if category in ("spatial", "complex") else ""
        objects = _place(world, kinds, rng)
        if category == "numeracy":
            objects = tuple(sorted(objects, key=lambda o: (o.row, o.column)))
        possible = not relation or relation_holds(relation, *objects[:2])
        rare = sum((o.colour, o.shape) in RARE_PAIRS for o in objects) == (rare_pair is not None)
        if possible and rare and split_of(objects, relation) == split:
            prompt = _prompt(category, objects, relation, rng)
            noise_seed = rng.randint(2**31)
            return Scene(category, objects, relation, prompt, plan_text(objects), noise_seed)


def random_scene(world, seed, index):
    """Make a crowded scene of any colour-shape pairs, without prompt, to train the tokenizer on."""
    rng, choices = _rng("random", seed, index), (tuple(COLOURS), SHAPES, world.textures)
    number = rng.randint(1, 2 * world.grid + 1)
    kinds = [[_pick(rng, options) for options in choices] for _ in range(number)]
    return Scene("random", _place(world, kinds, rng), "", "", "", rng.randint(2**31))


def _contradict(world, scene, rng):
    """Return the scene with a wrong attribute, a missing object or two exchanged objects. Never
    adds a rare pair, which would change the frequency of rare pairs in the corpus."""
    place = lambda o: dict(row=o.row, column=o.column)
    attributes = dict(colour=tuple(COLOURS), shape=SHAPES, texture=world.textures)
    while True:
        objects = list(scene.objects)
        i = rng.randint(len(objects))
        fault = _pick(rng, ("colour", "shape", "texture", "missing", "exchanged"))
        if fault in attributes:
            objects[i] = objects[i]._replace(**{fault: _pick(rng, attributes[fault])})
        elif fault == "missing" and len(objects) > 1:
            del objects[i]
        elif fault == "exchanged" and scene.relation:
            a, b = objects[:2]  # each in the other's place
            objects[:2] = a._replace(**place(b)), b._replace(**place(a))
        wrong = tuple(objects)
        if wrong != scene.objects and rare_pairs(wrong) <= rare_pairs(scene.objects):
            return scene._replace(objects=wrong, plan=plan_text(wrong))


def corpus_item(world, seed, index):
    """Make one item of the noisy pretraining corpus, a Scene."""
    rng = _rng("corpus", seed, index)
    pairs, fractions = zip(*RARE_PAIRS.items())
    rank = np.searchsorted(np.cumsum(fractions), rng.rand(), side="right")
    if rank < len(pairs):
        scene = make_scene(world, "rare-train", seed, index, rare_pair=pairs[rank])
    else:
        scene = make_scene(world, "train", seed, index)
    if rng.rand() < CAPTION_FAULTS:
        return _contradict(world, scene, rng)
    if rng.rand() < PLAN_FAULTS:
        return scene._replace(plan=_contradict(world, scene, rng).plan)
    return scene


@lru_cache(maxsize=None)
def shape_mask(shape, texture, size):
    """Draw the antialiased coverage of a shape: size x size, 0 to 1, read-only."""
    n = 8 * size  # drawn eight times too large, then reduced
    image = Image.new("L", (n, n))
    draw = ImageDraw.Draw(image)
    if shape == "circle":
        draw.ellipse((0, 0, n - 1, n - 1), fill=255)
    elif shape == "square":
        draw.rectangle((0, 0, n - 1, n - 1), fill=255)
    elif shape == "cross":
        draw.rectangle((0, n // 3, n - 1, 2 * n // 3 - 1), fill=255)
        draw.rectangle((n // 3, 0, 2 * n // 3 - 1, n - 1), fill=255)
    elif shape == "triangle":
        draw.polygon([(n / 2, 0), (n - 1, n - 1), (0, n - 1)], fill=255)
    else:
        draw.polygon([(n / 2, 0), (n - 1, n / 2), (n / 2, n - 1), (0, n / 2)], fill=255)
    if texture == "striped":
        for i in range(3):  # three stripes and three gaps
            draw.rectangle((0, (2 * i + 1) * n // 6, n, (2 * i + 2) * n // 6 - 1), fill=0)
    if texture == "hollow":
        hole, full = np.asarray(image.resize((n // 2, n // 2))), np.array(image)
        top = 5 * n // 16 if shape == "triangle" else n // 4  # its centre lies below its box's
        full[top : top + n // 2, n // 4 : n // 4 + n // 2][hole > 127] = 0
        image = Image.fromarray(full)
    mask = np.asarray(image.resize((size, size), Image.BOX)) / 255
    mask.flags.writeable = False  # cached
    return mask


def _stars(world, rng):
    """Draw the brightness of the stars of a sky, (h, w) in grey levels: at most one per patch, with
    probability star_probability * 2 (n - r) / (n + 1) in patch row r of n."""
    n, patch = world.side, world.patch
    probability = world.star_probability * 2 * (n - np.arange(n)) / (n + 1)
    stars = np.zeros((n, n, patch * patch))  # by patch and pixel within the patch
    row, column = np.nonzero(rng.rand(n, n) < probability[:, None])
    stars[row, column, rng.randint(patch * patch, size=len(row))] = world.star_brightness
    stars = stars.reshape(n, n, patch, patch).transpose(0, 2, 1, 3)  # rows of pixels together
    return stars.reshape(world.image_size, world.image_size)


def render(world, scene):
    """Render a scene. Returns (h, w, 3) uint8.

    pixel = background + (1 - coverage) * star
                       + coverage * (brightness * (colour - background) + noise)
    """
    rng = np.random.RandomState(scene.noise_seed)
    stars = _stars(world, rng)
    brightness = rng.uniform(*world.brightness, size=(world.side, world.side))
    brightness = brightness.repeat(world.patch, 0).repeat(world.patch, 1)  # (h, w)
    noise = world.noise_std * rng.standard_normal((*brightness.shape, 3))
    image = np.array(BACKGROUND) + stars[..., None]  # (h, w, 3)
    for o in scene.objects:
        top = o.row * world.cell
        left = o.column * world.cell
        box = slice(top, top + world.object_size), slice(left, left + world.object_size)
        coverage = shape_mask(o.shape, o.texture, world.object_size)[..., None]
        paint = brightness[box][..., None] * np.subtract(COLOURS[o.colour], BACKGROUND)
        image[box] += coverage * (paint + noise[box] - stars[box][..., None])
    return np.clip(np.rint(image), 0, 255).astype(np.uint8)
