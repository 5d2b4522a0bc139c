"""Run the study: methods over base policies and seeds, then records of single policies.

    bash train.sh lab.study                      hours on two cores; then: bash train.sh lab.analyze
    bash train.sh lab.study --jobs 14            on a GPU that has room for 14 processes

    -> out/study/base-<b>/small/    tokenizer, base policy, a folder per run, records

Each base policy has a tokenizer and a corpus of its own seed. Runs of base b and number s have the
seed 10 b + s: methods are compared on the same base policy, training prompts and rollout noise. All
policies answer the same evaluation prompts with the same noise. Jobs run in the order of `plan`. A
finished one is skipped, an interrupted one continues. Each has one thread; as many run at a time as
there are cores, or one on a GPU, unless --jobs says otherwise (docs/gpu.md).
"""

import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm

import common
import eggrpo
import pretrain
import tiny_vq.train
from evaluate import draw_noise, load_base, load_env, load_run, sample_and_score
from lab import one_sided
from lab.measure import diversity, record_rows, score, step_config
from lab.world import gradient_sizes
from runs import check_settings
from scenes import make_scene

ROOT = Path(__file__).parent.parent
MAIN = ("grpo", "eggrpo", "eggrpo-released")  # the default number of steps, several seeds
# the two 2x2 tables, text x image and exclude x bonus: short runs, two seeds
HALVES = ("grpo", "eggrpo", "eggrpo-text", "eggrpo-image", "exclude", "bonus")
BASES = {"base-no-plan": dict(no_plan=True), "base": {}}  # settings of a base policy
SPLIT = ("grpo-0", "eggrpo-0")  # runs whose gradient is split
RECORDED = (*BASES, *SPLIT)  # policies
RECORD_SEED = 5000  # of the prompts that base policy 0 is recorded on; b more for base policy b
# runs of lab.one_sided, most informative first: {name: values of its Config}
ONE_SIDED = json.loads(Path(__file__).with_name("one_sided.json").read_text())
FIVE = ("grpo", "eggrpo", "eggrpo-released", "exclude")  # on five base policies, others on 3


@dataclass(frozen=True)
class Config(common.BaseConfig):
    out: Path = Path("out/study")  # folder of the study
    bases: int = 5  # base policies
    seeds: int = 3  # runs of the main methods per base policy
    short_steps: int = 100  # of the runs that compare the halves of the method
    eval_every: int = 25  # steps between evaluations in training
    eval_prompts: int = 600  # of each, per split: 100 for each rare pair
    prompts: int = 1200  # evaluation prompts per policy; half as many of rare pairs
    diverse_prompts: int = 100  # whose diversity is measured, of as many images as plans
    gradient_batches: int = 4  # training batches whose gradient is split
    per_category: int = 10  # prompts of each category that are recorded, per base policy
    plans: int = 10  # per recorded prompt, as in the paper
    images: int = 10  # per plan, as in the paper
    pass_prompts: int = 60  # of usual and of rare pairs, each drawn pass_images times
    pass_images: int = 100  # each with a plan of its own
    one_sided: int = len(ONE_SIDED)  # settings of lab.one_sided, the first ones of the list
    jobs: int = 0  # at a time; 0: on a CPU one per core, else one
    only: str = ""  # do this one job, by name


PRESETS = {
    "smoke": dict(
        bases=2,
        seeds=1,
        short_steps=2,
        eval_every=2,
        eval_prompts=12,
        prompts=12,
        diverse_prompts=2,
        gradient_batches=1,
        per_category=1,
        plans=2,
        images=2,
        pass_prompts=6,
        pass_images=2,
        one_sided=2,
    ),
    "small": dict(),
    "large": dict(),
}


class Job(NamedTuple):
    base: int  # number of its base policy
    kind: str  # base, runs, records, passes or one-sided
    last: str = ""  # name of the run, or of the policy
    needs: tuple = ()  # names of the jobs that must be finished before
    flags: tuple = ()  # of eggrpo.py for a run

    @property
    def name(self):
        """What --only calls it: base-<b>, or base-<b>/<kind>/<last>."""
        own = f"/{self.kind}/{self.last}" if self.last else ""
        return f"base-{self.base}{own}"


