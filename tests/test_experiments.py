"""docs/experiments.md: its commands and snippets run, in the smoke preset and for one step."""

import json
import re
import shlex
from dataclasses import replace

import pytest

import eggrpo
import rewards
from conftest import ROOT
from lab import one_sided

PAGE = (ROOT / "docs" / "experiments.md").read_text()
COMMANDS = re.findall(r"^bash train\.sh eggrpo (.*)$", PAGE, re.M)
SNIPPETS = re.findall(r"```python\n(.*?)```", PAGE, re.S)


@pytest.fixture
def short(out, monkeypatch):
    """Let eggrpo.main run in the smoke preset. Returns a function: name of a run -> its log."""
    main = eggrpo.main
    flags = "--preset smoke --steps 1 --prompts 1 --group-size 2 --eval-prompts 1 --out".split()
    monkeypatch.setattr(eggrpo, "main", lambda argv: main([*argv, *flags, str(out[0])]))
    train = one_sided.train
    few = dict(preset="smoke", out=out[0], device="cpu", steps=1, prompts=1, group_size=2)
    few |= dict(prompts_scored=6)
    monkeypatch.setattr(one_sided, "train", lambda config: train(replace(config, **few)))

    def log(name):
        lines = (out[0] / "smoke" / name / "log.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]

    return log


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.split()[1])
def test_each_command_trains(short, command):
    words = shlex.split(command, comments=True)
    eggrpo.main(words)
    assert [record["step"] for record in short(words[1])[1:]] == [-1, 0]


def test_each_snippet_does_what_the_page_says(short, capsys):
    assert len(COMMANDS) == 10 and len(SNIPPETS) == 4
    usual = dict(rewards.REWARDS)
    for snippet in SNIPPETS:
        exec(snippet, {})
    assert rewards.REWARDS == usual
    printed = capsys.readouterr().out
    assert "sampler and learner are not the same policy" in printed
    record = short("only-red")[2]
    assert "reward/red" in record and "reward/objects" not in record
    assert all(f"\n{name} 0.0 " in printed for name in ("grpo", "bonus", "weights-bonus"))
    assert [record["step"] for record in short("one-prompt")[1:]] == [-1, 0]
