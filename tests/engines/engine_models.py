"""A static model whose tokenizer cuts at white space, and documents of its words, some cut into several passages."""

import itertools
import json
from pathlib import Path

import numpy as np
from scipy.sparse import csr_array
from tokenizers import Tokenizer
from tokenizers.models import Unigram
from tokenizers.pre_tokenizers import WhitespaceSplit

from soju.sparse.indexing import Index, read_documents, search_index
from soju.sparse.static.encoder import StaticEncoder

WORDS = ("v1.5", "3.5%", "서버", "server", "쌀", "rice", "소주", "soju", *(f"w{number}" for number in range(32)))
PIECES = ("<unk>", *WORDS)
QUERIES = ("서버 쌀", "v1.5 소주", "rice w1 w2 w3", "3.5% w30 w31 w4", "server soju w0", "w0")


def save_static_model(folder: Path) -> str:
    """쌀 also means rice (0.5), 서버 server (0.7), 소주 soju (0.9); w0 is in most training documents."""
    tokenizer = Tokenizer(Unigram([(piece, -float(index)) for index, piece in enumerate(PIECES)], unk_id=0))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    size = len(PIECES)
    canonical = np.diag(np.float32([0] + [1] * len(WORDS)))
    translations = np.zeros((size, size), np.float32)
    for source, target, weight in (("서버", "server", 0.7), ("쌀", "rice", 0.5), ("소주", "soju", 0.9)):
        translations[PIECES.index(source), PIECES.index(target)] = weight
    share = np.float32([0.0] + [min(0.9, 1 / (1 + at)) for at in range(len(WORDS))])[:size]
    encoder = StaticEncoder(tokenizer, csr_array(canonical), csr_array(translations), share)
    encoder.save(folder, about={"search": {"k1": 1.2, "b": 0.75, "prior_documents": 100}})
    return str(folder)


def write_corpus(path: Path) -> str:
    """80 documents of Zipf-distributed words; every tenth is long enough for several passages; two have no word."""
    random = np.random.default_rng(3)
    odds = 1 / np.arange(1, len(WORDS) + 1)
    with path.open("w", encoding="utf-8") as file:
        for number in range(80):
            length = 400 if number % 10 == 0 else int(random.integers(3, 20))
            words = random.choice(WORDS, size=length, p=odds / odds.sum())
            text = "?!" if number in (7, 8) else " ".join(words)
            file.write(json.dumps({"id": f"문서 {number}", "text": text}, ensure_ascii=False) + "\n")
    return str(path)


def exact_search(model: str, corpus: str, folder: Path, queries=QUERIES, k: int = 20):
    """What our own exact engine finds: the reference of every other."""
    if not folder.exists():
        Index.build(read_documents([corpus]), model, folder, engine="exact")
    index = Index.open(folder)
    return search_index(index.vectors, index.model.encoder, queries, k=k, engine="exact")


def ids(search) -> list[str]:
    return [hit.document_id for hit in search.hits]


def assert_ranks_as(search, reference, *, relative: float) -> None:
    """Scores agree within `relative`; any two documents whose reference scores differ by more are in the same order."""
    scores = {hit.document_id: hit.score for hit in reference.hits}
    found = [hit for hit in search.hits if hit.document_id in scores]
    worst = min(scores.values(), default=0.0)
    missing = set(scores) - {hit.document_id for hit in search.hits}
    assert all(scores[name] <= worst * (1 + 2 * relative) for name in missing), missing
    for hit in found:
        assert abs(hit.score - scores[hit.document_id]) <= relative * scores[hit.document_id], hit
    for before, after in itertools.pairwise(found):
        assert scores[after.document_id] <= scores[before.document_id] * (1 + 2 * relative), (before, after)
