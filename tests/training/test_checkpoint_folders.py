"""A checkpoint is whole or absent: found by verification, published by one rename, removed name first."""

import errno
import os
import shutil
from collections import namedtuple

import pytest

from soju.core.errors import DiskFullError, UserError
from soju.core.files import MANIFEST, verify_manifest, write_manifest
from soju.training import checkpoints

Usage = namedtuple("Usage", "total used free")


def make(folder, step, text="weights"):
    path = folder / f"checkpoint-{step}"
    path.mkdir(parents=True)
    (path / "model.bin").write_text(text)
    write_manifest(path)
    return path


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_the_newest_is_the_largest_step_not_the_last_in_the_alphabet(tmp_path):
    for step in (900, 1000, 80):
        make(tmp_path, step)
    assert checkpoints.newest_verified(tmp_path).path == tmp_path / "checkpoint-1000"
    assert [checkpoints.checkpoint_step(path) for path in checkpoints.list_checkpoints(tmp_path)] == [80, 900, 1000]


def test_a_damaged_and_an_unfinished_checkpoint_are_skipped_with_the_reason(tmp_path):
    for step in (1, 2, 3):
        make(tmp_path, step)
    (tmp_path / "checkpoint-3" / MANIFEST).unlink()
    (tmp_path / "checkpoint-2" / "model.bin").write_text("weightz")
    found = checkpoints.newest_verified(tmp_path)
    assert found.path == tmp_path / "checkpoint-1"
    assert [path.name for path, _ in found.skipped] == ["checkpoint-3", "checkpoint-2"]
    assert "missing" in found.skipped[0][1]
    assert "content changed" in found.skipped[1][1]
    assert "skipped checkpoint-2" in str(found)


def test_only_the_steps_asked_for_are_considered(tmp_path):
    for step in (1, 2, 3):
        make(tmp_path, step)
    assert checkpoints.newest_verified(tmp_path, steps={1, 2}).path == tmp_path / "checkpoint-2"


@pytest.mark.parametrize("exists", [True, False])
def test_nothing_to_find_is_no_error(tmp_path, exists):
    folder = tmp_path if exists else tmp_path / "none"
    assert checkpoints.resume_path(folder).path is None
    assert "no checkpoint" in str(checkpoints.resume_path(folder))


@pytest.mark.parametrize("name", ["best", "checkpoint-", "checkpoint-1.bak", ".checkpoint-1.saving"])
def test_a_folder_of_another_name_is_no_checkpoint(tmp_path, name):
    with pytest.raises(UserError, match="not a checkpoint"):
        checkpoints.checkpoint_step(tmp_path / name)


def test_an_abandoned_checkpoint_can_be_named_but_is_never_found(tmp_path):
    os.replace(make(tmp_path, 5), tmp_path / "abandoned-checkpoint-5")
    assert checkpoints.checkpoint_step(tmp_path / "abandoned-checkpoint-5") == 5
    assert checkpoints.newest_verified(tmp_path).path is None


def test_publishing_replaces_what_was_there(tmp_path):
    make(tmp_path, 5, "old")
    staged = tmp_path / ".checkpoint-5.saving" / "checkpoint-5"
    staged.mkdir(parents=True)
    (staged / "model.bin").write_text("new")
    checkpoints.publish(staged, tmp_path / "checkpoint-5")
    verify_manifest(tmp_path / "checkpoint-5")
    assert (tmp_path / "checkpoint-5" / "model.bin").read_text() == "new"
    checkpoints.tidy(tmp_path)
    assert names(tmp_path) == ["checkpoint-5"]


def test_a_kill_between_the_two_renames_of_a_replacement_loses_nothing(tmp_path):
    os.replace(make(tmp_path, 5, "old"), tmp_path / ".checkpoint-5.replaced")
    make(tmp_path, 4)
    assert checkpoints.resume_path(tmp_path).path == tmp_path / "checkpoint-5"


