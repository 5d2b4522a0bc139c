"""The world tells the truth, the same truth every time, and its splits do not leak."""

import zlib
from dataclasses import replace

import numpy as np
import pytest
import torch

from rewards import paint_coverage
from scenes import BACKGROUND, CAPTION_FAULTS, CATEGORIES, END, PAD, PLAN_FAULTS
from scenes import RARE_CATEGORIES, RARE_PAIRS, RELATIONS, WORDS, WORLDS, Object
from scenes import canonical_form, corpus_item, decode_words, encode_words
from scenes import make_scene, plan_text, rare_pairs, relation_holds, render

EACH_WORLD = pytest.mark.parametrize("world", [WORLDS["small"], WORLDS["large"]])
SPLITS = ("train", "eval", "rare-train", "rare")


def scenes_of(world, split, n=300):
    return [make_scene(world, split, 0, i) for i in range(n)]


def test_scenes_are_pinned():
    """A change here would change every published number. An early version drew from a set, whose
    order is Python's hash seed, and made other scenes in every process."""
    world = WORLDS["small"]
    scene = make_scene(world, "train", 0, 3)
    assert scene.prompt == "a green triangle left of a blue circle"
    assert scene.plan == "green triangle at row 1 column 1 ; blue circle at row 2 column 3"
    assert np.array_equal(render(world, scene), render(world, scene))
    for preset, split, digest in (("small", "train", 1881277791), ("large", "rare", 2505803587)):
        scenes = [make_scene(WORLDS[preset], split, 0, i) for i in range(400)]
        scenes += [corpus_item(WORLDS[preset], 0, i) for i in range(400)]
        assert zlib.crc32(repr(scenes).encode()) == digest


@EACH_WORLD
def test_every_category_and_relation_occurs_in_every_split(world):
    """In the released spatial reward no branch matches "above": what is asked for must exist."""
    expected = set(CATEGORIES) - (set() if len(world.textures) > 1 else {"texture"})
    for split in SPLITS:
        scenes = scenes_of(world, split)
        categories = set(RARE_CATEGORIES) if "rare" in split else expected
        assert {s.category for s in scenes} == categories
        assert {s.relation for s in scenes} == {"", *RELATIONS}
        assert max(len(s.objects) for s in scenes) == world.max_objects
        assert {t for s in scenes for t in (o.texture for o in s.objects)} == set(world.textures)


@EACH_WORLD
def test_splits_share_no_meaning_and_rare_pairs_stay_in_theirs(world):
    """Of 500 scenes, 7 or more would be in both if the form of a mirrored relation or of exchanged
    objects were another one."""
    train, held_out, rare_train, rare = (scenes_of(world, s, 500) for s in SPLITS)
    assert not {s.prompt for s in train + rare_train} & {s.prompt for s in held_out + rare}
    forms = lambda scenes: {canonical_form(s.objects, s.relation) for s in scenes}
    assert not forms(train + rare_train) & forms(held_out + rare)
    assert not any(rare_pairs(s.objects) for s in train + held_out)
    for scenes in (rare_train, rare):  # number i has pair i mod 6, once, and no second one
        for i, scene in enumerate(scenes):
            pair = tuple(RARE_PAIRS)[i % 6]
            assert [(o.colour, o.shape) in RARE_PAIRS for o in scene.objects].count(True) == 1
            assert rare_pairs(scene.objects) == {pair}


@EACH_WORLD
def test_the_relation_is_true_of_the_scene_and_words_fit_their_slots(world):
    for scene in (scene for split in SPLITS for scene in scenes_of(world, split)):
        assert not scene.relation or relation_holds(scene.relation, *scene.objects[:2])
        assert len({(o.row, o.column) for o in scene.objects}) == len(scene.objects)
        assert decode_words(encode_words(scene.prompt, world.prompt_slots)) == scene.prompt
        ids = encode_words(scene.plan, world.plan_slots, end=True)
        assert decode_words(ids) == scene.plan == plan_text(scene.objects)
        assert ids.count(END) == 1