def run_jobs(config, methods, number, prefix="", flags=""):
    """List the runs of some methods on every base policy. flags: of eggrpo.py."""
    evaluation = f"--eval-every {config.eval_every} --eval-prompts {config.eval_prompts}"
    jobs = []
    for base in range(config.bases):
        for method in methods:
            name = f"{prefix}{method}-{number}"
            own = f"--method {method} --seed {10 * base + number} {evaluation} {flags}"
            jobs.append(Job(base, "runs", name, (f"base-{base}",), tuple(own.split())))
    return jobs


def plan(config):
    """List all jobs in the order in which they start."""
    jobs = [Job(base, "base") for base in range(config.bases)]
    jobs += run_jobs(config, MAIN, 0)
    for base in range(config.bases):
        for policy in RECORDED:
            needs = f"base-{base}"
            if policy not in BASES:
                needs += f"/runs/{policy}"
            for kind in ("records", "passes"):
                jobs.append(Job(base, kind, policy, (needs,)))
    for number in range(1, config.seeds):
        jobs += run_jobs(config, MAIN, number)
    short = f"--steps {config.short_steps}"
    jobs += run_jobs(config, HALVES, 0, "short-", short)
    guided = f"{short} --guidance 2"
    jobs += run_jobs(config, ("grpo", "eggrpo"), 0, "guided-", guided)
    jobs += run_jobs(config, ("top-entropy",), 0, "short-", short)
    jobs += run_jobs(config, HALVES, 1, "short-", short)
    for name in [*ONE_SIDED][: config.one_sided]:
        bases = config.bases
        if not config.only:
            bases = min(bases, 5 if name in FIVE else 3)
        for base in range(bases):
            jobs.append(Job(base, "one-sided", name, (f"base-{base}",)))
    return jobs


def result_path(config, job):
    """Return the file that a job writes last. config.out: the study's folder."""
    folder = config.out / f"base-{job.base}" / config.preset
    if job.kind == "base":
        return folder / "scores.json"
    if job.kind == "runs":
        return folder / job.last / "scores.json"
    ending = "json" if job.kind == "one-sided" else "jsonl"
    return folder / job.kind / f"{job.last}.{ending}"


def load(config, name):
    """Load a policy of the folder config.out. Returns env, policy, and options to sample it."""
    env = load_env(config, common.pick_device(config.device))
    base = load_base(config, env)
    if name in BASES:
        return env, base, BASES[name]
    path = config.folder / name / "policy.pt"
    return env, *load_run(path, config, env, base)


def score_policy(config, name):
    """Score and measure a policy. Returns what is written to scores.json."""
    env, policy, options = load(config, name)
    scored = score(env, policy, config.prompts, seed=config.seed, **options)
    scored["diversity"] = diversity(env, policy, config, **options)
    if name in SPLIT:
        settings = step_config(config.preset, "eggrpo", config.seed)
        scored["gradient"] = gradient_sizes(env, policy, settings, config.gradient_batches)
    return scored


def do_base(config, job, flags):
    """Train the tokenizer and the base policy of a seed, and score it without and with plan."""
    flags = [*flags, "--seed", str(job.base)]
    tiny_vq.train.main(flags)
    pretrain.main(flags)
    return {name: score_policy(config, name) for name in BASES}


def do_run(config, job, flags):
    """Train a policy and score it."""
    eggrpo.main([*flags, *job.flags, "--name", job.last])
    return score_policy(config, job.last)


def do_records(config, job, flags):
    """Record the images that a policy draws: a dict per image."""
    env, policy, options = load(config, job.last)
    rows = []
    for category in tqdm(env.world.categories, job.name, leave=False):
        for i in range(config.per_category):
            # each base policy is recorded on prompts of its own
            scene = make_scene(env.world, "eval", RECORD_SEED + job.base, i, category)
            number = f"base {job.base}, {category} {i}"
            rows += record_rows(config, env, policy, scene, number, **options)
    return rows


