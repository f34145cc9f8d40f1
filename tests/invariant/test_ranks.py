"""Two gloo ranks of batch 4 are one of batch 8, for what the docs say is invariant."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from fixtures.pico_terms import save_start
from invariant import two_ranks
from soju.core.files import check_tree, read_json_lines
from soju.sparse.losses import flops

TESTS = Path(__file__).parents[1]
NAMES = ("loss_self", "loss_korean", "loss_english", "loss_margin", "loss_flops")


def torchrun(*arguments, cwd):
    path = os.pathsep.join([str(TESTS), *sys.path])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", *arguments]
    return subprocess.run(command, env=environment, cwd=cwd, capture_output=True, text=True, timeout=500, check=False)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """One training on one rank and the same on two."""
    root = tmp_path_factory.mktemp("ranks")
    start = save_start(root / "start")
    for name in ("one", "two"):
        (root / name).mkdir()
    said = torchrun(str(TESTS / "invariant" / "two_ranks.py"), str(start), str(root / "two"), cwd=root)
    assert said.returncode == 0, said.stdout + said.stderr
    return root, two_ranks.train(start, root / "one", ranks=1)


@pytest.mark.slow
def test_per_row_losses_and_the_penalty_are_those_of_one_rank(folders):
    root, _ = folders
    one, two = (
        [[row[name] for name in NAMES] for row in read_json_lines(root / name / "history.jsonl") if "loss" in row]
        for name in ("one", "two")
    )
    assert len(one) == 3
    np.testing.assert_allclose(two, one, rtol=1e-4)


@pytest.mark.slow
def test_the_trained_weights_are_those_of_one_rank(folders):
    root, expected = folders
    for rank in (0, 1):
        found = load_file(root / "two" / f"rank{rank}.safetensors")
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.slow
def test_the_penalty_has_the_exact_gradient_also_where_ranks_have_unequal_numbers_of_texts(folders):
    root, _ = folders
    value, gradient_BV = two_ranks.penalty(slice(None), across_ranks=False)
    for rank in (0, 1):
        found = load_file(root / "two" / f"rank{rank}.safetensors")
        torch.testing.assert_close(found["value"], value)
        torch.testing.assert_close(found["gradient"], gradient_BV)


def test_on_one_rank_the_penalty_over_all_ranks_is_the_penalty():
    weights_BV = two_ranks.ACTIVATION.relu()
    assert flops(weights_BV, across_ranks=True) == flops(weights_BV)


PICO = [
    "student.hidden_size=32",
    "student.heads=2",
    "student.intermediate_size=32",
    "training.max_steps=4",
    "training.eval_steps=2",
    "evaluation.sets=[]",
    "evaluation.terms=[]",
]


def train_the_preset(folder, *arguments):
    return torchrun("-m", "soju", "train", "splade-pico", *PICO, *arguments, cwd=folder)


@pytest.mark.slow
def test_two_ranks_train_the_pico_preset_into_one_run_folder_and_resume_it(tmp_path):
    said = train_the_preset(tmp_path)
    assert said.returncode == 0, said.stdout + said.stderr
    assert said.stdout.count("Model ") == 1
    (run,) = (tmp_path / "runs").iterdir()
    assert [checked.problem for checked in check_tree(run) if checked.problem] == []
    assert [row["outcome"] for row in read_json_lines(run / "rollbacks.jsonl")] == ["started", "finished"]
    for name in ("verdicts.jsonl", "probes.jsonl"):
        assert [row["step"] for row in read_json_lines(run / name)] == [2, 4]
    resumed = train_the_preset(tmp_path, "--resume")
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    refused = train_the_preset(tmp_path)
    assert refused.returncode != 0
    assert "holds a run already" in refused.stderr


@pytest.mark.slow
def test_a_warm_up_waits_for_no_other_rank(tmp_path):
    said = train_the_preset(tmp_path, "student.init=random", "student.warm_up={steps: 3}", "training.max_steps=2")
    assert said.returncode == 0, said.stdout + said.stderr
