"""Speed and quality of new rows of an embedding, compared with mergekit's tokensurgeon.

Same inputs in one process, each in turn. ``mean``: Korean words of our samples, from a byte-level BPE without
Korean, against mergekit's ``subword_approximate``; both tokenize. ``omp``: against mergekit's ``batch_omp``.

With ``--base`` and ``--donor`` every initialiser expands a real model, and the Korean and English similarity of the
expanded, untrained models is compared with the base's.

The peer is no extra of soju: mergekit 0.1.5 brings three dozen packages. Where it is not installed it is left out of
the claims and named under ``missing``. To have it: pip install mergekit

    python benchmarks/expansion.py [--quick] [--base MODEL --donor TOKENIZER --data ../shared/data --corpus TEXT]
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from soju.core.files import write_json
from soju.embedding.config import EvaluationSettings
from soju.embedding.embedder import Subject
from soju.embedding.evaluate import measure_models
from soju.embedding.expansion.byte_bpe import ByteBpe
from soju.embedding.expansion.expand import expand_model, read_pairs
from soju.embedding.expansion.initialise import (
    INITIALISERS,
    NEED_DONOR,
    SPARSITY,
    donor_vectors,
    initialise,
    matching_pursuit,
)
from soju.embedding.expansion.merges import Expansion

RESULTS = Path(__file__).parent / "results"
PEERS = ("mergekit",)
GOAL_SPEED = 1.0
PeerRows = Callable[[Tensor, Expansion, str, Path, Path | None], Tensor]


def timed(run: Callable[[], Tensor], repetitions: int) -> tuple[float, Tensor]:
    """Return the median seconds of a run and what it returns."""
    seconds = []
    for _ in range(repetitions):
        start = time.perf_counter()
        result = run()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds), result


def compare_mean(size: int, repetitions: int) -> list[dict[str, Any]]:
    """Time the mean of sub-tokens, and count the rows that are the mean of what the tokenizer makes of the word."""
    from mergekit.tokensurgeon import subword_approximate

    texts = [line for name in ("terms.train.jsonl", "terms.heldout.jsonl") for line in sample(name)]
    english = [text for text in texts if text.isascii()]
    words = sorted({word for text in texts for word in text.split() if not word.isascii()})[:size]
    backend = Tokenizer(BPE())
    backend.pre_tokenizer = ByteLevel(add_prefix_space=False)
    trainer = BpeTrainer(vocab_size=4000, initial_alphabet=ByteLevel.alphabet(), show_progress=False)
    backend.train_from_iterator(english, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    old_VD = torch.randn(backend.get_vocab_size(), 1024, generator=torch.Generator().manual_seed(0))
    speller = ByteLevel(add_prefix_space=False)
    spellings = ["".join(piece for piece, _ in speller.pre_tokenize_str(word)) for word in words]

    def ours() -> Tensor:
        return initialise(old_VD, [encoding.ids for encoding in backend.encode_batch(words)])

    def peer() -> Tensor:
        return subword_approximate(old_VD, spellings, is_lm_head=False, tok_0=tokenizer)  # as donors spell them

    (our_seconds, our_rows), (peer_seconds, peer_rows) = timed(ours, repetitions), timed(peer, repetitions)
    truth = torch.stack([old_VD[backend.encode(word).ids].mean(dim=0) for word in words])
    right = [float((rows - truth).abs().amax(dim=1).lt(1e-4).float().mean()) for rows in (our_rows, peer_rows)]
    name = f"expansion.mean.{len(words)}"
    metric = "share of Korean rows that are the mean of the word's sub-tokens (ratio = difference)"
    share = claim(name, metric, *right, 0.0) | {"ratio": round(right[0] - right[1], 3), "holds": right[0] >= right[1]}
    return [claim(name, "words per second", len(words) / our_seconds, len(words) / peer_seconds, GOAL_SPEED), share]


def sample(name: str) -> list[str]:
    """Return the texts of one of our sample files."""
    lines = (files("soju") / "samples" / name).read_text(encoding="utf-8").splitlines()
    return [value for line in lines for value in json.loads(line).values() if isinstance(value, str)]


def compare_omp(size: int, repetitions: int) -> list[dict[str, Any]]:
    """Time 32 atoms of each target, and compare what is left of the targets."""
    from mergekit.tokensurgeon import batch_omp

    target_BF, atom_AF, _ = space(size)

    def left(found: tuple[Tensor, Tensor]) -> Tensor:
        index_BK, coefficient_BK = found
        return (target_BF - (coefficient_BK[:, None] @ atom_AF[index_BK]).squeeze(1)).norm(dim=1).mean()

    our_seconds, our_rest = timed(lambda: left(matching_pursuit(target_BF, atom_AF, 32)), repetitions)
    peer_seconds, peer_rest = timed(lambda: left(batch_omp(target_BF, atom_AF, 32)), repetitions)
    name = f"expansion.omp.{size}"
    rest = claim(name, "what is left of a vector (ratio = ours / peer)", float(our_rest), float(peer_rest), 1.0)
    ratio = float(our_rest / peer_rest)
    rest |= {"ratio": round(ratio, 3), "goal": "<= 1.01", "holds": ratio <= 1.01}
    return [claim(name, "tokens per second", size / our_seconds, size / peer_seconds, GOAL_SPEED), rest]


def space(size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return vectors of new tokens and of 8,000 anchors that lie around common directions, and rows of the base."""
    generator = torch.Generator().manual_seed(0)
    topics = torch.randn(64, 256, generator=generator)
    drawn = torch.randn(size + 8000, 64, generator=generator) @ topics / 8
    vectors = drawn + 0.5 * torch.randn(drawn.shape, generator=generator)
    return vectors[:size], vectors[size:], torch.randn(8000, 1024, generator=generator)