def do_passes(config, job, flags):
    """Count the images that are exactly right of each of some prompts: a dict per prompt."""
    env, policy, options = load(config, job.last)
    n = config.pass_images
    rows = []
    for split in ("eval", "rare"):
        for i in tqdm(range(config.pass_prompts), f"{job.name}, {split}", leave=False):
            scene = make_scene(env.world, split, RECORD_SEED + job.base, i)
            number = f"base {job.base}, {split} {i}"
            noise = draw_noise(policy, n, config.seed, "passes", number)  # each has its own plan
            *_, exact = sample_and_score(env, policy, [scene] * n, noise, **options)
            rows.append(dict(number=number, split=split, n=n, exact=int(exact.sum())))
    return rows


def do_one_sided(config, job, flags):
    """Train a policy that is sampled in one way and scored in another."""
    values = dict(preset=config.preset, out=config.out, device=config.device, seed=10 * job.base)
    values |= eggrpo.PRESETS[config.preset] | ONE_SIDED[job.last]
    if config.preset == "smoke":
        values |= dict(steps=2, prompts_scored=12)
    of_run = one_sided.Config(**values)
    return one_sided.train(of_run)


WORK = {
    "base": do_base,
    "runs": do_run,
    "records": do_records,
    "passes": do_passes,
    "one-sided": do_one_sided,
}


def do(config, job):
    """Do one job in this process, and write its dict, or a line for each of its dicts."""
    folder = config.out / f"base-{job.base}"
    flags = ["--preset", config.preset, "--out", str(folder), "--device", config.device]
    found = WORK[job.kind](replace(config, out=folder), job, flags)
    rows = found if isinstance(found, list) else [found]
    lines = [json.dumps(common.to_jsonable(row)) + "\n" for row in rows]
    path = result_path(config, job)
    common.write(path, "".join(lines).encode())


def read_lines(path):
    """Read a file of JSON lines."""
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def keep_settings(config):
    """Write a study's settings. Raises UserError if it was begun with others."""
    path = config.folder / "settings.json"
    free = ("out", "device", "jobs", "only", "bases", "seeds", "one_sided")  # more are more jobs
    settings = {k: v for k, v in asdict(config).items() if k not in free}
    if path.exists():
        check_settings(path, json.loads(path.read_text()), settings)
    common.write(path, json.dumps(settings, indent=1).encode())


def launch(config, job, argv, running):
    """Do one job in a process of its own after those it needs. Returns the exit status."""
    for name in job.needs:
        if name in running and running[name].result():
            return 1  # what it needs has failed
    logs = config.folder / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    log = logs / f"{job.name.replace('/', '-')}.txt"
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    own = ["--out", str(config.out), "--only", job.name]
    command = [sys.executable, "-m", "lab.study", *argv, *own]
    with open(log, "w") as file:
        options = dict(cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT)
        return subprocess.run(command, **options).returncode


@common.stage()
def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    config = common.parse(Config, PRESETS, __doc__, argv)
    # the processes of the jobs run in the project's root, this one perhaps elsewhere
    config = replace(config, out=config.out.absolute())
    keep_settings(config)
    jobs = plan(config)
    if config.only:
        chosen = [job for job in jobs if job.name == config.only]
        common.check(chosen, f"no job {config.only!r}")
        return do(config, chosen[0])
    started = time.time()
    left = [job for job in jobs if not result_path(config, job).exists()]
    on_cuda = torch.cuda.is_available() and config.device.startswith(("auto", "cuda"))
    number = config.jobs or (1 if on_cuda else torch.get_num_threads())
    print(f"study: {len(jobs)} jobs, {len(left)} to do, {number} at a time")
    pool = ThreadPoolExecutor(number)
    running = {}
    try:
        for job in left:
            running[job.name] = pool.submit(launch, config, job, argv, running)
        failed = [job.name for job in tqdm(left, "study") if running[job.name].result()]
    finally:
        pool.shutdown(cancel_futures=True)  # after Ctrl-C the jobs to come do not start
    logs = f"{config.out}/{config.preset}/logs"
    again = common.command_for("lab.study", config)
    problem = f"{len(failed)} jobs failed ({', '.join(failed[:5])}): see {logs}"
    common.check(not failed, f"{problem}, then go on with `{again}`")
    tables = common.command_for("lab.analyze", config)
    print(f"study: done in {time.time() - started:.0f} s; tables: `{tables}`")


if __name__ == "__main__":
    common.run(main)
