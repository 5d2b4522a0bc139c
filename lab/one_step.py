"""Show one training step on one prompt: rewards, advantages, entropies, masks, token advantages.

    bash train.sh lab.one_step         the first step of a run, after bash train.sh; seconds

    -> out/small/one-step.png (figure), one-step.json (its numbers), one-step.md (docs/one-step.md)
"""

import copy
import json
from pathlib import Path

import numpy as np
import torch

import common
from eggrpo import train_step
from evaluate import markdown_table
from lab.measure import step_config, token_advantages, training_batch
from lab.one_step_figure import draw
from lab.study import load, read_lines
from lab.world import object_tokens
from model import score
from objective import bonus_coefficient
from scenes import WORDS, WORLDS, rare_pairs

STEP = 0  # of the training run with the seed --seed


def choose_prompt(batch):
    """Return the prompt of at most two objects, with an exact image, and most distinct rewards."""

    def clarity(i):
        few = len(batch.scenes[i].objects) <= 2
        solved = batch.exact[i].max().item() == 1
        return few and solved, len(batch.rewards[i].unique())

    return max(range(len(batch.scenes)), key=clarity)


def describe_tokens(batch, low, high, shaped, objects, row):
    """List the valid tokens of a sequence: {modality: {field: list}}, and the words of the plan."""
    rollout = batch.rollout
    c = rollout.plan.shape[1]
    of_plan = rollout.valid[row, :c]
    fields = dict(
        entropy=rollout.entropy,
        probability=rollout.logp.exp(),  # of the sampled token
        low=low,
        high=high,
        eggrpo=shaped,
    )
    plan = {name: values[row, :c][of_plan].tolist() for name, values in fields.items()}
    image = {name: values[row, c:].tolist() for name, values in fields.items()}
    image["object"] = objects[row].tolist()
    words = [WORDS[word] for word in rollout.plan[row][of_plan]]
    return dict(plan=plan, image=image, words=words)


def measure_update(policy, env, settings, batch, masks, rows):
    """Make the step. Returns the change of log-prob, summed over tokens: {row: {mask: nats}}."""
    learner = copy.deepcopy(policy)
    rate = settings.lr / 10  # that of the first warm-up step
    optimizer = torch.optim.AdamW(learner.parameters(), rate, (0.9, 0.95), weight_decay=0.0)
    train_step(learner, policy, optimizer, env, settings, STEP)
    rollout = batch.rollout
    with torch.no_grad():
        logp = score(learner, rollout.prompt, rollout.plan, rollout.codes, settings.guidance)
    change = logp - rollout.logp  # (B, T)
    found = {}
    for name, row in rows.items():
        found[name] = {}
        for part, mask in masks.items():
            found[name][part] = change[row][mask[row]].sum().item()
    return found


def measure(config):
    """Compute a step. Returns the numbers, JSON-able, and the images of the prompt's G rollouts."""
    env, policy, _ = load(config, "base")
    log = read_lines(config.folder / "base.jsonl")
    settings = {m: step_config(config.preset, m, config.seed) for m in ("grpo", "eggrpo")}
    batch = training_batch(env, policy, settings["eggrpo"], STEP)
    low, high, shaped = token_advantages(batch, settings["eggrpo"])
    valid = batch.rollout.valid
    coefficient = bonus_coefficient(batch.advantage, batch.rollout.entropy, low, high, valid)

    i = choose_prompt(batch)
    rewards = batch.rewards[i]
    g = len(rewards)
    sequences = slice(i * g, (i + 1) * g)
    chosen = dict(good=int(rewards.argmax()), bad=int(rewards.argmin()))
    rows = {name: i * g + k for name, k in chosen.items()}
    objects = object_tokens(batch.images, env.world)
    tokens = [describe_tokens(batch, low, high, shaped, objects, i * g + k) for k in range(g)]
    masks = dict(all=valid, low=low, high=high)
    components = dict(good={}, bad={})
    for name, k in chosen.items():
        for key, values in batch.components.items():
            if not values[i, k].isnan():  # it applies to the prompt
                components[name][key] = values[i, k].item()
    update = {}
    for method, own in settings.items():
        update[method] = measure_update(policy, env, own, batch, masks, rows)
    data = {
        "preset": config.preset,
        "commit": log[0]["commit"],
        "seed": config.seed,
        "step": STEP,
        "index": i,
        "prompt": batch.scenes[i].prompt,
        "rare": sorted(" ".join(pair) for pair in rare_pairs(batch.scenes[i].objects)),
        "rewards": rewards.tolist(),
        "components": components,
        "mean": rewards.mean().item(),
        "std": rewards.std().item(),
        "advantages": batch.advantage[sequences].tolist(),
        "lambda": coefficient.item(),
        "sequences": len(valid),
        "plans": [sequence["words"] for sequence in tokens],
        "chosen": chosen,
        "tokens": {name: tokens[k] for name, k in chosen.items()},
        "update": update,
    }
    data = json.loads(json.dumps(data), parse_float=lambda x: round(float(x), 4))
    return data, batch.images[sequences]


