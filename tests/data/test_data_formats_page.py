import re
from pathlib import Path

import pytest

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "data_formats.md").read_text(encoding="utf-8")
SOURCE = Path(__file__).resolve().parents[2] / "src" / "soju" / "data"
NAMES = "terms|pairs|triplets|documents|passages|judgements|similarity|inference|choices|knowledge|questions"
KINDS = re.findall(rf"^\| `({NAMES})` \| (.*) \| (.*) \| (.*) \|$", PAGE, re.MULTILINE)
CELLS = [
    (kind, name, example.replace("⇥", "\t").replace("\\|", "|"))
    for kind, *cells in KINDS
    for name, cell in zip(("data.jsonl", "data.tsv", "data.txt"), cells, strict=True)
    for example in re.findall(r"`([^`]+)`", cell)
]


@pytest.mark.parametrize(("kind", "name", "example"), CELLS)
def test_every_example_row_of_the_page_is_read(read, kind, name, example):
    rows, log = read(example, kind, name)
    assert (len(rows), log.problems) == (1, [])


def test_the_page_has_an_example_for_every_cell():
    assert len(CELLS) == 17


def test_the_page_lists_every_reason_in_the_code():
    pattern = r'(?:SKIP\}"|remedy|\)\}"|\w"), "([a-z0-9]+(?:-[a-z0-9]+)*)"\)$'
    code = "\n".join(path.read_text(encoding="utf-8") for path in SOURCE.glob("*.py"))
    reasons = {reason for reason in re.findall(pattern, code, re.MULTILINE) if "-" in reason}
    assert len(reasons) > 20
    assert {reason for reason in reasons if f"`{reason}`" not in PAGE} == set()
