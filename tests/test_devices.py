"""What a GPU would be surprised by and a CPU forgives. Says nothing about speed or memory.

Each stage on tensors without values (the device "meta") and in bf16, all operations watched: a
tensor made on another device, a transfer to the host in the middle of sampling, probabilities in
bf16. Then sampler against learner in bf16, network and cache as on CUDA, with a policy trained
here: rounding stays far below the bound at which a run stops, and the bound catches mismatches. A
CPU's bf16 is not a GPU's: other kernels add in another order.
"""

import contextlib
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import common
import eggrpo
import model
import pretrain
import rewards
from conftest import difference, tiny_env, tiny_policy
from eggrpo import LOGP_DIFF_BOUND
from model import Block, Policy, generate
from pretrain import corpus_chunk
from runs import load_model
from scenes import END, WORLDS
from tiny_vq import train as tiny_vq_train

META = torch.device("meta")
CPU = torch.device("cpu")
PROBABILITIES = torch.ops.aten._log_softmax, torch.ops.aten.cumsum, torch.ops.aten.exp
CONFIG = eggrpo.Config(prompts=2, group_size=2, micro_batch=3)


class Operations(TorchDispatchMode):
    """Assert that all operands of an operation are on one device. Between devices tensors are only
    copied; numbers of no dimension may come from the host, as on CUDA."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        devices = {x.device.type for x in tensors if x.dim() > 0}
        copies = "copy" in function.name()
        assert copies or len(devices) < 2, f"{function.name()} of tensors on {devices}"
        if function.overloadpacket in PROBABILITIES and tensors[0].is_floating_point():
            assert tensors[0].dtype == torch.float32, f"{function.name()} of {tensors[0].dtype}"
        return function(*args, **(kwargs or {}))


class HostReads(TorchFunctionMode):
    """Count what waits for the device, and answer with zeros."""

    def __init__(self):
        self.count = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        on_device = args and isinstance(args[0], torch.Tensor) and args[0].device == META
        if on_device and function is torch.Tensor.tolist:
            self.count += 1
            return [0.0] * len(args[0])
        if on_device and function in (torch.Tensor.__bool__, torch.Tensor.item):
            self.count += 1
            return True
        return function(*args, **(kwargs or {}))


@pytest.fixture
def watched(monkeypatch):
    """A function: device -> context manager in which operations are watched, and their reads."""

    @contextlib.contextmanager
    def watch(device):
        reads = HostReads()
        with monkeypatch.context() as patch:
            if device == META:  # which has no autocast
                patch.setattr(torch, "autocast", lambda *a, **k: contextlib.nullcontext())
            else:
                patch.setattr(common, "network_dtype", lambda device: torch.bfloat16)
            with reads, Operations():
                yield reads

    return watch


def sample(world, device):
    """Draw two images of few tokens, with guidance."""
    policy = tiny_policy(replace(world, plan_slots=4, image_size=2 * world.patch)).to(device)
    prompts = torch.full((1, policy.S), END).to(device)
    return generate(policy, prompts, torch.rand(2, policy.C + policy.L).to(device), 2.0)


@pytest.mark.parametrize("device", [META, CPU], ids=str)
def test_a_step_stays_on_its_device_and_its_probabilities_in_float32(watched, world, device):
    """It waits for the device once for the log, and once for each reward and the mean."""
    policy, reference = (tiny_policy(world, scale=2.0).to(device) for _ in range(2))
    optimizer = torch.optim.AdamW(policy.parameters())
    env = tiny_env(world, device)
    with watched(device) as reads:
        stats = eggrpo.train_step(policy, reference, optimizer, env, CONFIG, 0)
    assert len(stats) > 10 and reads.count == (2 + len(rewards.REWARDS)) * (device == META)


def test_sampling_never_waits_for_the_device(watched, world):
    with watched(META) as reads:
        rollout = sample(world, META)
    assert reads.count == 0 and rollout.codes.device == META


def test_tokenizer_and_pretraining_stay_on_their_device(watched, world):
    tokenizer = tiny_env(world, META).tokenizer
    policy = tiny_policy(world).to(META)
    images = torch.rand(4, 3, world.image_size, world.image_size).to(META)
    tokens = [torch.zeros(4, n, dtype=torch.long) for n in (policy.S, policy.C, policy.L)]
    with watched(META) as reads:
        optimizer = torch.optim.AdamW(tokenizer.parameters())
        tiny_vq_train.update(tokenizer, optimizer, images, tiny_vq_train.Config(), 1, None)
        tiny_vq_train.fit_residuals(tokenizer, [images])
        optimizer = torch.optim.AdamW(policy.parameters())
        pretrain.update(policy, optimizer, *(x.to(META) for x in tokens))
    assert reads.count == 2  # each stage waits once, for what it logs


made_on_the_host = lambda keep: torch.zeros(keep.shape)[:, None, None].bool()
wait_at_every_word = lambda decoder, word: bool((word == 0).all()) and word  # have all plans ended?
round_before_softmax = lambda policy, x: policy.code_head(x)


@pytest.mark.parametrize(
    "owner, name, planted, device, words",
    [
        (model, "causal_mask", made_on_the_host, META, "of tensors on"),
        (model.Decoder, "feed_word", wait_at_every_word, META, "reads of the host"),
        (Policy, "code_logits", round_before_softmax, CPU, "log_softmax of torch.bfloat16"),
    ],
)
def test_a_planted_fault_is_caught(
    watched, world, monkeypatch, owner, name, planted, device, words
):
    monkeypatch.setattr(owner, name, planted)
    with pytest.raises(AssertionError, match=words):
        with watched(device) as reads:
            sample(world, device)
        assert reads.count == 0, "reads of the host"


WORLD = WORLDS["small"]
BOUND = LOGP_DIFF_BOUND[torch.bfloat16]


def patch_codes(images):
    """Stand in for a tokenizer: number each patch by its mean colour. (n, h, w, 3) -> (n, L)."""
    n, side = len(images), WORLD.side
    means = images.reshape(n, side, WORLD.patch, side, WORLD.patch, 3).mean((2, 4)) // 86  # 0 to 2
    return torch.from_numpy(means @ np.array([1, 3, 9])).long().flatten(1)


@pytest.fixture(scope="module")
def trained():
    """A policy after some seconds of pretraining, prompts and noise."""
    torch.manual_seed(0)
    prompt, plan, images = corpus_chunk(WORLD, 0, range(128))
    tokens = torch.from_numpy(prompt).long(), torch.from_numpy(plan).long(), patch_codes(images)
    policy = Policy(WORLD, 27, 4, width=64, layers=2, heads=2)
    optimizer = torch.optim.AdamW(policy.parameters(), 5e-3)
    for step in range(120):
        rows = torch.arange(16) + 16 * (step % 8)
        terms = pretrain.update(policy, optimizer, *(x[rows] for x in tokens))
    assert terms["image_nll"] < 0.6 and terms["plan_nll"] < 0.8  # from 3.3 and 4.2: it has learned
    noise = torch.rand(64, policy.C + policy.L, generator=torch.Generator().manual_seed(0))
    return policy, tokens[0][:64], noise


@pytest.fixture
def bf16(monkeypatch):
    """Network and cache in bf16, as on a GPU of compute capability 8 or more."""
    monkeypatch.setattr(common, "network_dtype", lambda device: torch.bfloat16)


def sampled(trained, guidance=1.0):
    policy, prompt, noise = trained
    return generate(policy, prompt, noise, guidance)


@pytest.mark.parametrize("guidance", [1.0, 5.0])
def test_bf16_rounds_to_less_than_a_third_of_the_bound(trained, bf16, monkeypatch, guidance):
    """Guidance multiplies the error of the logits by |g| + |1 - g|, and the bound likewise."""
    rollout = sampled(trained, guidance)
    found = difference(trained[0], rollout, guidance)
    assert 3 * found < BOUND * (guidance + abs(1 - guidance))
    monkeypatch.undo()
    assert difference(trained[0], rollout, guidance) > 1e-4  # scored in float32: it was bf16


class CountCasts(TorchDispatchMode):
    """Count conversions to bf16 of what has two dimensions: weights; activations have three."""

    number = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        of_weight = args and isinstance(args[0], torch.nn.Parameter) and args[0].dim() == 2
        self.number += function == torch.ops.aten._to_copy.default and of_weight
        return function(*args, **(kwargs or {}))


def test_a_finished_policy_casts_each_weight_once_a_batch(trained, bf16, tmp_path):
    """Frozen weights are cast again at every slot. Four of a block, and the aligner; heads are
    float32."""
    policy, prompt, noise = trained
    record = dict(model_config=policy.config, model=policy.state_dict(), config=dict(steps=1))
    torch.save(record | dict(origin="", step=1, log=[]), tmp_path / "policy.pt")
    loaded, _ = load_model(partial(Policy, WORLD), tmp_path / "policy.pt", "", "", CONFIG)
    with CountCasts() as casts:
        generate(loaded, prompt, noise)
    assert casts.number == 4 * len(loaded.blocks) + 1


def forgetful_cache(policy, monkeypatch):
    forward = Block.forward

    def forgetful(block, x, mask, cache=None, slot=0):
        out = forward(block, x, mask, cache, slot)
        if slot > 0:
            cache[:, :, :, slot] = 0
        return out

    monkeypatch.setattr(Block, "forward", forgetful)


def shifted_positions(policy, monkeypatch):
    positions = policy.position_embeddings().roll(1, 0)
    monkeypatch.setattr(policy, "position_embeddings", lambda: positions)


@pytest.mark.parametrize("plant", [forgetful_cache, shifted_positions])
def test_a_planted_mismatch_is_outside_of_the_bound(trained, bf16, monkeypatch, plant):
    with monkeypatch.context() as patch:
        plant(trained[0], patch)
        wrong = sampled(trained)
    assert difference(trained[0], wrong) > BOUND


def test_guidance_on_one_side_is_caught_from_1_05_in_bf16(trained, bf16):
    assert difference(trained[0], sampled(trained, 1.05)) > BOUND