def claim(benchmark: str, metric: str, ours: float, peer: float, goal: float) -> dict[str, Any]:
    """Return one claim; the ratio says how many times more ours is."""
    ratio = ours / max(peer, 1e-9)
    numbers = {"ours": round(ours, 4), "peer": round(peer, 4), "ratio": round(ratio, 3)}
    return {"benchmark": benchmark, "metric": metric, **numbers, "goal": f">= {goal:g}", "holds": ratio >= goal}


def zero_shot(base: str, donor: str, data: Path, corpus: Path | None) -> dict[str, Any]:
    """Expand a model with each initialiser, and with rows of the peers, and score all before any training."""
    sets = [
        {"name": name, "file": str((data / file).resolve()), "language": language}
        for name, file, language in (
            ("KorSTS", "korsts.dev.tsv", "ko"),
            ("KLUE-STS", "klue_sts.dev_a.tsv", "ko"),
            ("STS-B", "stsb_en.dev.tsv", "en"),
        )
    ]
    pairs = read_pairs([str(data / "parallel.train.tsv.gz")], "stop")
    subjects, seconds = [Subject("base", base)], {}
    with tempfile.TemporaryDirectory() as folder:
        for method in INITIALISERS:
            if method in NEED_DONOR and corpus is None:
                continue
            out, start = Path(folder) / method, time.perf_counter()
            expand_model(base, donor, out, corpus=corpus, pairs=pairs, initialiser=method, speed=False)
            seconds[method] = round(time.perf_counter() - start, 1)
            subjects.append(Subject(method, str(out)))
        for name, rows_of in (("mergekit mean", mergekit_means), ("mergekit omp", mergekit_omp)):
            try:
                subjects.append(Subject(name, str(with_peer_rows(Path(folder), name, base, rows_of, corpus))))
            except ImportError:
                continue
        measured = measure_models(subjects, EvaluationSettings.model_validate({"sts": sets}))
    return {"seconds": seconds, "scores": [score.to_json() for score in measured.scores]}


