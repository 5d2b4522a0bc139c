"""The CUDA path, dry: devices, dtypes, host traffic and captures, on fake tensors without a GPU.

fake_cuda.py says what this cannot show: that a capture succeeds, kernels, streams, numbers, speed.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
PARTS = ("sampling", "sampling_on_an_old_gpu", "graph_keys", "rollouts", "shaping_and_update",
         "pretraining", "tokenizer", "evaluation")  # fmt: skip
BUGS = {  # of dry_run.py: what must be said of it
    "a host constant in captured code": "host operations while capturing",
    "a CPU tensor in captured code": "mixes while capturing",
    "a host read in captured code": "reads while capturing",
    "a host read after sampling": "'reads': 1",
    "a part of the graph's key forgotten": "expected {'captures': 1, 'replays': 1}",
    "a capture at every call": "expected {'replays': 1}",
    "float32 products where bf16 is native": "expected ({torch.bfloat16}",
    "bf16 where it is emulated": "expected ({torch.float32}",
    "a sixth tensor sent by a rollout": "'sends': 6",
    "an update that reads in every micro-batch": "'reads': 5",
    "a pretraining step that reads in every micro-batch": "'reads': 3",
}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """Compile the shim and make the dry run in a process of its own."""
    if torch.version.cuda or torch.version.hip:
        pytest.skip("this torch is built for CUDA: the tests marked gpu are the real thing")
    if not shutil.which("g++"):
        pytest.skip("no g++")
    root, library = Path(torch.__file__).parent, tmp_path_factory.mktemp("shim") / "fake_cuda.so"
    command = ["g++", "-shared", "-fPIC", "-std=c++20", f"-I{root}/include", HERE / "fake_cuda.cpp"]
    command += [f"-L{root}/lib", f"-Wl,-rpath,{root}/lib", "-ltorch_cpu", "-lc10", "-o", library]
    subprocess.run(command, check=True)
    run = [sys.executable, HERE / "dry_run.py", library]
    done = subprocess.run(run, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("part", PARTS)
def test_each_part_of_the_cuda_path_runs_as_it_should_on_fake_tensors(outcomes, part):
    assert outcomes["parts"].keys() == set(PARTS)
    assert outcomes["parts"][part] == "passed"


@pytest.mark.parametrize("bug", BUGS)
def test_each_planted_bug_is_caught(outcomes, bug):
    assert outcomes["bugs"].keys() == BUGS.keys()
    assert BUGS[bug] in outcomes["bugs"][bug]
