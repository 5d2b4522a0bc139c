"""The paper's claims, run by run: every method over seeds, then records of what each policy draws.

    python -m lab.study --preset cpu      -> out/study/cpu/: a folder per run, records/*.jsonl
    python -m lab.analyze --preset cpu    -> out/study/cpu/: tables, figures

`bash train.sh study` does both.

A run that is finished is skipped, an interrupted one goes on. On a CPU as many runs as there are
cores go at a time, a thread each: that is faster than all threads on one run. All runs share the
base policy, the evaluation prompts and their noise; runs of a seed share the training prompts and
the noise of the rollouts.

Records follow the protocol of the paper's release: for some prompts of every category 8 plans, for
every plan 8 pictures, one JSON line a picture (record_rows says what is in it).
"""

import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from tqdm import tqdm

import common
import eggrpo
import evaluate
import rewards
from model import load_base, load_policy
from rollout import draw_uniform, entropy_moments, load_env, sample_images, sample_scenes
from scenes import encode_scenes, make_scene
from words import decode_words

ROOT = Path(__file__).parent.parent


@dataclass(frozen=True)
class Config:
    preset: str = ""  # smoke, cpu or gpu
    device: str = "auto"
    out: str = "out/study"
    seed: int = 0  # of evaluation and records; runs have seeds 0, 1, 2, ...
    seeds: int = 5  # runs of grpo and eggrpo
    other_seeds: int = 3  # runs of everything else
    steps: int = 100  # of a run (`python eggrpo.py` itself makes more)
    prompts: int = 2100  # evaluation prompts a run; a fifth as many of rare pairs
    per_category: int = 10  # prompts of each category that are recorded
    plans: int = 8  # plans a recorded prompt (paper: 10)
    pictures: int = 8  # pictures a plan (paper: 10)
    jobs: int = 0  # runs at a time; 0: on a CPU one a core, else one
    only: str = ""  # do this one job, by name

    def check(self):
        common.check_at_least(
            1, self, "seeds", "other_seeds", "steps", "prompts", "per_category", "plans", "pictures"
        )
        common.check_at_least(0, self, "seed", "jobs")


PRESETS = {
    "smoke": dict(seeds=2, other_seeds=1, steps=2, prompts=12, per_category=1, plans=2, pictures=2),
    "cpu": dict(),
    "gpu": dict(steps=400),
}
# name: (what differs, flags of eggrpo.py). Names are folders: <name>-<seed>.
MAIN = {"grpo": ["--method", "grpo"], "eggrpo": ["--method", "eggrpo"]}
ABLATIONS = {
    m: ["--method", m]
    for m in (
        "calm",
        "bonus",
        "exclude",
        "eggrpo-text",
        "eggrpo-image",
        "eggrpo-gradient",
        "top-entropy",
        "entropy-coef",
        "dr-grpo",
        "dapo",
    )
}
SWEEPS = {
    f"{flag}-{value}": [f"--{flag}", value]
    for flag, values in (
        ("low-frac", ("0.1", "0.4")),  # 0 is `bonus`, .2 is `eggrpo`
        ("high-frac", ("0.25", "0.8")),  # .8 is all that low leaves, .5 is `eggrpo`
        ("bonus-coef", ("0.1", "1.0")),  # 0 is `exclude`, .3 is `eggrpo`
    )
    for value in values
}
REGIMES = ("lr", "exact", "group", "long")


