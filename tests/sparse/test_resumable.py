import pytest

from soju.core.errors import IntegrityError, UserError
from soju.sparse.mine import Parts


def test_parts_are_kept_and_read_in_order(tmp_path):
    parts = Parts(tmp_path / "out.jsonl", {"seed": 1}, resume=False)
    parts.write(1, ["나"])
    parts.write(0, ["가"])
    again = Parts(tmp_path / "out.jsonl", {"seed": 1}, resume=True)
    assert 0 in again
    assert 2 not in again
    assert list(again.read(2)) == [["가"], ["나"]]
    again.remove()
    assert list(tmp_path.iterdir()) == []


def test_going_on_with_other_settings_is_refused_by_name(tmp_path):
    Parts(tmp_path / "out.jsonl", {"seed": 1, "depth": 5}, resume=False)
    with pytest.raises(UserError, match=r"other settings \(seed was 1, is 2\)"):
        Parts(tmp_path / "out.jsonl", {"seed": 2, "depth": 5}, resume=True)


def test_an_unfinished_run_is_neither_mixed_with_a_new_one_nor_lost(tmp_path):
    Parts(tmp_path / "out.jsonl", {}, resume=False)
    with pytest.raises(UserError, match="--resume"):
        Parts(tmp_path / "out.jsonl", {}, resume=False)


def test_a_finished_file_is_not_replaced(tmp_path):
    (tmp_path / "out.jsonl").write_text("{}\n")
    with pytest.raises(UserError, match="is there already"):
        Parts(tmp_path / "out.jsonl", {}, resume=True)


def test_a_damaged_part_is_named(tmp_path):
    parts = Parts(tmp_path / "out.jsonl", {}, resume=False)
    parts.write(0, [])
    (parts.folder / "000000.json").write_text("[")
    with pytest.raises(IntegrityError, match=r"000000.json: unreadable"):
        list(parts.read(1))
    (parts.folder / "settings.json").unlink()
    with pytest.raises(IntegrityError, match=r"settings.json: unreadable"):
        Parts(tmp_path / "out.jsonl", {}, resume=True)
