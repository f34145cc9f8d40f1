"""The vectorised term losses: their share of a training step, goal 3 %, and equality with the row-by-row ones.

One step is the forward and backward pass of a 6-layer masked language model (D 384, 32,000 terms) with our head on 64
texts of about 8 tokens, all losses of mode ``terms`` included. The term losses' own time is their forward pass and
their backward pass down to the (B, V) they read. The peer is the same definition as a loop over rows, the reference of
``tests/sparse/reference_terms.py``. Timings alternate; medians.

    python benchmarks/terms_loss.py
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from torch import Tensor
from transformers import PreTrainedTokenizerFast, XLMRobertaConfig, XLMRobertaForMaskedLM

from soju.core.files import write_json
from soju.sparse.losses import RowTargets, TermTargets, flops
from soju.sparse.splade import SpladeEncoder
from soju.sparse.terms.losses import in_batch_distillation, signed_terms, v19_terms

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from fixtures.reference_terms import row_by_row

RESULTS = Path(__file__).parent / "results"
TERMS, WIDTH, LAYERS, TEXTS = 32_000, 384, 6, 64
ACTIVE_SHARE = 0.015
GOAL_SHARE, GOAL_DIFFERENCE = 0.03, 1e-5
SPECIAL = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
WEIGHTS = {"self": 3.0, "korean": 2.0, "english": 12.0, "margin": 2.0}


def build_encoder(seed: int) -> SpladeEncoder:
    """Build the student with random weights; its head's bias is set later."""
    words = {word: number for number, word in enumerate([*SPECIAL, *(f"w{n}" for n in range(TERMS - len(SPECIAL)))])}
    backend = Tokenizer(WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = WhitespaceSplit()
    backend.post_processor = TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)])
    names = {"bos_token": "<s>", "cls_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>", "sep_token": "</s>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", mask_token="<mask>", **names)
    torch.manual_seed(seed)
    config = XLMRobertaConfig(
        vocab_size=TERMS,
        hidden_size=WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=12,
        intermediate_size=4 * WIDTH,
        max_position_embeddings=66,
        pad_token_id=1,
        bos_token_id=0,
        eos_token_id=2,
    )
    return SpladeEncoder.from_model(XLMRobertaForMaskedLM(config), tokenizer, max_seq_length=64, device="cpu")


def build_batch(encoder: SpladeEncoder, seed: int) -> tuple[dict[str, Tensor], list[RowTargets]]:
    """Draw texts of 4 to 8 words, 8 tokens with the special ones on average, and 0 to 8 targets of either language."""
    rng = np.random.default_rng(seed)
    texts, rows = [], []
    for _ in range(TEXTS):
        own = rng.choice(np.arange(len(SPECIAL), TERMS), int(rng.integers(4, 9)), replace=False).tolist()
        texts.append(" ".join(f"w{number - len(SPECIAL)}" for number in own))
        korean, english = (
            [(int(term), float(rng.uniform(0.5, 1))) for term in rng.choice(TERMS, int(rng.integers(9)), replace=False)]
            for _ in range(2)
        )
        rows.append(RowTargets(own, korean, english))
    return dict(encoder.preprocess(texts)), rows


def set_active_share(encoder: SpladeEncoder, features: dict[str, Tensor]) -> float:
    """Shift the head's bias until `ACTIVE_SHARE` of the weights are active, as in a trained student; return it."""
    with torch.no_grad():
        maxima = encoder(dict(features))["signed_maxima"]
        encoder[0].model.get_output_embeddings().bias -= torch.quantile(maxima.flatten()[::7], 1 - ACTIVE_SHARE)
        return float((encoder(dict(features))["sentence_embedding"] > 0).float().mean())


