"""What can and cannot be set about mode triplets; the presets that ship."""

import pytest
from transformers import TrainingArguments

from fixtures.pico_terms import SCRATCH as TERMS_SCRATCH
from fixtures.pico_terms import config_of
from fixtures.pico_triplets import SCRATCH, triplets_config
from soju.core.config import parse_yaml, preset_text
from soju.core.errors import ConfigError
from soju.sparse.recipe import RECIPE


def preset(name, *overrides):
    from soju.core.config import apply_overrides

    return RECIPE.configure(apply_overrides(parse_yaml(preset_text(name), place=name), overrides), place=name)


def test_v23_has_the_published_settings():
    config = preset("splade-v23")
    losses = config.losses
    assert (losses.infonce, losses.self_terms, losses.positive_terms, losses.margin) == (2.5, 1.0, 3.0, 0.0)
    assert (losses.flops, losses.flops_cost, losses.minimum_activation) == (0.003, "inverse", 1.0)
    assert losses.triplet_margin == 0.3
    assert [stage.temperature for stage in config.curriculum] == [0.08, 0.05, 0.04]
    assert [losses.infonce * stage.infonce for stage in config.curriculum] == [1.25, 1.875, 2.5]
    assert [stage.learning_rate for stage in config.curriculum] == [1.0, 0.5, 0.25]
    training = config.training
    assert (training.learning_rate, training.num_train_epochs, training.per_device_train_batch_size) == (2e-5, 20, 64)
    assert (config.student.max_length, config.student.dropout, config.similarity) == (128, 0.1, "cosine")


def test_v22_has_the_published_settings():
    config = preset("splade-v22")
    losses = config.losses
    assert (losses.infonce, losses.self_terms, losses.positive_terms, losses.margin) == (2.0, 4.0, 10.0, 2.5)
    assert (losses.flops, losses.flops_cost, losses.minimum_activation) == (0.005, None, 1.0)
    assert (losses.triplet_margin, losses.form, losses.regularize) == (1.5, "published", "query")
    assert [stage.temperature for stage in config.curriculum] == [0.07, 0.05, 0.03]
    assert [losses.infonce * stage.infonce for stage in config.curriculum] == [1.0, 1.5, 2.0]
    assert (config.training.learning_rate, config.training.num_train_epochs, config.student.max_length) == (
        3e-6,
        30,
        64,
    )


def test_the_defaults_are_those_of_v23():
    config, v23 = triplets_config(), preset("splade-v23")
    assert config.losses == v23.losses
    stages = zip(config.curriculum, v23.curriculum, strict=True)
    assert all(a.model_dump(exclude={"mix"}) == b.model_dump(exclude={"mix"}) for a, b in stages)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("curriculum=[{share: 0.5, temperature: 0.1}]", "add up to 0.5"),
        ("curriculum=[{share: 1, temperature: 0.1, mix: {hard: 0.5, monolingual: 0.5}}]", "use only"),
        ("curriculum=[{share: 1, temperature: 0.1, mix: {hard: 1.5}}]", "parts of 1"),
        ("curriculum=[{share: 1, temperature: 0.1, mix: {easy: 0.5, medium: 0.2, hard: 0.2}}]", "1 when all"),
        ("curriculum=[{share: 1, temperature: 0.1, mix: {simple: 0.5}}]", "use only"),
        ("losses.distillation=1", "needs a teacher"),
        ("teacher={model: a, vectors: b}", "either model or vectors"),
        ("teacher={kind: scores, model: a}", "leave out model"),
        ("teacher={kind: cross_encoder, vectors: a}", "no vectors"),
        ("sparsity.query_terms=0", "query_terms"),
        ("losses.regularise=query", "regularise"),
    ],
)
def test_settings_that_do_not_fit_are_refused_with_the_reason(override, said):
    with pytest.raises(ConfigError, match=said):
        triplets_config(override)


def test_listwise_distillation_needs_scores_of_all_pairs():
    with pytest.raises(ConfigError, match="listwise"):
        triplets_config("losses.distillation=1", "teacher={kind: scores}")
    triplets_config("losses.distillation=1", "losses.distillation_form=margin_mse", "teacher={kind: scores}")


def test_documents_that_are_not_penalised_cannot_be_steered():
    with pytest.raises(ConfigError, match="document_terms"):
        triplets_config("losses.regularize=query", "sparsity.document_terms=9")


def test_a_student_from_a_static_model_needs_no_pairs():
    config = triplets_config("data={triplets: [a.jsonl]}", "student.static_model=ko-en-static")
    assert config.student.static_model == "ko-en-static"
    with pytest.raises(ConfigError, match="static_model"):
        triplets_config("data={triplets: [a.jsonl]}")


FORMER = {
    "batch_size": "per_device_train_batch_size",
    "accumulation": "gradient_accumulation_steps",
    "epochs": "num_train_epochs",
    "warm_up": "warmup_steps",
    "max_gradient_norm": "max_grad_norm",
    "validate_every": "eval_steps",
    "log_every": "logging_steps",
    "keep_checkpoints": "save_total_limit",
}


@pytest.mark.parametrize(("former", "name"), FORMER.items())
@pytest.mark.parametrize("values", [SCRATCH, TERMS_SCRATCH], ids=["triplets", "terms"])
def test_a_former_name_of_a_training_setting_is_refused_with_the_new_one(values, former, name):
    with pytest.raises(ConfigError) as refused:
        config_of(values, f"training.{former}=1")
    assert str(refused.value) == f'pico: training.{former}: the setting is called "{name}" now; rename it'
    assert getattr(config_of(values, f"training.{name}=1").training, name) == 1


@pytest.mark.parametrize(("given", "steps"), [(0, 0), (0.1, 2), (0.99, 12), (1, 1), (5, 5)])
def test_a_warm_up_below_one_is_a_share_of_the_run(given, steps):
    training = triplets_config(f"training.warmup_steps={given}").training
    assert training.warmup_of(12) == steps
    assert TrainingArguments(output_dir="unused", warmup_steps=given).get_warmup_steps(12) == steps


def test_a_bare_off_is_the_word_although_yaml_reads_false():
    assert triplets_config("training.mixed_precision=off").training.mixed_precision == "off"
