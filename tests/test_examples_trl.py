"""examples/trl_eggrpo.py on a tiny random Llama, and our loss beside TRL's. Skipped where TRL is
not installed.

Every trainer has a process of its own (this file, run as a script): several TRL trainers in one
process sometimes abort at exit.
"""

import copy
import os
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
import torch

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
trl = pytest.importorskip("trl")
ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "examples"))

import datasets  # noqa: E402
import tiny_janus  # noqa: E402
from trl_eggrpo import EGGRPOTrainer, objective  # noqa: E402

PROMPTS = ["a red ball", "a small blue dog on a green box", "cat", "dog and ball"]
PROMPTS += ["green cat under a box", "a ball left of a dog", "red", "a big cat"]
COMMON = dict(loss_type="grpo", num_generations=4, per_device_train_batch_size=8, max_steps=3)
COMMON |= dict(max_completion_length=12, learning_rate=0.02, use_cpu=True, bf16=False)
COMMON |= dict(logging_steps=1, report_to="none", save_strategy="no", disable_tqdm=True)
CASES = {
    "accumulation": dict(gradient_accumulation_steps=2, per_device_train_batch_size=4, lora=0.0),
    "iterations": dict(num_iterations=2, gradient_checkpointing=True),
    "sgd": dict(optim="sgd", learning_rate=0.5, max_grad_norm=100.0),
}
# fields of GRPOConfig
REFUSED = dict(top_k=5, top_p=0.9, min_p=0.1, repetition_penalty=1.1, neftune_noise_alpha=5.0)
REFUSED |= dict(generation_kwargs=dict(temperature=2.0), loss_type="dapo", entropy_coef=0.01)
REFUSED |= dict(importance_sampling_level="sequence", off_policy_mask_threshold=0.5)
REFUSED |= dict(top_entropy_quantile=0.2, use_adaptive_entropy=True)
SHIPPED = dict(typical_p=0.5, no_repeat_ngram_size=2, suppress_tokens=[5])  # with a model


def make_model():
    """Make a random language model of two layers and its tokenizer."""
    tokenizer = tiny_janus.make_tokenizer()
    return transformers.LlamaForCausalLM(tiny_janus.language_config(tokenizer)), tokenizer


def make_trainer(kind, folder, config, shaping):
    """Make EGGRPOTrainer, or TRL's own for kind "stock", on a tiny random model."""
    torch.manual_seed(0)
    model, tokenizer = make_model()
    model.lm_head.weight.data *= 20  # entropies far from 1
    shipped = dict(top_k=1, min_p=0.9, temperature=0.1)  # TRL overrides these
    for name, value in (shipped | config.pop("shipped", {})).items():
        setattr(model.generation_config, name, value)
    if "lora" in config:
        lora = peft.LoraConfig(task_type="CAUSAL_LM", lora_dropout=config.pop("lora"))
        shaping = shaping | dict(peft_config=lora)
    cls = trl.GRPOTrainer if kind == "stock" else EGGRPOTrainer
    return cls(
        model=model,
        processing_class=tokenizer,
        reward_funcs=reward_words,
        train_dataset=datasets.Dataset.from_dict({"prompt": PROMPTS}),
        args=trl.GRPOConfig(output_dir=str(folder), **COMMON | config),
        **shaping,
    )


def reward_words(completions, **_):
    return [float(len(text) % 7) for text in completions]


def worker(kind, case, folder):
    """Train, and write what the test compares to folder/kind-case.pt."""
    rank, seen = int(os.environ.get("RANK", 0)), []
    path = Path(folder) / f"{kind}-{case}-{rank}.pt"
    if case == "refusals":
        bad = [{name: value} for name, value in REFUSED.items()] + [dict(lora=0.1)]
        bad += [dict(shipped={name: value}) for name, value in SHIPPED.items()]
        torch.save([refusal(config, folder) for config in bad], path)
        os._exit(0)
    config = dict(CASES[case])
    if "WORLD_SIZE" in os.environ:
        config.update(ddp_backend="gloo", per_device_train_batch_size=4)
    trainer = make_trainer(kind, folder, config, dict(low_frac=0.0) if kind == "off" else {})
    if case == "sgd":
        fix_completions(trainer)
    inner = trainer._generate_and_score_completions

    def record(inputs):
        batch = inner(inputs)
        tensors = {k: v.clone() for k, v in batch.items() if isinstance(v, torch.Tensor)}
        seen.append(tensors | dict(rewards=list(trainer._logs["rewards"]["reward_words"])))
        return batch

    trainer._generate_and_score_completions = record
    before = copy.deepcopy(trainer.model.state_dict())
    trainer.train()
    weights = trainer.accelerator.unwrap_model(trainer.model).state_dict()
    log = [row for row in trainer.state.log_history if "loss" in row]
    torch.save(dict(weights=weights, before=before, batches=seen, log=log), path)
    trainer.accelerator.wait_for_everyone()
    sys.stdout.flush()
    os._exit(0)  # TRL processes, stock ones too, sometimes abort at exit


