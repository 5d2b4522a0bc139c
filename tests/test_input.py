"""Whatever is typed: prompts and flags drawn at random are taken, or refused in one line."""

import random
import re

import pytest

import common
import eggrpo
import evaluate
import pretrain
import sample
from conftest import one_line
from common import UserError
from scenes import WORLDS
from words import WORDS, encode_words
from tiny_vq import train as tiny_vq_train

NASTY = (
    "",
    " ",
    "\0",
    "\x1b[31mred",
    "\n",
    "🟥",
    "../../etc/passwd",
    "/",
    ".",
    "..",
    "-",
    ";",
    "; ;",
    "a " * 1000,
    "circle" * 1000,
    "RED",
    "<end>",
    "<pad>",
    "a/b\\c",
    "\udcff",
    "nan",
    "inf",
    "-inf",
    "1e400",
    "-1",
    "0",
    "99999999999999999999",
    "9" * 5000,
    "1.5",
    "true",
    "0x10",
    "%s",
    "١",
    "cpu",
    "smoke",
    "--",
    "-x",
    "=",
    "--seed",
)


def noise(draw):
    """A word, a number, something nasty, or a few characters from anywhere."""
    return draw.choice(
        (
            lambda: draw.choice(NASTY),
            lambda: draw.choice(WORDS),
            lambda: str(draw.randint(-9, 9)),
            lambda: str(draw.uniform(-2, 2)),
            lambda: "".join(map(chr, draw.choices(range(0xD800), k=5))),
        )
    )()


def test_any_prompt_is_words_of_the_grammar_or_one_line_and_its_file_stays_in_its_folder():
    draw = random.Random("prompts")
    for i in range(2000):
        prompt = " ".join(noise(draw) for _ in range(draw.choice((1, 1, 2, 5))))
        if i % 4 == 0:
            prompt = " ".join(draw.choices(WORDS[4:], k=draw.randint(1, 20)))
        try:
            ids = encode_words(prompt, WORLDS["cpu"].prompt_slots)
            assert len(ids) == WORLDS["cpu"].prompt_slots
        except ValueError as error:
            assert str(error).isprintable() and len(str(error)) < 400
        assert re.fullmatch("[a-z0-9][a-z0-9-]{0,79}", sample.file_name(prompt))


COMMANDS = [
    ("-m tiny_vq.train", tiny_vq_train, None),
    ("pretrain.py", pretrain, None),
    ("eggrpo.py", eggrpo, eggrpo.METHODS),
    ("evaluate.py", evaluate, None),
    ("sample.py", sample, None),
]


@pytest.mark.parametrize("script, module, methods", COMMANDS, ids=[c[0] for c in COMMANDS])
def test_any_flags_are_a_config_or_one_line(script, module, methods, capsys):
    """Half of the flags are right ones with any value, or none."""
    draw, presets = random.Random(script), getattr(module, "PRESETS", {"smoke": {}, "cpu": {}})
    names = [name.replace("_", "-") for name in module.Config.__dataclass_fields__]
    accepted = 0
    for _ in range(400):
        argv = ["--preset", "smoke"]
        for _ in range(draw.randint(1, 3)):
            argv.append(f"--{draw.choice(names)}" if draw.random() < 0.9 else noise(draw))
            argv += [noise(draw)] * (draw.random() < 0.8)
        if {"-h", "--help"} & set(argv):
            continue
        try:
            common.parse(script, module.Config, presets, "", argv, methods)
            accepted += 1
        except UserError as error:
            line = one_line(capsys, 2, common.run, lambda: common.check(False, str(error)))
            assert line.isprintable()
    assert accepted > 5


@pytest.mark.parametrize(
    "argv, words",
    [
        (["--steps", "99999999999999999999"], "--steps 99999999999999999999: must be"),
        (["--seed", "4294967296"], "--seed 4294967296: must be"),
        (["--seed", "-1"], "--seed -1: must"),
        (["--lr", "nan"], "--lr nan: must be"),
        (["--lr", "inf"], "--lr inf: must be"),
        (["--out", ""], "--out '': must be"),
        (["--width", "0"], "--width 0: must be"),
    ],
)
def test_numbers_out_of_range_are_named(argv, words):
    for script, module, _ in COMMANDS[:2]:
        with pytest.raises(UserError, match=re.escape(words)):
            common.parse(script, module.Config, module.PRESETS, "", argv)
