"""Give an embedding model a Korean vocabulary and Korean parameters; leave its English where it was, and prove both."""

from __future__ import annotations

import importlib.util
import os
import shutil
from pathlib import Path

from accelerate import PartialState
from transformers.utils.logging import disable_progress_bar

from soju.core.errors import BadNumbersError, MissingExtraError, RegressionError, UserError
from soju.core.files import write_json, write_manifest
from soju.core.model_folder import find_model_folder
from soju.core.run import RunDirectory
from soju.embedding.adapters import load_float32
from soju.embedding.config import EmbeddingConfig, ScratchBase
from soju.embedding.data import EmbeddingData, EvaluationData, read_embedding_data, read_evaluation
from soju.embedding.expanding_stage import expand_stage
from soju.embedding.finish import measure, report
from soju.embedding.retention import RetentionGuard
from soju.embedding.scratch_base import make_scratch_base
from soju.embedding.stages import SUPERVISED, Accepted, run_stages
from soju.training.ranks import join_ranks


def run(
    config: EmbeddingConfig,
    run_dir: RunDirectory,
    *,
    data: EmbeddingData | None = None,
    evaluation: EvaluationData | None = None,
    resume: Path | None = None,
) -> Path:
    """Expand, train stage by stage, measure and report.

    Args:
        config: What to do.
        run_dir: Where everything goes; a run that was begun in it goes on.
        data: What `read_run` read, when that was done before the folder was made.
        evaluation: The test sets, likewise.
        resume: A checkpoint to go on from, in the ``training`` folder of one of the stages; later stages are put aside.

    Returns:
        The HTML report.

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
        write_json(run_dir.path / "data.json", data.statistics)

    # 2. The base: a model as it is, or one made from scratch, with a donor of Korean tokens.
    base, donor = base_and_donor(config, data, run_dir)
    accepted = [Accepted("base", base)]

    # 3. What the guard will compare with: the untouched model.
    names = [f"stage{stage}" for stage in config.stages if stage] + [SUPERVISED] * (config.supervised is not None)
    guard: RetentionGuard | None = None
    if names:
        guard = RetentionGuard(data.watched_korean, data.watched_english, load_float32(base), config.retention)

    # 4. Stage 0: analyse, expand, initialise, certify.
    if 0 in config.stages:
        assert donor is not None
        with PartialState().main_process_first():
            accepted.append(expand_stage(config, data, base, donor, run_dir.path, guard=guard))

    # 5. Stages 1 to 3 and the supervised phase: each from the accepted model of the one before, under the guard.
    failed: RegressionError | BadNumbersError | None = None
    if guard is not None:
        failed = run_stages(names, config, data, accepted, guard, run_dir.path, resume=resume)

    if PartialState().is_main_process:
        # 6. The last model that was accepted is the result.
        publish_best(accepted[-1].folder, run_dir)

        # 7. Measure base and stages side by side; show what words and vectors became; report.
        measured = measure(accepted, config, evaluation, run_dir)
        report(accepted, measured, config, data, run_dir, failed=failed)
    if failed:
        raise failed
    return run_dir.path / "report.html"


def read_run(config: EmbeddingConfig) -> tuple[EmbeddingData, EvaluationData]:
    """Read what a run learns from and what it is measured on.

    Args:
        config: Settings of the run.

    Returns:
        Both, checked against each other.

    Raises:
        DataError: If rows are broken.
        MissingExtraError: If the settings ask for a package that is not installed.
        UserError: If test texts stand in the training data.
    """
    if 2 in config.stages and config.stage2.adapters.kind == "lora" and importlib.util.find_spec("peft") is None:
        raise MissingExtraError("stage2.adapters.kind lora", "lora")
    evaluation = read_evaluation(config.evaluation, root=config.data.root)
    return read_embedding_data(config, measured=evaluation.all_texts()), evaluation


def base_and_donor(config: EmbeddingConfig, data: EmbeddingData, run_dir: RunDirectory) -> tuple[Path, str | None]:
    """Find the base and name the donor, or make both.

    Args:
        config: Settings of the run.
        data: For a base from scratch.
        run_dir: Gets it.

    Returns:
        The base's folder, and the donor's folder or hub id.

    Raises:
        UserError: If the base is no sentence-transformers folder.
    """
    if isinstance(config.base, ScratchBase):
        base, donor = make_scratch_base(config.base, data, run_dir.path, seed=config.seed)
        return base, str(donor)
    with PartialState().main_process_first():
        folder = find_model_folder(config.base.model).path
    if not (folder / "modules.json").is_file():
        raise UserError(f"{config.base.model}: no modules.json, so nothing says how it pools; give an embedding model")
    return folder, config.base.donor


def publish_best(folder: Path, run_dir: RunDirectory) -> None:
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
