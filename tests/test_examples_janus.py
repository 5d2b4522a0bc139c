"""examples/janus.py on tiny random models: no network, no weights. Skipped where transformers or
peft are not installed."""

import copy
import json
import re
import shutil
import sys
from dataclasses import replace

import pytest
import torch
from PIL import Image

from conftest import ROOT, one_line, read_log, run

transformers = pytest.importorskip("transformers")
pytest.importorskip("peft")
sys.path.insert(0, str(ROOT / "examples"))  # where the command's own folder is

import janus  # noqa: E402
import tiny_janus  # noqa: E402
from janus_setup import Config, UserError, add_adapter, trained_weights  # noqa: E402

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
        "from channels import RED\n"  # a file beside it
        "redness = lambda images, prompts: images[:, RED].mean((1, 2))\n"
        "wrong = lambda images, prompts: images[:, 0].mean()\n"
        "none = lambda images, prompts: None\n"
        "nan = lambda images, prompts: redness(images, prompts) * float('nan')\n"
    )
    return folder


def settings(files, **changes):
    names = dict(model="janus", reward="redness.py:redness", prompts="prompts.txt")
    values = {key: f"{files}/{name}" for key, name in names.items()}
    return values | dict(plan_tokens=C, device="cpu") | changes


def make_policy(files, **changes):
    config = Config(**settings(files, **changes))
    return janus.load_policy(config), config


def move_adapter(policy):
    """Give the adapter weights for which it changes the policy."""
    g = torch.Generator().manual_seed(1)
    for weight in trained_weights(policy.model).values():
        weight.data = 0.3 * torch.randn(weight.shape, generator=g)


def make_batch(files, prompts=PROMPTS * 2, moved=False, **changes):
    """A policy, whose adapter has moved or is new, its config, a rollout and advantages (B, C + L)
    for it."""
    policy, config = make_policy(files, **changes)
    if moved and not config.full:
        move_adapter(policy)
    noise = torch.rand(len(prompts), C + L, generator=torch.Generator().manual_seed(0))
    rollout, _ = janus.make_rollout(policy, prompts, config, noise)
    scalar = torch.linspace(-1.0, 1.0, len(prompts))
    return policy, config, rollout, janus.shape_rollout(rollout, scalar, config)[0]


def sgd(policy, lr):
    return torch.optim.SGD(trained_weights(policy.model).values(), lr)


@pytest.mark.parametrize("guidance", [1.0, 5.0])
@pytest.mark.parametrize("full", [True, False])
def test_sampled_equals_rescored(files, guidance, full):
    """With prompts of three lengths, so that requests are padded; in train() mode with
    checkpointing when scored, as in an update; for LoRA with an adapter that does something."""
    policy, _, rollout, _ = make_batch(files, moved=True, guidance=guidance, full=full)
    assert (rollout.plan_request < 0).any() and (rollout.image_request < 0).any()
    policy.model.train()
    plan = janus.score(policy, rollout.plan_request, rollout.plan, False)
    codes = janus.score(policy, rollout.image_request, rollout.codes, True, guidance)
    for sampled, *pair in zip((rollout.logp, rollout.entropy), plan, codes):
        gap = (sampled - torch.cat(pair, 1))[rollout.valid]
        assert gap.abs().max() < 1e-5 * guidance  # which multiplies rounding differences
    assert rollout.entropy.std() > 0.03


def test_samples_follow_the_probabilities(files):
    """4000 draws of the first code against its softmax."""
    policy, _ = make_policy(files)
    request = torch.tensor([[policy.tokenizer.bos_token_id, 20, 21, policy.boi]])
    many = torch.rand(4000, 1, generator=torch.Generator().manual_seed(0))
    tokens, logp, _, _ = janus.sample(policy, request.repeat(4000, 1), 1, True, 5.0, many)
    for code in tokens.unique():
        p = logp[tokens == code][0].exp().item()
        assert abs((tokens == code).float().mean().item() - p) < 4 * (p / 4000) ** 0.5
    assert len(tokens.unique()) > 3


