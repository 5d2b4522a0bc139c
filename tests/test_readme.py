"""The README: its snippets run, the files that it names exist, the commands that it shows parse.
docs/experiments.md: its commands and snippets run, in the smoke preset and for one step."""

import copy
import importlib.util
import json
import re
import shlex
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import common
import eggrpo
import rewards
from conftest import ROOT, read_log
from lab import one_sided
from objective import entropy_masks, shape_advantages
from scenes import WORLDS
from test_objective import random_batch

README = (ROOT / "README.md").read_text()
SNIPPETS = re.findall(r"```python\n(import.*?)```", README, re.S)  # not the lines of the method
PAGE = (ROOT / "docs" / "experiments.md").read_text()
COMMANDS = re.findall(r"^bash train\.sh eggrpo (.*)$", PAGE, re.M)
EXPERIMENTS = re.findall(r"```python\n(.*?)```", PAGE, re.S)


def read_flags(name, argv):
    """Parse the flags of a command of the lesson; raises UserError if one is wrong."""
    module = importlib.import_module(name)
    methods = eggrpo.METHODS if module is eggrpo else None
    presets = getattr(module, "PRESETS", {preset: {} for preset in WORLDS})
    return common.parse(module.Config, presets, "", argv, methods)


def test_every_file_that_is_named_exists():
    for link in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / link).is_file(), link
    for name in re.findall(r"`([\w/]+\.(?:py|sh|md|txt))`", README):
        assert (ROOT / name).is_file() or name in ("vqvae.py", "train.py", "results.md"), name
    for path in ROOT.glob("*.py"):
        assert f"`{path.name}`" in README, f"{path.name} is not in the reading order"


def test_every_command_that_is_shown_parses():
    shown = re.findall(r"^bash train\.sh.*|^python .*|(?<=`)bash train\.sh[^`]*", README, re.M)
    assert len(shown) >= 3
    for command in shown:
        words = shlex.split(command, comments=True)[1:]
        words = words[1:] if words[0] == "-m" else words
        name = words.pop(0).removesuffix(".py")
        if name == "train.sh":
            name = words.pop(0) if words and words[0][0] != "-" else "train"
        if name in ("test", "NAME"):
            continue
        assert importlib.util.find_spec(name), command
        if not name.startswith("lab.") and "..." not in words:
            read_flags(name, words)


def test_the_table_is_that_of_the_study():
    variants = json.loads((ROOT / "assets/study.json").read_text())["variants"]
    rows = {
        "base policy, no plan": "base-no-plan",
        "base policy + plan": "base",
        "GRPO, 250 steps": "grpo",
        "EG-GRPO, 250 steps": "eggrpo",
    }
    for row, name in rows.items():
        measures = variants[name]["measures"]
        exact = measures["exact"]["mean"]
        rare = measures["rare exact"]["mean"]
        assert f"| {row} | {exact:.2f} | {rare:.2f} |" in README


def test_every_snippet_runs(monkeypatch):
    """In one namespace, from top to bottom; training is replaced by reading its flags."""
    monkeypatch.setattr(eggrpo, "main", lambda argv: read_flags("eggrpo", argv))
    monkeypatch.setattr("rewards.REWARDS", dict(rewards.REWARDS))
    space = dict(torch=torch)
    for snippet in SNIPPETS:
        exec(snippet, space)


def test_the_lines_of_the_method_are_the_method():
    lines = re.search(r"```python\nA = .*?\n(excluded.*?)loss", README, re.S)[1]
    advantage, entropy, valid = random_batch()
    low, high = entropy_masks(entropy, valid)
    space = dict(A=advantage, low=low, high=high, entropy=entropy, kappa=0.5, length=valid.sum(1))
    exec(lines, space)
    expected = shape_advantages(advantage, entropy, low, high, valid, kappa=0.5)
    assert torch.allclose(space["A_t"], expected)