def seconds(work: Callable[[], object]) -> float:
    """Time one call."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def measure(*, form: str, repetitions: int, seed: int) -> dict[str, Any]:
    """Time a step, the term losses alone, and the loop over rows; compare their values and gradients."""
    encoder = build_encoder(seed)
    encoder.train()
    features, rows = build_batch(encoder, seed)
    active = set_active_share(encoder, features)
    targets = TermTargets.from_rows(rows)
    teacher = torch.randn(TEXTS, WIDTH, generator=torch.Generator().manual_seed(seed))
    signed = form == "signed"

    def terms_of(values: Tensor) -> dict[str, Tensor]:
        return (signed_terms if signed else v19_terms)(values, targets).named()

    def weighted(losses: dict[str, Tensor]) -> Tensor:
        return torch.stack([WEIGHTS[name] * loss for name, loss in losses.items()]).sum()

    def step() -> None:
        encoder.zero_grad(set_to_none=True)
        output = encoder(dict(features))
        weights = output["sentence_embedding"]
        loss = weighted(terms_of(output["signed_maxima"] if signed else weights))
        (loss + 1.5 * in_batch_distillation(weights, teacher) + 5e-5 * flops(weights)).backward()

    with torch.no_grad():
        output = encoder(dict(features))
    values = output["signed_maxima" if signed else "sentence_embedding"].detach().clone().requires_grad_()

    def ours() -> None:
        torch.autograd.grad(weighted(terms_of(values)), values)

    def loop() -> None:
        torch.autograd.grad(weighted(row_by_row(values, rows, signed=signed)), values)

    works = {"step": step, "ours": ours, "loop": loop}
    for work in works.values():
        work()
    times: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(repetitions):
        for name, work in works.items():
            times[name].append(seconds(work))
    medians = {name: statistics.median(taken) for name, taken in times.items()}
    return {
        "form": form,
        "texts": TEXTS,
        "tokens_per_text": float(features["attention_mask"].sum() / TEXTS),
        "active_share": active,
        "targets": {kind: len(getattr(targets, kind).ids_T) for kind in ("source", "korean", "english")},
        "repetitions": repetitions,
        "median_ms": {name: 1e3 * taken for name, taken in medians.items()},
        "share_of_step": medians["ours"] / medians["step"],
        "difference": difference(terms_of, values, rows, signed=signed),
    }


def difference(
    terms_of: Callable[[Tensor], dict[str, Tensor]], values: Tensor, rows: list[RowTargets], *, signed: bool
) -> float:
    """Return the largest relative difference of a loss or of a gradient to the loop's, which runs in float64.

    A gradient is compared with the largest entry of its loss's.
    """
    exact = values.detach().double().requires_grad_()
    found, expected = terms_of(values), row_by_row(exact, rows, signed=signed)
    worst = 0.0
    for name, loss in expected.items():
        ours = torch.autograd.grad(found[name], values, retain_graph=True)[0].double()
        theirs = torch.autograd.grad(loss, exact, retain_graph=True)[0]
        value = abs(found[name].item() - loss.item()) / max(abs(loss.item()), 1e-12)
        gradient = float((ours - theirs).abs().max() / theirs.abs().max().clamp_min(1e-12))
        worst = max(worst, value, gradient)
    return worst


def claims(result: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the lines that `make bench` reads."""
    name, milliseconds = f"terms_loss.{result['form']}", result["median_ms"]
    share, worst, faster = result["share_of_step"], result["difference"], milliseconds["loop"] / milliseconds["ours"]
    return [
        {
            "benchmark": name,
            "metric": "term losses, forward and backward, ms (peer: whole step; ratio: share)",
            "ours": round(milliseconds["ours"], 3),
            "peer": round(milliseconds["step"], 1),
            "ratio": round(share, 5),
            "goal": f"<= {GOAL_SHARE:g}",
            "holds": share <= GOAL_SHARE,
        },
        {
            "benchmark": name,
            "metric": "largest relative difference of values and gradients to the loop in float64",
            "ours": worst,
            "peer": 0.0,
            "ratio": worst,
            "goal": f"<= {GOAL_DIFFERENCE:g}",
            "holds": worst <= GOAL_DIFFERENCE,
        },
        {
            "benchmark": name,
            "metric": "term losses, ms (peer: the loop over rows; ratio: times faster)",
            "ours": round(milliseconds["ours"], 3),
            "peer": round(milliseconds["loop"], 3),
            "ratio": round(faster, 2),
            "goal": ">= 1",
            "holds": faster >= 1,
        },
    ]


def machine() -> dict[str, Any]:
    """Describe the processor and the versions."""
    cpu = Path("/proc/cpuinfo")
    models = [line.split(":", 1)[1].strip() for line in cpu.read_text().splitlines() if line.startswith("model name")]
    return {
        "cpu": models[0] if models else platform.machine(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        **{package: importlib.metadata.version(package) for package in ("torch", "transformers")},
    }


def main() -> None:
    """Measure both forms and print the claims."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repetitions", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    results = [
        measure(form=form, repetitions=arguments.repetitions, seed=arguments.seed) | {"threads": arguments.threads}
        for form in ("v19", "signed")
    ]
    report = {
        "machine": machine(),
        "results": results,
        "claims": [line for result in results for line in claims(result)],
    }
    write_json(RESULTS / "terms_loss.json", report)
    print(json.dumps(results))
    for line in report["claims"]:
        print(json.dumps(line))


if __name__ == "__main__":
    main()
