import pytest

from fixtures.needs import DATA, needs_data
from soju.data.log import ReadLog
from soju.data.readers import SourceFilter, read_rows
from soju.data.rows import KINDS, PAIRS

pytestmark = [pytest.mark.slow, needs_data]


@pytest.mark.parametrize(
    ("name", "kind", "count"),
    [
        ("parallel.train.tsv.gz", "pairs", 128_997),
        ("parallel.dev.tsv.gz", "pairs", 1_950),
        ("terms.jsonl.gz", "terms", 17_530),
        ("triplets.train.jsonl.gz", "triplets", 117_686),
        ("triplets.dev.jsonl.gz", "triplets", 2_306),
        ("ko.txt.gz", "documents", 415_550),
        ("korsts.train.tsv", "similarity", 5_749),
        ("klue_sts.dev_a.tsv", "similarity", 259),
        ("stsb_en.dev.tsv", "similarity", 1_000),
        ("klue_nli.dev_a.tsv", "inference", 2_421),
        ("kobest_copa.train.jsonl.gz", "choices", 3_076),
        ("kobest_hellaswag.train.jsonl.gz", "choices", 2_029),
    ],
)
def test_no_row_of_the_real_data_is_refused(name, kind, count):
    log = ReadLog()
    assert sum(1 for _ in read_rows([name], KINDS[kind], log=log, root=DATA)) == count
    log.raise_if_broken()


def test_one_source_of_the_real_pairs_can_be_selected():
    log = ReadLog()
    select = SourceFilter("parallel.train.src.gz", ("stylekqc",))
    rows = read_rows(["parallel.train.tsv.gz"], PAIRS, log=log, root=DATA, select=select)
    assert sum(1 for _ in rows) == 22_411
    log.raise_if_broken()