def generate(policy, requests, **how):
    """transformers' own loop, greedy, on requests padded on the left."""
    inputs = requests.where(requests >= 0, torch.tensor(policy.tokenizer.pad_token_id))
    mask = (requests >= 0).long()
    return policy.model.generate(inputs=inputs, attention_mask=mask, do_sample=False, **how)


def test_greedy_images_are_those_of_generate(files):
    """At guidance 5, padded prompts: the same 9 codes for each."""
    policy, _, rollout, _ = make_batch(files)
    ours, plain = (janus.sample(policy, rollout.image_request, L, True, g)[0] for g in (5.0, 1.0))
    policy.model.generation_config.generation_kwargs = {"boi_token_id": policy.boi}
    how = dict(generation_mode="image", guidance_scale=5)
    assert torch.equal(ours, generate(policy, rollout.image_request, **how))
    assert not torch.equal(ours, plain) and len(ours.unique()) > 5  # guidance does something


def test_a_plan_ends_with_its_end_token(files):
    """The end token is valid, what follows is not, and the image request holds the plan's ids."""
    policy, _, rollout, _ = make_batch(files, PROMPTS * 20)
    end, lengths = policy.tokenizer.eos_token_id, set()
    answer = policy.tokenizer("\n\n<|Assistant|>:", add_special_tokens=False).input_ids
    rows = rollout.plan, rollout.valid[:, :C], rollout.image_request
    for plan, valid, request in zip(*(x.tolist() for x in rows)):
        n = plan.index(end) + 1 if end in plan else C
        assert valid == [t < n for t in range(C)]
        words = [token for token in plan[:n] if token != end]
        assert request[-len(words + answer) - 1 :] == words + answer + [policy.boi]
        lengths.add(n)
    assert len(lengths) > 2


def gradients(policy, config, batch, advantage):
    """The gradients of an update, before clipping, whose optimizer does nothing."""
    stats = janus.update(policy, sgd(policy, 0.0), batch, advantage, config)
    scale = max(stats["grad_norm"], 1.0)  # undo clipping to norm 1
    weights = trained_weights(policy.model)
    return {k: v.grad * scale for k, v in weights.items() if v.grad is not None}, stats


@pytest.mark.parametrize("full", [True, False])
def test_micro_batches_do_not_change_the_update(files, full):
    """12, 6, 5 (with a rest of 2) and 1, with checkpointing, and 4 without: the rest weighs by its
    number of sequences."""
    changes = dict(moved=True, full=full, beta=0.5)
    policy, config, *rest = make_batch(files, PROMPTS * 4, **changes)
    assert not rest[0].valid.all()
    sizes = 12, 6, 5, 1
    results = [gradients(policy, replace(config, micro_batch=n), *rest) for n in sizes]
    assert policy.model.model.language_model.is_activation_checkpointing
    policy.model.model.language_model.activation_checkpointing_disable()
    results.append(gradients(policy, config, *rest))
    for grads, stats in results[1:]:
        for name, grad in grads.items():
            assert torch.allclose(grad, results[0][0][name], rtol=1e-3, atol=1e-6), name
        for key in ("loss", "kl"):
            assert abs(stats[key] - results[0][1][key]) < 1e-6


def test_all_weights_that_sample_get_gradient(files):
    """Both heads, the code embedding and its aligner, every layer; not the vision tower or the
    decoder."""
    policy, *rest = make_batch(files, full=True)
    grads, _ = gradients(policy, *rest)
    heads = "lm_head generation_head.vision_head generation_embeddings generation_aligner.fc1"
    layers = "embed_tokens layers.0.self_attn.q_proj layers.1.mlp.down_proj"
    parts = heads.split() + [f"language_model.{layer}" for layer in layers.split()]
    for part in (x if x == "lm_head" else f"model.{x}" for x in parts):
        assert grads[part + ".weight"].abs().max() > 1e-6, part
    others = re.compile("vision_model|vqmodel|^model.aligner")
    assert not any(others.search(name) for name in trained_weights(policy.model))


