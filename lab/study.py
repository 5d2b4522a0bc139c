"""Run the study: methods over base policies and seeds, then records of single policies.

    bash train.sh study --preset cpu      runs everything, then lab.analyze (hours on two cores)
    bash train.sh study --preset smoke    the same in minutes; nothing is learned

    -> out/study/base-<b>/cpu/         tokenizer, base policy, a folder per run, records/*.jsonl
       out/study/cpu/runs.jsonl        one line per finished run: scores and learning curve

Each base policy has a tokenizer and a corpus of its own seed. Runs of base b and number s have the
seed 10 b + s: methods are compared on the same base policy, training prompts and rollout noise. All
policies answer the same evaluation prompts with the same noise. docs/results.md has the design and
the predictions, written before the runs.

Jobs run in the order of `plan`, the most informative first, so that a study that is stopped early
is balanced. A finished job is skipped, an interrupted one continues. On a CPU as many jobs as there
are cores run at a time, one thread each, which is faster than all threads on one job.
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
from tqdm import tqdm

import common
import eggrpo
import evaluate
import pretrain
import tiny_vq.train
from lab.records import gradient_rows, rare_rows, record_rows
from model import load_base, load_policy
from rollout import load_env
from scenes import make_scene

ROOT = Path(__file__).parent.parent
RARER = 0.003  # fraction of the corpus with a rare pair, in the regime of that name


@dataclass(frozen=True)
class Config:
    preset: str = ""  # smoke, cpu or gpu
    device: str = "auto"
    out: str = "out/study"
    seed: int = 0  # of evaluation and records
    bases: int = 5  # base policies
    seeds: int = 4  # runs of grpo and eggrpo per base policy
    steps: int = 60  # of a run (`python eggrpo.py` itself makes 300)
    prompts: int = 1200  # evaluation prompts per run; a third as many of rare pairs
    per_category: int = 6  # prompts of each category that are recorded, per base policy
    plans: int = 8  # per recorded prompt (paper: 10)
    images: int = 8  # per plan (paper: 10)
    batches: int = 16  # training batches whose gradients are recorded, per policy
    jobs: int = 0  # at a time; 0: on a CPU one per core, else one
    only: str = ""  # do this one job, by name

    @property
    def rare_prompts(self):
        return max(self.prompts // 3, 1)

    @property
    def record_seed(self):
        """Of the prompts that base policy 0 is recorded on; b more for base policy b."""
        return 5000 + 100 * self.seed

    def check(self):
        positive = "bases seeds steps prompts per_category plans images batches"
        common.check_at_least(1, self, *positive.split())
        common.check_at_least(0, self, "seed", "jobs")


PRESETS = {
    "smoke": dict(
        bases=2, seeds=1, steps=2, prompts=12, per_category=1, plans=2, images=2, batches=2
    ),
    "cpu": dict(),
    "gpu": dict(steps=400),
}

MAIN = ("grpo", "eggrpo")
RIVALS = ("exclude", "bonus", "eggrpo-text", "eggrpo-image", "top-entropy")


class Job(NamedTuple):
    name: str  # of its folder below out, also its name for --only
    kind: str  # base, run, records, gradients or rare
    flags: tuple  # of pretrain.py for a base, of eggrpo.py for a run; else empty
    needs: tuple = ()  # names of the jobs that must be finished before


def base_job(folder, *flags):
    return Job(folder, "base", flags)


def run_job(config, base, s, variant, method, *flags, folder="base"):
    """Describe run number s of a variant on a base policy."""
    flags = ("--method", method, "--seed", str(10 * base + s), "--steps", str(config.steps), *flags)
    folder = f"{folder}-{base}"
    return Job(f"{folder}/{variant}-{s}", "run", flags, (folder,))


def plan(config):
    """List all jobs in the order in which they start."""
    usual = eggrpo.Config(**eggrpo.PRESETS[config.preset])
    bases = range(config.bases)
    high, low = (("--lr", f"{usual.lr * factor:.3g}") for factor in (10 / 3, 1 / 3))
    beta = ("--beta", "0")
    long = ("--steps", str(5 * config.steps))

    def runs(methods, s, *flags, prefix="", on=bases, folder="base"):
        return [
            run_job(config, b, s, prefix + m, m, *flags, folder=folder) for b in on for m in methods
        ]

    records = [
        Job(f"base-{b}/records/{name}", "records", (), (f"base-{b}", *needs))
        for b in bases
        for name, *needs in (
            ("base-no-plan",), ("base",),
            ("grpo-0", f"base-{b}/grpo-0"), ("eggrpo-0", f"base-{b}/eggrpo-0"),
        )
    ]  # fmt: skip
    gradients = [
        Job(f"base-{b}/records/{name}.gradients", "gradients", (), tuple(needs))
        for b in bases
        for name, *needs in (("base", f"base-{b}"), ("grpo-0", f"base-{b}/grpo-0"))
    ]
    rarer = [base_job(f"rarer-{b}", "--rare-fraction", str(RARER)) for b in bases[:3]]
    jobs = [base_job(f"base-{b}") for b in bases]
    jobs += runs(MAIN, 0) + records + gradients
    two = max(config.seeds // 2, 1)
    jobs += [job for s in range(1, two) for job in runs(MAIN, s)]
    jobs += runs(MAIN, 0, *high, prefix="lr-high-")
    jobs += [job for s in range(two, config.seeds) for job in runs(MAIN, s)]
    for part in (bases[:3], bases[3:]):
        jobs += runs(MAIN, 0, *beta, prefix="no-kl-", on=part)
        jobs += runs(RIVALS, 0, on=part)
    jobs += runs(MAIN, 0, *low, prefix="lr-low-")
    jobs += rarer + runs(MAIN, 0, prefix="rarer-", on=bases[:3], folder="rarer")
    jobs += runs(MAIN, 1, *high, prefix="lr-high-") + runs(MAIN, 1, *low, prefix="lr-low-")
    jobs += runs(MAIN, 0, *long, prefix="long-", on=bases[:3])
    # made later, because the few runs planned had intervals above 0: five of the bonus, three long
    jobs += [job for s in range(1, config.seeds) for job in runs(("bonus",), s)]
    jobs += runs(MAIN, 0, *long, prefix="long-", on=bases[3:])
    jobs += runs(MAIN, 1, *long, prefix="long-", on=bases[:3])
    names = [f"{m}-{s}" for m in MAIN for s in range(config.seeds)]
    names += [f"long-{m}-0" for m in MAIN]
    return jobs + [
        Job(f"base-{b}/records/{name}.rare", "rare", (), (f"base-{b}{run}",))
        for b in bases
        for name, run in (("base", ""), *((name, f"/{name}") for name in names))
    ]


# --- one job --------------------------------------------------------------------------------------


def do_base(config, job, flags):
    """Train the tokenizer and the base policy of a seed."""
    seed = ["--seed", job.name.rpartition("-")[2]]
    tiny_vq.train.main([*flags, *seed])
    pretrain.main([*flags, *seed, *job.flags])


def do_run(config, job, flags):
    """Train a policy and score it on held-out and rare prompts."""
    name = Path(job.name).name
    every = ["--eval-every", str(max(config.steps // 4, 1))]
    eggrpo.main([*flags, *job.flags, *every, "--name", name])
    device, out = common.pick_device(config.device), flags[flags.index("--out") + 1]
    env, path = load_env(config.preset, out, device), Path(out) / config.preset / name
    policy, trained = load_policy(path / "policy.pt", "policy", config.preset, device=device)
    options = dict(seed=config.seed, guidance=trained["guidance"])
    scored = {
        split: evaluate.summarize(evaluate.evaluate(env, policy, split, n, **options))
        for split, n in (("eval", config.prompts), ("rare", config.rare_prompts))
    }
    content = json.dumps(common.to_jsonable(scored), indent=1)
    common.write(path / "scores.json", content.encode())


def recorded_policy(config, job, flags):
    """Load what a job records: env, policy, options to sample it, number of the base policy."""
    name, out = Path(job.name).stem, flags[flags.index("--out") + 1]
    device, options = common.pick_device(config.device), {}
    if name.startswith("base"):
        policy, options = load_base(config.preset, out, device), dict(no_plan="no-plan" in name)
    else:
        path = Path(out) / config.preset / name / "policy.pt"
        policy, _ = load_policy(path, "policy", config.preset, device=device)
    base = int(job.name.partition("/")[0].rpartition("-")[2])
    return load_env(config.preset, out, device), policy, options, base


def do_records(config, job, flags):
    """Write the records of a policy: one JSON line per image."""
    rows, (env, policy, options, base) = [], recorded_policy(config, job, flags)
    for category in tqdm(env.world.categories, job.name, leave=False):
        for i in range(config.per_category):
            # each base policy is recorded on prompts of its own
            scene = make_scene(env.world, "eval", config.record_seed + base, i, category)
            number = f"base {base}, {category} {i}"
            rows += record_rows(config, env, policy, scene, number, **options)
    write_lines(result_path(config, job), rows)


def do_gradients(config, job, flags):
    """Write what the gradient of a policy consists of: one JSON line per part."""
    env, policy, _, base = recorded_policy(config, job, flags)
    seed = config.record_seed + base
    settings = eggrpo.Config(seed=seed, **eggrpo.PRESETS[config.preset])
    rows = gradient_rows(env, policy.requires_grad_(True), settings, config.batches)
    write_lines(result_path(config, job), rows)


def do_rare(config, job, flags):
    """Write how a policy draws each rare pair: one JSON line per pair."""
    env, policy, _, _ = recorded_policy(config, job, flags)
    rows = rare_rows(env, policy, config.rare_prompts, config.seed)
    write_lines(result_path(config, job), rows)


def result_path(config, job):
    """Return the file that a job writes last."""
    folder, _, name = job.name.partition("/")
    path = Path(config.out) / folder / config.preset / name
    if job.kind == "base":
        return path / "base.done"
    return path / "scores.json" if job.kind == "run" else path.with_name(path.name + ".jsonl")


def do(config, job):
    """Do one job in this process."""
    out = str(Path(config.out) / job.name.partition("/")[0])
    flags = ["--preset", config.preset, "--out", out, "--device", config.device]
    work = dict(base=do_base, run=do_run, records=do_records, gradients=do_gradients,
                rare=do_rare)  # fmt: skip
    work[job.kind](config, job, flags)
    if job.kind == "base":
        common.write(result_path(config, job), b"")


# --- all jobs -------------------------------------------------------------------------------------


def launch(config, job, argv, running):
    """Do one job in a process of its own after those it needs. Returns the exit status."""
    if any(running[name].result() for name in job.needs if name in running):
        return 1  # what it needs has failed
    log = Path(config.out) / config.preset / "logs" / f"{job.name.replace('/', '-')}.txt"
    log.parent.mkdir(parents=True, exist_ok=True)
    environment = os.environ if on_cuda(config) else {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "lab.study", *argv, "--out", config.out, "--only", job.name]
    with open(log, "w") as file:
        options = dict(cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT)
        return subprocess.run(command, **options).returncode


def on_cuda(config):
    return torch.cuda.is_available() and config.device.startswith(("auto", "cuda"))


def write_lines(path, rows):
    """Write a file of JSON lines."""
    common.write(path, "".join(json.dumps(row) + "\n" for row in rows).encode())


def read_lines(path):
    """Read a file of JSON lines."""
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def collect(config, jobs):
    """Write runs.jsonl: of every finished run its variant, base policy, number, scores, curve."""
    rows = []
    for job in jobs:
        path = result_path(config, job)
        if job.kind != "run" or not path.exists():
            continue
        head, *log = read_lines(path.with_name("log.jsonl"))
        folder, _, name = job.name.partition("/")
        variant, _, s = name.rpartition("-")
        evaluated = ("eval_reward", "eval_exact", "rare_reward", "rare_exact")
        curve = [[r["step"] + 1, *(r[k] for k in evaluated)] for r in log if "eval_exact" in r]
        trained = ("reward", "exact", "kl", "plan_entropy", "image_entropy", "reward_std")
        steps = [r for r in log if r["step"] >= 0]
        blocks = [steps[i : i + 10] for i in range(0, len(steps), 10)]
        train = [[sum(r[k] for r in block) / len(block) for k in trained] for block in blocks]
        rows.append(dict(variant=variant, base=int(folder.rpartition("-")[2]), number=int(s),
                         commit=head["commit"], flags=" ".join(job.flags),
                         scores=json.loads(path.read_text()), curve=curve,
                         train=train))  # fmt: skip
    rows = json.loads(json.dumps(rows), parse_float=lambda x: round(float(x), 5))
    write_lines(Path(config.out) / config.preset / "runs.jsonl", rows)


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    config, command = common.parse("-m lab.study", Config, PRESETS, __doc__, argv)
    # the processes of the jobs run in the project's root, this one perhaps elsewhere
    config = replace(config, out=str(Path(config.out).resolve()))
    jobs = plan(config)
    if config.only:
        chosen = [job for job in jobs if job.name == config.only]
        common.check(chosen, f"no job {config.only!r}")
        return do(config, chosen[0])
    left, started = [job for job in jobs if not result_path(config, job).exists()], time.time()
    number = config.jobs or (1 if on_cuda(config) else os.cpu_count())
    print(f"study: {len(jobs)} jobs, {len(left)} to do, {number} at a time")
    pool, running = ThreadPoolExecutor(number), {}
    try:
        for job in left:
            running[job.name] = pool.submit(launch, config, job, argv, running)
        failed = [job.name for job in tqdm(left, "study") if running[job.name].result()]
    finally:
        pool.shutdown(cancel_futures=True)  # after Ctrl-C the jobs to come do not start
        collect(config, jobs)
    logs = f"{config.out}/{config.preset}/logs"
    some = ", ".join(failed[:5])
    problem = f"{len(failed)} jobs failed ({some}): see {logs}, then go on with `{command}`"
    common.check(not failed, problem)
    print(f"study: done in {time.time() - started:.0f} s; tables: `python -m lab.analyze`")


if __name__ == "__main__":
    common.run(main)
