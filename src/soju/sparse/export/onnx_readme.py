"""The README of an ONNX folder, with a program that uses it."""

from __future__ import annotations

from typing import Any


def onnx_readme(name: str, settings: dict[str, Any]) -> str:
    """Write the README of a folder from what was measured when it was written."""
    int8 = ""
    if "int8" in settings:
        figures = settings["int8"]
        overlaps = [
            f"{value:.3f} of the {key.split('_')[1]} heaviest terms"
            for key, value in figures.items()
            if key.startswith("top_")
        ]
        int8 = _INT8.format(overlaps=" and ".join(overlaps), **figures)
    return _README.format(
        name=name, usage=USAGE, k=settings["k"], max_length=settings["max_length"], int8=int8,
        worst=settings["parity"]["largest_difference"], texts=settings["parity"]["texts"],
    )  # fmt: skip


USAGE = """import json
from pathlib import Path

import numpy as np
import onnxruntime
from tokenizers import Tokenizer

folder = Path(".")  # this one
settings, terms = (json.loads((folder / name).read_text("utf-8")) for name in ("soju_onnx.json", "terms.json"))
tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
tokenizer.encode_special_tokens = settings["split_special_tokens"]
session = onnxruntime.InferenceSession(str(folder / "model.onnx"))
tokens = tokenizer.encode_batch([settings["prompt"] + text for text in ("검색 엔진", "a search engine")])
rows = {"input_ids": [t.ids for t in tokens], "attention_mask": [t.attention_mask for t in tokens]}
outputs = session.run(["term_ids", "weights"], {name: np.array(ids, np.int64) for name, ids in rows.items()})
for ids, weights in zip(*outputs):
    print([(terms[i], round(float(w), 4)) for i, w in zip(ids, weights) if w > 0])
"""

_README = """# {name}

A cross-lingual sparse encoder for Korean and English as an ONNX graph, written by `soju export --to onnx`. It takes
`input_ids` and `attention_mask`, int64 `(batch, sequence)`, and gives `term_ids`, int64, and `weights`, float32, both
`(batch, {k})`: the {k} heaviest terms of each text, heaviest first. A text with fewer terms has weight 0 in the places
left over, whose ids mean nothing. Texts are cut after {max_length} tokens.

`pip install numpy onnxruntime tokenizers` is all it needs:

```python
{usage}```

On {texts} texts, in one padded batch and one by one, no weight of `model.onnx` differs from the model's by more than
{worst:.1e}; a difference above 1e-4 is refused when the folder is written.
{int8}
`soju_onnx.json` says what was exported with which versions. The logits inside the graph take 4 · batch · sequence ·
terms bytes while a batch is computed; keep batches of long texts small.
"""

_INT8 = """
`model.int8.onnx` has int8 weights ({bytes:,} bytes instead of {bytes_float32:,}). On {texts} texts it shares {overlaps}
with `model.onnx`; the mean cosine of their vectors is {cosine_mean:.4f}, the 5th percentile {cosine_p5:.4f}.
"""