def page(data):
    """Fill lab/one_step_page.md with the numbers of one-step.json. Returns docs/one-step.md."""
    fields = dict(data)
    fields["g"] = len(data["plans"])
    fields["rewards"] = ", ".join(f"{reward:.2f}" for reward in data["rewards"])
    fields["rare"] = "no rare pair"
    if data["rare"]:
        fields["rare"] = "a rare pair, " + " and ".join(data["rare"])
    for name, k in data["chosen"].items():
        image = {key: np.array(values) for key, values in data["tokens"][name]["image"].items()}
        top = image["entropy"].argmax()  # the most uncertain token
        components = [f"{key} {x:.2f}" for key, x in data["components"][name].items()]
        fields |= {
            name: data["advantages"][k],
            f"{name}_components": ", ".join(components),
            f"{name}_reward": data["rewards"][k],
            f"{name}_top": image["entropy"][top],
            f"{name}_token": image["eggrpo"][top],
            f"{name}_p": image["probability"][top],
        }

    good = data["tokens"]["good"]
    low_tokens = [0.0]
    for name in ("plan", "image"):
        of = {key: np.array(values) for key, values in good[name].items()}
        fields |= {
            f"{name}_n": len(of["entropy"]),
            f"{name}_h": of["entropy"].mean(),
            f"{name}_low": of["low"].sum(),
            f"{name}_high": of["high"].sum(),
            f"{name}_top": of["entropy"].max(),
        }
        low_tokens += [*of["entropy"][of["low"]]]
    fields["low_top"] = max(low_tokens)
    fields["word"] = good["words"][np.argmax(good["plan"]["entropy"])]
    fields["bonus"] = data["lambda"] * fields["good_top"]

    on_object = of["object"]
    fields["object_n"] = on_object.sum()
    fields["object_h"] = of["entropy"][on_object].sum() / max(on_object.sum(), 1)
    fields["sky_h"] = of["entropy"][~on_object].sum() / max((~on_object).sum(), 1)
    fields["object_low"] = (on_object & of["low"]).sum()
    fields["object_high"] = (on_object & of["high"]).sum()

    # of the log-prob of the most uncertain image token, by its logit, in the loss's weight
    fields["weight"] = (fields["plan_n"] + fields["image_n"]) * data["sequences"]
    for name, advantage in (("grpo", fields["good"]), ("eggrpo", fields["good_token"])):
        fields[f"{name}_gradient"] = advantage * (1 - fields["good_p"]) / fields["weight"]

    rows = []
    for name in ("good", "bad"):
        for part in ("all", "low", "high"):
            shown = [f"{change[name][part]:+.4f}" for change in data["update"].values()]
            rows.append([f"{name} rollout, sum over {part} tokens", *shown])
    fields["table"] = markdown_table(["", "GRPO", "EG-GRPO"], rows)
    template = Path(__file__).with_name("one_step_page.md").read_text(encoding="utf-8")
    return template.format(**fields)


@common.stage()
def main(argv=None):
    config = common.parse(common.BaseConfig, {name: {} for name in WORLDS}, __doc__, argv)
    data, images = measure(config)
    folder = config.folder
    draw(folder / "one-step.png", data, images)
    common.write(folder / "one-step.json", (json.dumps(data) + "\n").encode())
    common.write(folder / "one-step.md", page(data).encode())
    print(f"figure: {folder / 'one-step.png'}")


if __name__ == "__main__":
    common.run(main)
