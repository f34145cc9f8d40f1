"""Two gloo ranks under torchrun: they stop together, resume exactly, and one that dies takes the other with it."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from soju.core.files import verify_manifest
from soju.training.checkpoints import list_checkpoints
from training import pico_trainers

pytestmark = pytest.mark.slow
ENVIRONMENT = {
    **os.environ,
    "OMP_NUM_THREADS": "1",
    "PYTHONWARNINGS": "ignore",
    "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
}
"""The last one as docs/training.md says: torch's default lets a restart read the addresses of dead processes."""


def start(folder, *settings, restarts=0):
    folder.mkdir(exist_ok=True)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += [f"--max-restarts={restarts}", str(Path(pico_trainers.__file__)), "ranks", str(folder), "save_steps=2"]
    with (folder / "output").open("a") as output:
        return subprocess.Popen([*command, *settings], env=ENVIRONMENT, stdout=output, stderr=output)


def wait(process, folder):
    process.wait(timeout=300)
    return process.returncode, (folder / "output").read_text()


def kill_after_checkpoint(process, folder, rank, number):
    while not list_checkpoints(folder / "checkpoints"):
        assert process.poll() is None, (folder / "output").read_text()
        time.sleep(0.01)
    os.kill(int((folder / f"process-{rank}").read_text()), number)


def assert_same(folder, expected):
    for name in ("final.safetensors", "final1.safetensors"):
        final = load_file(folder / name)
        assert [key for key in expected if not torch.equal(final[key], expected[key])] == []


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    folder = tmp_path_factory.mktemp("straight")
    code, output = wait(start(folder), folder)
    assert code == 0, output
    expected = load_file(folder / "final.safetensors")
    assert_same(folder, expected)
    return folder, expected


def test_a_signal_to_one_rank_stops_both_after_the_same_step_and_the_resume_is_exact(straight, tmp_path):
    folder, expected = straight
    process = start(tmp_path)
    kill_after_checkpoint(process, tmp_path, rank=1, number=signal.SIGTERM)
    code, output = wait(process, tmp_path)
    assert code != 0
    assert output.count("SIGTERM: stopped after step") >= 1
    stopped = list_checkpoints(tmp_path / "checkpoints")[-1]
    verify_manifest(stopped)
    assert {path.name for path in stopped.glob("rng_state*")} == {"rng_state_0.pth", "rng_state_1.pth"}
    code, output = wait(start(tmp_path), tmp_path)
    assert code == 0, output
    assert_same(tmp_path, expected)
    assert (tmp_path / "history.jsonl").read_bytes() == (folder / "history.jsonl").read_bytes()


def test_a_dead_rank_ends_the_run_within_a_minute_and_a_restart_resumes(straight, tmp_path):
    process = start(tmp_path)
    kill_after_checkpoint(process, tmp_path, rank=1, number=signal.SIGKILL)
    begin = time.monotonic()
    code, _ = wait(process, tmp_path)
    assert code != 0
    assert time.monotonic() - begin < 60
    code, output = wait(start(tmp_path), tmp_path)
    assert code == 0, output
    assert_same(tmp_path, straight[1])


def test_torchrun_restarts_by_itself(straight, tmp_path):
    process = start(tmp_path, restarts=1)
    kill_after_checkpoint(process, tmp_path, rank=0, number=signal.SIGKILL)
    code, output = wait(process, tmp_path)
    assert code == 0, output
    assert_same(tmp_path, straight[1])


def test_ranks_see_every_row_once_and_log_means_over_both(straight):
    folder, _ = straight
    rows = [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]
    assert len({row["step"] for row in rows}) == len(rows)
    assert all(row["loss_flops"] > 0 for row in rows)


def test_a_checkpoint_of_two_ranks_is_refused_by_one(straight, tmp_path):
    folder, _ = straight
    program = [sys.executable, str(Path(pico_trainers.__file__)), "ranks", str(folder)]
    said = subprocess.run(program, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert said.returncode == 2
    assert "trained with processes 2 (now 1)" in said.stderr


def test_a_loss_with_parameters_of_its_own_is_refused_on_several_ranks(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += [str(Path(pico_trainers.__file__)), "sparse", str(tmp_path)]
    said = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert said.returncode != 0
    assert "the loss has trainable parameters of its own (0.temperature)" in said.stderr
