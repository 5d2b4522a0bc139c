"""examples/janus.py on tiny random models: no network, no weights. Skipped where transformers or
peft are not installed."""

import copy
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

transformers = pytest.importorskip("transformers")
pytest.importorskip("peft")
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "examples"))  # where the command's own folder is

import janus  # noqa: E402
import tiny_janus  # noqa: E402
from janus_setup import (
    Config,
    UserError,
    add_adapter,
    call_reward,
    load_policy,  # noqa: E402
    load_reward,
    read_prompts,
    run,
    trained_weights,
)

PROMPTS = ["a red ball", "a small blue dog on a green box", "cat"]
C, L = 6, 9


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A saved Janus, whose decoder knows a palette, a saved CLIP and a prompts file."""
    folder = tmp_path_factory.mktemp("tiny")
    model, tokenizer = tiny_janus.make_janus()
    assert tiny_janus.teach_palette(model) < 0.1
    tiny_janus.save(folder / "janus", model, tokenizer)
    tiny_janus.save(folder / "clip", *tiny_janus.make_clip())
    (folder / "prompts.txt").write_text("\n".join(PROMPTS) + "\n\n")
    (folder / "channels.py").write_text("RED = 0\n")
    (folder / "redness.py").write_text(
        "from channels import RED\n\n"  # a file beside it
        "def redness(images, prompts):\n    return images[:, RED].mean((1, 2))\n\n"
        "def wrong(images, prompts):\n    return images[:, 0].mean()\n\n"
        "def none(images, prompts):\n    pass\n\n"
        "def words(images, prompts):\n    return prompts\n\n"
        "def nan(images, prompts):\n    return images[:, 0].mean((1, 2)) * float('nan')\n"
    )
    return folder


def make_config(files, **changes):
    values = dict(
        model=str(files / "janus"),
        reward=f"{files}/redness.py:redness",
        prompts=str(files / "prompts.txt"),
        plan_tokens=C,
        device="cpu",
    )
    return Config(**values | changes)


def make_policy(files, **changes):
    config = make_config(files, **changes)
    return load_policy(config), config


def noise(rows, seed=0):
    return torch.rand(rows, C + L, generator=torch.Generator().manual_seed(seed))


def make_batch(policy, config, prompts=PROMPTS * 2, seed=0):
    """A rollout for some prompts and advantages (B, C + L) for it."""
    rollout, images = janus.make_rollout(policy, prompts, config, noise(len(prompts), seed))
    scalar = torch.linspace(-1.0, 1.0, len(prompts))
    return rollout, images, janus.shape_rollout(rollout, scalar, config)[0]


def move_adapter(policy):
    """Give the adapter weights for which it changes the policy."""
    g = torch.Generator().manual_seed(1)
    for weight in trained_weights(policy.model).values():
        weight.data = 0.3 * torch.randn(weight.shape, generator=g)


# --- sampling and scoring -------------------------------------------------------------------------


@pytest.mark.parametrize("guidance", [1.0, 5.0])
@pytest.mark.parametrize("full", [True, False])
def test_sampled_equals_rescored(files, guidance, full):
    """With prompts of three lengths, so that requests are padded; in train() mode with
    checkpointing when scored, as in an update; for LoRA with an adapter that does something."""
    policy, config = make_policy(files, guidance=guidance, full=full)
    if not full:
        move_adapter(policy)
    rollout, _, _ = make_batch(policy, config)
    assert (rollout.plan_request < 0).any() and (rollout.image_request < 0).any()
    policy.model.train()
    plan = janus.score(policy, rollout.plan_request, rollout.plan, False)
    codes = janus.score(policy, rollout.image_request, rollout.codes, True, guidance)
    for sampled, pair in (
        (rollout.logp, (plan[0], codes[0])),
        (rollout.entropy, (plan[1], codes[1])),
    ):
        gap = (sampled - torch.cat(pair, 1))[rollout.valid]
        assert gap.abs().max() < 1e-5 * guidance  # which multiplies rounding differences
    assert rollout.entropy.std() > 0.03


def test_samples_follow_the_probabilities(files):
    """4000 draws of the first code against its softmax."""
    policy, config = make_policy(files, guidance=5.0)
    request = torch.tensor([[policy.tokenizer.bos_token_id, 20, 21, policy.boi]])
    many = torch.rand(4000, 1, generator=torch.Generator().manual_seed(0))
    tokens, logp, _, _ = janus.sample(policy, request.repeat(4000, 1), 1, True, 5.0, many)
    for code in tokens.unique():
        p = logp[tokens == code][0].exp().item()
        assert abs((tokens == code).float().mean().item() - p) < 4 * (p / 4000) ** 0.5
    assert len(tokens.unique()) > 3


def padded(policy, requests):
    """What generate takes: pad ids on the left, and the mask."""
    return dict(
        inputs=requests.where(requests >= 0, torch.tensor(policy.tokenizer.pad_token_id)),
        attention_mask=(requests >= 0).long(),
    )


def test_greedy_images_are_those_of_generate(files):
    """transformers' own loop at guidance 5, padded prompts: the same 9 codes for each."""
    policy, config = make_policy(files)
    rollout, _, _ = make_batch(policy, config)
    ours = janus.sample(policy, rollout.image_request, L, True, 5.0)[0]
    policy.model.generation_config.generation_kwargs = {"boi_token_id": policy.boi}
    theirs = policy.model.generate(
        **padded(policy, rollout.image_request),
        do_sample=False,
        generation_mode="image",
        guidance_scale=5,
    )
    assert torch.equal(ours, theirs)
    plain = janus.sample(policy, rollout.image_request, L, True, 1.0)[0]
    assert not torch.equal(ours, plain) and len(ours.unique()) > 5  # guidance does something


