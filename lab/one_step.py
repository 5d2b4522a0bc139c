"""Show one training step on one prompt: rewards, advantages, entropies, masks, token advantages.

    python -m lab.one_step --preset cpu                     of the base policy: the first step
    python -m lab.one_step --preset cpu --run eggrpo-0      of the policy of a finished run

    -> out/cpu/one-step.png (figure), one-step.json (its numbers), one-step.md (docs/one-step.md)

Everything is computed by rollout.make_rollout, eggrpo.make_batch and eggrpo.update, on the prompts
and with the noise of that training step. The update is made twice, by GRPO and by EG-GRPO, to
measure what it does to the log-probs of the sampled tokens.
"""

import copy
import json
from dataclasses import dataclass
from pathlib import Path

import torch

import common
import eggrpo
from evaluate import markdown_table
from lab.one_step_figure import draw
from lab.study import read_lines
from model import forward_logits, load_base, load_policy, token_logp
from rollout import load_env, make_rollout, split_modalities, training_scenes
from scenes import WORLDS
from words import WORDS


@dataclass(frozen=True)
class Config:
    preset: str = ""  # smoke, cpu or gpu
    device: str = "auto"
    out: str = "out"
    seed: int = 0  # of the training run whose step is shown
    run: str = ""  # name of a run's folder; default: the base policy
    index: int = -1  # of the training scene; -1: of the first step, the most varied rewards

    def check(self):
        common.check_at_least(0, self, "seed")
        common.check_at_least(-1, self, "index")


# --- numbers --------------------------------------------------------------------------------------


def choose_prompt(rollout, scenes):
    """Return the prompt of a step with the most distinct rewards, among those with at most two
    objects and an exact image if there are any."""
    distinct = [len(set(rewards)) for rewards in rollout.rewards.tolist()]
    clear = [len(s.objects) <= 2 and e.max().item() for s, e in zip(scenes, rollout.exact)]
    return max(range(len(scenes)), key=lambda i: (clear[i], distinct[i]))


def describe_tokens(rollout, batches, row):
    """List the valid tokens of a sequence: {modality: {field: list}}; words only of the plan."""
    found = {}
    for modality, slots in split_modalities(rollout.plan.shape[1]).items():
        valid = rollout.valid[row, slots]
        pick = lambda x: x[row, slots][valid].tolist()
        found[modality] = dict(
            entropy=pick(rollout.entropy),
            low=pick(batches["eggrpo"].low),
            high=pick(batches["eggrpo"].high),
            grpo=pick(batches["grpo"].advantage),
            eggrpo=pick(batches["eggrpo"].advantage),
        )
    words = [WORDS[w] for w, valid in zip(rollout.plan[row], rollout.valid[row]) if valid]
    return found | dict(words=words)


def measure_update(policy, reference, batch, masks, settings, rows):
    """Make one update on the step's batch; return, for each row, the change of log-prob in nats:
    of all tokens, of the low and of the high ones among them (masks: a Batch of EG-GRPO)."""
    learner = copy.deepcopy(policy).requires_grad_(True)
    # the learning rate of the first warm-up step
    optimizer = torch.optim.AdamW(
        learner.parameters(), settings.lr / 10, (0.9, 0.95), weight_decay=0.0
    )
    eggrpo.update(learner, reference, optimizer, batch, settings)
    with torch.no_grad():
        logits = forward_logits(learner, *batch[:3], settings.guidance)
        change = token_logp(*logits, batch.plan, batch.codes) - batch.logp_old  # (B, T)
    parts = dict(all=batch.valid, low=masks.low, high=masks.high)
    return {
        name: {part: round((change * mask)[row].sum().item(), 4) for part, mask in parts.items()}
        for name, row in rows.items()
    }


