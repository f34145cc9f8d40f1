import json

import numpy as np
import pytest

from soju.core.errors import IntegrityError, UserError
from soju.teachers.dense import Embeddings, SentenceTransformerTeacher, cached_embeddings
from teachers.pico_teacher import save_pico_teacher


class Counting:
    """A teacher that says how often it was asked: a text's vector is (its length, 1), normalised."""

    def __init__(self, fail_after=None, name="counting"):
        self.identity = {"model": name}
        self.asked = []
        self.fail_after = fail_after

    def embed(self, texts):
        if self.fail_after is not None and len(self.asked) >= self.fail_after:
            raise KeyboardInterrupt
        self.asked += texts
        return vectors_of(texts)


def vectors_of(texts):
    vectors = np.array([[len(text), 1] for text in texts], np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


TEXTS = ["a", "bb", "ccc", "dddd", "eeeee", "ffffff", "ggggggg"]


def test_vectors_come_back_in_the_order_of_the_texts_and_from_disk(tmp_path):
    first = cached_embeddings(Counting(), TEXTS, tmp_path, shard_size=2)
    again = Counting()
    second = cached_embeddings(again, TEXTS[::-1], tmp_path)
    assert again.asked == []
    assert first.shape == (7, 2)
    np.testing.assert_allclose(np.asarray(first), vectors_of(TEXTS), rtol=1e-6)
    np.testing.assert_array_equal(second[:], first[::-1])


def test_only_missing_texts_are_embedded_and_repeated_ones_once(tmp_path):
    cached_embeddings(Counting(), ["a", "bb"], tmp_path)
    teacher = Counting()
    embeddings = cached_embeddings(teacher, ["bb", "ccc", "a", "ccc", "dddd", "ccc"], tmp_path)
    assert teacher.asked == ["ccc", "dddd"]
    np.testing.assert_allclose(embeddings[:], vectors_of(["bb", "ccc", "a", "ccc", "dddd", "ccc"]), rtol=1e-6)


def test_interrupted_work_is_kept_and_ends_in_the_same_files(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        cached_embeddings(Counting(fail_after=4), TEXTS, tmp_path / "interrupted", shard_size=2)
    teacher = Counting()
    cached_embeddings(teacher, TEXTS, tmp_path / "interrupted", shard_size=2)
    assert teacher.asked == TEXTS[4:]
    cached_embeddings(Counting(), TEXTS, tmp_path / "straight", shard_size=2)
    left, right = (
        {path.relative_to(root): path.read_bytes() for path in root.rglob("*") if path.is_file()}
        for root in (tmp_path / "interrupted", tmp_path / "straight")
    )
    assert left == right


def test_teachers_do_not_share_vectors(tmp_path):
    cached_embeddings(Counting(), TEXTS, tmp_path)
    other = Counting(name="another")
    cached_embeddings(other, TEXTS, tmp_path)
    assert other.asked == TEXTS


def test_a_shard_whose_description_was_not_written_does_not_exist(tmp_path):
    cached_embeddings(Counting(), TEXTS[:2], tmp_path)
    (shard,) = tmp_path.glob("*/*.npy")
    shard.with_suffix(".json").unlink()
    teacher = Counting()
    cached_embeddings(teacher, TEXTS[:2], tmp_path)
    assert teacher.asked == TEXTS[:2]


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    "damage",
    [flip_a_bit, lambda path: path.write_bytes(path.read_bytes()[:-1]), lambda path: path.unlink()],
    ids=["a flipped bit", "a lost byte", "a lost file"],
)
def test_a_damaged_shard_is_refused_with_the_remedy_and_the_remedy_works(tmp_path, damage):
    cached_embeddings(Counting(), TEXTS, tmp_path, shard_size=4)
    shard = sorted(tmp_path.glob("*/*.npy"))[0]
    damage(shard)
    with pytest.raises(IntegrityError, match=f"remove {shard.stem}"):
        cached_embeddings(Counting(), TEXTS, tmp_path)
    for path in shard.parent.glob(f"{shard.stem}.*"):
        path.unlink()
    np.testing.assert_allclose(cached_embeddings(Counting(), TEXTS, tmp_path)[:], vectors_of(TEXTS), rtol=1e-6)


def test_a_damaged_description_is_refused(tmp_path):
    cached_embeddings(Counting(), TEXTS, tmp_path)
    (shard,) = tmp_path.glob("*/*.npy")
    shard.with_suffix(".json").write_text("[]")
    with pytest.raises(IntegrityError, match="incomplete"):
        cached_embeddings(Counting(), TEXTS, tmp_path)


def test_an_unusable_vector_is_refused_and_nothing_of_its_shard_kept(tmp_path):
    class Broken(Counting):
        def embed(self, texts):
            return super().embed(texts) * 0

    with pytest.raises(UserError, match='"a" is zero'):
        cached_embeddings(Broken(), TEXTS, tmp_path)
    assert not list(tmp_path.glob("*/*.npy"))


def test_the_cache_says_whose_vectors_it_holds(tmp_path):
    cached_embeddings(Counting(), ["a"], tmp_path)
    (about,) = tmp_path.glob("*/teacher.json")
    assert json.loads(about.read_text(encoding="utf-8")) == {"model": "counting"}


def test_no_texts_need_no_teacher(tmp_path):
    assert len(cached_embeddings(Counting(), [], tmp_path)) == 0


def test_one_several_and_all_vectors_can_be_taken():
    shards = [np.eye(3, dtype=np.float32), -np.eye(3, dtype=np.float32)]
    embeddings = Embeddings(shards, [1, 0, 1], [0, 2, 1])
    assert embeddings[0].tolist() == [-1, 0, 0]
    assert embeddings[[2, 1, 2]].tolist() == [[0, -1, 0], [0, 0, 1], [0, -1, 0]]
    assert embeddings[np.array([], np.int64)].shape == (0, 3)
    assert embeddings[1:].tolist() == [[0, 0, 1], [0, -1, 0]]


def test_a_model_and_its_cache_agree(tmp_path):
    teacher = SentenceTransformerTeacher(str(save_pico_teacher(tmp_path / "pico")), device="cpu")
    texts = ["검색 엔진", "water", "물"]
    embeddings = cached_embeddings(teacher, texts, tmp_path / "cache")
    np.testing.assert_allclose(embeddings[:], teacher.embed(texts), atol=1e-6)
    fresh = SentenceTransformerTeacher(str(tmp_path / "pico"), device="cpu")
    np.testing.assert_array_equal(cached_embeddings(fresh, texts, tmp_path / "cache")[:], embeddings[:])
    assert "_model" not in vars(fresh)  # the weights were not loaded
