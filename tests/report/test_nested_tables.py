from soju.report.page import Block, lay_out


def test_plain_values_come_first_and_groups_get_headings():
    assert lay_out({"by_reason": {"empty": 3}, "pairs": 1200}) == [
        Block("", (), (("pairs", "1,200"),)),
        Block("by reason", (), (("empty", "3"),)),
    ]


def test_groups_of_the_same_keys_become_one_table():
    (block,) = lay_out({"splits": {"train": {"rows": 9}, "dev": {"rows": 1, "seed": 12345}}})[:1]
    assert block.header == ("", "rows", "seed")
    assert block.rows == (("train", "9", ""), ("dev", "1", "12345"))


def test_a_list_of_records_becomes_a_table():
    (block,) = lay_out({"sources": [{"name": "a", "ok": True}, {"name": "b", "ok": None}]})
    assert block.rows == (("a", "yes"), ("b", "—"))


def test_deep_groups_name_their_path():
    assert [block.heading for block in lay_out({"a": {"b": {"c": {"d": 1}}}})] == ["a › b › c"]


def test_anything_else_is_shown_as_json():
    (block,) = lay_out({"mixed": [[1, 2], {"a": [{"b": 1}]}]})
    assert block.rows == (("1", "[1, 2]"), ("2", '{"a": [{"b": 1}]}'))
