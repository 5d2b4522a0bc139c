"""The stages before reinforcement learning: the tokenizer's nearest codes, straight-through
gradient, moving averages and dead codes; the corpus of pretraining and its batches."""

import os
import signal

import pytest
import torch

import common
import pretrain
from conftest import one_line
from scenes import PAD
from tiny_vq.quantizer import Quantizer
from tiny_vq.train import fit_residuals
from tiny_vq.vqvae import VQVAE


def test_nearest_is_the_argmin_of_distances():
    quantizer = Quantizer(16, 4)
    z = torch.randn(50, 4, generator=torch.Generator().manual_seed(0))
    slow = torch.stack([((quantizer.codebook - v) ** 2).sum(1).argmin() for v in z])
    assert torch.equal(quantizer.nearest(z), slow)


def test_straight_through_has_the_codes_value_and_the_identitys_gradient():
    quantizer = Quantizer(8, 3)
    z = torch.randn(5, 3, requires_grad=True)
    out, codes, _ = quantizer(z)
    assert torch.allclose(out, quantizer.codebook[codes], atol=1e-6)
    (out * torch.arange(3.0)).sum().backward()
    assert torch.equal(z.grad, torch.arange(3.0).expand(5, 3))


def test_update_moves_an_entry_to_the_mean_of_its_vectors():
    """One step by hand: count .5 + .5 * 2 = 1.5, sum .5 * 0 + .5 * (1 + 3) = 2, so the entry goes
    to 4/3."""
    quantizer = Quantizer(2, 1, decay=0.5)
    quantizer.codebook.copy_(torch.tensor([[0.0], [9.0]]))
    quantizer.sums.copy_(quantizer.codebook)
    quantizer.update(torch.tensor([[1.0], [3.0]]), torch.tensor([0, 0]))
    assert torch.allclose(quantizer.codebook, torch.tensor([[4 / 3], [9.0]]))


def test_dead_codes_restart_on_vectors_of_the_batch_and_live_ones_stay():
    quantizer = Quantizer(4, 2)
    z = torch.randn(10, 2) + 50
    quantizer.counts.copy_(torch.tensor([5.0, 0.0, 5.0, 0.1]))
    before = quantizer.codebook.clone()
    quantizer.restart(z, quantizer.nearest(z), torch.Generator().manual_seed(0))
    assert torch.equal(quantizer.codebook[[0, 2]], before[[0, 2]])
    assert all((z == quantizer.codebook[i]).all(1).any() for i in (1, 3))
    assert torch.equal(quantizer.counts, torch.tensor([5.0, 1.0, 5.0, 1.0]))


def test_dead_codes_do_not_restart_where_an_entry_already_is():
    """Most vectors of an image are background; a dead code moved there would stay useless."""
    quantizer = Quantizer(4, 2)
    quantizer.counts.copy_(torch.tensor([5.0, 0.0, 0.0, 0.0]))
    z = quantizer.codebook[:1].repeat(100, 1)
    z[42] = 7.0
    quantizer.restart(z, torch.zeros(100, dtype=torch.long), torch.Generator().manual_seed(0))
    assert (quantizer.codebook[1:] == 7.0).all()


def test_encode_and_decode_are_the_halves_of_forward():
    model = VQVAE(patch=4, width=16, blocks=1, codebook_size=32, dim=4)
    images = torch.rand(2, 3, 16, 16)
    restored, features, codes, _ = model(images)
    assert torch.equal(model.encode(images), codes.view(2, 16))
    assert torch.allclose(model.decode(model.encode(images)), restored.clamp(0, 1), atol=1e-5)
    assert features.shape == (32, 4) and model.decode(codes.view(2, 16)).shape == images.shape


def test_residuals_make_the_mean_patch_of_each_code_right():
    """The mean over all patches of one code is restored exactly, whatever the decoder makes of it;
    codes that no patch has are left as they are."""
    model = VQVAE(patch=4, width=16, blocks=1, codebook_size=32, dim=4)
    images = torch.rand(6, 3, 16, 16)
    fit_residuals(model, images.split(4))
    restored, _, codes, _ = model(images)
    missed = torch.nn.functional.pixel_unshuffle(images - restored, 4)
    missed = missed.permute(0, 2, 3, 1).flatten(0, 2)  # (6 * 16, 48)
    for code in codes.unique():
        assert missed[codes == code].mean(0).abs().max() < 1e-5
    unused = torch.bincount(codes, minlength=32) == 0
    assert unused.any() and not model.residuals[unused].any()


def test_equal_patches_get_equal_codes_wherever_they_are():
    """The encoder sees one patch at a time: a change in one patch changes no other code."""
    model = VQVAE(patch=4, width=16, blocks=1, codebook_size=32, dim=4)
    images = torch.rand(1, 3, 4, 4).tile(1, 1, 4, 4)
    assert len(model.encode(images).unique()) == 1
    changed = images.clone()
    changed[..., 4:8, 8:12] = torch.rand(3, 4, 4)
    features, others = model.features(images)[0], model.features(changed)[0]
    differs = (features != others).any(-1)
    assert differs[1, 2] and differs.sum() == 1


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
    alone = pretrain.make_corpus(config, world, env.tokenizer, env.device)
    monkeypatch.setattr(pretrain, "CHUNK", 4)
    monkeypatch.setattr(pretrain, "FEW", 0)
    together = pretrain.make_corpus(config, world, env.tokenizer, env.device)
    assert all(torch.equal(a, b) for a, b in zip(alone, together)) and len(alone[0]) == 44


def kill_this_process(world, seed, items):
    os.kill(os.getpid(), signal.SIGKILL)


def have_a_bug():
    raise RuntimeError("Caught RuntimeError in DataLoader worker process 0.")  # torch's words


def test_a_killed_process_of_the_corpus_is_one_line_and_a_bug_keeps_its_traceback(
    env, world, monkeypatch, capsys
):
    """The system kills a process if memory runs out."""
    monkeypatch.setattr(pretrain, "FEW", 0)
    make = common.stage("--batch")(pretrain.make_corpus)
    arguments = pretrain.Config(items=4), world, env.tokenizer, env.device
    monkeypatch.setattr(pretrain, "corpus_chunk", kill_this_process)
    assert "out of memory: lower --batch" in one_line(capsys, 2, make, *arguments)
    with pytest.raises(RuntimeError):
        common.run(common.stage("--batch")(have_a_bug))
