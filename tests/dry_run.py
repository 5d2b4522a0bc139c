"""Dry run of the CUDA path on fake tensors (fake_cuda.py says what that can show).

    python tests/dry_run.py LIBRARY   -> {"parts": {name: outcome}, "bugs": {name: outcome}}

LIBRARY is fake_cuda.cpp, compiled. An outcome is "passed" or what was caught. Called by
test_fake_cuda.py in a process of its own, as it replaces what a process knows of CUDA.
"""

import ctypes
import json
import sys
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path
from unittest import mock

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent.parent))
    ctypes.CDLL(sys.argv[1])  # before torch, which asks what devices there are when imported

import torch

import common
import eggrpo
import evaluate
import model
import pretrain
import rollout
import tiny_vq.train
from common import network_dtype
from fake_cuda import CUDA, Caught, fake_cuda, leaves, to_cuda
from scenes import WORLDS, make_scene
from words import PAD, WORDS
from tiny_vq.vqvae import VQVAE


# --- the parts of the CUDA path, each with what must hold -----------------------------------------

GPU = WORLDS["gpu"]
# the code path of the gpu preset on few image tokens, as sampling runs token by token
SMALL = replace(GPU, image_size=16, grid=2, object_size=6, max_objects=3, plan_slots=28)
SHORT = replace(SMALL, plan_slots=9)  # for the plan of one object
TINY = replace(SMALL, prompt_slots=3, plan_slots=2, image_size=8)


def make_policy(world, layers, heads=8, width=512):
    """The gpu preset's policy, or one of fewer layers, untrained, on CUDA."""
    sizes = world.prompt_slots, world.plan_slots, world.image_tokens
    return to_cuda(model.Policy(len(WORDS), 1024, 16, *sizes, width, layers, heads))


def make_env(world):
    return rollout.Env(to_cuda(VQVAE(world.patch, width=32)), world, CUDA)


def make_inputs(policy, prompts, sequences):
    """Prompts and noise, on CUDA."""
    prompt = torch.full((prompts, policy.S), 20)
    return prompt.to(CUDA), torch.rand(sequences, policy.C + policy.L).to(CUDA)


def expect(watch, **counts):
    """Raise Caught unless the watch has counted this and nothing else since the last reset."""
    if watch.counts != Counter(counts):
        raise Caught(f"counted {dict(watch.counts)}, expected {counts}")


def expect_types(sample, watch, dtype):
    """Raise Caught unless products have this type, and log-probs and entropies are float32."""
    kinds = {x.dtype for x in (sample.logp, sample.entropy)}, {x.device.type for x in sample}
    expected = ({dtype}, {torch.float32}, {torch.float32}, {"cuda"})
    found = (watch.products, watch.probabilities, *kinds)
    if found != expected:
        raise Caught(f"products, probabilities, log-probs on {found}, expected {expected}")


def sampling(watch, world=SHORT):
    """One capture and one replay; a second call replays; the host is never met."""
    policy = make_policy(world, layers=1)
    inputs = make_inputs(policy, 4, 16)
    watch.reset()
    sample = model.generate(policy, *inputs)
    expect(watch, captures=1, replays=1)
    expect_types(sample, watch, network_dtype(CUDA))
    if (watch.bf16_casts > 0) != (network_dtype(CUDA) == torch.bfloat16):
        raise Caught(f"{watch.bf16_casts} casts to bf16")
    model.generate(policy, *inputs)
    expect(watch, captures=1, replays=2)


def graph_keys(watch):
    """One capture per shape and option; a key that was seen before replays."""
    policy = make_policy(TINY, layers=1, heads=2, width=16)
    calls = [(2, 4, {}), (4, 4, {}), (4, 8, {}), (4, 4, dict(no_plan=True))]  # prompts, sequences
    calls += [(4, 4, dict(guidance=2.0)), (4, 4, dict(temperature=0.5))]
    for captures, (prompts, sequences, options) in enumerate(calls, 1):
        inputs = make_inputs(policy, prompts, sequences)
        for call in range(2):
            watch.reset()
            model.generate(policy, *inputs, **options)
            first = dict(captures=1) if call == 0 else {}
            expect(watch, **first, replays=1)
        if len(policy.graphs) != min(captures, 5):
            raise Caught(f"{len(policy.graphs)} graphs are kept after {captures} captures")


