"""The README: its snippets run, the files that it names exist, the commands that it shows parse."""

import importlib.util
import re
import shlex
from types import SimpleNamespace

import torch
from torch import nn

import common
import eggrpo
from conftest import ROOT
from scenes import WORLDS

README = (ROOT / "README.md").read_text()
SNIPPETS = re.findall(r"```python\n(.*?)```", README, re.S)


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
            name = words.pop(0) if words and words[0][0] != "-" else "eggrpo"
        if name in ("test", "NAME", "MODULE"):
            continue
        assert importlib.util.find_spec(name), command
        if name == "sample" and words and words[0][0] != "-":
            words.pop(0)  # the prompt
        if not name.startswith("lab.") and "..." not in words:
            read_flags(name, words)


def test_every_snippet_runs(monkeypatch):
    """In one namespace, from top to bottom; training is replaced by reading its flags."""
    monkeypatch.setattr(eggrpo, "main", lambda argv: read_flags("eggrpo", argv))
    monkeypatch.setattr("rewards.REWARDS", dict(eggrpo.REWARDS))
    space = dict(torch=torch)
    for snippet in SNIPPETS:
        exec(snippet, space)


class TinyLanguageModel(nn.Module):
    """In place of a causal language model: tokens in, .logits out; each looks one back."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(11, 11)

    def forward(self, tokens):
        return SimpleNamespace(logits=self.table(tokens))


def test_the_example_trains_any_causal_language_model():
    space = {}
    exec(next(snippet for snippet in SNIPPETS if "def eggrpo_update" in snippet), space)
    torch.manual_seed(0)
    model, reference = TinyLanguageModel(), TinyLanguageModel()
    reference.load_state_dict(model.state_dict())
    optimizer = torch.optim.Adam(model.parameters(), 0.1)
    history = []
    for _ in range(40):
        tokens = torch.randint(11, (4 * 8, 1))  # prompts of one token
        for _ in range(10):
            p = model(tokens[:, -1]).logits.softmax(-1).detach()
            tokens = torch.cat([tokens, torch.multinomial(p, 1)], 1)
        generated = torch.ones_like(tokens, dtype=torch.bool)
        generated[:, 0] = False
        rewards = (tokens[:, 1:] == 7).float().mean(1).view(4, 8)  # say seven
        space["eggrpo_update"](model, reference, optimizer, tokens, generated, rewards)
        history.append(rewards.mean().item())
    assert history[-1] > 3 * history[0]
