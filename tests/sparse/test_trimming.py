import gzip
import json

import pytest
import torch
from transformers import AutoModelForMaskedLM, AutoTokenizer, BertConfig, BertModel

from fixtures.pico_masked_lms import NEEDED, OTHERS, build
from fixtures.terminal import soju
from soju.core.errors import DataError, UserError
from soju.core.files import verify_manifest
from soju.data.log import ReadLog
from soju.sparse.trim import corpus_texts, trim

TERMS = [{"ko": "검색 엔진", "terms": [{"term": "Search Engine", "sim": 0.9}, "신경망"]}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save(tmp_path_factory.mktemp("masked-lm"), "unigram")


def save(folder, kind):
    for part in build(kind):
        part.save_pretrained(folder)
    return folder


def write(path, rows):
    lines = rows if isinstance(rows[0], str) else [json.dumps(row, ensure_ascii=False) for row in rows]
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return str(path)


@pytest.fixture
def corpus(tmp_path):
    return write(tmp_path / "corpus.txt", NEEDED)


@pytest.mark.parametrize("kind", ["unigram", "byte-bpe", "word-piece", "modern-bpe"])
def test_a_folder_is_trimmed_to_its_corpus_and_loads_with_transformers(tmp_path, corpus, kind):
    whole = save(tmp_path / "whole", kind)
    report, log = trim(str(whole), tmp_path / "out", [corpus])
    verify_manifest(tmp_path / "out")
    assert json.loads((tmp_path / "out" / "trim.json").read_text(encoding="utf-8"))["ids_after"] == report.ids_after
    model, tokenizer = (
        AutoModelForMaskedLM.from_pretrained(tmp_path / "out"),
        AutoTokenizer.from_pretrained(tmp_path / "out"),
    )
    before = AutoTokenizer.from_pretrained(whole)
    assert len(tokenizer) == model.config.vocab_size == report.ids_after < report.ids_before
    assert [tokenizer.tokenize(text) for text in NEEDED] == [before.tokenize(text) for text in NEEDED]
    assert (report.covered_share, report.ids_left_out, report.checked_texts) == (1.0, 0, 5)
    assert report.rows == log.kept == 5
    assert report.head_megabytes_before == pytest.approx(report.ids_before * 16 * 4 / 1e6)
    assert report.head_megabytes_after == pytest.approx(report.ids_after * 16 * 4 / 1e6)
    with torch.no_grad():
        assert model(**tokenizer(NEEDED[0], return_tensors="pt")).logits.shape[-1] == report.ids_after


def test_nothing_written_names_a_temporary_folder(tmp_path, folder, corpus):
    trim(str(folder), tmp_path / "out", [corpus])
    for path in (tmp_path / "out").glob("*.json"):
        assert str(tmp_path.parent) not in path.read_text(encoding="utf-8"), path.name
        assert "/tmp" not in path.read_text(encoding="utf-8"), path.name


def test_a_smaller_size_leaves_out_what_is_needed_least_and_says_how_much(tmp_path, folder, corpus):
    full, _ = trim(str(folder), tmp_path / "full", [corpus])
    report, _ = trim(str(folder), tmp_path / "small", [corpus], max_size=full.ids_after - 3)
    assert (report.ids_after, report.ids_left_out) == (full.ids_after - 3, 3)
    assert 0.5 < report.covered_share < 1


def test_rows_of_every_kind_give_all_their_texts(tmp_path):
    triplet = {"query": "q", "positive": "p", "negative": "n", "pair_type": "monolingual", "difficulty": "easy"}
    passage = {"id": "1", "domain": "d", "ko": "물", "en": "water", "query_ko": "무엇", "query_en": "what"}
    files = [
        write(tmp_path / "terms.jsonl", TERMS),
        write(tmp_path / "pairs.jsonl", [{"ko": "차", "en": "Tea"}]),
        write(tmp_path / "pairs.tsv", ["en\tko", "rice\t쌀"]),
        write(tmp_path / "bare-pairs.tsv", ["국\tsoup"]),
        write(tmp_path / "bare-documents.tsv", ["7\t김치"]),
        write(tmp_path / "passages.jsonl", [passage]),
        write(tmp_path / "triplets.jsonl", [triplet]),
        write(tmp_path / "documents.jsonl", [{"id": "1", "text": "a document"}]),
        write(tmp_path / "lines.txt", ["one line"]),
    ]
    (tmp_path / "more.txt.gz").write_bytes(gzip.compress(b"packed\n"))
    log = ReadLog()
    found = list(corpus_texts([*files, str(tmp_path / "*.gz")], log))
    expected = [
        "검색 엔진",
        "신경망",
        "Search Engine",
        "search engine",
        "차",
        "Tea",
        "쌀",
        "rice",
        "국",
        "soup",
        "김치",
    ]
    assert found == [*expected, "물", "water", "무엇", "what", "q", "p", "n", "a document", "one line", "packed"]
    log.raise_if_broken()


def test_samples_are_a_corpus_too(tmp_path, folder):
    report, _ = trim(str(folder), tmp_path / "out", ["samples:terms.train"])
    assert report.corpus_tokens > 100


@pytest.mark.parametrize(
    ("name", "rows", "message"),
    [
        ("empty.txt", [""], "holds no row"),
        ("three.tsv", ["물\twater\t1"], "neither names nor number of the columns"),
        ("broken.jsonl", ["{"], "not JSON"),
        ("list.jsonl", ["[1]"], "expected a JSON object"),
        ("other.jsonl", [{"title": "x"}], "text"),
    ],
)
def test_a_corpus_that_cannot_be_read_is_refused_and_nothing_is_written(tmp_path, folder, name, rows, message):
    with pytest.raises(DataError, match=message):
        trim(str(folder), tmp_path / "out", [write(tmp_path / name, rows)])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["nowhere.txt", "nowhere.tsv", "nowhere*.jsonl"])
