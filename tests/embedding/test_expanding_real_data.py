"""A base trained on English, with no, some and much Korean, and a donor trained on Korean: the promise about tokens."""

import gzip
from itertools import islice

import pytest

from fixtures.needs import DATA, needs_data
from soju.embedding.expansion.byte_bpe import ByteBpe
from soju.embedding.expansion.certificate import certify
from soju.embedding.expansion.difference import fertility, find_candidates
from soju.embedding.expansion.merges import count_pre_tokens, expand_by_corpus, expand_by_merges, write_tokenizer
from soju.embedding.scratch_base import train_byte_bpe

pytestmark = [pytest.mark.slow, needs_data]


def lines(name):
    with gzip.open(DATA / name, "rt", encoding="utf-8") as file:
        return [line.rstrip("\n") for line in islice(file, 0, None, 20)]


@pytest.fixture(scope="module")
def korean():
    texts = lines("ko.txt.gz")
    return [text for place, text in enumerate(texts) if place % 20], texts[::20]


@pytest.fixture(scope="module")
def donor(korean, tmp_path_factory):
    folder = tmp_path_factory.mktemp("donor")
    train_byte_bpe(korean[0], 8_000, folder)
    return ByteBpe.load(str(folder))


@pytest.mark.parametrize("known", [0, 500, 2_000], ids=["no Korean", "some Korean", "much Korean"])
@pytest.mark.parametrize("order", ["donor", "corpus"])
def test_korean_texts_need_at_most_three_per_cent_more_tokens_than_with_the_donor(
    korean, donor, known, order, tmp_path
):
    texts, held_out = korean
    english = [line.split("\t")[1] for line in lines("parallel.train.tsv.gz")]
    train_byte_bpe([*english, *texts[:known]], 12_000, tmp_path / "base")
    base = ByteBpe.load(str(tmp_path / "base"))
    candidates = find_candidates(base, donor).candidates
    if order == "donor":
        expansion = expand_by_merges(base, candidates)
    else:
        expansion = expand_by_corpus(base, candidates, count_pre_tokens(base, texts))
    write_tokenizer(base, expansion, tmp_path / "out")
    certificate = certify(base, expansion, tmp_path / "out", texts={"ko": held_out, "en": english[:500]}, speed=False)
    assert certificate.failed == []
    expanded = ByteBpe.load(str(tmp_path / "out"))
    before, after, wanted = (fertility(tokenizer, held_out).tokens for tokenizer in (base, expanded, donor))
    assert after < before
    assert after <= 1.03 * wanted
