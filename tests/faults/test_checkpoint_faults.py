"""What the world does to a training run: kill -9, flipped bits, a full disk, a dead rank. Nothing may be lost."""

import contextlib
import errno
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from soju.core.errors import DiskFullError
from soju.core.files import verify_manifest
from soju.training import checkpoints, reliable
from soju.training.checkpoints import list_checkpoints, newest_verified
from training import pico_trainers
from training.pico_trainers import plain_trainer, weights

PROGRAM = Path(pico_trainers.__file__)
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
SETTINGS = ("save_steps=2", "save_total_limit=2")
SHORT = ("save_steps=1", "save_total_limit=1", "max_steps=3")
Usage = namedtuple("Usage", "total used free")


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Server:
    """Trains in forks of a process that has imported everything."""

    def __init__(self, errors):
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(
            [sys.executable, str(PROGRAM), "serve"], env=ENVIRONMENT, stdin=pipe, stdout=pipe, stderr=errors, text=True
        )
        assert self.process.stdout.readline() == "ready\n"

    def start(self, *arguments):
        self.process.stdin.write(" ".join(map(str, arguments)) + "\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())

    def wait(self):
        return int(self.process.stdout.readline())

    def run(self, *arguments):
        self.start(*arguments)
        return self.wait()


@pytest.fixture(scope="module")
def errors(tmp_path_factory):
    return tmp_path_factory.mktemp("server") / "stderr"


@pytest.fixture(scope="module")
def server(errors):
    with errors.open("w") as file:
        server = Server(file)
        yield server
        server.process.communicate()


def run_straight(server, kind, folder, settings=SETTINGS):
    """Return final weights of an uninterrupted run, how many seconds and how many file operations it takes."""
    begin = time.monotonic()
    assert server.run(kind, folder, *settings) == 0
    seconds = time.monotonic() - begin
    return load_file(folder / "final.safetensors"), seconds, int((folder / "operations").read_text())


@pytest.fixture(scope="module")
def straight(server, tmp_path_factory):
    return run_straight(server, "plain", tmp_path_factory.mktemp("plain"))


def assert_same(folder, expected):
    final = load_file(folder / "final.safetensors")
    assert final.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(final[name], expected[name])] == []


def kill_often(server, kind, folder, seconds, times, seed):
    generator = random.Random(seed)
    for _ in range(times):
        child = server.start(kind, folder, *SETTINGS)
        time.sleep(generator.uniform(0.02, 0.9) * seconds)
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
        assert server.wait() in (0, -signal.SIGKILL)
    assert server.run(kind, folder, *SETTINGS) == 0


def test_kill_9_at_a_few_random_moments_changes_nothing(server, straight, tmp_path):
    expected, seconds, _ = straight
    kill_often(server, "plain", tmp_path, seconds, times=3, seed=0)
    assert_same(tmp_path, expected)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "seed"), [("plain", 1), ("sparse", 2)])
def test_kill_9_at_20_random_moments_changes_nothing(server, tmp_path, kind, seed):
    expected, seconds, _ = run_straight(server, kind, tmp_path / "straight")
    kill_often(server, kind, tmp_path / "killed", seconds, times=20, seed=seed)
    assert_same(tmp_path / "killed", expected)