def test_a_missing_corpus_is_refused(tmp_path, folder, name):
    with pytest.raises(DataError, match="nowhere"):
        trim(str(folder), tmp_path / "out", [str(tmp_path / name)])


def test_a_hub_data_set_is_no_corpus(tmp_path, folder):
    with pytest.raises(DataError, match=r"save its rows as \.jsonl"):
        trim(str(folder), tmp_path / "out", ["hub:owner/name:train"])


def test_too_small_a_size_is_refused_with_the_smallest_possible(tmp_path, folder, corpus):
    with pytest.raises(UserError, match="max-size 10 is too small"):
        trim(str(folder), tmp_path / "out", [corpus], max_size=10)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["corpus.txt"]


def test_a_model_without_a_masked_lm_head_is_refused(tmp_path, corpus):
    encoder = save(tmp_path / "encoder", "word-piece")
    config = BertConfig.from_pretrained(encoder)
    (encoder / "model.safetensors").unlink()
    BertModel(config).save_pretrained(encoder)
    with pytest.raises(UserError, match="not a masked language model, it has no cls"):
        trim(str(encoder), tmp_path / "out", [corpus])


def test_a_model_of_another_kind_is_refused(tmp_path, folder, corpus):
    other = tmp_path / "other"
    other.mkdir()
    for path in folder.iterdir():
        (other / path.name).write_bytes(path.read_bytes())
    (other / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(UserError, match="not a masked language model"):
        trim(str(other), tmp_path / "out", [corpus])
    (other / "tokenizer.json").unlink()
    (other / "tokenizer_config.json").unlink()
    with pytest.raises(UserError, match="no tokenizer in"):
        trim(str(other), tmp_path / "out", [corpus])


def test_an_existing_folder_is_left_alone(tmp_path, folder, corpus):
    with pytest.raises(UserError, match="exists already"):
        trim(str(folder), tmp_path, [corpus])


def test_trim_from_the_command_line(tmp_path, folder, corpus):
    other = write(tmp_path / "other.txt", [*OTHERS[:1], ""])
    made = soju("trim", str(folder), "out", "--corpus", corpus, "--corpus", other, cwd=tmp_path)
    assert made.returncode == 0, made.stderr
    assert "of 116 ids" in made.stdout
    assert "100.00% of" in made.stdout
    assert soju("verify", "out", cwd=tmp_path).returncode == 0
    again = soju("trim", str(folder), "out", "--corpus", corpus, cwd=tmp_path)
    assert again.returncode == 2
    assert "exists already" in again.stderr
