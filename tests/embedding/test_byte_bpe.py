import json

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from embedding.byte_bpes import byte_bpe, byte_bpe_spec
from soju.core.errors import UserError
from soju.embedding.expansion.byte_bpe import ByteBpe


def test_vocabulary_merges_and_added_tokens_are_read():
    base = byte_bpe([("t", "h"), ("th", "e")])
    assert base.merges == [("t", "h"), ("th", "e")]
    assert base.vocabulary["the"] == 257
    assert base.added_tokens == {"<|endoftext|>": 258, "<|im_start|>": 259, "<|im_end|>": 260, "<think>": 261}
    assert base.size == 262
    assert list(base.encode(["the t<think>"])) == [[257, base.vocabulary["Ġ"], base.vocabulary["t"], 261]]
    assert base.decode([257, 258]) == "the<|endoftext|>"


def test_merges_may_be_written_as_one_text():
    spec = byte_bpe_spec([("t", "h")])
    spec["model"]["merges"] = ["t h"]
    assert ByteBpe.from_spec(spec, name="old").merges == [("t", "h")]


def test_normaliser_and_pre_tokenizer_are_its_own():
    base = byte_bpe()
    assert base.normalise("\u1112\u1161\u11ab") == "\ud55c"
    assert base.pre_tokens("the cat, 42") == ["the", "Ġcat", ",", "Ġ", "4", "2"]


def test_padding_and_truncation_of_the_file_do_not_count():
    spec = byte_bpe_spec()
    spec["truncation"] = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    assert len(next(ByteBpe.from_spec(spec, name="short").encode(["four"]))) == 4


def without_bytes():
    spec = byte_bpe_spec()
    del spec["model"]["vocab"]["Ġ"]
    return spec


def sentencepiece():
    backend = Tokenizer(models.BPE(byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.ByteFallback()
    return json.loads(backend.to_str())


def of_model(**settings):
    spec = byte_bpe_spec()
    spec["model"] |= settings
    return spec


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (json.loads(Tokenizer(models.WordPiece({"[UNK]": 0}, unk_token="[UNK]")).to_str()), "of the kind WordPiece"),
        (json.loads(Tokenizer(models.Unigram([("a", 0.0)])).to_str()), "of the kind Unigram"),
        (sentencepiece(), "BPE over characters"),
        (without_bytes(), "lacks 1 of the 256 bytes"),
        (of_model(end_of_word_suffix="</w>"), "marks pieces"),
        (of_model(dropout=0.1), "drops merges at random"),
    ],
)
def test_other_kinds_of_tokenizers_are_refused_with_what_is_supported(spec, message):
    with pytest.raises(UserError, match=f"other: .*{message}.*; only byte-level BPE .* supported"):
        ByteBpe.from_spec(spec, name="other")


def test_an_added_token_that_loads_with_another_id_is_refused():
    spec = byte_bpe_spec()
    spec["added_tokens"][3]["id"] = 999
    with pytest.raises(UserError, match=r"'<think>' is stored as id 999 but loads as 259"):
        ByteBpe.from_spec(spec, name="shifted")


def test_a_folder_without_a_tokenizer_and_a_missing_folder_are_refused(tmp_path):
    with pytest.raises(UserError, match="in the folder; save the tokenizer"):
        ByteBpe.load(str(tmp_path))
    with pytest.raises(UserError, match="no such folder"):
        ByteBpe.load(str(tmp_path / "missing"))
    (tmp_path / "tokenizer.json").write_text("{", encoding="utf-8")
    with pytest.raises(UserError, match="cannot be read"):
        ByteBpe.load(str(tmp_path))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[]", "holds no tokenizer"),
        ('{"model": {"type": "BPE", "merges": []}, "pre_tokenizer": {"type": "ByteLevel"}}', "lacks 256 of the 256"),
        (json.dumps(of_model(merges=[["zz", "yy"]])), "does not load .*out of vocabulary.*; save the tokenizer again"),
    ],
)
def test_a_file_that_is_no_tokenizer_is_refused_in_one_sentence(tmp_path, content, message):
    (tmp_path / "tokenizer.json").write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match=message):
        ByteBpe.load(str(tmp_path))