def with_peer_rows(folder: Path, name: str, base: str, rows_of: PeerRows, corpus: Path | None) -> Path:
    """Return the model expanded with means, its new rows replaced by a peer's."""
    out = folder / name.replace(" ", "-")
    shutil.copytree(folder / "mean", out)
    weights = load_file(out / "model.safetensors")
    embedding_VD, expansion = weights["embed_tokens.weight"], Expansion.load(out)
    first, last = expansion.first_id, expansion.size
    embedding_VD[first:last] = rows_of(embedding_VD[:first].clone(), expansion, base, out, corpus)
    save_file(weights, out / "model.safetensors", {"format": "pt"})
    return out


def mergekit_means(old_VD: Tensor, expansion: Expansion, base: str, out: Path, corpus: Path | None) -> Tensor:
    """Return what tokensurgeon's ``subword`` makes of the tokens as donors spell them."""
    from mergekit.tokensurgeon import subword_approximate

    tokenizer = AutoTokenizer.from_pretrained(base)
    return subword_approximate(old_VD, list(expansion.tokens), is_lm_head=False, tok_0=tokenizer)


def mergekit_omp(old_VD: Tensor, expansion: Expansion, base: str, out: Path, corpus: Path | None) -> Tensor:
    """Return the rows that tokensurgeon's ``omp`` adds up from the vectors that our ``omp`` gets as well."""
    from mergekit.tokensurgeon import batch_omp

    if corpus is None:
        raise ImportError("without a corpus there are no vectors of a donor")
    texts = corpus.read_text(encoding="utf-8").splitlines()
    vectors = donor_vectors(expansion, ByteBpe.load(base), ByteBpe.load(str(out)), corpus=texts)
    rows_ND = initialise(old_VD, expansion.decompositions)
    if not bool(vectors.known_N.any()):
        return rows_ND
    found = vectors.known_N.nonzero().squeeze(1)
    for token_B in torch.split(found, 256):
        index_BK, weight_BK = batch_omp(
            vectors.new_NF[token_B], vectors.anchor_AF, min(SPARSITY, len(vectors.anchor_AF))
        )
        rows_ND[token_B] = (weight_BK[:, None] @ old_VD[vectors.anchor_ids_A[index_BK]]).squeeze(1)
    return rows_ND


def main() -> None:
    """Measure with the peers that are installed and print the claims."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few tokens, to try the script out; no claim")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--base", help="a model to expand, for similarity without training")
    parser.add_argument("--donor", help="a tokenizer to expand it with")
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--corpus", type=Path, help="texts, for the order of merges and omp")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    size, repetitions = (50, 1) if arguments.quick else (500, 3)
    lines: list[dict[str, Any]] = []
    missing: dict[str, str] = {}
    for peer, compare in (("mergekit", compare_mean), ("mergekit", compare_omp)):
        try:
            lines += compare(size, repetitions)
        except ImportError as error:
            missing[peer] = str(error)
    cpu = Path("/proc/cpuinfo").read_text().splitlines()
    packages = ("torch", "tokenizers", *(name for name in PEERS if name not in missing))
    machine = {
        "cpu": next(
            (line.split(":", 1)[1].strip() for line in cpu if line.startswith("model name")), platform.machine()
        ),
        "cores": os.cpu_count(),
        "threads": arguments.threads,
        **{name: importlib.metadata.version(name) for name in packages},
    }
    report = {"machine": machine, "claims": lines, "missing": missing}
    if arguments.base and arguments.donor:
        report["zero_shot"] = zero_shot(arguments.base, arguments.donor, arguments.data, arguments.corpus)
    if not arguments.quick:
        write_json(RESULTS / "expansion.json", report)
    for line in lines:
        print(json.dumps(line))
    for peer, why in missing.items():
        print(json.dumps({"benchmark": "expansion", "missing": peer, "why": why}))


if __name__ == "__main__":
    main()
