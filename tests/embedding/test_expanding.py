import json
import shutil
import unicodedata

import pytest
import torch
from safetensors.torch import load_file, save
from sentence_transformers import SentenceTransformer
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from embedding.pico_expansion import KOREAN, save_pico_base, save_pico_donor
from soju.core.errors import UserError
from soju.core.files import verify_manifest
from soju.data.rows import PairRow
from soju.embedding.expansion.byte_bpe import ByteBpe, token_spelling
from soju.embedding.expansion.expand import expand_model
from soju.embedding.expansion.initialise import token_translations
from soju.embedding.expansion.merges import Expansion

PAIRS = [PairRow("오늘", "the"), PairRow("검색", "x"), PairRow("오늘 검색", "the x"), PairRow("서울", "a b")]
TEXTS = ["오늘 한국 회의에서 데이터베이스 검색을 했다.", "The API를 검색ㅋㅋ", "한국어 <|im_end|> 국어"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("expanding")
    base, donor = save_pico_base(root / "base"), save_pico_donor(root / "donor")
    return base, donor, expand_model(str(base), str(donor), root / "out")


def test_the_folder_is_whole_and_says_what_was_done(folders):
    _, _, out = folders
    verify_manifest(out)
    certificate = json.loads((out / "certificate.json").read_text(encoding="utf-8"))
    assert certificate["passed"]
    assert {check["name"] for check in certificate["checks"]} == {
        "special_tokens_unchanged",
        "id_range",
        "decoding_gives_the_text_back",
        "other_languages_keep_their_ids",
        "encodings_are_coarsenings",
        "special_tokens_around_texts_are_the_same",
        "every_new_token_is_reached",
        "loaders_agree",
        "old_weights_are_bit_identical",
        "settings_are_unchanged",
        "english_embeddings_are_bit_identical",
    }
    assert all(check["texts"] > 0 for check in certificate["checks"])
    assert set(certificate["measurements"]["speed"]) == {"base", "expanded", "added_tokens"}
    assert not (out / "vocab.json").exists()


def test_every_way_of_loading_gives_the_same_ids(folders):
    base, _, out = folders
    expansion = Expansion.load(out)
    plain, auto = Tokenizer.from_file(str(out / "tokenizer.json")), AutoTokenizer.from_pretrained(out)
    stock = SentenceTransformer(str(out), device="cpu").tokenizer
    for text in TEXTS:
        ids = plain.encode(text).ids
        assert ids == auto(text)["input_ids"] == stock(text)["input_ids"]
        assert ids[-1] == ByteBpe.load(str(base)).added_tokens["<|endoftext|>"]
        assert expansion.collapse(ids) == AutoTokenizer.from_pretrained(base)(text)["input_ids"]
        assert auto.decode(ids[:-1]) == unicodedata.normalize("NFC", text)
    assert auto.get_vocab()[token_spelling(" 한국")] >= expansion.first_id


def test_specials_padding_side_and_chat_template_survive_saving_again(folders, tmp_path):
    base, _, out = folders
    old, new = AutoTokenizer.from_pretrained(base), AutoTokenizer.from_pretrained(out)
    new.save_pretrained(tmp_path)
    for tokenizer in (new, AutoTokenizer.from_pretrained(tmp_path)):
        assert tokenizer.padding_side == "left"
        assert tokenizer.chat_template == old.chat_template
        assert tokenizer.convert_tokens_to_ids(["<|im_start|>", "<think>"]) == old.convert_tokens_to_ids(
            ["<|im_start|>", "<think>"]
        )
        assert tokenizer(TEXTS)["input_ids"] == new(TEXTS)["input_ids"]
        assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (old.eos_token_id, old.pad_token_id)


def test_without_their_ids_in_the_vocabulary_special_tokens_would_move(folders):
    _, _, out = folders
    spec = json.loads((out / "tokenizer.json").read_text(encoding="utf-8"))
    kept = Tokenizer.from_str(json.dumps(spec)).token_to_id("<|im_end|>")
    for token in spec["added_tokens"]:
        del spec["model"]["vocab"][token["content"]]
    assert Tokenizer.from_str(json.dumps(spec)).token_to_id("<|im_end|>") != kept


def test_old_rows_are_kept_bit_by_bit_and_new_rows_are_means(folders):
    base, _, out = folders
    expansion = Expansion.load(out)
    old, new = (load_file(folder / "model.safetensors")["embed_tokens.weight"] for folder in (base, out))
    assert torch.equal(new[: expansion.first_id], old)
    assert new.shape == (expansion.size, 16)
    assert json.loads((out / "config.json").read_text(encoding="utf-8"))["vocab_size"] == expansion.size
    for place, ids in enumerate(expansion.decompositions):
        torch.testing.assert_close(new[expansion.first_id + place], old[list(ids)].mean(dim=0))


def test_korean_changes_and_english_vectors_do_not(folders):
    base, _, out = folders
    old, new = (SentenceTransformer(str(folder), device="cpu") for folder in (base, out))
    english = ["the cat", "other things"]
    assert (old.encode(english) == new.encode(english)).all()
    assert not (old.encode(TEXTS[:1]) == new.encode(TEXTS[:1])).all()


def test_the_difference_is_written_with_its_statistics(folders):
    _, donor, out = folders
    rows = json.loads((out / "vocab_diff.json").read_text(encoding="utf-8"))
    statistics = json.loads((out / "vocab_diff_stats.json").read_text(encoding="utf-8"))
    assert {row["token"] for row in rows} >= set(KOREAN) - {"국어", "오", "늘"}
    assert statistics["candidates"] == len(rows)
    assert statistics["candidates"] + sum(statistics["refused"].values()) == ByteBpe.load(str(donor)).size
    assert statistics["refused"]["in-base"] == 7  # 한 국 어 오 늘 검 국어
    assert statistics["fertility"]["en"]["base"] == statistics["fertility"]["en"]["expanded"]
    assert statistics["fertility"]["ko"]["base"]["tokens"] > statistics["fertility"]["ko"]["expanded"]["tokens"]
    assert sum(statistics["scripts"]["expanded"].values()) == pytest.approx(1, abs=1e-5)


def test_rows_that_padded_the_base_are_used_first(tmp_path):
    base = save_pico_base(tmp_path / "base", padding_rows=200)
    out = expand_model(str(base), str(save_pico_donor(tmp_path / "donor")), tmp_path / "out", speed=False)
    old, new = (load_file(folder / "model.safetensors")["embed_tokens.weight"] for folder in (base, out))
    expansion = Expansion.load(out)
    assert len(new) == len(old) > expansion.size
    assert torch.equal(new[expansion.size :], old[expansion.size :])
    assert not torch.equal(new[expansion.first_id], old[expansion.first_id])


def test_a_half_precision_base_stays_half_precision(tmp_path):
    base = save_pico_base(tmp_path / "base", dtype=torch.bfloat16)
    out = expand_model(str(base), str(save_pico_donor(tmp_path / "donor")), tmp_path / "out", speed=False)
    assert load_file(out / "model.safetensors")["embed_tokens.weight"].dtype == torch.bfloat16


def corpus_file(folder, lines=("한국 검색 서울",) * 30):
    path = folder / "ko.txt"
    path.write_text("".join(f"{line} {number}\n" for number, line in enumerate(lines)), encoding="utf-8")
    return path


def test_a_corpus_decides_the_order_and_a_part_of_it_only_measures(folders, tmp_path):
    base, donor, _ = folders
    corpus = corpus_file(tmp_path)
    out = expand_model(str(base), str(donor), tmp_path / "out", corpus=corpus, limit=4, speed=False)
    expansion = Expansion.load(out)
    assert len(expansion.tokens) == 4
    assert " 서울" not in expansion.texts  # no candidate
    statistics = json.loads((out / "vocab_diff_stats.json").read_text(encoding="utf-8"))
    assert statistics["fertility"]["ko"]["base"]["texts"] == 3


def test_a_corpus_of_one_text_decides_the_order_too(folders, tmp_path):
    base, donor, _ = folders
    corpus = corpus_file(tmp_path, ["검색 " * 9])
    out = expand_model(str(base), str(donor), tmp_path / "out", corpus=corpus, limit=4, speed=False)
    assert "검색" in Expansion.load(out).texts


def save_donor_model(folder, donor, weights):
    shutil.copytree(donor, folder)
    (folder / "model.safetensors").write_bytes(weights)
    return folder


def test_vectors_of_a_donor_that_cannot_be_used_are_refused_in_one_sentence(folders, tmp_path):
    base, donor, _ = folders
    broken = save_donor_model(tmp_path / "broken", donor, b"no safetensors")
    with pytest.raises(UserError, match=r"the weights in its folder cannot be read .*; fetch them again"):
        expand_model(str(base), str(broken), tmp_path / "a", initialiser="omp")
    small = save_donor_model(tmp_path / "small", donor, save({"embed_tokens.weight": torch.ones(3, 4)}))
    with pytest.raises(UserError, match="its model 3 rows; give a donor whose tokenizer and model belong together"):
        expand_model(str(base), str(small), tmp_path / "a", initialiser="omp")
    (broken / "model.safetensors.index.json").write_text("{}", encoding="utf-8")
    with pytest.raises(UserError, match="cannot be read"):
        expand_model(str(base), str(broken), tmp_path / "a", initialiser="omp")
    assert not (tmp_path / "a").exists()


def test_a_base_with_fewer_rows_than_ids_is_refused(folders, tmp_path):
    _, donor, _ = folders
    base = save_pico_base(tmp_path / "base", padding_rows=-2)
    with pytest.raises(UserError, match=r"its tokenizer has 275 ids and its embedding 273 rows"):
        expand_model(str(base), str(donor), tmp_path / "a")


@pytest.mark.parametrize("initialiser", ["omp", "aligned", "noise"])
def test_every_initialiser_makes_a_certified_model(folders, tmp_path, initialiser):
    base, donor, _ = folders
    corpus = corpus_file(tmp_path)
    out = expand_model(
        str(base), str(donor), tmp_path / "out", corpus=corpus, pairs=PAIRS, initialiser=initialiser, speed=False
    )
    verify_manifest(out)
    weight = load_file(out / "model.safetensors")["embed_tokens.weight"]
    assert weight.isfinite().all()


def test_a_new_token_is_translated_by_what_stands_on_the_other_side(folders):
    base, _, out = folders
    old, new, expansion = ByteBpe.load(str(base)), ByteBpe.load(str(out)), Expansion.load(out)
    table = token_translations(PAIRS, old, new, expansion)
    assert table.shape == (len(expansion.tokens), old.size)
    ((today,),) = new.encode(["오늘"])
    ((the,),) = old.encode(["the"])
    row = table[[today - expansion.first_id]].tocoo()
    assert row.col[row.data.argmax()] == the
    assert {round(float(total), 5) for total in table.sum(axis=1)} == {0.0, 1.0}
    ((unseen, *_),) = new.encode(["데이터"])
    assert table[[unseen - expansion.first_id]].nnz == 0


def test_added_tokens_are_written_for_comparison_with_a_certificate_that_says_so(folders, tmp_path):
    base, donor, _ = folders
    out = expand_model(str(base), str(donor), tmp_path / "out", method="added-tokens", speed=False)
    certificate = json.loads((out / "certificate.json").read_text(encoding="utf-8"))
    failed = {check["name"] for check in certificate["checks"] if not check["passed"]}
    assert "encodings_are_coarsenings" in failed
    assert "id_range" not in failed
    words = AutoTokenizer.from_pretrained(out).tokenize("저 한국인")
    assert " 한국" in words  # cut out of the word before BPE sees it


def test_what_cannot_be_expanded_is_refused_in_one_sentence(folders, tmp_path):
    base, donor, out = folders
    with pytest.raises(UserError, match="exists already"):
        expand_model(str(base), str(donor), out)
    with pytest.raises(UserError, match=r"no modules.json"):
        expand_model(str(base.parent / "base-plain"), str(donor), tmp_path / "a")
    with pytest.raises(UserError, match="no initialiser; choose one of mean"):
        expand_model(str(base), str(donor), tmp_path / "a", initialiser="magic")
    with pytest.raises(UserError, match=r"omp needs vectors .*give --corpus"):
        expand_model(str(base), str(donor), tmp_path / "a", initialiser="omp")
    with pytest.raises(UserError, match=r"aligned learns from sentence pairs .* give --pairs"):
        expand_model(str(base), str(donor), tmp_path / "a", initialiser="aligned")
    with pytest.raises(UserError, match="no such file"):
        expand_model(str(base), str(donor), tmp_path / "a", corpus=tmp_path / "missing.txt")
    (tmp_path / "en.txt").write_text("no Korean\n" * 20, encoding="utf-8")
    with pytest.raises(UserError, match=r"en.txt: no Korean text; give Korean text"):
        expand_model(str(base), str(donor), tmp_path / "a", corpus=tmp_path / "en.txt")
    with pytest.raises(UserError, match="limit: got 0; give at least 1"):
        expand_model(str(base), str(donor), tmp_path / "a", limit=0)
    with pytest.raises(UserError, match="no Korean token"):
        expand_model(str(base), str(base), tmp_path / "a")
    (tmp_path / "words").mkdir()
    (tmp_path / "words" / "tokenizer.json").write_text('{"model": {"type": "WordPiece"}}', encoding="utf-8")
    with pytest.raises(UserError, match=r"WordPiece; only byte-level BPE"):
        expand_model(str(tmp_path / "words"), str(donor), tmp_path / "a")
    assert not (tmp_path / "a").exists()
