"""What the README says is so."""

import inspect
import json
import re
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import nn

import eggrpo
import evaluate

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
DOCS = {path.name: path.read_text() for path in (ROOT / "docs").glob("*.md")}
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.S)


def test_the_core_shown_is_the_core_that_runs():
    assert inspect.getsource(eggrpo.shape_advantages) in BLOCKS[0]
    assert len(BLOCKS[0].splitlines()) <= 30


def test_every_method_is_listed_as_in_the_code_and_no_other():
    page = DOCS["methods.md"]
    table = page[page.index("| method | what it is |") :].split("\n\n")[0]
    rows = [f"| `{name}` | {method.about} |" for name, method in eggrpo.METHODS.items()]
    assert table.splitlines()[2:] == rows


def test_every_link_and_every_file_of_the_reading_order_exists():
    for page, folder in ((README, ROOT), *((text, ROOT / "docs") for text in DOCS.values())):
        for link in re.findall(r"\]\((?!http)([^)#]+)\)", page):
            assert (folder / link).is_file(), link
    lesson = [path.name for path in ROOT.glob("*.py")]
    assert all(f"`{name}`" in README for name in lesson)
    assert all(
        (ROOT / name).is_file()
        for name in re.findall(r"`(\w+\.py)`", README)
        if name not in ("vqvae.py", "train.py")
    )
    assert len(README.splitlines()) <= 170


def test_the_results_are_those_of_results_json():
    """The table of the README is the one that evaluate.py makes of the committed numbers."""
    results = json.loads((ROOT / "assets" / "results.json").read_text())
    scores, by_category = evaluate.results_table(results).split("\n\n")
    assert scores in README and by_category in DOCS["results.md"]


def test_what_was_made_again_is_told_as_it_came_out():
    """The runs that were added because few runs had an interval above 0, by themselves."""
    lines = (ROOT / "assets" / "study-runs.jsonl").read_text().splitlines()
    runs = {(r["variant"], r["base"], r["number"]): r["scores"]["eval"]["reward"]
            for r in map(json.loads, lines)}  # fmt: skip
    text, readme = (re.sub(r"\s+", " ", page) for page in (DOCS["results.md"], README))
    mean = lambda x: sum(x) / len(x)

    def gains(variant, grpo, planned):
        """Gains of the runs that were planned, and of those added."""
        keys = [key for key in runs if key[0] == variant]
        gain = {key: runs[key] - runs[grpo, key[1], key[2]] for key in keys}
        return [[x for key, x in gain.items() if planned(*key[1:]) == p] for p in (True, False)]

    first, again = gains("bonus", "grpo", lambda base, number: number == 0)
    assert (len(first), len(again)) == (5, 15)
    assert f"was {mean(first):.3f} above GRPO in its first five runs" in text
    assert f"15 more were made: these are {mean(again):.4f} above" in text
    first, again = gains("long-eggrpo", "long-grpo", lambda base, number: base < 3 and not number)
    assert (len(first), len(again)) == (3, 5)
    above = sum(x > 0 for x in again)
    assert f"{above} of them are above 0, {mean(again):.4f} in the mean" in text
    assert f"{above + sum(x > 0 for x in first)} of 8 pairs are above 0" in readme


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
    assert history[-1] > 3 * history[0] and stats["kl"] > 0