def regimes(config):
    """Where should the method matter? Changes that are made to grpo and to eggrpo."""
    usual = eggrpo.Config(**eggrpo.PRESETS[config.preset])
    return dict(
        zip(
            REGIMES,
            (
                ["--lr", f"{usual.lr * 10 / 3:.3g}"],  # a step that may overshoot
                ["--reward", "exact"],  # a sparse reward
                [
                    "--plans-per-prompt",
                    str(usual.plans_per_prompt // 2),
                    "--prompts",
                    str(usual.prompts * 2),
                ],  # more noise
                ["--steps", str(config.steps * 5 // 2)],
            ),
        )
    )


class Job(NamedTuple):
    name: str  # a run <variant>-<seed>, records-<policy> or records-pictures
    flags: list  # of eggrpo.py; None for records


def all_jobs(config):
    """List all jobs, in the order in which they are done: what matters most first."""
    runs = lambda variants, seeds: [
        Job(f"{name}-{seed}", [*flags, "--seed", str(seed)])
        for seed in range(seeds)
        for name, flags in variants.items()
    ]
    main = runs(MAIN, config.seeds)
    recorded = [Job(f"records-{name}", None) for name in ("base-no-plan", "base")]
    recorded += [Job(f"records-{job.name}", None) for job in main]
    recorded += [Job("records-pictures", None)]
    changed = {
        f"{regime}-{method}": ["--method", method, *flags]
        for regime, flags in regimes(config).items()
        for method in MAIN
    }
    dear = {name: changed.pop(name) for name in list(changed) if name.startswith("long")}
    return (
        main
        + recorded
        + [
            job
            for variants in (ABLATIONS, changed, SWEEPS, dear)
            for job in runs(variants, config.other_seeds)
        ]
    )


# --- one job --------------------------------------------------------------------------------------


def open_policy(config, name, device):
    """Load a policy by name: base-no-plan, base or a run. Returns it and how it is drawn from."""
    if name.startswith("base"):
        return load_base(config.preset, config.out, device), dict(no_plan=name == "base-no-plan")
    path, command = f"{config.out}/{config.preset}/{name}/policy.pt", "python -m lab.study"
    policy, trained = load_policy(path, "policy", config.preset, command, device)
    return policy, dict(guidance=trained["guidance"])


def score_policy(config, env, name):
    """Score a policy on held-out and rare prompts and write its summaries."""
    policy, how = open_policy(config, name, env.device)
    scored = {
        split: evaluate.summarize(evaluate.evaluate(env, policy, split, n, seed=config.seed, **how))
        for split, n in (("eval", config.prompts), ("rare", max(config.prompts // 5, 1)))
    }
    path = Path(config.out) / config.preset / name / "scores.json"
    common.write(path, json.dumps(common.to_jsonable(scored), indent=1).encode())


@torch.no_grad()
def record_rows(config, env, policy, scene, number, **how):
    """Draw a prompt's plans and pictures. Returns a list of dicts, one a picture.

    Entropies are those of the distributions that were sampled from, as fractions of log V, over
    valid plan tokens and over image tokens; nll in nats a token; distance is the mean distance to
    the prompt's other pictures, as root mean square of the pixels' difference, 0 to 1. The last
    five say which tokens draw objects, and how sure the policy is of those and of the ground.
    """
    m, n = config.pictures, config.plans * config.pictures
    uniform = draw_uniform(policy, n, m, config.seed, "records", number)
    prompt = encode_scenes(env.world, [scene])[0]
    drawn, images = sample_images(env, policy, prompt, uniform, **how)
    target = rewards.encode_targets(env.world, [scene] * n, env.device)
    reward, components, exact = rewards.compute_rewards(images, target, env.world)
    flat = images.flatten(1)
    distance = torch.cdist(flat, flat).sum(1) / (max(n - 1, 1) * flat.shape[1] ** 0.5)
    columns = dict(reward=reward, exact=exact, **components, distance=distance)
    for part, slots in (("plan", slice(None, policy.C)), ("image", slice(policy.C, None))):
        valid = drawn.valid[:, slots]
        mean, std = entropy_moments(drawn.entropy[:, slots], valid)
        nll, _ = entropy_moments(-drawn.logp[:, slots], valid)
        columns |= {f"{part}_entropy": mean, f"{part}_entropy_std": std, f"{part}_nll": nll}
    # which tokens draw objects: a tenth of their patch is paint
    h, valid = drawn.entropy[:, policy.C :], drawn.valid[:, policy.C :]
    paint = (
        F.avg_pool2d(rewards.paint_coverage(images).sum(1, keepdim=True), env.world.patch).flatten(
            1
        )
        > 0.1
    )
    low, high = eggrpo.entropy_masks(h, valid)
    share = lambda of, among: (of & among).sum(1) / among.sum(1).clamp(min=1)
    columns |= dict(
        objects_share=share(paint, valid),
        low_on_objects=share(paint, low),
        high_on_objects=share(paint, high),
        object_entropy=(h * paint).sum(1) / paint.sum(1).clamp(min=1),
        ground_entropy=(h * ~paint).sum(1) / (~paint).sum(1).clamp(min=1),
    )
    columns = {name: values.tolist() for name, values in columns.items()}
    return [
        common.to_jsonable(
            dict(
                prompt=scene.prompt,
                number=number,
                category=scene.category,
                plan=decode_words(drawn.plan[i]),
                plan_index=i // m,
                **{name: values[i] for name, values in columns.items()},
            )
        )
        for i in range(n)
    ]


def record_policy(config, env, name):
    """Write a policy's records: one JSON line a picture."""
    policy, how = open_policy(config, name, env.device)
    rows = []
    for category in tqdm(env.world.categories, name, leave=False):
        for i in range(config.per_category):
            scene = make_scene(env.world, "eval", 5000 + config.seed, i, category)
            rows += record_rows(config, env, policy, scene, f"{category} {i}", **how)
    path = Path(config.out) / config.preset / "records" / f"{name}.jsonl"
    write_lines(path, rows)


@torch.no_grad()
def record_pictures(config, env):
    """Draw the same prompts with the same noise by each setting (before-after.png), and write the
    entropy of every token of a few pictures, with the masks over them (pictures.jsonl)."""
    folder, scenes = Path(config.out) / config.preset, evaluate.gallery_scenes(env.world)
    settings, rows, marks = ("base-no-plan", "base", "grpo-0", "eggrpo-0"), [], []
    for name in settings:
        policy, how = open_policy(config, name, env.device)
        images, exact = evaluate.gallery_row(env, policy, **how)
        rows.append(images), marks.append(exact)
    titles = ("base", "base + plan", "GRPO", "EG-GRPO")
    sheet = evaluate.gallery(rows, [s.prompt for s in scenes], titles, marks, size=108)
    evaluate.save_image(sheet, folder / "before-after.png")

    drawn, images = sample_scenes(env, policy, scenes, "gallery", **how)
    maps, image = [], slice(policy.C, None)
    low, high = eggrpo.entropy_masks(drawn.entropy[:, image], drawn.valid[:, image])
    for i in range(0, len(scenes), 2):
        words = drawn.valid[i, : policy.C]
        maps.append(
            dict(
                prompt=scenes[i].prompt,
                plan=decode_words(drawn.plan[i]),
                plan_entropy=drawn.entropy[i, : policy.C][words].tolist(),
                image_entropy=drawn.entropy[i, image].tolist(),
                image_low=low[i].tolist(),
                image_high=high[i].tolist(),
                picture=(images[i] * 255).round().byte().permute(1, 2, 0).tolist(),
            )
        )
    write_lines(folder / "records" / "pictures.jsonl", maps)


def is_done(config, job):
    folder, name = Path(config.out) / config.preset, job.name.removeprefix("records-")
    return (
        (folder / "records" / f"{name}.jsonl")
        if job.flags is None
        else (folder / name / "scores.json")
    ).exists()


def run_job(config, job):
    """Do one job, in this process."""
    flags = ["--preset", config.preset, "--out", config.out, "--device", config.device]
    if job.flags is not None:
        eggrpo.main([*flags, "--steps", str(config.steps), *job.flags, "--name", job.name])
    device = common.pick_device(config.device)
    env = load_env(config.preset, config.out, device)
    if job.flags is not None:
        return score_policy(config, env, job.name)
    name = job.name.removeprefix("records-")
    if name == "pictures":
        return record_pictures(config, env)
    record_policy(config, env, name)
    if name.startswith("base"):
        score_policy(config, env, name)


# --- all jobs -------------------------------------------------------------------------------------


def stages(config):
    """Make the tokenizer and the base policy, which all runs share."""
    flags = ["--preset", config.preset, "--out", config.out, "--device", config.device]
    for command in (["-m", "tiny_vq.train"], ["pretrain.py"]):
        done = subprocess.run([sys.executable, *command, *flags], cwd=ROOT)
        if done.returncode:
            sys.exit(done.returncode)


def launch(config, job, argv):
    """Do one job in a process of its own, its output in a file. Returns the exit status."""
    log = Path(config.out) / config.preset / "logs" / f"{job.name}.txt"
    log.parent.mkdir(parents=True, exist_ok=True)
    environment = os.environ if on_cuda(config) else {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "lab.study", *argv, "--out", config.out, "--only", job.name]
    with open(log, "w") as file:
        return subprocess.run(
            command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT
        ).returncode


def on_cuda(config):
    return torch.cuda.is_available() and config.device.startswith(("auto", "cuda"))


def write_lines(path, rows):
    """Write a file of JSON lines."""
    common.write(path, "".join(json.dumps(row) + "\n" for row in rows).encode())


def read_lines(path):
    """Read a file of JSON lines."""
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    config, command = common.parse("-m lab.study", Config, PRESETS, __doc__, argv)
    # the processes of the jobs run in the project's root, this one perhaps elsewhere
    config = replace(config, out=str(Path(config.out).resolve()))
    todo = all_jobs(config)
    if config.only:
        chosen = [job for job in todo if job.name == config.only]
        common.check(chosen, f"no job {config.only!r}")
        return run_job(config, chosen[0])
    stages(config)
    left, started = [job for job in todo if not is_done(config, job)], time.time()
    number = config.jobs or (1 if on_cuda(config) else os.cpu_count())
    print(f"study: {len(todo)} jobs, {len(left)} to do, {number} at a time")
    pool = ThreadPoolExecutor(number)
    try:
        statuses = list(
            tqdm(pool.map(lambda job: launch(config, job, argv), left), "study", len(left))
        )
    finally:
        pool.shutdown(cancel_futures=True)  # after Ctrl-C the jobs to come do not start
    failed = [job.name for job, status in zip(left, statuses) if status]
    common.check(
        not failed,
        f"{len(failed)} jobs failed ({', '.join(failed[:5])}): see "
        f"{config.out}/{config.preset}/logs, then go on with `{command}`",
    )
    print(f"study: done in {time.time() - started:.0f} s; draw it with `python -m lab.analyze`")


if __name__ == "__main__":
    common.run(main)
