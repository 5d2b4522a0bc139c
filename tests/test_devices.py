"""Each stage on tensors without values (the device "meta") and in bf16 on a CPU, all operations
watched.

What a GPU would be surprised by and a CPU forgives: a tensor made on another device, a transfer to
the host in the middle of sampling, probabilities in bf16. Says nothing about speed or memory.
"""

import contextlib
from dataclasses import replace

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
from conftest import tiny_env, tiny_policy
from model import generate
from scenes import END
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


def step(world, device):
    """Make one step of reinforcement learning."""
    policy, reference = (tiny_policy(world, scale=2.0).to(device) for _ in range(2))
    optimizer = torch.optim.AdamW(policy.parameters())
    return eggrpo.train_step(policy, reference, optimizer, tiny_env(world, device), CONFIG, 0)


def sample(world, device):
    """Draw two images of few tokens, with guidance."""
    policy = tiny_policy(replace(world, plan_slots=4, image_size=2 * world.patch)).to(device)
    prompts = torch.full((1, policy.S), END).to(device)
    return generate(policy, prompts, torch.rand(2, policy.C + policy.L).to(device), 2.0)


@pytest.mark.parametrize("device", [META, CPU], ids=str)
def test_a_step_stays_on_its_device_and_its_probabilities_in_float32(watched, world, device):
    """It waits for the device once for the log, and once for each reward and the mean."""
    with watched(device) as reads:
        stats = step(world, device)
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


def on_the_host(monkeypatch):
    """A tensor made on the wrong device."""
    zeros = lambda x: torch.zeros(x.shape)
    monkeypatch.setattr(model, "causal_mask", lambda keep: zeros(keep)[:, None, None].bool())


def read_in_the_loop(monkeypatch):
    """A loop that stops when all plans have ended waits for the device at every word."""
    feed_word = model.Decoder.feed_word
    stop = lambda decoder, word: bool((word == 0).all()) and feed_word(decoder, word)
    monkeypatch.setattr(model.Decoder, "feed_word", stop)


def heads_in_bf16(monkeypatch):
    """Logits that are rounded before the softmax."""
    monkeypatch.setattr(model.Policy, "code_logits", lambda self, x: self.code_head(x))


@pytest.mark.parametrize(
    "plant, device, words",
    [
        (on_the_host, META, "of tensors on"),
        (read_in_the_loop, META, "reads of the host"),
        (heads_in_bf16, CPU, "log_softmax of torch.bfloat16"),
    ],
)
def test_a_planted_fault_is_caught(watched, world, monkeypatch, plant, device, words):
    plant(monkeypatch)
    with pytest.raises(AssertionError, match=words):
        with watched(device) as reads:
            sample(world, device)
        assert reads.count == 0, "reads of the host"
