"""Recipe `embedding` on two processes: every stage ends, and what it leaves verifies."""

import json
import os
import subprocess
import sys

import pytest

from embedding.test_embedding_recipe import QUICK
from soju.core.files import read_json_lines, verify_manifest

ONE_PROBE = [override for override in QUICK if not override.startswith("expansion.")]


def on_two_ranks(folder, *overrides):
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "soju", "-q",
        "train", "embedding-pico", *ONE_PROBE, *overrides, "--out", str(folder),
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=folder.parent, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_every_stage_ends_on_two_processes(tmp_path):
    result = on_two_ranks(tmp_path / "run")
    assert result.returncode == 0, result.stderr[-3000:]
    for name in ("base", "stage0", "stage1", "stage2", "stage3", "best"):
        verify_manifest(tmp_path / "run" / name)
    state = json.loads((tmp_path / "run/training/stage2/checkpoints/checkpoint-2/extra_state.json").read_text())
    assert state["run"]["processes"] == 2
    rows = [row for row in read_json_lines(tmp_path / "run/training/stage2/history.jsonl") if "loss" in row]
    assert rows
    refused = on_two_ranks(tmp_path / "other", "stage2.mini_batch_size=4")
    assert refused.returncode != 0
    assert "stage2.mini_batch_size: works on one process" in refused.stderr
