"""The whole recipe on the toy language, a few hundred steps: what passes, and what must be refused."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from pico_translation import PAIRS, Scramble, training, vocabulary_in
from transformers import M2M100ForConditionalGeneration

from soju.core.errors import ConfigError, RegressionError, UserError
from soju.core.files import verify_manifest
from soju.core.recipe import recipe_of_model, train
from soju.translation import DistillationConfig, ModelDistiller
from soju.translation.ctranslate import CTranslate2Model, convert
from soju.translation.gate import WeakTeacherError
from soju.translation.recipe import Translator
from soju.translation.trainer import train_exactly
from soju.translation.validation import translate_greedily
from soju.translation.vocabulary import Vocabulary, train_vocabulary

SHORT = {
    "data.toy_pairs": 1_500,
    "teacher.training.max_steps": 300,
    "teacher.training.eval_steps": 150,
    "teacher.training.logging_steps": 50,
    "training.max_steps": 60,
    "training.eval_steps": 30,
    "training.logging_steps": 30,
    "validation.pairs": 16,
    "validation.test_pairs": 60,
    "validation.draws": 200,
    "validation.decoder": "generate",
}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """A teacher well above chance, with its vocabulary."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("teacher")
    config = {**SHORT, "task": "teacher", "teacher.training.max_steps": 900, "teacher.training.eval_steps": 300}
    return train("translation-pico", out=folder / "run", overrides={**config, "data.toy_pairs": 3_000}).best


def from_teacher(teacher, **changes):
    return {**SHORT, "teacher": {"path": str(teacher)}, "data.toy_pairs": 3_000, **changes}


def without_teacher_settings(overrides):
    return {name: value for name, value in overrides.items() if not name.startswith("teacher.")}


def test_a_student_of_the_teachers_size_passes_and_is_published(teacher, tmp_path):
    """Shrinking to the same sizes changes nothing, so what is kept is all, in float32 and in every form."""
    shape = {"d_model": 48, "layers": 2, "attention_heads": 3, "ffn_dim": 96}
    overrides = without_teacher_settings(from_teacher(teacher)) | {
        "student.shape": shape,
        "training.learning_rate": 1e-5,
        "gate.retention": 0.8,
    }
    run = train("translation-pico", out=tmp_path / "run", overrides=overrides)
    metadata = json.loads((run.final / "metadata.json").read_text(encoding="utf-8"))
    assert metadata["account"]["executed"] == 60
    assert metadata["verdicts"][0]["artefact"] == "student"
    assert metadata["verdicts"][0]["passed"]
    verify_manifest(run.final)
    assert {score.subject for score in run.scores} >= {"teacher", "student", "ctranslate2-int8"}
    assert run.report.is_file()
    assert (run.folder / "validation" / "best_model_validation_report.txt").is_file()
    model = Translator(run.final)
    assert model.translate([PAIRS[0].ko, "", PAIRS[0].en])[1] == ""
    assert recipe_of_model(str(run.final)).owns(str(run.folder))


def test_a_random_student_is_refused_with_exit_code_3_and_no_final(teacher, tmp_path):
    overrides = without_teacher_settings(from_teacher(teacher)) | {"student.init": "random"}
    with pytest.raises(RegressionError, match="retention") as error:
        train("translation-pico", out=tmp_path / "run", overrides=overrides)
    assert error.value.exit_code == 3
    assert not (tmp_path / "run" / "final").exists()
    assert (tmp_path / "run" / "best" / "model.safetensors").is_file()
    assert (tmp_path / "run" / "report.html").is_file()


