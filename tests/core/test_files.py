import hashlib
import json
import re

import pytest

from soju.core.errors import IntegrityError
from soju.core.files import MANIFEST, atomic_writer, sha256, verify_manifest, write_json, write_manifest, write_text


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_file_is_written_whole_and_its_folder_is_made(tmp_path):
    write_text(tmp_path / "new" / "a.txt", "가나\r\n다\n")
    assert (tmp_path / "new" / "a.txt").read_bytes() == "가나\r\n다\n".encode()
    assert names(tmp_path / "new") == ["a.txt"]


def test_bytes_are_written_without_an_encoding(tmp_path):
    with atomic_writer(tmp_path / "a.bin", encoding=None) as file:
        file.write(b"\r\n\xff")
    assert (tmp_path / "a.bin").read_bytes() == b"\r\n\xff"


def break_off(path, error):
    with atomic_writer(path) as file:
        file.write("half of the new")
        file.flush()
        raise error


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt(), SystemExit(1)])
def test_a_block_that_raises_keeps_the_old_content_and_leaves_no_other_file(tmp_path, error):
    path = tmp_path / "a.txt"
    write_text(path, "old")
    with pytest.raises(type(error)):
        break_off(path, error)
    assert path.read_text() == "old"
    assert names(tmp_path) == ["a.txt"]


def test_a_block_that_raises_makes_no_file(tmp_path):
    with pytest.raises(OSError, match="disk full"):
        break_off(tmp_path / "a.txt", OSError("disk full"))
    assert names(tmp_path) == []


def test_the_new_content_appears_only_at_the_end(tmp_path):
    path = tmp_path / "a.txt"
    write_text(path, "old")
    with atomic_writer(path) as file:
        file.write("new")
        file.flush()
        assert path.read_text() == "old"
    assert path.read_text() == "new"


def test_text_that_cannot_be_encoded_keeps_the_old_content(tmp_path):
    write_text(tmp_path / "a.txt", "old")
    with pytest.raises(UnicodeEncodeError):
        write_text(tmp_path / "a.txt", "\ud800")
    assert (tmp_path / "a.txt").read_text() == "old"
    assert names(tmp_path) == ["a.txt"]


def test_json_keeps_korean_readable_and_keys_in_order(tmp_path):
    write_json(tmp_path / "a.json", {"나": 1, "가": [1.5, None]})
    text = (tmp_path / "a.json").read_text(encoding="utf-8")
    assert text.index("나") < text.index("가")
    assert text.endswith("}\n")
    assert json.loads(text) == {"나": 1, "가": [1.5, None]}


def test_the_digest_of_a_file_larger_than_one_read_is_that_of_its_bytes(tmp_path):
    content = bytes(range(256)) * 4100  # a little over 1 MiB
    (tmp_path / "a").write_bytes(content)
    assert sha256(tmp_path / "a") == hashlib.sha256(content).hexdigest()


@pytest.fixture
def folder(tmp_path):
    write_text(tmp_path / "model.bin", "0123456789")
    write_text(tmp_path / "deep" / "config.json", "{}")
    write_text(tmp_path / "empty", "")
    write_manifest(tmp_path)
    return tmp_path


def test_an_untouched_folder_verifies(folder):
    verify_manifest(folder)


def test_the_manifest_lists_every_file_but_itself_with_size_and_digest(folder):
    write_manifest(folder)  # a second time: the old manifest is not in the new one
    entries = json.loads((folder / MANIFEST).read_text())["files"]
    assert list(entries) == ["deep/config.json", "empty", "model.bin"]
    assert entries["model.bin"] == {"bytes": 10, "sha256": hashlib.sha256(b"0123456789").hexdigest()}


def test_a_truncated_file_is_told_by_its_size(folder):
    (folder / "model.bin").write_text("01234")
    with pytest.raises(IntegrityError, match=r"model\.bin: 5 bytes instead of 10; restore it"):
        verify_manifest(folder)


@pytest.mark.parametrize("bit", [0, 7, 79])
def test_a_flipped_bit_is_told_by_its_digest(folder, bit):
    content = bytearray((folder / "model.bin").read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    (folder / "model.bin").write_bytes(content)
    with pytest.raises(IntegrityError, match=r"model\.bin: its content changed"):
        verify_manifest(folder)


def test_all_faults_are_listed(folder):
    (folder / "model.bin").unlink()
    (folder / "deep" / "config.json").write_text("[]")
    (folder / "empty").write_text("x")
    with pytest.raises(IntegrityError) as caught:
        verify_manifest(folder)
    lines = str(caught.value).splitlines()
    assert [re.search(r"(\S+): (\S+)", line)[1].removeprefix(f"{folder}/") for line in lines] == [
        "deep/config.json",
        "empty",
        "model.bin",
    ]
    assert "missing since the manifest was written" in lines[2]


def test_a_folder_without_a_manifest_was_not_written_completely(folder):
    (folder / MANIFEST).unlink()
    with pytest.raises(IntegrityError, match="was not written completely"):
        verify_manifest(folder)


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "{}", "3", '{"files": []}', '{"files": {"a": 1}}', '{"files": {"a": {"bytes": 1}}}', "\xff"],
)
def test_an_unreadable_manifest_is_refused(folder, text):
    (folder / MANIFEST).write_text(text, encoding="latin-1")
    with pytest.raises(IntegrityError, match="unreadable"):
        verify_manifest(folder)


def test_a_flipped_bit_of_the_manifest_is_noticed_or_harmless(tmp_path):
    """White space is the only harmless place: the entries read are the same."""
    write_text(tmp_path / "a", "x")
    write_manifest(tmp_path)
    content = (tmp_path / MANIFEST).read_bytes()
    for bit in range(0, 8 * len(content), 3):
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << bit % 8
        (tmp_path / MANIFEST).write_bytes(flipped)
        try:
            verify_manifest(tmp_path)
        except IntegrityError:
            continue
        assert json.loads(flipped) == json.loads(content)