def rollouts(watch):
    """A rollout sends five tensors and reads none; only the first one captures."""
    policy, env = make_policy(SHORT, layers=1), make_env(SHORT)
    config = eggrpo.Config(prompts=2, plans_per_prompt=4)
    scenes = [make_scene(SHORT, "train", 0, i, "knowledge") for i in range(2)]  # of one object
    rollout.make_rollout(policy, env, scenes, config, 0)  # fills the caches of the rewards too
    watch.reset()
    result = rollout.make_rollout(policy, env, scenes, config, 1)
    expect(watch, sends=5, replays=1)
    if {x.device.type for x in leaves(tuple(result))} != {"cuda"}:
        raise Caught("a field of the rollout is not on CUDA")


def shaping_and_update(watch, layers=2):
    """At the gpu preset's shapes, with fewer of its equal layers: shaping meets the host never, an
    update with KL reads once."""
    config = eggrpo.Config(preset="gpu", **eggrpo.PRESETS["gpu"])
    policy, reference = make_policy(GPU, layers), make_policy(GPU, layers)
    optimizer = torch.optim.AdamW(policy.parameters(), config.lr, fused=True)
    (b, t), p = (config.sequences, GPU.plan_slots + GPU.image_tokens), config.prompts
    integers = lambda n: torch.zeros(b, n, dtype=torch.long, device=CUDA)
    floats = lambda *shape: torch.zeros(*shape, device=CUDA)
    rolled = rollout.Rollout(
        integers(GPU.prompt_slots), integers(GPU.plan_slots), integers(GPU.image_tokens),
        floats(b, t), floats(b, t), floats(b, t) > 0, floats(b, 3, 64, 64), floats(p, b // p),
        dict(objects=floats(p, b // p)), floats(p, b // p),
    )  # fmt: skip
    watch.reset()
    batch = eggrpo.make_batch(rolled, config)
    extra = rollout.rollout_stats(rolled, batch)
    expect(watch)
    eggrpo.update(policy, reference, optimizer, batch, config, 0, extra)
    expect(watch, reads=1)
    state = {x.device.type for s in optimizer.state.values() for x in s.values()}
    if state != {"cuda"} or batch.advantage.dtype != torch.float32:
        raise Caught(f"optimizer state on {state}, advantages {batch.advantage.dtype}")


def pretraining(watch, layers=2):
    """At the gpu preset's shapes, with fewer of its equal layers: a batch sends four tensors, an
    update reads once."""
    config = pretrain.Config(preset="gpu", **pretrain.PRESETS["gpu"] | dict(items=256))
    sizes = GPU.prompt_slots, GPU.plan_slots, GPU.image_tokens
    corpus = [torch.full((config.items, n), PAD, dtype=torch.int16) for n in sizes]
    policy = make_policy(GPU, layers)
    optimizer = torch.optim.AdamW(policy.parameters(), config.lr, fused=True)
    watch.reset()
    batch = pretrain.training_batch(corpus, config, 0, CUDA)
    pretrain.update(policy, optimizer, *batch, config.micro_batch)
    expect(watch, sends=4, reads=1)


def tokenizer(watch):
    """At the gpu preset's shapes: a batch sends one tensor, an update reads once."""
    config = tiny_vq.train.Config(preset="gpu", **tiny_vq.train.PRESETS["gpu"])
    vqvae = to_cuda(VQVAE(GPU.patch, config.width, config.blocks, config.codebook_size, config.dim))
    optimizer = torch.optim.AdamW(vqvae.parameters(), config.lr)
    images = torch.zeros(config.batch, 3, GPU.image_size, GPU.image_size, dtype=torch.uint8)
    for step in (1, 2):  # the first one fills the cache of the rewards
        watch.reset()
        tiny_vq.train.update(vqvae, optimizer, images.to(CUDA) / 255, config, step, None)
    expect(watch, sends=1, reads=1)
    if watch.products != {torch.float32}:
        raise Caught(f"products {watch.products}, expected float32")


def evaluation(watch):
    """Batches of one size share a graph with the gallery; sampling is captured once."""
    policy, env = make_policy(SMALL, layers=1), make_env(SMALL)
    watch.reset()
    evaluate.evaluate(env, policy, "eval", prompts=16, batch=8)
    evaluate.gallery_row(env, policy)
    if (watch.counts["captures"], watch.counts["replays"], watch.counts["mixes"]) != (1, 3, 0):
        raise Caught(f"counted {dict(watch.counts)}, expected 1 capture, 3 replays, no mixes")


def sampling_on_an_old_gpu(watch):
    """A T4 (compute capability 7.5) samples in float32."""
    with mock.patch.object(torch.cuda, "get_device_capability", lambda *_: (7, 5)):
        sampling(watch, TINY)


PARTS = [sampling, sampling_on_an_old_gpu, graph_keys, rollouts, shaping_and_update, pretraining,
         tokenizer, evaluation]  # fmt: skip


# --- planted bugs, each with the part that must catch it ------------------------------------------


class Forgetful(dict):
    """Options that the key of a graph does not contain."""

    def values(self):
        return ()


def then(function, change):
    """Return a function that calls another one and changes its result."""
    return lambda *args, **kwargs: change(function(*args, **kwargs))


def also(function, effect):
    """Return a function that calls another one and does something beside, with its result."""

    def wrapped(*args, **kwargs):
        result = function(*args, **kwargs)
        effect(result)
        return result

    return wrapped


def recapture(policy, inputs, options):
    policy.graphs.clear()
    return ORIGINAL(policy, inputs, options)


ORIGINAL = model.sample_by_graph
forget = lambda policy, inputs, options: ORIGINAL(policy, inputs, Forgetful(options))
tiny_sampling = partial(sampling, world=TINY)
BUGS = {  # name: part, module, function, replacement
    "a host constant in captured code": (
        tiny_sampling, model, "policy_logits",
        then(model.policy_logits, lambda x: x * torch.tensor(1.0, device=x.device))),
    "a CPU tensor in captured code": (
        tiny_sampling, model, "policy_logits",
        then(model.policy_logits, lambda x: x * torch.ones(()))),
    "a host read in captured code": (
        tiny_sampling, model, "sample_token",
        also(model.sample_token, lambda x: x[1].amax().item())),
    "a host read after sampling": (
        tiny_sampling, model, "sample_by_graph",
        also(ORIGINAL, lambda x: x.logp.amax().item())),
    "a part of the graph's key forgotten": (graph_keys, model, "sample_by_graph", forget),
    "a capture at every call": (graph_keys, model, "sample_by_graph", recapture),
    "float32 products where bf16 is native": (
        tiny_sampling, common, "network_dtype", lambda device: torch.float32),
    "bf16 where it is emulated": (
        sampling_on_an_old_gpu, common, "network_dtype", lambda device: torch.bfloat16),
    "a sixth tensor sent by a rollout": (
        rollouts, rollout, "generate",
        also(model.generate, lambda x: torch.zeros(1).to(CUDA))),
    "an update that reads in every micro-batch": (
        partial(shaping_and_update, layers=1), eggrpo, "policy_loss",
        also(eggrpo.policy_loss, lambda x: x[0].item())),
    "a pretraining step that reads in every micro-batch": (
        partial(pretraining, layers=1), pretrain, "token_logp",
        also(model.token_logp, lambda x: x.amax().item())),
}  # fmt: skip


def outcome(function, watch):
    """Call a part. Returns what it caught, or "passed"."""
    try:
        function(watch)
        return "passed"
    except Caught as caught:
        return str(caught)


def main():
    results = dict(parts={}, bugs={})
    with fake_cuda() as watch:
        for part in PARTS:
            results["parts"][part.__name__] = outcome(part, watch)
        for name, (part, module, function, replacement) in BUGS.items():
            with mock.patch.object(module, function, replacement):
                results["bugs"][name] = outcome(part, watch)
    print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
