"""Mode ``terms`` killed anywhere, or its newest checkpoint damaged: the finished model has the same bytes."""

import os
import random
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fixtures import pico_terms
from soju.core.errors import UserError
from soju.core.files import check_tree, read_json_lines
from soju.training.checkpoints import list_checkpoints

TESTS = Path(__file__).parents[1]
WEIGHTS = {
    "recipe": ("best/model.safetensors", "final/model.safetensors", "static/model.safetensors"),
    "student": ("checkpoints/checkpoint-12/model.safetensors", "checkpoints/checkpoint-12/optimizer.pt"),
}
"""What an interruption must not change, of the whole recipe and of the training alone."""


class Server:
    """A program that trains in a fork for each line it reads."""

    def __init__(self, start):
        path = os.pathsep.join([str(TESTS), *sys.path])
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
        program = [sys.executable, "-W", "ignore", str(TESTS / "fixtures" / "pico_terms.py"), str(start)]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        self.process = subprocess.Popen(program, env=environment, text=True, bufsize=1, **pipes)
        assert self.process.stdout.readline() == "ready\n"

    def run(self, kind, folder, *, kill_after=None, kill_at=None):
        """Run to the end, or kill the run after so many seconds or once a path is there; returns the exit code."""
        self.process.stdin.write(f"{kind} {folder}\n")
        child = int(self.process.stdout.readline())
        if kill_after is not None:
            ended = self._ended(within=kill_after)
        while kill_at is not None and not (ended := self._ended(within=0.001)) and not kill_at.exists():
            pass
        if (kill_after is not None or kill_at is not None) and not ended:
            os.kill(child, signal.SIGKILL)
        return int(self.process.stdout.readline())

    def _ended(self, *, within):
        return bool(select.select([self.process.stdout], [], [], within)[0])

    def close(self):
        self.process.stdin.close()
        self.process.stdout.close()
        self.process.wait()


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    return pico_terms.save_start(tmp_path_factory.mktemp("pretrained") / "start")


@pytest.fixture(scope="module")
def server(start):
    server = Server(start)
    yield server
    server.close()


class Straight:
    """Runs that nothing interrupted, made when they are asked for, and how long one takes that compiles nothing."""

    def __init__(self, server, folder):
        self.server = server
        self.folder = folder
        self.seconds = {}

    def of(self, kind):
        if kind not in self.seconds:
            assert self.server.run(kind, self.folder / f"{kind}-first") == 0
            begin = time.monotonic()
            assert self.server.run(kind, self.folder / kind) == 0
            self.seconds[kind] = time.monotonic() - begin
        return self.folder / kind


@pytest.fixture(scope="module")
def straight(server, tmp_path_factory):
    return Straight(server, tmp_path_factory.mktemp("straight"))


def assert_same(kind, folder, expected):
    for name in WEIGHTS[kind]:
        assert (folder / name).read_bytes() == (expected / name).read_bytes(), name
    assert read_json_lines(folder / "history.jsonl") == read_json_lines(expected / "history.jsonl")
    assert [checked.problem for checked in check_tree(folder / "checkpoints") if checked.problem] == []


def kill_and_resume(kind, straight, folder, moments):
    """Kill the run at each moment, a share of its whole length, then let it end; returns how often it was killed."""
    expected = straight.of(kind)
    seconds = straight.seconds[kind]
    codes = [straight.server.run(kind, folder, kill_after=share * seconds) for share in moments]
    assert set(codes) <= {0, -signal.SIGKILL}, codes
    assert straight.server.run(kind, folder) == 0
    assert_same(kind, folder, expected)
    return codes.count(-signal.SIGKILL)


@pytest.mark.slow
def test_a_training_killed_after_each_of_its_checkpoints_ends_with_the_same_bytes(straight, tmp_path):
    expected = straight.of("student")
    folder = tmp_path / "run"
    for step in (3, 6, 9):
        straight.server.run("student", folder, kill_at=folder / "checkpoints" / f"checkpoint-{step}")
    assert straight.server.run("student", folder) == 0
    assert_same("student", folder, expected)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("kind", ["student", "recipe"])
def test_a_run_killed_at_twenty_random_moments_ends_with_the_same_bytes(straight, tmp_path, kind):
    generator = random.Random(11)
    killed = 0
    for attempt in range(60):  # a run that ended before its moment is not counted
        killed += kill_and_resume(kind, straight, tmp_path / f"run{attempt}", [generator.uniform(0, 1)])
        if killed == 20:
            return
    pytest.fail(f"only {killed} of 60 runs were killed in time")


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_run_killed_again_and_again_still_gets_to_its_end(straight, tmp_path):
    generator = random.Random(17)
    moments = [generator.uniform(0.3, 0.9) for _ in range(12)]
    assert kill_and_resume("recipe", straight, tmp_path / "run", moments) >= 2


def test_a_flipped_bit_in_the_newest_checkpoint_is_told_and_the_one_before_is_used(tmp_path, start, caplog):
    pico = pico_terms.Pretrained(tmp_path, start=start)
    newest = pico.train().last
    expected = (newest / "model.safetensors").read_bytes()
    history = read_json_lines(tmp_path / "history.jsonl")
    flip_a_bit(newest / "model.safetensors")
    *_, before, damaged = list_checkpoints(tmp_path / "checkpoints")
    assert (before.name, damaged) == ("checkpoint-9", newest)
    again = pico.train()
    assert f"skipped {newest.name}: " in caplog.text
    assert "its content changed since the manifest was written" in caplog.text
    assert (again.last / "model.safetensors").read_bytes() == expected
    assert read_json_lines(tmp_path / "history.jsonl") == history
    assert (tmp_path / "checkpoints" / f"abandoned-{newest.name}").is_dir()


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_going_on_from_a_damaged_checkpoint_that_was_named_is_refused(tmp_path, start):
    pico = pico_terms.Pretrained(tmp_path, "training.max_steps=3", start=start)
    newest = pico.train().last
    flip_a_bit(newest / "optimizer.pt")
    with pytest.raises(UserError, match=r"optimizer\.pt: its content changed"):
        pico.train(resume=newest)
    assert newest.is_dir()
