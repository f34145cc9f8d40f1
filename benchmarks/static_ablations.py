"""Ablations of the static encoder. Trains one variant a line and compares its Recall@10 with the default's.

Training draws nothing at random, so the uncertainty is that of the queries: differences carry a 95 % interval of the
paired bootstrap. Writes a Markdown table for docs/experiments.md.

Run: python benchmarks/static_ablations.py [--data ../shared/data] [--only NAME ...]
"""

from __future__ import annotations

import argparse

from soju.core.config import apply_overrides, parse_yaml, preset_text, validate
from soju.evaluation.retrieval import evaluate
from soju.evaluation.significance import Measurement, compare
from soju.sparse.config import StaticConfig
from soju.sparse.data import RunData
from soju.sparse.evaluate import SUBJECT, Subject, search_all
from soju.sparse.recipe import read_run_data
from soju.sparse.static.lexicon import analyse
from soju.sparse.static.training import texts_to_analyse, train_static

PRESET = "splade-static"
VARIANTS: dict[str, list[str]] = {
    "default": [],
    "no term list in the mix": ["expansion.dictionary_share=0"],
    "probabilities as weights (power 1, confidence 1)": ["expansion.power=1", "expansion.confidence=1"],
    "power 1": ["expansion.power=1"],
    "sub-words count 1": ["tokenizer.sub_word_weight=1"],
    "function words count 1": ["tokenizer.function_word_weight=1"],
    "function words count 0": ["tokenizer.function_word_weight=0"],
    "idf of the index alone": ["search.prior_documents=0"],
    "maximum likelihood (prior 0)": ["alignment.prior=0"],
    "10 iterations": ["alignment.iterations=10"],
    "analysed pairs 20k": ["tokenizer.analysed_pairs=20000"],
    "weights above 0.1": ["expansion.min_weight=0.1"],
    "all pairs analysed": ["tokenizer.analysed_pairs=null"],
}
Cells = dict[str, Measurement]


def config_of(data: str, overrides: list[str]) -> StaticConfig:
    """Return the preset with overrides."""
    values = apply_overrides(parse_yaml(preset_text(PRESET), place=PRESET), [f"data.root={data}", *overrides])
    return validate(values, StaticConfig, place=PRESET)


def measure(config: StaticConfig, data: RunData, name: str, seen: dict[str, list]) -> tuple[Cells, str]:
    """Train one variant; return Recall@10 with per-query values for each direction, and a remark."""
    korean, _ = texts_to_analyse(data.training.pairs, data.training.terms, config.tokenizer)
    new = [text for text in dict.fromkeys(korean) if text not in seen]
    seen.update(zip(new, analyse(new), strict=True))
    analysed = [seen[text] for text in korean]
    encoder = train_static(data.training.pairs, data.training.terms, config, analysed=analysed)
    remark = f"{encoder.translations_VV.nnz:,}"
    cells: Cells = {}
    for texts in data.evaluation:
        for test_set in texts.directions.values():
            run = test_set.run_of(search_all(Subject(SUBJECT, encoder, config.search), test_set))
            cells[test_set.name] = evaluate(run, test_set, subject=name, metrics=["recall@10"]).measurements[0]
    return cells, remark


def main() -> None:
    """Print one row a variant, as it is measured."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", default="../shared/data")
    parser.add_argument("--only", nargs="*", default=None, help="names of variants; the default always runs")
    arguments = parser.parse_args()
    default = config_of(arguments.data, [])
    data = read_run_data(default)
    seen: dict[str, list] = {}
    reference: Cells = {}
    for name, overrides in VARIANTS.items():
        if name != "default" and arguments.only is not None and name not in arguments.only:
            continue
        cells, remark = measure(config_of(arguments.data, overrides), data, name, seen)
        if not reference:
            reference = cells
            print("| variant | " + " | ".join(cells) + " | translation weights |")
            print("| --- |" + " ---: |" * (len(cells) + 1))
        row = []
        for test_set, cell in cells.items():
            text = f"{cell.score.value:.4f}"
            if name != "default":
                comparison = compare(cell, reference[test_set], samples=2000, seed=default.seed)
                interval = comparison.interval
                text += f" ({comparison.difference:+.4f} [{interval.low:+.4f}, {interval.high:+.4f}])"
            row.append(text)
        print(f"| {name} | " + " | ".join(row) + f" | {remark} |", flush=True)
    for cell in reference.values():
        print(cell.score.signature)


if __name__ == "__main__":
    main()
