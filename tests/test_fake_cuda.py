"""The CUDA path, dry: devices, dtypes, host traffic and captures, on fake tensors without a GPU.

fake_cuda.py says what this cannot show: that a capture succeeds, kernels, streams, numbers, speed.
"""

import pytest
import torch

from conftest import can_dry_run

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


@pytest.fixture(scope="session")
def outcomes(background):
    """What dry_run.py prints; conftest.py starts it."""
    if torch.version.cuda or torch.version.hip:
        pytest.skip("this torch is built for CUDA: the tests marked gpu are the real thing")
    if not can_dry_run():
        pytest.skip("no g++")
    return background["outcomes"].result()


@pytest.mark.parametrize("part", PARTS)
def test_each_part_of_the_cuda_path_runs_as_it_should_on_fake_tensors(outcomes, part):
    assert outcomes["parts"].keys() == set(PARTS)
    assert outcomes["parts"][part] == "passed"


@pytest.mark.parametrize("bug", BUGS)
def test_each_planted_bug_is_caught(outcomes, bug):
    assert outcomes["bugs"].keys() == BUGS.keys()
    assert BUGS[bug] in outcomes["bugs"][bug]
