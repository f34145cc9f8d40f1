"""A retrieval test set of five documents in the layout of BEIR, written by hand."""

from pathlib import Path

CORPUS = (
    '{"_id": "d1", "title": "vaccine", "text": "vaccines protect people"}',
    '{"_id": "d2", "title": "", "text": "a doctor reads a book"}',
    '{"_id": "d3", "title": "school", "text": ""}',
    '{"_id": "d4", "text": "the sea is big"}',
    '{"_id": "d5", "title": "doctor", "text": "a doctor looks for the vaccine"}',
)
QUERIES = (
    '{"_id": "q1", "text": "백신", "metadata": {}}',
    '{"_id": "q2", "text": "학교"}',
    '{"_id": "q3", "text": "의사"}',
    '{"_id": "unjudged", "text": "바다"}',
)
QRELS = ("query-id\tcorpus-id\tscore", "q1\td1\t2", "q1\td5\t1", "q2\td3\t1", "q2\td4\t0", "q3\td4\t0")
"""Nothing answers q3."""


def write_beir(folder: Path, *, corpus=CORPUS, queries=QUERIES, qrels=QRELS, split: str = "test") -> Path:
    (folder / "qrels").mkdir(parents=True, exist_ok=True)
    for name, lines in (("corpus.jsonl", corpus), ("queries.jsonl", queries), (f"qrels/{split}.tsv", qrels)):
        (folder / name).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return folder