def measure(config, device):
    """Compute a step. Returns the numbers, JSON-able, and the images of the prompt's G rollouts."""
    env = load_env(config.preset, config.out, device)
    folder = Path(config.out) / config.preset
    policy = reference = load_base(config.preset, config.out, device)
    log = folder / (f"{config.run}/log.jsonl" if config.run else "base.jsonl")
    if config.run:
        path = folder / config.run / "policy.pt"
        policy, _ = load_policy(path, "policy", config.preset, device=device)
    settings = {
        m: eggrpo.Config(method=m, seed=config.seed,
                         **eggrpo.PRESETS[config.preset] | eggrpo.METHODS[m].values)
        for m in ("grpo", "eggrpo")
    }  # fmt: skip
    step, i = divmod(max(config.index, 0), settings["grpo"].prompts)
    scenes = training_scenes(env.world, settings["grpo"], step)
    rollout = make_rollout(policy, env, scenes, settings["grpo"], step)
    batches = {m: eggrpo.make_batch(rollout, c) for m, c in settings.items()}
    i = choose_prompt(rollout, scenes) if config.index < 0 else i
    rewards, exact, g = rollout.rewards[i], rollout.exact[i], rollout.rewards.shape[1]
    advantages = batches["grpo"].group_advantage.view(-1, g)[i]
    rows = dict(good=i * g + int(rewards.argmax()), bad=i * g + int(rewards.argmin()))
    plans = [describe_tokens(rollout, batches, i * g + k)["words"] for k in range(g)]
    data = dict(
        preset=config.preset, policy=config.run or "base policy", seed=config.seed, step=step,
        commit=read_lines(log)[0]["commit"], index=step * len(scenes) + i, prompt=scenes[i].prompt,
        mean=rewards.mean().item(), std=rewards.std().item(), rewards=rewards.tolist(),
        exact=exact.tolist(), advantages=advantages.tolist(), plans=plans,
        chosen={name: row - i * g for name, row in rows.items()},
        tokens={name: describe_tokens(rollout, batches, row) for name, row in rows.items()},
        update={m: measure_update(policy, reference, batches[m], batches["eggrpo"], c, rows)
                for m, c in settings.items()},
    )  # fmt: skip
    data = json.loads(json.dumps(data), parse_float=lambda x: round(float(x), 4))
    return data, rollout.images.view(len(scenes), g, *rollout.images.shape[1:])[i]


# --- page -----------------------------------------------------------------------------------------


def page(data):
    """Fill lab/one_step_page.md with the numbers of one-step.json. Returns docs/one-step.md."""
    fields, mean = dict(data), lambda x: sum(x) / len(x)
    for name, k in data["chosen"].items():
        image = data["tokens"][name]["image"]
        token = image["eggrpo"][image["entropy"].index(max(image["entropy"]))]
        fields |= {name: data["advantages"][k], f"{name}_token": token}
    good = data["tokens"]["good"]
    for m in ("plan", "image"):
        x = good[m]
        fields |= {f"{m}_n": len(x["low"]), f"{m}_h": mean(x["entropy"]), f"{m}_low": sum(x["low"]),
                   f"{m}_high": sum(x["high"]), f"{m}_top": max(x["entropy"])}  # fmt: skip
    low = lambda x: [h for h, low in zip(x["entropy"], x["low"]) if low]
    low_top = max(low(good["plan"]) + low(good["image"]), default=0.0)
    fields |= dict(good_reward=max(data["rewards"]),
                   good_bonus=fields["good_token"] - fields["good"], low_top=low_top,
                   word=good["words"][good["plan"]["entropy"].index(fields["plan_top"])],
                   )  # fmt: skip
    change = data["update"]
    rows = [[f"{name} rollout, {part} tokens", *(f"{change[m][name][part]:+.4f}" for m in change)]
            for name in ("good", "bad") for part in ("all", "low", "high")]  # fmt: skip
    fields |= dict(g=len(data["plans"]), rewards=", ".join(f"{r:.2f}" for r in data["rewards"]),
                   run="" if data["policy"] == "base policy" else f" --run {data['policy']}",
                   table=markdown_table(["", "GRPO", "EG-GRPO"], rows))  # fmt: skip
    template = Path(__file__).with_name("one_step_page.md").read_text()
    return template.format(**fields)


def main(argv=None):
    presets = {name: {} for name in WORLDS}
    config, _ = common.parse("-m lab.one_step", Config, presets, __doc__, argv)
    data, images = measure(config, common.pick_device(config.device))
    folder = Path(config.out) / config.preset
    draw(folder / "one-step.png", data, images)
    common.write(folder / "one-step.json", (json.dumps(data) + "\n").encode())
    common.write(folder / "one-step.md", page(data).encode())
    print(f"figure: {folder / 'one-step.png'}")


if __name__ == "__main__":
    common.run(main)