def test_low_tokens_get_no_reward_gradient(files):
    """20 % of a plan's valid tokens and of the codes have advantage 0; plan and image are ranked
    apart. One lambda for both: where A is 1, the mean of the shaped advantages is 1 again."""
    _, config, batch, _ = make_batch(files)
    shaped, coefficient = janus.shape_rollout(batch, torch.ones(len(batch.plan)), config)
    for row, valid, entropy in zip(shaped, batch.valid[:, :C], batch.entropy[:, C:]):
        plan, image = row[:C][valid], row[C:]
        assert (plan == 0).sum() == int(0.2 * len(plan))
        assert (image == 0).sum() == int(0.2 * L) and (image > 1).sum() == int(0.5 * L)
        assert entropy[image == 0].max() <= entropy[image != 0].min()
    high = shaped > 1
    assert torch.allclose(shaped[high] - 1, coefficient * batch.entropy[high], atol=1e-6)
    means = (shaped * batch.valid).sum(1) / batch.valid.sum(1)
    assert abs(means.mean() - 1) < 1e-5


def test_a_step_shapes_advantages_of_its_groups(files, monkeypatch):
    """What update is given: rows of a prompt are compared with each other, and shaped; the learning
    rate is warmed up over 10 steps."""
    policy, config = make_policy(files, group_size=3, lr=1e-3)
    optimizer, given = sgd(policy, 1.0), []

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


@pytest.mark.parametrize("planted", ["guidance", "plan", "weights", "gradient"])
def test_another_policy_or_a_gradient_that_is_not_finite_makes_no_update(files, planted):
    """Scored without the guidance that was sampled with; a plan altered by re-tokenizing; weights
    changed in between. No weight changes."""
    policy, config, batch, advantage = make_batch(files, full=True)
    words = "not one policy; no update was made"
    if planted == "guidance":
        config = replace(config, guidance=1.0)
    if planted == "plan":
        batch = batch._replace(plan=batch.plan.roll(1, 0))
    if planted == "weights":
        policy.model.lm_head.weight.data += 0.1 * policy.model.lm_head.weight.data.roll(1, 0)
    if planted == "gradient":
        advantage, words = advantage * float("inf"), "gradient is not finite"
    before = copy.deepcopy(policy.model.state_dict())
    with pytest.raises(UserError, match=words):
        janus.update(policy, sgd(policy, 1.0), batch, advantage, config)
    assert all(torch.equal(v, before[k]) for k, v in policy.model.state_dict().items())


def test_lora_touches_the_language_model_only(files):
    """The vision tower has modules of the same names. Adapter weights are float32."""
    policy, config = make_policy(files)
    names = list(trained_weights(policy.model))
    assert names and all(".language_model." in name and ".lora_" in name for name in names)
    found = {re.search(r"(\w+)_proj", name)[1] for name in names}
    assert found == set("q k v o gate up down".split())
    assert any("q_proj" in name for name, _ in policy.model.model.vision_model.named_modules())
    model = tiny_janus.make_janus()[0].to(torch.bfloat16).requires_grad_(False)
    add_adapter(model, config)
    for network in (policy.model, model):
        assert {p.dtype for p in trained_weights(network).values()} == {torch.float32}


def test_the_reference_is_the_model_with_its_adapter_off(files):
    policy, _, batch, _ = make_batch(files)
    base, _ = make_policy(files, full=True)
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
    policy, config, batch, advantage = make_batch(files, full=True)
    before = janus.score_reference(policy, batch, 5.0)
    assert janus.update(policy, sgd(policy, 0.5), batch, advantage, config)["kl"] < 1e-9
    assert torch.equal(janus.score_reference(policy, batch, 5.0), before)
    with torch.no_grad():
        assert (janus.score_rollout(policy, batch, 5.0) - before).abs().max() > 1e-3