class TinyLanguageModel(nn.Module):
    """In place of a causal language model: each logit sees the mean of the attended tokens so far,
    and the position."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(11, 11)
        self.position = nn.Embedding(20, 11)

    def forward(self, tokens, attention_mask, position_ids):
        seen = (self.table(tokens) * attention_mask[..., None]).cumsum(1)
        number = attention_mask.cumsum(1).clamp(min=1)[..., None]
        return SimpleNamespace(logits=seen / number + self.position(position_ids))


def example():
    """The snippet for one's own trainer, two equal models and an optimizer of the first."""
    space = {}
    exec(next(snippet for snippet in SNIPPETS if "def eggrpo_update" in snippet), space)
    torch.manual_seed(0)
    model = TinyLanguageModel()
    reference = copy.deepcopy(model)
    with torch.no_grad():
        reference.table.weight *= 0.5
    optimizer = torch.optim.SGD(model.parameters(), 1.0)
    return space["eggrpo_update"], model, reference, optimizer


@pytest.mark.parametrize("left, right", [(3, 0), (0, 4), (2, 1)])
@pytest.mark.parametrize("length", [6, 9])
def test_padding_on_either_side_does_not_change_the_example(left, right, length):
    """It once ignored the attention mask: log-probs were .85 nats off with left padding."""
    tokens = torch.randint(11, (8, length), generator=torch.Generator().manual_seed(length))
    rewards = torch.rand(2, 4, generator=torch.Generator().manual_seed(0))
    results = []
    for pad in ((0, 0), (left, right)):
        update, model, reference, optimizer = example()
        attention = torch.ones_like(tokens)
        generated = torch.arange(length).expand(8, -1) >= 2  # the prompt has two tokens
        padded = [F.pad(x, pad) for x in (tokens, attention, generated)]
        stats = update(model, reference, optimizer, *padded, rewards)
        results.append((stats, model.table.weight.detach()))
    (plain, weights), (stats, padded_weights) = results
    assert plain["kl"] > 1e-6 and stats == pytest.approx(plain, rel=1e-4, abs=1e-7)
    assert torch.allclose(weights, padded_weights, atol=1e-6)


def test_the_example_trains_a_causal_language_model():
    update, model, reference, _ = example()
    optimizer = torch.optim.Adam(model.parameters(), 0.1)
    history = []
    for _ in range(40):
        tokens = torch.randint(11, (4 * 8, 1))  # prompts of one token
        for t in range(10):
            attention = torch.ones_like(tokens)
            positions = torch.arange(t + 1).expand_as(tokens)
            p = model(tokens, attention, positions).logits[:, -1].softmax(-1).detach()
            tokens = torch.cat([tokens, torch.multinomial(p, 1)], 1)
        generated = torch.ones_like(tokens, dtype=torch.bool)
        generated[:, 0] = False
        rewards = (tokens[:, 1:] == 7).float().mean(1).view(4, 8)  # say seven
        attention = torch.ones_like(tokens)
        update(model, reference, optimizer, tokens, attention, generated, rewards)
        history.append(rewards.mean().item())
    assert history[-1] > 3 * history[0]


@pytest.fixture
def short(out, monkeypatch, no_galleries):
    """Let eggrpo.main run in the smoke preset. Returns a function: name of a run -> its log."""
    main = eggrpo.main
    flags = "--preset smoke --steps 1 --prompts 1 --group-size 2 --eval-prompts 1 --out".split()
    monkeypatch.setattr(eggrpo, "main", lambda argv: main([*argv, *flags, str(out[0])]))
    train = one_sided.train
    few = dict(preset="smoke", out=out[0], device="cpu", steps=1, prompts=1, group_size=2)
    few |= dict(prompts_scored=6)
    monkeypatch.setattr(one_sided, "train", lambda config: train(replace(config, **few)))
    return lambda name: read_log(out[0] / "smoke" / name / "log.jsonl")


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.split()[1])
def test_each_command_of_the_experiments_trains(short, command):
    words = shlex.split(command, comments=True)
    eggrpo.main(words)
    assert [record["step"] for record in short(words[1])[1:]] == [-1, 0]


def test_each_snippet_of_the_experiments_does_what_the_page_says(short, capsys):
    assert len(COMMANDS) == 10 and len(EXPERIMENTS) == 4
    usual = dict(rewards.REWARDS)
    for snippet in EXPERIMENTS:
        exec(snippet, {})
    assert rewards.REWARDS == usual
    printed = capsys.readouterr().out
    assert "sampler and learner are not the same policy" in printed
    record = short("only-red")[2]
    assert "reward/red" in record and "reward/objects" not in record
    assert all(f"\n{name} 0.0 " in printed for name in ("grpo", "bonus", "weights-bonus"))
    assert [record["step"] for record in short("one-prompt")[1:]] == [-1, 0]