def test_greedy_plans_are_those_of_generate(files):
    policy, config = make_policy(files)
    request = make_batch(policy, config)[0].plan_request
    ours, _, _, valid = janus.sample(policy, request, 20, False)
    theirs = policy.model.generate(
        **padded(policy, request), do_sample=False, max_new_tokens=20, generation_mode="text"
    )
    theirs = theirs[:, request.shape[1] :]  # shorter if all plans ended
    theirs = torch.nn.functional.pad(theirs, (0, 20 - theirs.shape[1]))
    assert torch.equal(ours[valid], theirs[valid]) and valid.sum(1).min() > 2
    assert len(ours.unique()) > 5


def test_a_plan_ends_with_its_end_token(files):
    """The end token is valid, what follows is not, and the image request holds the plan's ids."""
    policy, config = make_policy(files)
    end, prompts = policy.tokenizer.eos_token_id, PROMPTS * 20
    rollout, _, _ = make_batch(policy, config, prompts)
    lengths = set()
    for row in range(len(prompts)):
        plan, valid = rollout.plan[row].tolist(), rollout.valid[row, :C].tolist()
        n = plan.index(end) + 1 if end in plan else C
        assert valid == [t < n for t in range(C)]
        words = [token for token in plan[:n] if token != end]
        request = rollout.image_request[row].tolist()
        answer = policy.tokenizer("\n\n<|Assistant|>:", add_special_tokens=False).input_ids
        assert request[-len(words + answer) - 1 :] == words + answer + [policy.boi]
        lengths.add(n)
    assert len(lengths) > 2


# --- the update -----------------------------------------------------------------------------------


def gradients(policy, config, batch, advantage):
    """The gradients of an update, before clipping, whose optimizer does nothing."""
    optimizer = torch.optim.SGD(trained_weights(policy.model).values(), lr=0.0)
    stats = janus.update(policy, optimizer, batch, advantage, config)
    scale = max(stats["grad_norm"], 1.0)  # undo clipping to norm 1
    return {
        k: v.grad * scale for k, v in trained_weights(policy.model).items() if v.grad is not None
    }, stats