def refusal(bad, folder):
    try:
        make_trainer("eg", folder, bad, {})
    except ValueError as error:
        return re.match(r"\w+", str(error))[0]
    return f"{bad} was accepted"


def fix_completions(trainer):
    """Replace sampling by completions fixed by prompt and place in the group, so that runs with
    another number of processes train on the same completions."""

    def generate(prompt_ids, *_):
        completions = []
        for i, prompt in enumerate(prompt_ids):
            g = torch.Generator().manual_seed(1000 * sum(prompt) + i % COMMON["num_generations"])
            length = int(torch.randint(3, 13, (1,), generator=g))
            completions.append(torch.randint(5, 40, (length,), generator=g).tolist())
        return completions, None

    trainer._generate_single_turn = generate


def start(kind, case, folder, processes=1):
    """Run a worker; return what each of its processes wrote."""
    from conftest import run  # which has the repository on the path: not for the worker

    command = [sys.executable]
    if processes > 1:
        command += "-m torch.distributed.run --rdzv_backend c10d --rdzv_endpoint".split()
        command += ["localhost:0", "--master_port", "0", "--nproc_per_node", processes]
    run(*command, __file__, kind, case, folder)
    return [torch.load(folder / f"{kind}-{case}-{rank}.pt") for rank in range(processes)]


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """A run in one process, on completions of different lengths."""
    return start("eg", "sgd", tmp_path_factory.mktemp("one"))[0]


@pytest.mark.parametrize("case", ["accumulation", "iterations"])
def test_without_masks_it_is_the_stock_trainer(case, tmp_path):
    """Bit-equal weights, losses and batches, also with accumulation, LoRA, two iterations per batch
    and checkpointing: the subclass adds nothing but the shaping."""
    (stock,), (off,) = (start(kind, case, tmp_path) for kind in ("stock", "off"))
    stock_losses, losses = ([row["loss"] for row in run["log"]] for run in (stock, off))
    assert stock_losses == losses and len(losses) == 3
    for name, weight in stock["weights"].items():
        assert torch.equal(weight, off["weights"][name]), name
    assert any(not torch.equal(v, stock["before"][k]) for k, v in stock["weights"].items())
    for mine, theirs in zip(off["batches"], stock["batches"]):
        assert torch.equal(mine["completion_ids"], theirs["completion_ids"])
        assert (mine["advantages"] == theirs["advantages"][:, None]).all()


def test_advantages_are_those_of_a_hand_computation(one):
    """Rewards, one forward pass of the model as it was, then plain loops over each completion."""
    model, tokenizer = make_model()
    model.load_state_dict(one["before"])
    batch = one["batches"][0]
    size = batch["completion_ids"].shape[1]
    attention = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
    with torch.no_grad():
        logp = model(ids, attention_mask=attention).logits[:, -size - 1 : -1].log_softmax(-1)
    entropy = -(logp.exp() * logp).sum(-1) / torch.tensor(float(len(tokenizer))).log()
    rewards = torch.tensor(batch["rewards"][-8:]).view(2, 4)
    scalar = (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-4)
    assert batch["advantages"].shape == (8, size) and scalar.abs().max() > 0.5
    lengths = batch["completion_mask"].sum(1).tolist()
    assert len(set(lengths)) > 1 and not batch["prompt_mask"].all()  # padding to be ignored
    masks, taken, given = [], 0.0, 0.0
    for row, (a, n) in enumerate(zip(scalar.flatten().tolist(), lengths)):
        order = sorted(range(n), key=lambda t: entropy[row, t].item())
        low, high = order[: int(n * 0.2)], order[n - int(n * 0.5) :]
        masks.append((a, n, low, high))
        taken += abs(a) * len(low) / n
        given += sum(entropy[row, t].item() for t in high) / n
    assert abs(one["log"][0]["eg/lambda"] - taken / given) < 1e-4 and taken > 0.1
    for row, (a, n, low, high) in enumerate(masks):
        for t in range(n):
            bonus = taken / given * entropy[row, t].item() if t in high else 0.0
            expected = 0.0 if t in low else a + bonus
            assert abs(batch["advantages"][row, t].item() - expected) < 1e-5


def test_what_changes_the_sampler_or_the_weight_of_a_token_is_refused(tmp_path):
    """The entropies must be those of the sampler, and lambda is calibrated for one weight per
    token: top_entropy_quantile drops most tokens for which it was. No trainer is run."""
    assert start("eg", "refusals", tmp_path)[0] == [*REFUSED, "dropout", *SHIPPED]