def test_encode_words_names_the_unknown_word_its_neighbours_and_the_grammar():
    for text, words in (
        ("a rde circle", "unknown word 'rde'.*red.*grammar: "),
        ("  ", "empty.*grammar"),
        ("a " * 1000, "too many"),
        ("<end>", "unknown word '<end>'"),
    ):
        with pytest.raises(ValueError, match=words):
            encode_words(text, 12)
    assert encode_words("A Red", 3) == [WORDS.index("a"), WORDS.index("red"), PAD]


def test_the_corpus_lies_as_often_as_it_says():
    world, n = WORLDS["small"], 3000
    caption = plan = rare = 0
    for i in range(n):
        item, true = corpus_item(world, 0, i), make_scene(world, "train", 0, i)
        if item.prompt != true.prompt:
            rare += 1
            wanted = [make_scene(world, "rare-train", 0, i, rare_pair=pair) for pair in RARE_PAIRS]
            true = next(s for s in wanted if s.prompt == item.prompt)
        assert rare_pairs(item.objects) <= rare_pairs(true.objects)
        caption += item.objects != true.objects
        plan += item.objects == true.objects and item.plan != true.plan
    # bounds: four standard errors
    assert sum(RARE_PAIRS.values()) == pytest.approx(0.034)
    assert abs(rare / n - 0.034) < 0.0132
    assert abs(caption / n - CAPTION_FAULTS) < 0.032
    assert abs(plan / (n - caption) - PLAN_FAULTS) < 0.034


def test_each_rare_pair_has_its_fraction_of_the_corpus(monkeypatch):
    """A hundred times as frequent, without faults: shares within four standard errors."""
    monkeypatch.setattr("scenes.CAPTION_FAULTS", 0.0)
    often = {pair: 15 * fraction for pair, fraction in RARE_PAIRS.items()}  # half of the corpus
    monkeypatch.setattr("scenes.RARE_PAIRS", often)
    n = 2000
    found = [rare_pairs(corpus_item(WORLDS["small"], 0, i).objects) for i in range(n)]
    for pair, fraction in often.items():
        share = found.count({pair}) / n
        assert abs(share - fraction) < 4 * (fraction * (1 - fraction) / n) ** 0.5


def test_the_sky_has_faint_stars_that_thin_out_downwards():
    """At most one star per patch, of 45 grey levels, by the probability of its row; rows that the
    expectation separates by more than four standard errors."""
    world = WORLDS["small"]
    empty = make_scene(world, "train", 0, 3)._replace(objects=())
    skies = np.stack([render(world, empty._replace(noise_seed=i)) for i in range(400)])
    assert set(np.unique(skies - np.array(BACKGROUND))) == {0, 45}
    stars = (skies != BACKGROUND).all(-1).reshape(400, 6, 5, 6, 5).sum((2, 4))  # (400, rows, cols)
    assert stars.max() == 1
    expected = 0.2 * 2 * (6 - np.arange(6)) / 7
    error = (expected * (1 - expected) / 2400) ** 0.5
    assert (abs(stars.mean((0, 2)) - expected) < 4 * error).all()
    assert paint_coverage(torch.from_numpy(skies).permute(0, 3, 1, 2) / 255).max() == 0


def test_objects_are_lit_by_patch_and_always_stand_at_the_same_place():
    """A white square's pixels: one brightness in each patch, several in the object; its outline is
    the same whatever the noise seed, and it hides the stars behind it."""
    world = replace(WORLDS["small"], noise_std=0.0, star_probability=0.5)
    square = (Object("white", "square", "solid", 1, 1),)
    scene = make_scene(world, "train", 0, 0)._replace(objects=square)
    halves = slice(0, 5), slice(5, 9)
    for seed in range(20):
        image = render(world, scene._replace(noise_seed=seed)).astype(float)[..., 0]
        inside = image[10:19, 10:19].copy()
        patches = [inside[y, x] for y in halves for x in halves]
        levels = np.array([(patch.mean() - 40) / 205 for patch in patches])
        assert all(patch.std() == 0 for patch in patches) and len(set(levels)) > 2
        assert (levels > 0.64).all() and (levels < 1.01).all()
        image[10:19, 10:19] = 0
        assert image.max() <= 50 + 45
    rough = render(WORLDS["small"], scene)[10:15, 10:15].astype(float)
    assert 3 < rough.std(axis=(0, 1)).mean() < 8  # the noise, of 5 grey levels