def test_an_undertrained_teacher_is_refused_before_anything_is_distilled(tmp_path):
    overrides = {**SHORT, "teacher.training.max_steps": 30, "teacher.training.eval_steps": 30}
    overrides["teacher.training.logging_steps"] = 30
    with pytest.raises(WeakTeacherError, match="above chance") as error:
        train("translation-pico", out=tmp_path / "run", overrides=overrides)
    assert error.value.exit_code == 2
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_truncated_vocabulary_is_refused(teacher, tmp_path):
    broken = tmp_path / "teacher"
    shutil.copytree(teacher, broken)
    train_vocabulary([text for pair in PAIRS for text in (pair.ko, pair.en)], 150).save(broken)
    overrides = without_teacher_settings(from_teacher(broken))
    with pytest.raises(UserError, match="word-level distillation needs the vocabulary") as error:
        train("translation-pico", out=tmp_path / "run", overrides=overrides)
    assert error.value.exit_code == 2


def test_the_published_snippet_names_what_is_missing(tmp_path):
    config = DistillationConfig(
        num_iterations=10_000, validation_frequency=1_000, quality_threshold=0.9, temperature=6.0, alpha=0.8
    )
    assert (config.training.max_steps, config.gate.retention, config.loss.alpha) == (10_000, 0.9, 0.8)
    with pytest.raises(ConfigError, match=r"teacher\.path.*data\.files"):
        ModelDistiller(config, out=tmp_path / "run").run_distillation()
    assert not (tmp_path / "run").exists()


def test_defaults_are_the_preset_cvm():
    assert DistillationConfig() == DistillationConfig.from_preset("translation-cvm")


def test_unknown_and_doubled_names_are_refused():
    with pytest.raises(ConfigError, match='num_iteration: unknown setting; did you mean "num_iterations"'):
        DistillationConfig(num_iteration=5)
    with pytest.raises(ConfigError, match=r"alpha and loss\.alpha are the same setting"):
        DistillationConfig(alpha=0.5, loss={"alpha": 0.4})
    with pytest.raises(ConfigError, match="does not divide max_steps"):
        DistillationConfig(num_iterations=10_001)
    assert DistillationConfig.from_preset("translation-pico", num_iterations=2_000).training.max_steps == 2_000


def test_the_command_line_translates_a_file_and_keeps_empty_lines(teacher, tmp_path):
    (tmp_path / "in.txt").write_text(f"{PAIRS[0].ko}\n\n{PAIRS[1].ko}\n", encoding="utf-8")
    command = [sys.executable, "-m", "soju", "translate", str(teacher), "--file", str(tmp_path / "in.txt")]
    found = subprocess.run(command, capture_output=True, text=True, check=True)
    lines = found.stdout.split("\n")
    assert len(lines) == 4
    assert lines[0]
    assert lines[1] == ""


def test_ctranslate2_translates_as_pytorch_does_and_leaves_the_model_alone(teacher, tmp_path):
    model, vocabulary = M2M100ForConditionalGeneration.from_pretrained(teacher).eval(), Vocabulary.load(teacher)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    texts = [pair.ko for pair in PAIRS[:100]]
    expected = translate_greedily(model, vocabulary, texts, "ko", "en", max_length=40)
    for quantization, least in ((None, 99), ("int8", 80)):
        folder = tmp_path / str(quantization)
        convert(model, vocabulary, folder, quantization=quantization)
        found = CTranslate2Model(folder, max_length=40).translate(texts, "ko", "en")
        assert sum(one == other for one, other in zip(found, expected, strict=True)) >= least
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.slow
def test_exactly_ten_thousand_steps_ten_validations_one_rollback(tmp_path):
    folder = tmp_path / "long"
    run = training(folder, vocabulary_in(tmp_path), steps=10_000, every=1_000, callbacks=[Scramble(4_500)])
    outcome = train_exactly(run)
    rows = [json.loads(line) for line in run.verdicts.read_text(encoding="utf-8").splitlines()]
    assert [row["clock"] for row in rows] == list(range(0, 10_001, 1_000))
    assert 5_000 in [one.clock for one in outcome.account.rollbacks]
    summary = outcome.account.summary()
    assert summary["executed"] == summary["kept"] + summary["undone"] == 10_000
