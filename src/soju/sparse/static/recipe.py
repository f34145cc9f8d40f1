"""Mode ``static``: distil sentence pairs and a term list into a static cross-lingual sparse encoder, and score it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from soju.core.files import write_json, write_manifest, write_text
from soju.core.results import Score
from soju.core.run import Run
from soju.report import write_report
from soju.report.markdown import Example, ModelCard, render_model_card
from soju.sparse.config import StaticConfig
from soju.sparse.data import RunData, RunReader
from soju.sparse.evaluate import SUBJECT, Measured, Subject, metrics_of, score
from soju.sparse.export.formats import export
from soju.sparse.finish import data_sources, write_examples, write_measured
from soju.sparse.model import PACKAGED_MODEL
from soju.sparse.static.encoder import StaticEncoder
from soju.sparse.static.training import TrainingLog, train_static

_USAGE = 'soju index {model} corpus.jsonl INDEX\nsoju search INDEX "질의"'
_PYTHON_USAGE = """import soju

model = soju.load("{model}")
vectors = model.encode_queries(["인공지능"])  # scipy csr, (1, terms)"""

STEPS = {
    "analyse": "Korean sentences were split into morphemes.",
    "tokenizer": "The morphemes became the pieces of a tokenizer that needs no analyser.",
    "alignment": "The words of both languages were aligned in both directions.",
    "expansion": "Alignment and term list became weights and were pruned.",
}


def read(config: StaticConfig) -> RunData:
    """Read pairs, terms and test sets; see `RunReader.checked` for what is refused."""
    return RunReader(config).checked()


def run(
    config: StaticConfig, run_dir: Run, *, data: RunData | None = None, resume: Path | None = None, workers: int = 2
) -> Run:
    """Train, score, export and report.

    Args:
        config: What to do.
        run_dir: Where everything goes.
        data: What `read` returned, when that was done before the folder was made.
        resume: Always ``None``: this mode has no checkpoints.
        workers: Threads of the morphological analyser.

    Returns:
        The run.

    Raises:
        UserError: If the data cannot be trusted; nothing is trained then.
    """
    # 1. Read the data; refuse broken rows and evaluation texts that were trained on.
    data = data or read(config)
    write_json(run_dir.folder / "data.json", data.training.statistics)

    # 2. Distil the pairs and the terms into the encoder.
    log = TrainingLog()
    trained = train_static(data.training.pairs, data.training.terms, config, log=log, workers=workers)

    # 3. Save it, and from here on use what was saved.
    about = {
        "name": config.name,
        "seed": config.seed,
        "counts": log.counts,
        "search": config.search.model_dump(mode="json"),
    }
    trained.save(run_dir.final, about=about)
    encoder = StaticEncoder.load(run_dir.final)

    # 4. Score it against BM25, dictionary look-up and their fusion, and measure what it costs.
    measured = score([Subject(SUBJECT, encoder, config.search)], data, config, run_dir.final, workers=workers)
    write_measured(measured, run_dir, figures=[likelihood_figure(log)])

    # 5. Export for programs that do not know soju; the manifest comes last.
    export(encoder, run_dir.folder / "exports" / "translations.tsv", "tsv")
    prior = config.search.prior_documents
    export(encoder, run_dir.folder / "exports" / "query_tokens.jsonl", "query-tokens", prior_documents=prior)
    write_text(run_dir.final / "README.md", model_card(config, data, measured.scores))
    write_manifest(run_dir.final)

    # 6. Show what texts expand to and what a search finds.
    write_examples(encoder, data, config, run_dir, run_dir.final)

    # 7. Report.
    write_json(run_dir.folder / "story.json", story(config, log, measured))
    write_report(run_dir.folder)
    return run_dir


def likelihood_figure(log: TrainingLog) -> dict[str, Any]:
    """Describe the curve of the alignment's likelihood."""
    return {
        "id": "likelihood",
        "title": "Alignment: log-likelihood per target word",
        "caption": "IBM Model 1, before each round of expectation maximisation; the term list is part of the text.",
        "kind": "line",
        "x_label": "round",
        "y_label": "nats per word",
        "series": [
            {"name": direction, "x": list(range(1, len(values) + 1)), "y": values}
            for direction, values in log.log_likelihood.items()
        ],
    }


def story(config: StaticConfig, log: TrainingLog, measured: Measured) -> dict[str, Any]:
    """Tell the run in plain words."""
    best = {s.test_set: s for s in measured.scores if s.subject == SUBJECT and s.name == "recall@10"}
    sentences = [
        f"{log.counts['pairs']:,} sentence pairs and {log.counts['terms']:,} head words became "
        f"{log.counts['translation_weights']:,} translation weights over {log.counts['pieces']:,} pieces."
    ]
    sentences += [
        f"On {name}, {score.value:.1%} of the queries find their document among the first ten."
        for name, score in best.items()
    ]
    return {
        "title": config.name,
        "summary": sentences,
        "steps": [
            {"title": name, "text": text, "seconds": round(log.seconds[name], 2)} for name, text in STEPS.items()
        ],
    }


def model_card(config: StaticConfig, data: RunData, scores: list[Score]) -> str:
    """Write the model's README."""
    model = config.name if config.name == PACKAGED_MODEL else "MODEL"
    card = ModelCard(
        name=config.name,
        summary=(
            "A static cross-lingual sparse encoder for Korean and English: a tokenizer and a table of translations. "
            "Korean queries find English documents in an inverted index and the other way round, without a network."
        ),
        licence=config.card.licence,
        licence_name=config.card.licence_name,
        tags=("sparse-retrieval", "cross-lingual", "korean"),
        examples=(
            Example(title="Search your own text", language="bash", code=_USAGE.format(model=model)),
            Example(title="Encode in Python", code=_PYTHON_USAGE.format(model=model)),
        ),
        scores=tuple(score for score in scores if score.name in metrics_of(config.evaluation)),
        data=data_sources(config.card, data),
        command=f"soju train {config.card.command or config.name}",
        seed=config.seed,
        limits=(
            "It knows words, not sentences: word order and negation do not count.",
            "Names and words outside its vocabulary are matched by their spelling only, not across languages.",
            "Latin letters with accents are not folded: café and cafe do not match.",
        ),
    )
    return render_model_card(card)
