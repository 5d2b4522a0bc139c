"""The words of prompts and plans: what can be named, the vocabulary, text to ids and back.

One vocabulary serves all presets. A word is a token.
"""

import difflib

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
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
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
WORD_ID = {word: i for i, word in enumerate(WORDS)}
PAD, PLAN, IMAGE, END = range(4)  # the first three are placed, never sampled
GRAMMAR = (
    'grammar: "a red circle [left of|right of|above|below|and] a blue square [and a green '
    'cross]", "three red circles", "a circle and a square both red", "a shape with three '
    'sides in the colour of grass"'
)


def encode_words(text, slots, end=False):
    """Encode text as a list of `slots` word ids, padded with PAD.

    end: append the end token. Raises ValueError if the text is empty, too long, or has an unknown
    word (the message names the nearest known ones).
    """
    words = text.lower().split()
    if not words:
        raise ValueError(f"the prompt is empty; {GRAMMAR}")
    for word in words:
        if word not in WORD_ID or word.startswith("<"):
            known = [w for w in WORDS if w[0] != "<"]
            near = difflib.get_close_matches(word[:40], known, n=3, cutoff=0.4)
            hint = f"nearest known: {', '.join(near)}" if near else "nothing like it is known"
            raise ValueError(f"unknown word {word[:40]!r} ({hint}); {GRAMMAR}")
    ids = [WORD_ID[word] for word in words] + [END] * end
    if len(ids) > slots:
        raise ValueError(f"{len(words)} words are too many: at most {slots - end} fit; {GRAMMAR}")
    return ids + [PAD] * (slots - len(ids))


def decode_words(ids):
    """Decode word ids to text, up to the end token and without padding."""
    ids = [int(i) for i in ids]
    ids = ids[: ids.index(END)] if END in ids else ids
    return " ".join(WORDS[i] for i in ids if i != PAD)
