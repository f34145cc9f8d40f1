import json
import shutil

import numpy as np
import pytest
from sentence_transformers import SentenceTransformer

from soju.core.errors import UserError
from soju.core.model_folder import find_model_folder
from soju.teachers.dense import SentenceTransformerTeacher, unit_vectors
from teachers.pico_teacher import save_pico_teacher

TEXTS = ["검색 엔진", "water", "물", "search engine 검색 물"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_pico_teacher(tmp_path_factory.mktemp("teacher") / "pico")


def copy_of(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "copy")


def test_a_teacher_gives_the_models_vectors_with_length_1(folder):
    vectors = SentenceTransformerTeacher(str(folder), device="cpu").embed(TEXTS)
    expected = SentenceTransformer(str(folder), device="cpu").encode(TEXTS, normalize_embeddings=True)
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(vectors, expected, atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)


def test_batches_change_nothing_but_rounding(folder):
    one, all_at_once = (
        SentenceTransformerTeacher(str(folder), batch_size=size, device="cpu").embed(TEXTS) for size in (1, 4)
    )
    np.testing.assert_allclose(one, all_at_once, atol=1e-6)


def test_texts_are_cut_to_the_maximum_length(folder):
    teacher = SentenceTransformerTeacher(str(folder), max_length=3, device="cpu")  # [CLS], one token, [SEP]
    vectors = teacher.embed(["물 water search", "물"])
    np.testing.assert_allclose(vectors[0], vectors[1], atol=1e-6)


def test_a_prompt_stands_before_every_text(folder):
    prompted = SentenceTransformerTeacher(str(folder), prompt="query : ", device="cpu").embed(["물"])
    plain = SentenceTransformerTeacher(str(folder), device="cpu").embed(["query : 물", "물"])
    np.testing.assert_allclose(prompted[0], plain[0], atol=1e-6)
    assert np.abs(prompted[0] - plain[1]).max() > 1e-3


def test_identity_follows_the_files_and_settings_and_not_the_place(folder, tmp_path):
    identity = SentenceTransformerTeacher(str(folder)).identity
    copy = copy_of(folder, tmp_path)
    (copy / "README.md").write_text("another text about the same model", encoding="utf-8")
    assert SentenceTransformerTeacher(str(copy)).identity == identity
    assert SentenceTransformerTeacher(str(folder), max_length=8).identity != identity
    assert SentenceTransformerTeacher(str(folder), prompt="query: ").identity != identity
    config = json.loads((copy / "config.json").read_text(encoding="utf-8"))
    (copy / "config.json").write_text(json.dumps(config | {"layer_norm_eps": 1e-5}), encoding="utf-8")
    assert SentenceTransformerTeacher(str(copy)).identity != identity


def test_identity_of_a_hub_model_is_its_commit(folder, tmp_path, monkeypatch):
    snapshot = shutil.copytree(folder, tmp_path / "0123abc")
    asked = {}

    def download(name, **options):
        asked.update(options, name=name)
        return str(snapshot)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    teacher = SentenceTransformerTeacher("intfloat/multilingual-e5-base", revision="refs/pr/1", max_length=8)
    assert teacher.identity == {"model": "intfloat/multilingual-e5-base@0123abc", "max_length": 8, "prompt": None}
    assert (asked["name"], asked["revision"]) == ("intfloat/multilingual-e5-base", "refs/pr/1")
    assert not [pattern for pattern in asked["allow_patterns"] if pattern.endswith((".bin", ".pt", ".py", "*"))]


def install(package, folder, site, monkeypatch):
    """Make a package that carries the model, as pip would leave it."""
    module = package.replace("-", "_")
    (site / module).mkdir(parents=True)
    (site / module / "__init__.py").write_text("raise RuntimeError('a data package need not be imported')")
    shutil.copytree(folder, site / module / "model")
    files = [path.relative_to(site) for path in (site / module).rglob("*") if path.is_file()]
    information = site / f"{module}-1.0.dist-info"
    information.mkdir()
    (information / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
    (information / "RECORD").write_text("".join(f"{file.as_posix()},,\n" for file in files))
    monkeypatch.syspath_prepend(str(site))
    return site / module / "model"


def test_a_model_inside_an_installed_package_is_found_without_importing_it(folder, tmp_path, monkeypatch):
    inside = install("pico-teacher-model", folder, tmp_path / "site", monkeypatch)
    assert find_model_folder("package:pico-teacher-model").path == inside
    teacher = SentenceTransformerTeacher("package:pico-teacher-model", device="cpu")
    assert teacher.identity == SentenceTransformerTeacher(str(folder)).identity
    assert teacher.embed(TEXTS).shape == (4, 8)


def test_a_bare_transformer_inside_a_package_is_found_by_its_configuration(folder, tmp_path, monkeypatch):
    inside = install("pico-bare-model", folder.parent / "pico-plain", tmp_path / "site", monkeypatch)
    assert find_model_folder("package:pico-bare-model").path == inside


def test_a_missing_package_is_the_line_that_installs_it():
    with pytest.raises(UserError, match=r"pip install gt-all-no-such-model$"):
        SentenceTransformerTeacher("package:gt-all-no-such-model")


def test_a_package_without_a_model_is_refused():
    with pytest.raises(UserError, match="found none; give a folder's path"):
        find_model_folder("package:pytest")


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere/model", "models/teachers/nowhere"])
def test_a_missing_folder_is_not_looked_for_on_the_hub(name):
    with pytest.raises(UserError, match="no such model folder"):
        find_model_folder(name)


def test_a_hub_that_does_not_answer_is_one_sentence(monkeypatch):
    def download(*_, **__):
        raise ConnectionError("no route\nand more")

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    with pytest.raises(UserError, match=r"BAAI/bge-m3: neither .* \(no route\); check the name"):
        find_model_folder("BAAI/bge-m3")


def test_pickled_weights_are_refused_with_the_reason(folder, tmp_path):
    copy = copy_of(folder, tmp_path)
    (copy / "model.safetensors").rename(copy / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"weights pytorch_model\.bin are a pickle.*can run code"):
        SentenceTransformerTeacher(str(copy))


def test_a_pickled_module_below_is_refused_and_a_stray_pickle_ignored(folder, tmp_path):
    copy = copy_of(folder, tmp_path)
    (copy / "colbert_linear.pt").write_bytes(b"never read: the folder has safetensors")
    find_model_folder(str(copy))
    (copy / "2_Dense").mkdir()
    (copy / "2_Dense" / "config.json").write_text("{}")
    (copy / "2_Dense" / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(UserError, match=r"2_Dense/pytorch_model\.bin are a pickle"):
        find_model_folder(str(copy))


def test_a_folder_without_weights_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"no \.safetensors file"):
        find_model_folder(str(tmp_path))


@pytest.mark.parametrize(("bad", "what"), [(0.0, "zero"), (np.nan, "not finite"), (np.inf, "not finite")])
def test_an_unusable_vector_names_its_text(bad, what):
    vectors = np.array([[3.0, 4.0], [bad, 0.0]])
    with pytest.raises(UserError, match=f'"물" is {what}'):
        unit_vectors(vectors, ["water", "물"], source="teacher")


def test_vectors_of_any_length_become_unit_vectors():
    vectors = np.array([[3e30, 4e30], [3e-30, 4e-30], [0.0, -2.0]], np.float32)
    expected = np.array([[0.6, 0.8], [0.6, 0.8], [0, -1]], np.float32)
    np.testing.assert_allclose(unit_vectors(vectors, ["a", "b", "c"], source="t"), expected, rtol=1e-6)


def test_a_wrong_number_of_vectors_is_our_mistake():
    with pytest.raises(ValueError, match="vectors of 2 texts"):
        unit_vectors(np.ones((3, 2)), ["a", "b"], source="teacher")
