"""The second opinion on `exact`: the nearest rendered scene, cell by cell."""

import pytest
import torch
from PIL import ImageColor

from lab.nearest import is_exact, nearest_scenes, sheet
from rewards import compute_rewards, encode_targets
from scenes import RELATIONS, WORLDS, make_scene, render
from tiny_vq import stack_images


def judge(world, scenes, images):
    return [is_exact(*x) for x in zip(*nearest_scenes(images, world), scenes)]


def images_of(world, scenes):
    return stack_images([render(world, s) for s in scenes]) / 255


@pytest.mark.parametrize("preset", ["cpu", "gpu"])
def test_a_rendered_scene_is_its_own_nearest(preset):
    """Kinds and cells are found again, whatever brightness, noise and position."""
    world = WORLDS[preset]
    scenes = [make_scene(world, s, 3, i) for s in ("eval", "rare") for i in range(40)]
    found, error = nearest_scenes(images_of(world, scenes), world)
    place = lambda objects: sorted(o[:5] for o in objects)
    assert [place(f) for f in found] == [place(s.objects) for s in scenes]
    assert error.max() < 0.02 and all(judge(world, scenes, images_of(world, scenes)))


def test_an_image_of_another_scene_is_not_exact():
    """Each image is compared with the next prompt of its category; the detector says the same."""
    world = WORLDS["cpu"]
    scenes = [make_scene(world, "eval", 4, i, "complex") for i in range(40)]
    others = scenes[1:] + scenes[:1]
    images = images_of(world, others)
    assert not any(judge(world, scenes, images))
    assert not compute_rewards(images, encode_targets(world, scenes), world)[2].any()


def test_a_relation_that_does_not_hold_is_not_exact():
    world = WORLDS["cpu"]
    scene = make_scene(world, "eval", 0, 0, "spatial")
    i = RELATIONS.index(scene.relation)
    mirrored = scene._replace(relation=RELATIONS[i + 1 - 2 * (i % 2)])  # pairs of opposites
    assert judge(world, [scene, mirrored], images_of(world, [scene, scene])) == [True, False]


def test_what_no_scene_explains_makes_an_image_inexact():
    """A crown of stray paint on an object, which a loose detector accepts, is left over."""
    world = WORLDS["cpu"]
    scene = make_scene(world, "eval", 0, 5, "knowledge")
    clean = images_of(world, [scene])
    smeared = clean.clone()
    o = scene.objects[0]
    top, left = o.row * world.cell, o.column * world.cell
    smeared[:, :, top : top + 4, left : left + 10] = torch.tensor([0.9, 0.4, 0.9])[:, None, None]
    assert judge(world, [scene], clean) == [True] and judge(world, [scene], smeared) == [False]


def test_the_frame_tells_what_the_two_checks_say():
    """Twelve images, eight in a row: both say exact, the detector, the nearest scene, none."""
    world = WORLDS["cpu"]
    scenes = [make_scene(world, "eval", 0, i) for i in range(12)]
    exact, nearest = torch.tensor([1.0, 1, 0, 0] * 3), torch.tensor([True, False, True, False] * 3)
    page = sheet(images_of(world, scenes), scenes, exact, nearest, size=60)
    row, corner = page.height // 2, (lambda i: (6 + i * 66 - 2, 62 - 2))
    colours = [ImageColor.getrgb(c) for c in ("green", "blue", "orange", "red")]
    assert [page.getpixel(corner(i)) for i in range(4)] == colours
    assert [page.getpixel((x, y + row)) for x, y in map(corner, range(4))] == colours