@pytest.mark.parametrize("full", [True, False])
def test_micro_batches_do_not_change_the_update(files, full):
    """12, 6, 5 (with a rest of 2) and 1, with checkpointing, and 4 without: the rest weighs by its
    number of sequences."""
    policy, config = make_policy(files, full=full, beta=0.5)
    if not full:
        move_adapter(policy)
    batch, _, advantage = make_batch(policy, config, PROMPTS * 4)
    assert not batch.valid.all()
    results = [
        gradients(policy, make_config(files, full=full, beta=0.5, micro_batch=n), batch, advantage)
        for n in (12, 6, 5, 1)
    ]
    assert policy.model.model.language_model.is_activation_checkpointing
    policy.model.model.language_model.activation_checkpointing_disable()
    results.append(gradients(policy, config, batch, advantage))
    for grads, stats in results[1:]:
        for name, grad in grads.items():
            assert torch.allclose(grad, results[0][0][name], rtol=1e-3, atol=1e-6), name
        assert abs(stats["loss"] - results[0][1]["loss"]) < 1e-6
        assert abs(stats["kl"] - results[0][1]["kl"]) < 1e-6


def test_all_weights_that_sample_get_gradient(files):
    """Both heads, the code embedding and its aligner, every layer; not the vision tower or the
    decoder."""
    policy, config = make_policy(files, full=True)
    grads, _ = gradients(policy, config, *make_batch(policy, config)[::2])
    for part in (
        "lm_head",
        "model.generation_head.vision_head",
        "model.generation_embeddings",
        "model.generation_aligner.fc1",
        "model.language_model.embed_tokens",
        "model.language_model.layers.0.self_attn.q_proj",
        "model.language_model.layers.1.mlp.down_proj",
    ):
        assert grads[part + ".weight"].abs().max() > 1e-6, part
    assert not [
        name
        for name in trained_weights(policy.model)
        if "vision_model" in name or "vqmodel" in name or name.startswith("model.aligner")
    ]


def test_low_tokens_get_no_reward_gradient(files):
    """20 % of a plan's valid tokens and of the codes have advantage 0; plan and image are ranked
    apart. One lambda for both: where A is 1, the mean of the shaped advantages is 1 again."""
    policy, config = make_policy(files)
    batch, _, _ = make_batch(policy, config, seed=3)
    shaped, coefficient = janus.shape_rollout(batch, torch.ones(len(batch.plan)), config)
    for row in range(len(shaped)):
        n = int(batch.valid[row, :C].sum())
        assert (shaped[row, :C][batch.valid[row, :C]] == 0).sum() == int(0.2 * n)
        assert (shaped[row, C:] == 0).sum() == int(0.2 * L)
        assert (shaped[row, C:] > 1).sum() == int(0.5 * L)
        low = batch.entropy[row, C:][shaped[row, C:] == 0].max()
        assert low <= batch.entropy[row, C:][shaped[row, C:] != 0].min()
    high = shaped > 1
    assert torch.allclose(shaped[high] - 1, coefficient * batch.entropy[high], atol=1e-6)
    means = (shaped * batch.valid).sum(1) / batch.valid.sum(1)
    assert abs(means.mean() - 1) < 1e-5


def test_the_kl_term_is_weighted_by_beta(files):
    policy, config = make_policy(files, beta=0.02)
    move_adapter(policy)
    batch, _, advantage = make_batch(policy, config)
    _, stats = gradients(policy, config, batch, 0 * advantage)
    assert stats["loss"] == pytest.approx(0.02 * stats["kl"]) and stats["kl"] > 1e-3