def test_packages_of_the_names_of_our_files_stay_reachable(tmp_path, monkeypatch):
    """Guard: with the repository first on the path, evaluate.py hid Hugging Face's evaluate."""
    from conftest import run

    for path in ROOT.glob("*.py"):
        (tmp_path / path.name).write_text("theirs = True\n")
    names = ", ".join(path.stem for path in ROOT.glob("*.py"))
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "examples"))
    code = f"import trl_eggrpo, {names}; assert evaluate.theirs and model.theirs"
    run(sys.executable, "-c", code, cwd=tmp_path)


def test_two_processes_agree_with_one(one, tmp_path):
    """The same completions, one process with 8 rows and two with 4 each: the same lambda,
    advantages and weights. Each process has one group, whose own lambda would be another."""
    two = start("eg", "sgd", tmp_path, processes=2)
    for name, weight in one["weights"].items():
        assert torch.equal(two[0]["weights"][name], two[1]["weights"][name]), name
        assert (weight - two[0]["weights"][name]).abs().max() < 1e-5, name
    moved = max((one["weights"][k] - one["before"][k]).abs().max() for k in one["weights"])
    assert moved > 1e-2
    for rank in two:
        for mine, theirs in zip(rank["log"], one["log"]):
            assert abs(mine["eg/lambda"] - theirs["eg/lambda"]) < 1e-4
    whole = one["batches"][0]["advantages"]
    for part, rows in zip((rank["batches"][0]["advantages"] for rank in two), whole.split(4)):
        assert part.shape[0] == 4 and (part - rows[:, : part.shape[1]]).abs().max() < 1e-5


def trl_loss(logp, old, ref, advantage, valid, beta):
    """Call TRL's own _compute_loss with its network's output replaced by our tensors."""
    stub = MagicMock()
    stub._get_per_token_logps_and_entropies.return_value = (logp, torch.zeros_like(logp), None)
    stub.args = SimpleNamespace(use_bias_correction_kl=False, delta=None, steps_per_generation=1)
    stub.configure_mock(loss_type="grpo", beta=beta, epsilon_low=0.2, epsilon_high=0.2)
    stub.configure_mock(top_entropy_quantile=1.0, off_policy_mask_threshold=None, use_vllm=False)
    stub.configure_mock(importance_sampling_level="token", use_adaptive_entropy=False)
    stub.configure_mock(aux_loss_enabled=False, _entropy_bonus_enabled=False)
    stub.configure_mock(max_completion_length=30, current_gradient_accumulation_steps=1)
    stub.accelerator.gather.side_effect = stub.accelerator.reduce.side_effect = lambda x, **_: x
    words = torch.zeros_like(logp, dtype=torch.long)
    inputs = dict.fromkeys(("prompt_ids", "prompt_mask", "completion_ids"), words)
    inputs |= dict(completion_mask=valid.int(), advantages=advantage)
    inputs |= dict(old_per_token_logps=old, ref_per_token_logps=ref)
    return trl.GRPOTrainer._compute_loss(stub, None, inputs)


@pytest.mark.parametrize("method", ["grpo", "eggrpo"])
@pytest.mark.parametrize("beta", [0.0, 0.04])
def test_policy_loss_is_trls(method, beta):
    """A mean over sequences of means over tokens is what TRL calls grpo; with one update its
    clipping is idle."""
    g = torch.Generator().manual_seed(0)
    logp = (-3 * torch.rand(8, 30, generator=g)).requires_grad_(True)
    ref = logp.detach() + 0.2 * torch.randn(8, 30, generator=g)
    valid = torch.arange(30) < torch.randint(5, 31, (8, 1), generator=g)
    advantage = torch.randn(8, generator=g)
    shaped = advantage[:, None].expand(8, 30)
    if method == "eggrpo":
        entropy = torch.rand(8, 30, generator=g)
        shaped = objective.shape_advantages(
            advantage, entropy, *objective.entropy_masks(entropy, valid), valid
        )
    ours, _ = objective.policy_loss(logp, ref if beta else None, shaped, valid, beta)
    theirs = trl_loss(logp, logp.detach(), ref, shaped, valid, beta)
    assert abs(ours.item() - theirs.item()) < 1e-6
    (ours_grad,), (theirs_grad,) = (torch.autograd.grad(x, logp) for x in (ours, theirs))
    assert (ours_grad - theirs_grad).abs().max() < 1e-6 and ours_grad.abs().max() > 1e-3


if __name__ == "__main__":
    worker(*sys.argv[1:])