def test_what_an_interruption_left_is_cleared(tmp_path):
    make(tmp_path, 5)
    for name in (".checkpoint-5.replaced", ".checkpoint-6.saving", ".checkpoint-4.removed", "abandoned-checkpoint-9"):
        (tmp_path / name).mkdir()
    checkpoints.resume_path(tmp_path)
    assert names(tmp_path) == ["abandoned-checkpoint-9", "checkpoint-5"]


def test_rotation_keeps_the_last_ones_and_the_best(tmp_path):
    for step in range(1, 7):
        make(tmp_path, step)
    gone = checkpoints.rotate(tmp_path, keep_last=2, protected=[tmp_path / "checkpoint-3"])
    assert names(tmp_path) == ["checkpoint-3", "checkpoint-5", "checkpoint-6"]
    assert [path.name for path in gone] == ["checkpoint-1", "checkpoint-2", "checkpoint-4"]


def test_a_damaged_checkpoint_does_not_displace_a_good_one(tmp_path):
    for step in (1, 2, 3):
        make(tmp_path, step)
    (tmp_path / "checkpoint-3" / "model.bin").write_text("cut")
    checkpoints.rotate(tmp_path, keep_last=1)
    assert names(tmp_path) == ["checkpoint-2", "checkpoint-3"]
    assert checkpoints.newest_verified(tmp_path).path == tmp_path / "checkpoint-2"


@pytest.mark.parametrize(("keep_last", "left"), [(None, 3), (0, 1), (1, 1), (9, 3)])
def test_no_limit_keeps_all_and_no_limit_is_so_low_that_none_stays(tmp_path, keep_last, left):
    for step in (1, 2, 3):
        make(tmp_path, step)
    checkpoints.rotate(tmp_path, keep_last=keep_last)
    assert len(names(tmp_path)) == left


def test_going_back_renames_later_checkpoints(tmp_path):
    for step in (1, 2, 3):
        make(tmp_path, step)
    checkpoints.set_aside_after(tmp_path, 1)
    assert names(tmp_path) == ["abandoned-checkpoint-2", "abandoned-checkpoint-3", "checkpoint-1"]
    make(tmp_path, 2, "again")
    checkpoints.set_aside_after(tmp_path, 1)
    assert (tmp_path / "abandoned-checkpoint-2" / "model.bin").read_text() == "again"


def test_too_little_space_says_how_many_bytes_are_missing_and_what_is_left(tmp_path, monkeypatch):
    make(tmp_path, 7)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10_000, 9_000, 1_000))
    with pytest.raises(DiskFullError) as caught:
        checkpoints.require_space(tmp_path, 1_500)
    assert "needs 1,500 bytes and 1,000 are free, so 500 bytes are missing; checkpoint-7 is intact" in str(caught.value)
    checkpoints.require_space(tmp_path, 1_000)


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
)
def test_a_full_disk_is_recognised_whoever_reports_it(tmp_path, error):
    staging = tmp_path / ".checkpoint-1.saving"
    staging.mkdir()
    (staging / "model.bin").write_bytes(b"0" * 100)
    full = checkpoints.explain_failure(error, tmp_path, staging=staging, needed=10)
    assert isinstance(full, DiskFullError)
    assert "needs 100 bytes" in str(full)
    assert not staging.exists()


def test_pytorch_names_no_reason_so_the_free_bytes_tell(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10_000, 9_990, 10))
    error = RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 64 vs 0")
    staging = tmp_path / "none"
    assert "90 bytes are missing" in str(checkpoints.explain_failure(error, tmp_path, staging=staging, needed=100))
    assert checkpoints.explain_failure(error, tmp_path, staging=staging, needed=10) is None


def test_another_failure_is_not_called_a_full_disk_but_is_cleared_away_too(tmp_path):
    staging = tmp_path / ".checkpoint-1.saving"
    staging.mkdir()
    assert checkpoints.explain_failure(ValueError("shape"), tmp_path, staging=staging, needed=1) is None
    assert not staging.exists()
