import json
import shutil

import pytest
from sentence_transformers import SentenceTransformer
from transformers import AutoTokenizer

from embedding.byte_bpes import write_base_folder
from embedding.pico_expansion import MERGES, parts_of, save_pico_base, save_pico_donor
from soju.embedding.expansion.byte_bpe import ByteBpe, token_spelling
from soju.embedding.expansion.certificate import CertificateError, certify
from soju.embedding.expansion.difference import find_candidates
from soju.embedding.expansion.merges import expand_by_added_tokens, expand_by_merges, expanded_spec, write_tokenizer

KOREAN = {"ko": ["한국어 회의", "오늘 한국 서울"]}


@pytest.fixture
def made(tmp_path):
    """A base folder, its expansion and the folder with it."""
    base, _ = write_base_folder(tmp_path / "base", MERGES)
    donor = ByteBpe.load(str(save_pico_donor(tmp_path / "donor")))
    expansion = expand_by_merges(base, find_candidates(base, donor).candidates)
    write_tokenizer(base, expansion, tmp_path / "out")
    return base, expansion, tmp_path / "out"


def failed(certificate):
    return {check.name for check in certificate.failed}


def rewrite(folder, change):
    file = folder / "tokenizer.json"
    spec = json.loads(file.read_text(encoding="utf-8"))
    change(spec)
    file.write_text(json.dumps(spec), encoding="utf-8")


def test_a_right_expansion_passes_and_its_certificate_is_written(made):
    base, expansion, out = made
    certificate = certify(base, expansion, out, texts=KOREAN, speed=False)
    assert failed(certificate) == set()
    certificate.raise_if_failed(out)
    certificate.save(out)
    written = json.loads((out / "certificate.json").read_text(encoding="utf-8"))
    assert written["passed"]
    assert [check["name"] for check in written["checks"]] == [check.name for check in certificate.checks]
    assert certificate.measurements["longest_growth"] == 0
    assert certificate.measurements["tokens_after"] < certificate.measurements["tokens_before"]
    assert 0 < certificate.measurements["new_tokens_used"] <= 1


def test_prepended_merges_fail(made):
    base, expansion, out = made

    def prepend(spec):
        old = spec["model"]["merges"][: len(base.merges)]
        new = spec["model"]["merges"][len(base.merges) :]
        halves = len(MERGES) - 3  # a new merge needs the syllables, so it goes right behind them
        spec["model"]["merges"] = [*old[:halves], *new, *old[halves:]]

    rewrite(out, prepend)
    certificate = certify(base, expansion, out, texts=KOREAN, speed=False)
    assert failed(certificate) == {"encodings_are_coarsenings", "special_tokens_around_texts_are_the_same"}
    with pytest.raises(CertificateError, match=r"broke 2 of 8 checks \(encodings_are_coarsenings: .*do not use it"):
        certificate.raise_if_failed(out)


def test_added_tokens_fail(made, tmp_path):
    base, expansion, _ = made
    added = expand_by_added_tokens(base, [token for token in expansion.tokens if token not in expansion.intermediates])
    write_tokenizer(base, added, tmp_path / "added")
    found = failed(certify(base, added, tmp_path / "added", texts=KOREAN, speed=False))
    assert "encodings_are_coarsenings" in found
    assert not found & {"special_tokens_unchanged", "id_range", "loaders_agree"}


def test_shifted_special_tokens_fail(made):
    base, expansion, out = made

    def forget_ids(spec):  # what writing the stored file without the base's added tokens in its vocabulary does
        for content in base.added_tokens:
            del spec["model"]["vocab"][content]

    rewrite(out, forget_ids)
    found = failed(certify(base, expansion, out, texts=KOREAN, speed=False))
    assert {"special_tokens_unchanged", "id_range"} <= found


def test_other_chat_templates_and_padding_sides_fail(made):
    base, expansion, out = made
    config = json.loads((out / "tokenizer_config.json").read_text(encoding="utf-8"))
    (out / "tokenizer_config.json").write_text(json.dumps(config | {"padding_side": "right"}), encoding="utf-8")
    (check,) = certify(base, expansion, out, speed=False).failed
    assert check.name == "special_tokens_unchanged"
    assert "padding_side is 'right' instead of 'left'" in check.failure


def test_a_forgotten_end_of_text_fails(made):
    base, expansion, out = made
    rewrite(out, lambda spec: spec.update(post_processor=None))
    assert "special_tokens_around_texts_are_the_same" in failed(certify(base, expansion, out, speed=False))


def test_a_merge_of_english_fails(made):
    base, expansion, out = made
    rewrite(out, lambda spec: spec["model"]["merges"].append(["c", "o"]) or spec["model"]["vocab"].update(co=9999))
    assert {"other_languages_keep_their_ids", "id_range"} <= failed(certify(base, expansion, out, speed=False))


def test_a_custom_pre_tokenizer_that_transformers_rebuilds_is_found(tmp_path):
    base, _ = write_base_folder(tmp_path / "base", parts_of("한국"))
    donor = ByteBpe.load(str(save_pico_donor(tmp_path / "donor")))
    expansion = expand_by_merges(base, find_candidates(base, donor).candidates)
    spec = expanded_spec(base, expansion)
    spec["pre_tokenizer"]["pretokenizers"][0]["pattern"] = {"Regex": r"\s+"}
    write_tokenizer(base, expansion, tmp_path / "out")
    (tmp_path / "out" / "tokenizer.json").write_text(json.dumps(spec), encoding="utf-8")
    assert "loaders_agree" in failed(certify(base, expansion, tmp_path / "out", texts=KOREAN, speed=False))


def expanded_models(tmp_path):
    """The base, the expansion, and the folder and models before and after it, not yet saved."""
    folder = save_pico_base(tmp_path / "base")
    base = ByteBpe.load(str(folder))
    donor = ByteBpe.load(str(save_pico_donor(tmp_path / "donor")))
    expansion = expand_by_merges(base, find_candidates(base, donor).candidates)
    old, new = (SentenceTransformer(str(folder), device="cpu") for _ in range(2))
    new[0].auto_model.resize_token_embeddings(expansion.size, mean_resizing=False)
    shutil.copytree(folder, tmp_path / "out")
    write_tokenizer(base, expansion, tmp_path / "out")
    new[0].processor = AutoTokenizer.from_pretrained(tmp_path / "out")
    return base, expansion, tmp_path / "out", (old, new)


def test_a_changed_model_fails(tmp_path):
    base, expansion, out, (old, new) = expanded_models(tmp_path)

    def found():
        return failed(certify(base, expansion, out, models=(old, new), speed=False))

    weight_VD = new[0].auto_model.get_input_embeddings().weight.data
    assert found() == set()
    unused = base.vocabulary[token_spelling(b"\xff")]  # no text holds it, so no vector shows it
    weight_VD[unused] += 1
    assert found() == {"old_weights_are_bit_identical"}
    weight_VD[unused] = old[0].auto_model.get_input_embeddings().weight.data[unused]
    weight_VD[expansion.first_id] = float("nan")
    assert found() == {"old_weights_are_bit_identical"}
    weight_VD[expansion.first_id] = 0
    new.prompts["query"] = "query : "
    assert found() == {"settings_are_unchanged"}
    new.prompts["query"] = ""
    weight_VD[base.vocabulary["e"]] += 1
    assert found() == {"old_weights_are_bit_identical", "english_embeddings_are_bit_identical"}
