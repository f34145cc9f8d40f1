"""Everything below a folder is named once: intact, broken or without proof."""

import json
import shutil
import subprocess
import sys

import pytest

from soju.core.errors import IntegrityError
from soju.core.files import MANIFEST, append_json_line, check_tree, read_json_lines, tensor_names, write_manifest


def make(folder, file="model.safetensors", manifest=True):
    folder.mkdir(parents=True, exist_ok=True)
    header = b'{"__metadata__":{"format":"pt"},"w":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}'
    (folder / file).write_bytes(len(header).to_bytes(8, "little") + header + b"\x07")
    if manifest:
        write_manifest(folder)
    return folder


def told(root):
    return {str(item.path.relative_to(root)): item.problem for item in check_tree(root)}


def test_every_folder_is_checked_even_after_a_broken_one(tmp_path):
    for name in ("best", "checkpoints/checkpoint-1", "checkpoints/checkpoint-2", "final"):
        make(tmp_path / name)
    path = tmp_path / "checkpoints" / "checkpoint-1" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x06")
    result = told(tmp_path)
    assert [name for name, problem in result.items() if problem is None] == [
        "best",
        "checkpoints/checkpoint-2",
        "final",
    ]
    assert "content changed" in result["checkpoints/checkpoint-1"]


def test_a_checkpoint_or_model_without_manifest_is_named(tmp_path):
    make(tmp_path / "checkpoints" / "checkpoint-1", file="weights.bin", manifest=False)
    make(tmp_path / "final", manifest=False)
    make(tmp_path / "plots", file="curve.png", manifest=False)
    result = told(tmp_path)
    assert sorted(result) == ["checkpoints/checkpoint-1", "final"]
    assert "nothing proves that it is whole" in result["final"]


def test_folders_inside_a_checked_one_need_no_manifest_of_their_own(tmp_path):
    make(tmp_path / "final" / "1_Dense", manifest=False)
    make(tmp_path / "final")
    assert told(tmp_path) == {"final": None}


def test_unfinished_folders_are_left_out(tmp_path):
    make(tmp_path / ".checkpoint-3.saving" / "checkpoint-3", manifest=False)
    assert told(tmp_path) == {}


def test_soju_verify_names_every_folder_and_exits_with_2_when_one_is_broken(tmp_path):
    for name in ("a", "b", "checkpoint-3"):
        make(tmp_path / "run" / name, manifest=name != "checkpoint-3")

    def verify():
        command = [sys.executable, "-m", "soju", "verify", "run"]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)

    (tmp_path / "run" / "a" / "model.safetensors").write_bytes(b"")
    said = verify()
    assert said.returncode == 2
    assert [line.split()[0] for line in said.stdout.splitlines()] == ["broken", "intact", "broken"]
    assert "2 of 3 folders are not as they were written" in said.stderr
    shutil.rmtree(tmp_path / "run" / "a")
    write_manifest(tmp_path / "run" / "checkpoint-3")
    assert verify().returncode == 0


def test_a_manifest_names_the_tensors(tmp_path):
    folder = make(tmp_path / "final")
    entry = json.loads((folder / MANIFEST).read_text())["files"]["model.safetensors"]
    assert entry["tensors"] == ["w"] == tensor_names(folder / "model.safetensors")


@pytest.mark.parametrize("content", [b"", b"\xff" * 8, (3).to_bytes(8, "little") + b"{x}"])
def test_a_broken_safetensors_header_is_refused(tmp_path, content):
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(IntegrityError, match=r"model\.safetensors"):
        tensor_names(tmp_path / "model.safetensors")


def test_a_line_cut_short_is_removed_by_the_next_one(tmp_path):
    path = tmp_path / "new" / "x.jsonl"
    append_json_line(path, {"a": "가"})
    with path.open("ab") as out:
        out.write(b'{"a": "' + b"x" * 9000)
    assert read_json_lines(path) == [{"a": "가"}]
    append_json_line(path, {"a": 2})
    assert read_json_lines(path) == [{"a": "가"}, {"a": 2}]


def test_a_line_without_any_whole_one_before_it_is_removed_too(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'{"a"')
    assert read_json_lines(path) == []
    append_json_line(path, 1)
    assert read_json_lines(path) == [1]


def test_a_whole_line_that_is_not_json_is_an_error_with_its_place(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text('{"a": 1}\nnonsense\n')
    with pytest.raises(IntegrityError, match=r"x\.jsonl:2: not JSON"):
        read_json_lines(path)


def test_numbers_no_other_program_reads_are_not_written(tmp_path):
    with pytest.raises(ValueError, match="not JSON compliant"):
        append_json_line(tmp_path / "x.jsonl", float("nan"))