def test_a_step_shapes_advantages_of_its_groups(files, monkeypatch):
    """What update is given: rows of a prompt are compared with each other, and shaped; the learning
    rate is warmed up over 10 steps."""
    policy, config = make_policy(files, group_size=3, lr=1e-3)
    optimizer, given = torch.optim.SGD(trained_weights(policy.model).values(), lr=1.0), []

    def update(policy, optimizer, rollout, advantage, config):
        given.append((rollout, advantage, optimizer.param_groups[0]["lr"]))
        return {}

    monkeypatch.setattr(janus, "update", update)
    rewards = torch.tensor([[1.0, 2.0, 3.0], [10.0, 10.0, 10.0]])
    reward = lambda images, prompts: rewards.flatten()
    stats, _ = janus.train_step(policy, optimizer, reward, PROMPTS[:2], config, 0)
    janus.train_step(policy, optimizer, reward, PROMPTS[:2], config, 20)
    rollout, advantage, _ = given[0]
    scalar = torch.tensor([-1.0, 0.0, 1.0, 0.0, 0.0, 0.0]) / (1 + 1e-4)
    expected, coefficient = janus.shape_rollout(rollout, scalar, config)
    assert torch.allclose(advantage, expected) and (advantage[2] > 1).any()
    assert stats["lambda"] == pytest.approx(coefficient.item()) and coefficient > 0
    assert [lr for _, _, lr in given] == [pytest.approx(1e-4), pytest.approx(1e-3)]


@pytest.mark.parametrize("planted", ["guidance", "plan", "weights", "advantage"])
def test_a_sampler_that_is_another_policy_or_an_infinite_gradient_is_refused(files, planted):
    """Scored without the guidance that was sampled with; a plan altered by re-tokenizing; weights
    changed in between. No weight changes."""
    policy, config = make_policy(files, full=True)
    batch, _, advantage = make_batch(policy, config)
    message = "not one policy; no update was made"
    if planted == "guidance":
        config = make_config(files, full=True, guidance=1.0)
    if planted == "plan":
        batch = batch._replace(plan=batch.plan.roll(1, 0))
    if planted == "weights":
        policy.model.lm_head.weight.data += 0.1 * policy.model.lm_head.weight.data.roll(1, 0)
    if planted == "advantage":
        advantage, message = advantage * float("inf"), "the gradient is not finite"
    before = copy.deepcopy(policy.model.state_dict())
    optimizer = torch.optim.SGD(trained_weights(policy.model).values(), lr=1.0)
    with pytest.raises(UserError, match=message):
        janus.update(policy, optimizer, batch, advantage, config)
    assert all(torch.equal(v, before[k]) for k, v in policy.model.state_dict().items())


# --- adapter and reference ------------------------------------------------------------------------


def test_lora_touches_the_language_model_only(files):
    """The vision tower has modules of the same names. Adapter weights are float32."""
    policy, _ = make_policy(files)
    names = list(trained_weights(policy.model))
    assert names and all(".language_model." in name and ".lora_" in name for name in names)
    found = {re.search(r"(\w+)_proj", name)[1] for name in names}
    assert found == set("q k v o gate up down".split())
    assert any("q_proj" in name for name, _ in policy.model.model.vision_model.named_modules())
    assert {p.dtype for p in trained_weights(policy.model).values()} == {torch.float32}
    model = copy.deepcopy(tiny_janus.make_janus()[0]).to(torch.bfloat16).requires_grad_(False)
    add_adapter(model, make_config(files))
    assert {p.dtype for p in trained_weights(model).values()} == {torch.float32}


def test_the_reference_is_the_model_with_its_adapter_off(files):
    policy, config = make_policy(files)
    base, _ = make_policy(files, full=True)
    batch, _, _ = make_batch(policy, config)
    fresh = janus.score_rollout(policy, batch, 5.0)
    move_adapter(policy)
    with torch.no_grad():
        moved = janus.score_rollout(policy, batch, 5.0)
    off = janus.score_reference(policy, batch, 5.0)
    assert torch.equal(off, fresh) and not off.requires_grad
    assert (off - janus.score_reference(base, batch, 5.0)).abs().max() < 1e-6
    assert (moved - off).abs().max() > 0.1
    with torch.no_grad():  # and it is on again
        assert torch.equal(janus.score_rollout(policy, batch, 5.0), moved)
    assert all(p.requires_grad for n, p in policy.model.named_parameters() if ".lora_" in n)


