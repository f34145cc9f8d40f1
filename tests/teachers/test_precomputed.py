import json

import numpy as np
import pytest
from safetensors.numpy import save_file

from soju.core.errors import UserError
from soju.teachers.dense import precomputed_embeddings

VECTORS = np.array([[3.0, 4.0], [0.0, 2.0], [-1.0, 0.0]], np.float32)
UNIT = np.array([[0.6, 0.8], [0.0, 1.0], [-1.0, 0.0]], np.float32)
TEXTS = ["물", "green tea", "검색"]


def save(folder, vectors=VECTORS, texts=TEXTS, *, name="embeddings", ending=".txt"):
    path = folder / "vectors.safetensors"
    save_file({name: vectors}, path)
    lines = texts if ending == ".txt" else [json.dumps({"text": text}, ensure_ascii=False) for text in texts]
    path.with_suffix(ending).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


@pytest.mark.parametrize("ending", [".txt", ".jsonl"])
@pytest.mark.parametrize("kind", [np.float32, np.float16])
def test_vectors_are_found_by_text_and_normalised(tmp_path, ending, kind):
    embeddings = precomputed_embeddings(save(tmp_path, VECTORS.astype(kind), ending=ending), ["검색", " 물", "검색"])
    assert embeddings.shape == (3, 2)
    np.testing.assert_allclose(embeddings[:], UNIT[[2, 0, 2]], rtol=1e-6)


def test_a_text_without_a_vector_is_named(tmp_path):
    with pytest.raises(UserError, match='1 of 2 texts have no vector, the first is "차"'):
        precomputed_embeddings(save(tmp_path), ["물", "차"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"texts": TEXTS[:2]}, "3 vectors but 2 texts"),
        ({"name": "vectors"}, 'no tensor "embeddings"'),
        ({"vectors": VECTORS.astype(np.float64)}, "F64"),
        ({"vectors": VECTORS[0]}, r"\(N, D\)"),
        ({"vectors": VECTORS * np.array([[1], [0], [1]], np.float32)}, '"green tea" is zero'),
        ({"vectors": VECTORS + np.array([[0], [0], [np.inf]], np.float32)}, '"검색" is not finite'),
    ],
)
def test_unusable_vectors_are_refused_in_a_sentence(tmp_path, change, message):
    with pytest.raises(UserError, match=message):
        precomputed_embeddings(save(tmp_path, **change), TEXTS)


def test_missing_and_broken_files_are_refused(tmp_path):
    path = save(tmp_path)
    path.with_suffix(".jsonl").write_text("{}")
    with pytest.raises(UserError, match="both are there"):
        precomputed_embeddings(path, TEXTS)
    path.with_suffix(".txt").unlink()
    with pytest.raises(UserError, match=r"vectors\.jsonl:1: text"):
        precomputed_embeddings(path, TEXTS)
    path.with_suffix(".jsonl").unlink()
    with pytest.raises(UserError, match="neither is there"):
        precomputed_embeddings(path, TEXTS)
    path.with_suffix(".txt").write_bytes(b"\xb0\xa1")
    with pytest.raises(UserError, match="not UTF-8"):
        precomputed_embeddings(path, TEXTS)
    path.with_suffix(".txt").write_text("물")
    path.write_bytes(b"no safetensors")
    with pytest.raises(UserError, match="not a safetensors file"):
        precomputed_embeddings(path, TEXTS)
    path.unlink()
    with pytest.raises(UserError, match="no such file"):
        precomputed_embeddings(path, TEXTS)