def test_clip_reward_is_clips_own_similarity(files):
    """Against logits_per_image of the model, on images of CLIP's own size."""
    reward = janus.load_reward(Config(**settings(files, reward=f"{files}/clip")))
    images = torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    ours = janus.call_reward(reward, images, PROMPTS)
    model, tokenizer = tiny_janus.make_clip()
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)
    words = tokenizer(PROMPTS, padding=True, return_tensors="pt")
    out = model.eval()(pixel_values=(images - mean) / std, **words)
    theirs = out.logits_per_image.diagonal() / model.logit_scale.exp()
    assert (ours - theirs).abs().max() < 1e-5 and ours.std() > 1e-3


@pytest.mark.parametrize("full", [True, False])
def test_redness_rises(files, full):
    """25 updates toward red images, with all weights and with LoRA."""
    policy, config = make_policy(files, full=full, lr=5e-3, group_size=8)
    optimizer = torch.optim.AdamW(trained_weights(policy.model).values(), weight_decay=0.0)
    reward = janus.load_reward(config)
    train = lambda step: janus.train_step(policy, optimizer, reward, PROMPTS[:2], config, step)[0]
    history = [train(step)["reward"] for step in range(25)]
    assert sum(history[-5:]) / 5 > sum(history[:5]) / 5 + 0.3, history


def flags(files, out, **changes):
    values = settings(files, reward=files / "clip", out=out, save_every=2)
    values |= dict(steps=4, prompts_per_step=2, group_size=3, micro_batch=4)
    pairs = [(f"--{k.replace('_', '-')}", str(v)) for k, v in (values | changes).items()]
    return [word for pair in pairs for word in pair]


def load_saved(folder):
    return torch.load(folder / "policy.pt", weights_only=True)


def test_the_whole_command(files, tmp_path):
    """From saved files, in another working directory, as a process of its own."""
    out = tmp_path / "out"
    printed = run(sys.executable, ROOT / "examples/janus.py", *flags(files, out), cwd=tmp_path)
    assert "eg-grpo" in printed  # the progress bar
    head, *records = read_log(out / "log.jsonl")
    assert set(head) == {"config", "versions", "device", "seed"}
    assert [record["step"] for record in records] == [0, 1, 2, 3]
    last = records[-1]
    assert last["logp_gap_image"] < 1e-5 and 0 < last["entropy_image"] < 1 and last["kl"] > 0
    image = Image.open(out / "images-00004.png")
    assert image.size == (3 * 6, 2 * 6)  # G columns, P rows of 6 x 6 pixels
    model = transformers.JanusForConditionalGeneration.from_pretrained(files / "janus")
    model.load_adapter(str(out / "final"))
    saved = load_saved(out)
    assert saved["step"] == 4 and not list(out.glob("*.tmp"))
    state = dict(model.named_parameters())
    assert all(torch.equal(state[k], v) for k, v in saved["weights"].items())


def test_full_training_saves_a_model_to_go_on_from(files, tmp_path):
    """final/ of a run with --full is a Janus for --model, with the trained weights."""
    janus.main(flags(files, tmp_path, steps=1, lr=1e-3) + ["--full"])
    policy, _ = make_policy(files, model=str(tmp_path / "final"), full=True)
    saved = load_saved(tmp_path)["weights"]
    assert all(torch.equal(v, saved[k]) for k, v in trained_weights(policy.model).items())
    start, _ = make_policy(files, full=True)
    assert not torch.equal(start.model.lm_head.weight, policy.model.lm_head.weight)


