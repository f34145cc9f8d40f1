"""A small run folder, written file by file."""

import json
from pathlib import Path

HOSTILE = (
    "<script>alert(1)</script>",
    '"onmouseover=alert(1) x="',
    "</style><b>out</b>",
    "javascript:alert(1)",
    "{{ 7 * 7 }}",
    "<img src=x onerror=alert(1)>",
    "'><svg/onload=alert(1)>",
)


def score(subject="student", value=0.5, **changes):
    return {
        "name": "ndcg@10",
        "subject": subject,
        "test_set": "parallel.dev/ko-en",
        "value": value,
        "unit": "fraction",
        "higher_is_better": True,
        "signature": "k:10|metric:ndcg",
        "interval": None,
    } | changes


def comparison(**changes):
    return {
        "subject": "student",
        "baseline": "bm25",
        "test_set": "parallel.dev/ko-en",
        "metric": "ndcg@10",
        "difference": 0.3,
        "interval": {"low": 0.2, "high": 0.4, "level": 0.95},
        "p_value": 0.01,
        "samples": 100,
        "seed": 7,
    } | changes


def figure(**changes):
    return {
        "id": "quality",
        "title": "Quality while training",
        "caption": "Judged every step.",
        "kind": "line",
        "x_label": "step",
        "y_label": "nDCG@10",
        "series": [{"name": "ko-en", "x": [1, 2, 3], "y": [0.1, 0.2, 0.3]}],
    } | changes


def expansion(text="소주", term="distill"):
    return {
        "text": text,
        "terms": [
            {"term": "소주", "language": "ko", "weight": 2.0},
            {"term": term, "language": "en", "weight": 1.0},
            {"term": "40", "language": "other", "weight": 0.1},
        ],
    }


def search(query="전통 소주", passage="Soju is distilled.", term="soju"):
    matched = {"term": term, "language": "en", "query_weight": 2.0, "document_weight": 1.5, "contribution": 3.0}
    hit = {"rank": 1, "document_id": "en-1", "score": 3.0, "passage": passage, "matched": [matched]}
    return {"query": query, "engine": "inverted", "hits": [hit]}


def full_run(folder: Path) -> Path:
    korean = {"name": "한국어", "x": ["뉴스", "법"], "y": [1, 2]}
    step = {"title": "Read", "text": "All.", "seconds": 2}
    interval = {"low": 0.7, "high": 0.9, "level": 0.95}
    write_run(
        folder,
        scores=[
            score("bm25", 0.5),
            score("student", 0.8, interval=interval),
            score("bm25", 1_900_000, name="index size", unit="bytes", higher_is_better=False),
            score("student", 0.42, name="latency", unit="milliseconds", higher_is_better=False),
        ],
        comparisons=[comparison()],
        figures=[figure(), figure(id="sizes", kind="bar", series=[korean])],
        expansions=[expansion()],
        searches=[search()],
        data={"pairs": 1200, "rejected": {"empty": 3}},
        environment={"seed": 7, "started": "2025-05-02T08:41:09+00:00", "packages": {"numpy": "2.2"}},
        story={"title": "A small encoder", "summary": ["It works."], "steps": [step]},
    )
    (folder / "resolved.yaml").write_text("seed: 7\n", encoding="utf-8")
    return folder


def write_run(folder: Path, **files) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in files.items():
        (folder / f"{name}.json").write_text(json.dumps(value, ensure_ascii=False), encoding="utf-8")
    return folder
