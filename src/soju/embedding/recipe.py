"""Recipe ``embedding``: give a model a Korean vocabulary and Korean parameters; keep its English, and measure both."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from accelerate import PartialState
from transformers.utils.logging import disable_progress_bar

from soju.core.config import validate
from soju.core.errors import BadNumbersError, MissingExtraError, RegressionError, UserError
from soju.core.files import write_json, write_manifest, write_text
from soju.core.model_folder import STOCK_MODULES, find_model_folder
from soju.core.recipe import Answer, DataReport, Evaluation, MtebModel, Recipe, Show, train
from soju.core.run import Run
from soju.embedding.adapters import load_float32
from soju.embedding.config import EmbeddingConfig, ScratchBase
from soju.embedding.data import EmbeddingData, read_embedding_data
from soju.embedding.evaluate import EvaluationData, read_evaluation
from soju.embedding.expansion.expand import expand_model
from soju.embedding.finish import measure, report
from soju.embedding.retention import KOREAN, RetentionCheck
from soju.embedding.scratch_base import make_scratch_base
from soju.embedding.stages import STAGES, SUPERVISED, Accepted, run_stages
from soju.embedding.trainer import is_whole
from soju.training.ranks import from_all, join_ranks
from soju.training.rollback import Attempt


def run(
    config: EmbeddingConfig,
    run_dir: Run,
    *,
    data: EmbeddingData | None = None,
    evaluation: EvaluationData | None = None,
    resume: Path | None = None,
) -> Run:
    """Expand, train stage by stage, measure and report.

    Args:
        config: What to do.
        run_dir: Where everything goes; a run that was begun in it goes on.
        data: What `read_run` read, when that was done before the folder was made.
        evaluation: The test sets, likewise.
        resume: A checkpoint to go on from, in the ``training`` folder of one of the stages; later stages are put aside.

    Returns:
        The run.

    Raises:
        RegressionError: If a stage did not keep within the budget; the report of what was accepted is written.
        UserError: If data, base or donor cannot be used; what was trained so far stays.
    """
    disable_progress_bar()  # of the libraries: they would draw one for every file of weights
    join_ranks()

    # 1. Read the data; refuse broken rows and texts that the run is measured or watched on.
    if data is None or evaluation is None:
        data, evaluation = read_run(config)
    if PartialState().is_main_process:
        write_json(run_dir.folder / "data.json", data.statistics)

    # 2. The base: a model as it is, or one made from scratch, with a donor of Korean tokens.
    base, donor = base_and_donor(config, data, run_dir)
    accepted = [Accepted("base", base)]

    # 3. What the retention check compares with: the untouched model.
    names = [f"stage{stage}" for stage in config.stages if stage] + [SUPERVISED] * (config.supervised is not None)
    check: RetentionCheck | None = None
    if names:
        check = RetentionCheck(data.watched_korean, data.watched_english, load_float32(base), config.retention)

    # 4. Stage 0: analyse, expand, initialise, certify.
    if 0 in config.stages:
        assert donor is not None
        with PartialState().main_process_first():
            accepted.append(expand_stage(config, data, base, donor, run_dir.folder, check=check))

    # 5. Stages 1 to 3 and the supervised phase, each from the accepted model of the one before, all checked.
    failed: RegressionError | BadNumbersError | None = None
    if check is not None:
        failed = run_stages(names, config, data, accepted, check, run_dir.folder, resume=resume)

    if PartialState().is_main_process:
        # 6. The last model that was accepted is the result.
        publish_best(accepted[-1].folder, run_dir)

        # 7. Measure base and stages on the same sets; show what words and vectors became; report.
        measured = measure(accepted, config, evaluation, run_dir)
        report(accepted, measured, config, data, run_dir, failed=failed)
    if failed:
        raise failed
    return run_dir


def read_run(config: EmbeddingConfig) -> tuple[EmbeddingData, EvaluationData]:
    """Read what a run learns from and what it is measured on.

    Raises `DataError` if rows are broken. Raises `MissingExtraError` if the settings ask for a package that is not
    installed. Raises `UserError` if test texts stand in the training data.
    """
    if 2 in config.stages and config.stage2.adapters.kind == "lora" and importlib.util.find_spec("peft") is None:
        raise MissingExtraError("stage2.adapters.kind lora", "lora")
    evaluation = read_evaluation(config.evaluation, root=config.data.root)
    return read_embedding_data(config, measured=evaluation.all_texts()), evaluation


def base_and_donor(config: EmbeddingConfig, data: EmbeddingData, run_dir: Run) -> tuple[Path, str | None]:
    """Find the base and name the donor, or make both.

    Raises `UserError` if the base is no sentence-transformers folder.
    """
    if isinstance(config.base, ScratchBase):
        base, donor = make_scratch_base(config.base, data, run_dir.folder, seed=config.seed)
        return base, str(donor)
    with PartialState().main_process_first():
        folder = find_model_folder(config.base.model).path
    if not (folder / STOCK_MODULES).is_file():
        raise UserError(f"{config.base.model}: no modules.json, so nothing says how it pools; give an embedding model")
    return folder, config.base.donor


def expand_stage(
    config: EmbeddingConfig,
    data: EmbeddingData,
    base: Path,
    donor: str,
    run_folder: Path,
    *,
    check: RetentionCheck | None,
) -> Accepted:
    """Expand the base, or read what an earlier start of the run has finished.

    Raises `UserError` if a tokenizer is of a kind that cannot be expanded, or the certificate fails.
    """
    folder, settings = run_folder / "stage0", config.expansion
    if not is_whole(folder):
        shutil.rmtree(folder, ignore_errors=True)  # what an earlier start wrote and could not certify
        corpus: Path | None = None
        if settings.order == "corpus":
            corpus = run_folder / "training" / "expansion" / "korean.txt"
            write_text(corpus, "".join(" ".join(text.split()) + "\n" for text in data.korean))
        initialiser: str = settings.initialiser
        if settings.init_probe and check is not None:
            initialiser = choose_initialiser(config, data, base, donor, check, run_folder, corpus=corpus)
        expand_model(
            str(base),
            donor,
            folder,
            corpus=corpus,
            pairs=data.pairs,
            method=settings.method,
            initialiser=initialiser,
            limit=settings.limit,
            speed=settings.speed,
            seed=config.seed,
        )
        if corpus is not None:
            shutil.rmtree(corpus.parent)  # a copy of texts has no place in a run
    certificate = folder / "certificate.json"
    looks = json.loads(certificate.read_text(encoding="utf-8"))
    return Accepted("stage0", folder, looks)


PROBE = "probe"
"""Folder below ``training`` that the probe works in."""


def choose_initialiser(
    config: EmbeddingConfig,
    data: EmbeddingData,
    base: Path,
    donor: str,
    check: RetentionCheck,
    run_folder: Path,
    *,
    corpus: Path | None,
) -> str:
    """Try the initialisers that the settings name, or read what an earlier start of the run found.

    Raises `UserError` if an initialiser cannot be used, or several processes run.
    """
    folder, settings = run_folder / "training" / PROBE, config.expansion
    record = folder / "probe.json"
    if len(from_all(0)) > 1:
        raise UserError("expansion.init_probe: works on one process; run stage 0 alone first, or name one initialiser")
    if not record.is_file():
        found = {}
        for method in settings.init_probe:
            own = folder / method
            shutil.rmtree(own, ignore_errors=True)
            start = expand_model(
                str(base), donor, own / "stage0", corpus=corpus, pairs=data.pairs, method=settings.method,
                initialiser=method, limit=settings.limit, speed=False, seed=config.seed,
            )  # fmt: skip
            write_manifest(start)
            found[method] = _probe(method, config, data, start, base, check, own)
            shutil.rmtree(own)
        write_json(record, found)
    scores = json.loads(record.read_text(encoding="utf-8"))
    chosen: str = max(settings.init_probe, key=lambda method: scores[method]["after"][KOREAN])
    return chosen


def _probe(
    method: str,
    config: EmbeddingConfig,
    data: EmbeddingData,
    start: Path,
    base: Path,
    check: RetentionCheck,
    folder: Path,
) -> dict[str, dict[str, float]]:
    steps = config.expansion.probe_steps
    settings = config.stage1.model_copy(update={"max_steps": steps, "eval_steps": steps, "logging_steps": steps})
    trainer = STAGES["stage1"]("stage1", settings, config, data, start, base, folder).trainer(Attempt(), None)
    trainer.train()
    return {"before": check(load_float32(start).eval()), "after": check(trainer.model.eval())}


def publish_best(folder: Path, run_dir: Run) -> None:
    """Make ``best`` and ``final`` of the last accepted model; bytes are shared with it where the disk can."""
    for target in (run_dir.best, run_dir.final):
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(folder, target, copy_function=_share)
        write_manifest(target)


def _share(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


_DEMO, _DEMO_TEXT = "embedding-pico", "김치를 담그는 방법"


class EmbeddingRecipe(Recipe[EmbeddingConfig, tuple[EmbeddingData, EvaluationData]]):
    """See `soju.core.recipe.Recipe`."""

    def configure(self, values: Mapping[str, Any], *, place: str) -> EmbeddingConfig:
        """Check a configuration."""
        settings: EmbeddingConfig = validate(values, EmbeddingConfig, place=place)
        return settings

    def check(self, config: EmbeddingConfig) -> DataReport[tuple[EmbeddingData, EvaluationData]]:
        """Read training and evaluation data."""
        from soju.data.statistics import format_statistics

        data, evaluation = read_run(config)
        statistics = data.statistics
        watched = statistics["watched_pairs"]
        return DataReport(
            data=(data, evaluation),
            tables=[
                format_statistics(statistics[part], title=part)
                for part in ("korean", "english", "pairs", "passages")
                if part in statistics
            ],
            facts=[
                *(f"{name}: {count:,} Korean texts" for name, count in statistics["stage_texts"].items()),
                f"watched: {watched['korean']:,} Korean pairs, {watched['english']:,} English pairs",
                *(f"{name}: {len(pairs):,} scored pairs" for name, pairs in evaluation.sts.items()),
            ],
            refused=data.log.refused,
            reasons=data.log.reasons,
        )

    def train(
        self,
        config: EmbeddingConfig,
        run_dir: Run,
        *,
        data: tuple[EmbeddingData, EvaluationData] | None = None,
        resume: bool | Path = False,
        workers: int = 2,  # nothing here analyses text
    ) -> Run:
        """Expand, train stage by stage, measure and report."""
        rows, evaluation = data or (None, None)
        start = resume if isinstance(resume, Path) else None
        return run(config, run_dir, data=rows, evaluation=evaluation, resume=start)

    def evaluate(
        self,
        models: Sequence[str],
        values: Mapping[str, Any],
        *,
        place: str,
        samples: int | None = None,
        seed: int | None = None,
    ) -> Evaluation:
        """Measure models on the sets of a configuration; only its evaluation is looked at."""
        from soju.embedding.evaluate import compare_models
        from soju.report.tables import model_rows
        from soju.report.terminal import models_table

        given = {name: value for name, value in (("resamples", samples), ("seed", seed)) if value is not None}
        if given:
            values = {**values, "evaluation": {**(values.get("evaluation") or {}), **given}}
        measured = compare_models(models, values, place=place)
        rows = model_rows(measured.subjects, measured.scores, measured.comparisons)
        record = {**measured.to_json(), "rows": [row.to_json() for row in rows]}
        return Evaluation([models_table(measured.subjects, rows)], measured.not_compared, record)

    def demo(self, folder: Path, show: Show) -> Answer | None:
        """Train a pico model on our own samples and show what changed."""
        from sentence_transformers import SentenceTransformer

        from soju.report.terminal import run_tables

        show("Making a small English embedding model, giving it Korean, stage by stage ...")
        trained = train(_DEMO, out=folder)
        show(run_tables(folder))
        show(f"Model   {trained.best}\nReport  {trained.report}")
        for name in ("base", "stage0"):
            tokens = SentenceTransformer(str(folder / name), device="cpu").tokenizer.tokenize(_DEMO_TEXT)
            show(f"{name}: {_DEMO_TEXT!r} has {len(tokens)} tokens")
        return None

    def owns(self, model: str) -> bool:
        """Tell whether a folder is a run of this recipe, or pools token states into one dense vector."""
        from soju.embedding.evaluate import is_embedding_model

        recipe = Run(Path(model)).recipe
        return is_embedding_model(model) if recipe is None else recipe == "embedding"

    def load(self, folder: Path) -> Any:
        """Load a model as a ``SentenceTransformer``, adapters included."""
        from soju.embedding.adapters import load_adapted

        return load_adapted(folder, local_files_only=True).eval()

    def mteb(self, model: str) -> MtebModel:
        """Wrap a model in mteb's own wrapper for sentence-transformers."""
        from soju.embedding.evaluate import mteb_model

        return MtebModel(*mteb_model(model), retrieval_only=False)


RECIPE = EmbeddingRecipe()