def die_and_finish(server, folder, parts):
    """Kill a run at every n-th operation, as many as `parts`, and resume it."""
    expected, _, operations = run_straight(server, "plain", folder / "straight", SHORT)
    for number in sorted({1 + operations * part // parts for part in range(parts)}):
        place = folder / str(number)
        assert server.run("plain", place, *SHORT, f"die_at={number}") == -signal.SIGKILL
        for path in list_checkpoints(place / "checkpoints"):
            verify_manifest(path)
        assert server.run("plain", place, *SHORT) == 0
        assert_same(place, expected)
        shutil.rmtree(place)


def test_kill_9_at_some_file_operations_leaves_only_whole_checkpoints(server, tmp_path):
    die_and_finish(server, tmp_path, parts=3)


@pytest.mark.slow
def test_kill_9_at_fifty_file_operations_leaves_only_whole_checkpoints(server, tmp_path):
    die_and_finish(server, tmp_path, parts=50)


def test_sigterm_ends_with_a_checkpoint_a_sentence_and_143(server, errors, tmp_path):
    child = server.start("plain", tmp_path, *SETTINGS)
    while not list_checkpoints(tmp_path / "checkpoints"):
        time.sleep(0.01)
    os.kill(child, signal.SIGTERM)
    assert server.wait() == 128 + signal.SIGTERM
    said = errors.read_text().splitlines()[-1]
    assert re.fullmatch(r"SIGTERM: stopped after step \d+ of 15; .*checkpoint-\d+ is written; train again .*", said)
    verify_manifest(list_checkpoints(tmp_path / "checkpoints")[-1])


def flip_a_bit(path, seed=0):
    content = bytearray(path.read_bytes())
    place = random.Random(seed).randrange(8 * len(content))
    content[place // 8] ^= 1 << place % 8
    path.write_bytes(content)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    trainer = plain_trainer(folder, save_steps=2, max_steps=6)
    trainer.train()
    return folder, weights(trainer)


def test_a_flipped_bit_in_the_newest_checkpoint_resumes_from_the_one_before_and_says_so(trained, tmp_path, caplog):
    folder, expected = trained
    shutil.copytree(folder, tmp_path / "run")
    flip_a_bit(tmp_path / "run" / "checkpoints" / "checkpoint-6" / "optimizer.pt")
    trainer = plain_trainer(tmp_path / "run", save_steps=2, max_steps=6)
    trainer.train(True)
    assert "skipped checkpoint-6: " in caplog.text
    assert "optimizer.pt: its content changed" in caplog.text
    assert all(torch.equal(value, expected[name]) for name, value in weights(trainer).items())
    verify_manifest(tmp_path / "run" / "checkpoints" / "checkpoint-6")  # written again


def test_any_flipped_bit_in_any_file_is_noticed(trained, tmp_path):
    folder, _ = trained
    for number, file in enumerate(sorted((folder / "checkpoints" / "checkpoint-6").iterdir())):
        shutil.copytree(folder / "checkpoints", tmp_path / file.name)
        flip_a_bit(tmp_path / file.name / "checkpoint-6" / file.name, seed=number)
        assert newest_verified(tmp_path / file.name).path.name == "checkpoint-4", file.name


def test_a_file_cut_short_or_gone_is_noticed(trained, tmp_path):
    folder, _ = trained
    shutil.copytree(folder / "checkpoints", tmp_path / "x")
    (tmp_path / "x" / "checkpoint-6" / "scheduler.pt").unlink()
    file = tmp_path / "x" / "checkpoint-4" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    found = newest_verified(tmp_path / "x")
    assert found.path.name == "checkpoint-2"
    assert [path.name for path, _ in found.skipped] == ["checkpoint-6", "checkpoint-4"]


def left_intact(folder, step):
    found = newest_verified(folder / "checkpoints")
    assert found.path.name == f"checkpoint-{step}"
    assert [path.name for path in (folder / "checkpoints").iterdir() if path.name.startswith(".")] == []


def test_a_disk_too_small_is_told_before_anything_is_written(tmp_path, monkeypatch):
    trainer = plain_trainer(tmp_path, save_steps=2)
    free = [10**9, 1000]
    monkeypatch.setattr(checkpoints.shutil, "disk_usage", lambda path: Usage(10**9, 0, free.pop(0)))
    with pytest.raises(DiskFullError, match=r"1,000 are free, so [\d,]+ bytes are missing; checkpoint-2 is intact"):
        trainer.train()
    left_intact(tmp_path, 2)


@pytest.mark.parametrize("writer", ["weights", "optimizer", "manifest", "state"])
def test_a_disk_that_fills_up_while_writing_leaves_the_checkpoint_before(tmp_path, monkeypatch, writer):
    trainer = plain_trainer(tmp_path, save_steps=2)
    calls = []

    def fail_the_second_time(original):
        def write(*args, **kwargs):
            calls.append(1)
            if len(calls) == 2:
                raise OSError(errno.ENOSPC, "No space left on device")
            return original(*args, **kwargs)

        return write

    module, name = {
        "weights": (type(trainer.model), "save_pretrained"),
        "optimizer": (type(trainer), "_save_optimizer_and_scheduler"),
        "manifest": (checkpoints, "write_manifest"),
        "state": (reliable, "write_extra_state"),
    }[writer]
    monkeypatch.setattr(module, name, fail_the_second_time(getattr(module, name)))
    with pytest.raises(DiskFullError, match=r"bytes are missing; checkpoint-2 is intact; free space"):
        trainer.train()
    left_intact(tmp_path, 2)


def test_another_failure_while_writing_keeps_its_own_name_and_clears_up(tmp_path, monkeypatch):
    def fail(folder, parts):
        raise ZeroDivisionError

    trainer = plain_trainer(tmp_path, save_steps=2)
    monkeypatch.setattr(reliable, "write_extra_state", fail)
    with pytest.raises(ZeroDivisionError):
        trainer.train()
    assert list((tmp_path / "checkpoints").iterdir()) == []


@pytest.fixture
def small_disk(tmp_path):
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1800k", "tmpfs", str(folder)], capture_output=True, text=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"mounting a tmpfs is not permitted here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.slow
@pytest.mark.parametrize("checked", [True, False])
def test_a_real_full_disk_loses_nothing_and_training_goes_on_when_there_is_room(
    trained, tmp_path, small_disk, monkeypatch, checked
):
    if not checked:  # the estimate was too low: the disk fills up in the middle of a file
        monkeypatch.setattr(reliable.WholeCheckpoints, "_bytes_needed", lambda self, folder: 0)
    with pytest.raises(DiskFullError, match=r"bytes are missing; checkpoint-\d is intact"):
        plain_trainer(small_disk, save_steps=1, max_steps=6).train()
    left_intact(small_disk, checkpoints.checkpoint_step(list_checkpoints(small_disk / "checkpoints")[-1]))
    for path in list_checkpoints(small_disk / "checkpoints")[:-1]:
        shutil.rmtree(path)
    trainer = plain_trainer(small_disk, save_steps=1, max_steps=6, save_total_limit=1)
    trainer.train(True)
    assert all(torch.equal(value, trained[1][name]) for name, value in weights(trainer).items())