def test_the_reference_of_full_training_stays(files):
    policy, config = make_policy(files, full=True)
    batch, _, advantage = make_batch(policy, config)
    before = janus.score_reference(policy, batch, 5.0)
    optimizer = torch.optim.SGD(trained_weights(policy.model).values(), lr=0.5)
    assert janus.update(policy, optimizer, batch, advantage, config)["kl"] < 1e-9
    assert torch.equal(janus.score_reference(policy, batch, 5.0), before)
    with torch.no_grad():
        assert (janus.score_rollout(policy, batch, 5.0) - before).abs().max() > 1e-3


# --- rewards --------------------------------------------------------------------------------------


def test_clip_reward_is_clips_own_similarity(files):
    """Against logits_per_image of the model, on images of CLIP's own size."""
    config = make_config(files, reward=str(files / "clip"))
    images = torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    ours = call_reward(load_reward(config), images, PROMPTS)
    model, tokenizer = tiny_janus.make_clip()
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)
    out = model.eval()(
        pixel_values=(images - mean) / std, **tokenizer(PROMPTS, padding=True, return_tensors="pt")
    )
    theirs = out.logits_per_image.diagonal() / model.logit_scale.exp()
    assert (ours - theirs).abs().max() < 1e-5 and ours.std() > 1e-3


@pytest.mark.parametrize("full", [True, False])
def test_redness_rises(files, full):
    """25 updates toward red images, with all weights and with LoRA."""
    policy, config = make_policy(files, full=full, lr=5e-3, group_size=8)
    optimizer = torch.optim.AdamW(trained_weights(policy.model).values(), weight_decay=0.0)
    reward = load_reward(config)
    history = [
        janus.train_step(policy, optimizer, reward, PROMPTS[:2], config, step)[0]["reward"]
        for step in range(25)
    ]
    assert sum(history[-5:]) / 5 > sum(history[:5]) / 5 + 0.3, history


# --- the command ----------------------------------------------------------------------------------


def flags(files, out, **changes):
    values = dict(
        model=files / "janus",
        reward=files / "clip",
        prompts=files / "prompts.txt",
        out=out,
        steps=4,
        prompts_per_step=2,
        group_size=3,
        micro_batch=4,
        plan_tokens=C,
        save_every=2,
        device="cpu",
    )
    return [
        str(x)
        for name, value in (values | changes).items()
        for x in (f"--{name.replace('_', '-')}", value)
    ]


