"""Pretraining: the corpus and its batches."""

import os
import signal

import pytest
import torch

import common
import pretrain
from conftest import one_line
from scenes import PAD


def test_one_draw_per_item_drops_the_plan_or_both(world):
    """Below .10 prompt and plan go together, below .25 the plan alone; four standard errors."""
    n = 4000
    words = torch.ones(n, world.prompt_slots), torch.ones(n, world.plan_slots)
    corpus = *words, torch.zeros(n, world.image_tokens)
    config = pretrain.Config(items=n, batch=n)
    prompt, plan, _ = pretrain.training_batch(corpus, config, 0, torch.device("cpu"))
    no_prompt = (prompt == PAD).all(1)
    no_plan = (plan == PAD).all(1)
    assert not (no_prompt & ~no_plan).any()
    assert (prompt == 1).all(1).eq(~no_prompt).all() and (plan == 1).all(1).eq(~no_plan).all()
    for share, expected in ((no_prompt, 0.10), (no_plan, 0.25)):
        error = (expected * (1 - expected) / n) ** 0.5
        assert abs(share.float().mean() - expected) < 4 * error


def test_an_epoch_has_every_item_once(world):
    corpus = [torch.arange(1, 13)[:, None]] * 3
    config = pretrain.Config(items=12, batch=4, drop_both=0.0, drop_plan=0.0)
    steps = [pretrain.training_batch(corpus, config, i, torch.device("cpu")) for i in range(6)]
    for epoch in (steps[:3], steps[3:]):
        items = torch.cat([codes[:, 0] for _, _, codes in epoch])
        assert sorted(items.tolist()) == list(range(1, 13))


def test_a_corpus_is_the_same_by_processes_and_in_chunks(env, world, monkeypatch):
    """It is drawn and encoded item by item, as far as numbers go."""
    config = pretrain.Config(items=44)
    before = torch.get_rng_state()
    alone = pretrain.make_corpus(config, world, env.tokenizer, env.device)
    monkeypatch.setattr(pretrain, "CHUNK", 4)
    monkeypatch.setattr(pretrain, "FEW", 0)
    together = pretrain.make_corpus(config, world, env.tokenizer, env.device)
    assert all(torch.equal(a, b) for a, b in zip(alone, together)) and len(alone[0]) == 44
    assert torch.equal(before, torch.get_rng_state())


def kill_this_process(world, seed, items):
    os.kill(os.getpid(), signal.SIGKILL)


def have_a_bug(world, seed, items):
    raise RuntimeError("shapes do not fit")


def test_a_killed_process_of_the_corpus_is_one_line_and_a_bug_keeps_its_traceback(
    env, world, monkeypatch, capsys
):
    """The system kills a process if memory runs out."""
    monkeypatch.setattr(pretrain, "FEW", 0)
    make = common.stage("--batch")(pretrain.make_corpus)
    arguments = pretrain.Config(items=4), world, env.tokenizer, env.device
    monkeypatch.setattr(pretrain, "corpus_chunk", kill_this_process)
    assert "out of memory: lower --batch" in one_line(capsys, 2, make, *arguments)
    monkeypatch.setattr(pretrain, "corpus_chunk", have_a_bug)
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        common.run(lambda: make(*arguments))
