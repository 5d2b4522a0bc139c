"""What the README says is so."""

import inspect
import json
import re
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import nn

import eggrpo
from lab import analyze

README = (Path(__file__).parent.parent / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.S)


def test_the_core_shown_is_the_core_that_runs():
    assert inspect.getsource(eggrpo.shape_advantages) in BLOCKS[0]
    assert len(BLOCKS[0].splitlines()) <= 30


def test_every_method_is_listed_as_in_the_code_and_no_other():
    table = README[README.index("| method | what it is |") :].split("\n\n")[0]
    rows = [f"| `{name}` | {method.about} |" for name, method in eggrpo.METHODS.items()]
    assert table.splitlines()[2:] == rows


def test_every_file_of_the_reading_order_is_there_and_every_local_link_leads_somewhere():
    root = Path(__file__).parent.parent
    for link in re.findall(r"\]\((?!http)([^)]+)\)", README):
        assert (root / link).is_file(), link
    for name in (
        "scenes",
        "model",
        "pretrain",
        "rewards",
        "eggrpo",
        "evaluate",
        "sample",
        "common",
        "checkpoint",
    ):
        assert f"`{name}.py`" in README and (root / f"{name}.py").is_file()


def test_the_studys_numbers_are_those_of_study_json():
    """Tables word for word; every number with an interval that the text of that section quotes."""
    root = Path(__file__).parent.parent
    numbers = json.loads((root / "assets" / "study.json").read_text())
    found, page = analyze.tables(numbers), analyze.report(numbers)
    assert (root / "assets" / "study.md").read_text().endswith(page)
    assert found["A, reward"] in README and found["A, exact"] in README
    section = README[README.index("## The study") :].split("\n## ")[0]
    quoted = re.findall(r"[+-]?\d\.\d+ (?:± \d\.\d+|\[[^]]+\])", section)
    assert len(quoted) > 40
    assert not [number for number in quoted if number not in page]


class TinyLanguageModel(nn.Module):
    """Stands where a causal language model stands: tokens in, .logits out; each looks one back."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(11, 11)

    def forward(self, tokens):
        return SimpleNamespace(logits=self.table(tokens))


def test_the_example_runs_on_any_causal_language_model_and_learns():
    space = {}
    exec(next(b for b in BLOCKS if "def eggrpo_update" in b), space)
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
        stats = space["eggrpo_update"](model, reference, optimizer, tokens, generated, rewards)
        history.append(rewards.mean().item())
    assert history[-1] > 3 * history[0] and stats["kl"] > 0 and stats["ratio_min"] == 1