def test_the_whole_command(files, tmp_path):
    """From saved files, in another working directory, as a process of its own."""
    out = tmp_path / "out"
    done = subprocess.run(
        [sys.executable, ROOT / "examples/janus.py", *flags(files, out)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | dict(HF_HUB_OFFLINE="1"),
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr and "eg-grpo" in done.stderr  # the progress bar
    records = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert set(records[0]) == {"config", "versions", "device", "seed"}
    assert [record["step"] for record in records[1:]] == [0, 1, 2, 3]
    last = records[-1]
    assert last["logp_gap_image"] < 1e-5 and 0 < last["entropy_image"] < 1 and last["kl"] > 0
    from PIL import Image

    image = Image.open(out / "images-00004.png")
    assert image.size == (3 * 6, 2 * 6)  # G columns, P rows of 6 x 6 pixels
    model = transformers.JanusForConditionalGeneration.from_pretrained(files / "janus")
    model.load_adapter(str(out / "final"))
    saved = torch.load(out / "policy.pt", weights_only=True)
    assert saved["step"] == 4 and not list(out.glob("*.tmp"))
    state = dict(model.named_parameters())
    assert all(torch.equal(state[k], v) for k, v in saved["weights"].items())


def test_full_training_saves_a_model_to_go_on_from(files, tmp_path):
    """final/ of a run with --full is a Janus for --model, with the trained weights."""
    janus.main(flags(files, tmp_path, steps=1, lr=1e-3) + ["--full"])
    policy, _ = make_policy(files, model=str(tmp_path / "final"), full=True)
    saved = torch.load(tmp_path / "policy.pt", weights_only=True)["weights"]
    assert all(torch.equal(v, saved[k]) for k, v in trained_weights(policy.model).items())
    start, _ = make_policy(files, full=True)
    assert not torch.equal(start.model.lm_head.weight, policy.model.lm_head.weight)


def test_a_resumed_run_is_the_uninterrupted_one(files, tmp_path, monkeypatch):
    """Stopped in step 3, after the checkpoint of step 2 and with a torn last line in the log."""
    command = lambda out: janus.main(flags(files, out))
    command(tmp_path / "whole")
    inner = janus.train_step

    def interrupted(policy, optimizer, reward, prompts, config, step):
        if step == 3:
            raise KeyboardInterrupt
        return inner(policy, optimizer, reward, prompts, config, step)

    monkeypatch.setattr(janus, "train_step", interrupted)
    with pytest.raises(SystemExit) as stop:
        run(lambda: command(tmp_path / "cut"))
    assert stop.value.code == 130
    monkeypatch.setattr(janus, "train_step", inner)
    with open(tmp_path / "cut/log.jsonl", "a") as file:
        file.write('{"step": 3, "rew')
    command(tmp_path / "cut")
    one, two = (
        torch.load(tmp_path / name / "policy.pt", weights_only=True) for name in ("whole", "cut")
    )
    assert all(torch.equal(v, two["weights"][k]) for k, v in one["weights"].items())
    untimed = lambda name: [
        {k: v for k, v in json.loads(line).items() if "seconds" not in k}
        for line in (tmp_path / name / "log.jsonl").read_text().splitlines()
    ]
    assert untimed("whole")[1:] == untimed("cut")[1:] and len(untimed("cut")) == 5


BAD = {
    "model_missing": (dict(model="nowhere"), "--model nowhere"),
    "model_is_clip": (lambda f: dict(model=f / "clip"), "model type 'clip', not 'janus'"),
    "model_original": (lambda f: dict(model=f / "original"), "use deepseek-community/Janus-Pro-1B"),
    "model_broken": (lambda f: dict(model=f / "broken"), "--model"),
    "model_incomplete": (lambda f: dict(model=f / "incomplete"), "1 weights are missing"),
    "tokenizer": (lambda f: dict(model=f / "spaceless"), "tokenizer does not restore"),
    "reward_is_janus": (lambda f: dict(reward=f / "janus"), "model type 'janus', not 'clip'"),
    "reward_missing": (dict(reward="nowhere"), "--reward nowhere"),
    "reward_no_file": (dict(reward="nowhere.py:f"), "nowhere.py"),
    "reward_no_function": (lambda f: dict(reward=f"{f}/redness.py:blue"), "no function 'blue'"),
    "reward_shape": (lambda f: dict(reward=f"{f}/redness.py:wrong"), "returned shape (), not (2,)"),
    "reward_none": (lambda f: dict(reward=f"{f}/redness.py:none"), "returned a NoneType, not one"),
    "reward_words": (lambda f: dict(reward=f"{f}/redness.py:words"), "returned a list, not one"),
    "reward_nan": (lambda f: dict(reward=f"{f}/redness.py:nan"), "NaN"),
    "prompts_missing": (dict(prompts="nowhere.txt"), "nowhere.txt"),
    "prompts_latin1": (lambda f: dict(prompts=f / "latin1.txt"), "latin1.txt: not UTF-8"),
    "prompts_empty": (lambda f: dict(prompts=f / "empty.txt"), "no prompt in it"),
    "reward_import": (lambda f: dict(reward=f"{f}/imports.py:f"), "No module named 'nowhere'"),
    "group_of_one": (dict(group_size=1), "--group-size 1: must be from 2"),
    "lr_inf": (dict(lr="inf"), "--lr inf: must be from 0 to 1"),
    "beta_nan": (dict(beta="nan"), "--beta nan: must be"),
    "kappa_negative": (dict(kappa=-1), "--kappa -1.0: must be"),
    "guidance_inf": (dict(guidance="inf"), "--guidance inf: must be"),
    "seed": (dict(seed=10**20), "--seed 100000000000000000000: must be"),
    "plan_tokens": (dict(plan_tokens=10**20), "--plan-tokens 100000000000000000000: must be"),
    "fractions": (dict(low_frac=0.8), "at most 1"),
    "flag": (dict(speed=3), "--speed"),
    "value": (dict(steps="many"), "--steps"),
    "device": (dict(device="tpu"), "--device tpu"),
}


@pytest.fixture(scope="module")
def spoilt(files):
    """Adds to `files`: bad prompts files, and copies of the model with one defect each."""
    from safetensors.torch import load_file, save_file

    (files / "imports.py").write_text("import nowhere\n")
    (files / "empty.txt").write_text("\n \n")
    (files / "latin1.txt").write_bytes("a café".encode("latin1"))
    for name in ("broken", "incomplete", "spaceless"):
        shutil.copytree(files / "janus", files / name)
    weights = files / "broken/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:200000])
    weights = load_file(files / "incomplete/model.safetensors")
    del weights["lm_head.weight"]
    save_file(weights, files / "incomplete/model.safetensors", {"format": "pt"})
    words = json.loads((files / "spaceless/tokenizer.json").read_text())
    words["decoder"] = {"type": "Fuse"}
    (files / "spaceless/tokenizer.json").write_text(json.dumps(words))
    (files / "original").mkdir()
    (files / "original/config.json").write_text('{"model_type": "multi_modality"}')
    return files


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line(name, spoilt, tmp_path, capsys, monkeypatch):
    files = spoilt
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    changes, expected = BAD[name]
    changes = changes if isinstance(changes, dict) else changes(files)
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        run(lambda: janus.main(flags(files, tmp_path / "out", **changes)))
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert stop.value.code == 2 and len(lines) == 1 and expected in lines[0]


def test_a_folder_of_another_setting_is_refused(files, tmp_path, capsys):
    """Its log is there from the start, its checkpoint only after the first step: either is enough,
    and nothing is written."""
    janus.main(flags(files, tmp_path, steps=1))
    log, checkpoint = tmp_path / "log.jsonl", tmp_path / "policy.pt"
    before = log.read_text(), checkpoint.read_bytes()
    for message in ("is of another --beta: choose another --out", "was made with another --beta"):
        with pytest.raises(SystemExit):
            run(lambda: janus.main(flags(files, tmp_path, steps=2, beta=0.5)))
        assert message in capsys.readouterr().err and before[1] == checkpoint.read_bytes()
        if log.exists():
            assert before[0] == log.read_text()
            log.unlink()


def test_prompts_are_lines_of_utf8_with_or_without_a_mark(files, tmp_path):
    """Split at line ends only: U+2028 and form feeds stay inside of a prompt."""
    path = tmp_path / "prompts.txt"
    path.write_bytes("\ufeffa caf\u00e9\r\na\u2028b\x0cc\n".encode())
    of_step = read_prompts(make_config(files, prompts=str(path), prompts_per_step=2))
    assert sorted(of_step(0)) == ["a caf\u00e9", "a\u2028b\x0cc"]


def test_help_names_every_flag(capsys):
    with pytest.raises(SystemExit) as stop:
        run(lambda: janus.main(["--help"]))
    printed = capsys.readouterr().out
    assert stop.value.code == 0
    for field in Config.__dataclass_fields__:
        assert f"--{field.replace('_', '-')}" in printed