def test_a_resumed_run_is_the_uninterrupted_one(files, tmp_path, monkeypatch, capsys):
    """Stopped in step 3, after the checkpoint of step 2 and with a torn last line in the log."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    janus.main(flags(files, whole))
    inner = janus.train_step

    def interrupted(*arguments):
        if arguments[-1] == 3:
            raise KeyboardInterrupt
        return inner(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(janus, "train_step", interrupted)
        line = one_line(capsys, 130, janus.main, flags(files, cut), runner=janus.run)
    assert "the same command resumes" in line
    with open(cut / "log.jsonl", "a") as file:
        file.write('{"step": 3, "rew')
    janus.main(flags(files, cut))
    one, two = (load_saved(folder)["weights"] for folder in (whole, cut))
    assert all(torch.equal(v, two[k]) for k, v in one.items())
    one, two = (read_log(folder / "log.jsonl")[1:] for folder in (whole, cut))
    untimed = lambda log: [{k: v for k, v in r.items() if "seconds" not in k} for r in log]
    assert untimed(one) == untimed(two) and len(two) == 4


BAD = [  # flag, value in which {} is the folder, words of the message
    ("model", "nowhere", "--model nowhere"),
    ("model", "{}/clip", "model type 'clip', not 'janus'"),
    ("model", "{}/original", "use deepseek-community/Janus-Pro-1B"),
    ("model", "{}/broken", "--model"),
    ("model", "{}/spaceless", "tokenizer does not restore"),
    ("reward", "{}/janus", "model type 'janus', not 'clip'"),
    ("reward", "nowhere", "--reward nowhere"),
    ("reward", "nowhere.py:f", "nowhere.py"),
    ("reward", "{}/redness.py:blue", "no function 'blue'"),
    ("reward", "{}/redness.py:wrong", "returned shape (), not (2,)"),
    ("reward", "{}/redness.py:none", "returned a NoneType, not one"),
    ("reward", "{}/redness.py:nan", "NaN"),
    ("prompts", "nowhere.txt", "nowhere.txt"),
    ("prompts", "{}/latin1.txt", "latin1.txt: not UTF-8"),
    ("prompts", "{}/empty.txt", "no prompt in it"),
    ("reward", "{}/imports.py:f", "No module named 'nowhere'"),
    ("group_size", 1, "--group-size 1: must be from 2"),
    ("beta", "nan", "--beta nan: must be"),
    ("seed", 10**20, "--seed 100000000000000000000: must be"),
    ("low_frac", 0.8, "at most 1"),
    ("speed", 3, "--speed"),
    ("steps", "many", "--steps"),
    ("device", "tpu", "--device tpu"),
]


@pytest.fixture(scope="module")
def spoilt(files):
    """Adds to `files`: bad prompts files, and copies of the model with one defect each."""
    (files / "imports.py").write_text("import nowhere\n")
    (files / "empty.txt").write_text("\n \n")
    (files / "latin1.txt").write_bytes("a café".encode("latin1"))
    for name in ("broken", "spaceless"):
        shutil.copytree(files / "janus", files / name)
    weights = files / "broken/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:200000])
    words = json.loads((files / "spaceless/tokenizer.json").read_text())
    words["decoder"] = {"type": "Fuse"}
    (files / "spaceless/tokenizer.json").write_text(json.dumps(words))
    (files / "original").mkdir()
    (files / "original/config.json").write_text('{"model_type": "multi_modality"}')
    return files


@pytest.mark.parametrize("flag, value, words", BAD)
def test_bad_input_is_one_line(flag, value, words, spoilt, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    command = flags(spoilt, tmp_path / "out", **{flag: str(value).format(spoilt)})
    assert words in one_line(capsys, 2, janus.main, command, runner=janus.run)


def test_another_run_goes_on_from_neither_log_nor_checkpoint(files, tmp_path, capsys):
    """The log is there from the start, the checkpoint only after the first step."""
    janus.main(flags(files, tmp_path, steps=1))
    log, checkpoint, other = tmp_path / "log.jsonl", tmp_path / "policy.pt", tmp_path / "other.pt"
    before = log.read_bytes()
    other_flags = flags(files, tmp_path, steps=2, beta=0.5)
    refused = lambda: one_line(capsys, 2, janus.main, other_flags, runner=janus.run)
    assert "log.jsonl is of another --beta: choose another --out" in refused()
    checkpoint.rename(other)
    assert "log.jsonl is of another --beta: choose another --out" in refused()
    assert log.read_bytes() == before
    other.rename(checkpoint)
    log.unlink()
    assert "policy.pt was made with another --beta" in refused()
