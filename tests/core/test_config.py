from pathlib import Path
from typing import Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import Field, ValidationError, model_validator

from soju.core.config import Settings, apply_overrides, parse_yaml, preset_names, read_config, to_yaml, validate
from soju.core.errors import ConfigError, UserError


class Stage(Settings):
    name: str = "first"
    steps: int = Field(default=10, ge=1)
    """Steps of the optimiser."""


class Circle(Settings):
    kind: Literal["circle"] = "circle"
    radius: float = 1.0


class Square(Settings):
    kind: Literal["square"] = "square"
    side: float = 1.0


class Data(Settings):
    root: Path | None = None
    files: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _needs_files(self):
        if self.root is not None and not self.files:
            raise ValueError("a root without files; name some")
        return self


class Example(Settings):
    recipe: Literal["splade"]
    seed: int = Field(default=13, ge=0)
    learning_rate: float = Field(default=0.1, gt=0, allow_inf_nan=False)
    note: str = ""
    data: Data = Data()
    stages: tuple[Stage, ...] | None = None
    by_name: dict[str, Stage] = Field(default_factory=dict)
    shape: Circle | Square = Circle()


def refusal(values):
    with pytest.raises(ConfigError) as caught:
        validate(values, Example, place="a.yaml")
    return str(caught.value).splitlines()


def test_every_wrong_setting_is_listed_with_its_place_and_the_remedy():
    values = {"seed": -1, "learning_rate": "fast", "data": {"files": 3}, "sead": 1}
    assert refusal(values) == [
        "a.yaml: recipe: missing; add it",
        "a.yaml: seed: got -1; input should be greater than or equal to 0",
        "a.yaml: learning_rate: got 'fast'; input should be a valid number, unable to parse string as a number",
        "a.yaml: data.files: got 3; input should be a valid tuple",
        'a.yaml: sead: unknown setting; did you mean "seed"?',
    ]


def test_an_unknown_setting_without_a_near_name_lists_the_known_ones():
    assert refusal({"recipe": "splade", "data": {"xyz": 1}}) == [
        "a.yaml: data.xyz: unknown setting; known here: root, files"
    ]


@pytest.mark.parametrize(
    ("values", "place"),
    [
        ({"stages": [{}, {"step": 1}]}, "stages.1.step"),
        ({"by_name": {"warm-up": {"step": 1}}}, "by_name.warm-up.step"),
    ],
    ids=["optional tuple of groups", "mapping of groups"],
)
def test_a_misspelt_setting_deep_inside_gets_a_suggestion_from_its_own_group(values, place):
    assert refusal({"recipe": "splade", **values}) == [f'a.yaml: {place}: unknown setting; did you mean "steps"?']


def test_a_wrong_setting_of_one_of_several_groups_is_named_under_each():
    lines = refusal({"recipe": "splade", "shape": {"radios": 2}})
    assert 'a.yaml: shape.Circle.radios: unknown setting; did you mean "radius"?' in lines
    assert all(line.startswith("a.yaml: shape.") for line in lines)


def test_a_rule_over_several_settings_is_told_in_its_own_words():
    assert refusal({"recipe": "splade", "data": {"root": "/x"}}) == ["a.yaml: data: a root without files; name some"]


def test_a_long_wrong_value_is_cut():
    (line,) = refusal({"recipe": "splade", "seed": "x" * 10_000})
    assert len(line) < 250
    assert "xxx...; input should be a valid integer" in line


def test_keys_that_are_no_words_are_refused():
    assert refusal({"recipe": "splade", 1: 2}) == ["a.yaml: 1: got 1; keys should be strings"]


def test_settings_are_frozen():
    example = validate({"recipe": "splade"}, Example, place="a.yaml")
    with pytest.raises(ValidationError, match="frozen"):
        example.seed = 1


def test_the_help_of_a_field_is_the_docstring_under_it():
    assert Stage.model_fields["steps"].description == "Steps of the optimiser."


def test_a_number_that_yaml_reads_as_text_is_still_a_number():
    values = parse_yaml("learning_rate: 1e-5", place="a.yaml")
    assert values == {"learning_rate": "1e-5"}  # YAML 1.1 wants 1.0e-5
    assert validate({"recipe": "splade", **values}, Example, place="a.yaml").learning_rate == 1e-5


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "a.yaml: a mapping of settings was expected"),
        ("[1, 2]", "a.yaml: a mapping of settings was expected"),
        ("just text", "a.yaml: a mapping of settings was expected"),
        ("a: 1\nb: 2\na: 3", 'a.yaml:3: "a" is given twice'),
        ("a: {b: 1, b: 2}", 'a.yaml:1: "b" is given twice'),
        ("a:\n- {b: 1}\n- {b: 1, b: 2}", 'a.yaml:3: "b" is given twice'),
        ("1: x\n'1': y", '"1" is given twice'),
        ("a: [1", "a.yaml:1: .*check the indentation and the quotes there"),
        ("a: 1\n\tb: 2", "a.yaml:2: "),
        ("a: 1\n---\nb: 2", "another document"),
        ("a: !!python/object/apply:os.system [ls]", "could not determine a constructor"),
        ("a: &a {b: *a}", "recursive"),
        ("? [1, 2]\n: x", "unhashable"),
        ("a: \0", "a.yaml: not valid YAML"),
        ("day: 2026-13-01", "a.yaml: month must be in 1..12; quote the value"),
        ("[" * 1200, "a.yaml: not valid YAML"),
    ],
)
def test_text_that_is_no_mapping_of_settings_is_refused(text, message):
    with pytest.raises(ConfigError, match=message):
        parse_yaml(text, place="a.yaml")


def test_settings_can_be_shared_by_anchor_and_changed_after():
    text = "a: &shared {x: 1, y: 2}\nb:\n  <<: *shared\n  y: 3"
    assert parse_yaml(text, place="a.yaml")["b"] == {"x": 1, "y": 3}


def test_a_byte_order_mark_is_no_part_of_the_first_key(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_bytes(b"\xef\xbb\xbfseed: 1\r\nnote: \xea\xb0\x80\r\n")
    assert read_config(path)[0] == {"seed": 1, "note": "가"}


def test_files_that_cannot_be_read_are_refused(tmp_path):
    (tmp_path / "cp949.yaml").write_bytes("note: 한국어".encode("cp949"))
    with pytest.raises(ConfigError, match=r"cp949\.yaml: not UTF-8; save the file as UTF-8"):
        read_config(tmp_path / "cp949.yaml")
    with pytest.raises(ConfigError, match=r"absent\.yaml: No such file or directory; check the path"):
        read_config(tmp_path / "absent.yaml")
    (tmp_path / "folder.yaml").mkdir()
    with pytest.raises(ConfigError, match="check the path"):
        read_config(tmp_path / "folder.yaml")
    with pytest.raises(UserError, match="neither a YAML file nor a preset; presets: embedding-pico"):
        read_config(tmp_path)


def test_every_preset_is_found_by_its_name_and_keeps_its_comments():
    for name in preset_names():
        values, text = read_config(name, ["seed=7"])
        assert (values["name"], values["seed"]) == (values["name"], 7)
        assert text.startswith("# ")
        assert text.endswith("# override: seed=7\n")


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("seed=2", {"seed": 2, "data": {"root": "x"}}),
        ("data.root=null", {"seed": 1, "data": {"root": None}}),
        ("data.root=", {"seed": 1, "data": {"root": None}}),
        ("data.files=[a, b]", {"seed": 1, "data": {"root": "x", "files": ["a", "b"]}}),
        ("data={files: [a]}", {"seed": 1, "data": {"files": ["a"]}}),
        ("new.deep.key=true", {"seed": 1, "data": {"root": "x"}, "new": {"deep": {"key": True}}}),
        ("note=a=b", {"seed": 1, "data": {"root": "x"}, "note": "a=b"}),
        ("note=안녕", {"seed": 1, "data": {"root": "x"}, "note": "안녕"}),
    ],
)
def test_an_override_sets_one_place_and_leaves_the_given_values_alone(override, expected):
    values = {"seed": 1, "data": {"root": "x"}}
    assert apply_overrides(values, [override]) == expected
    assert values == {"seed": 1, "data": {"root": "x"}}


def test_the_last_override_wins():
    assert apply_overrides({}, ["a.b=1", "a.b=2"]) == {"a": {"b": 2}}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("seed", "expected key=value"),
        ("=1", "expected key=value"),
        ("data..root=1", "expected key=value"),
        ("data.=1", "expected key=value"),
        ("seed=[1", "not valid YAML; quote it"),
        ("seed={a: 1, a: 2}", "not valid YAML; quote it"),
        ("note=2026-13-01", "not valid YAML; quote it"),
        ("seed.x=1", '"seed" is a value, not a group of settings'),
    ],
)
def test_a_bad_override_is_refused(override, message):
    with pytest.raises(ConfigError, match=message):
        apply_overrides({"seed": 1}, [override])


TEXTS = st.text(st.characters(codec="utf-8"), max_size=12)


@settings(max_examples=25)
@given(
    st.builds(
        Example,
        recipe=st.just("splade"),
        seed=st.integers(0, 2**70),
        learning_rate=st.floats(1e-300, 1e300),
        note=TEXTS,
        data=st.builds(Data, root=st.just(Path("some where")), files=st.lists(TEXTS, min_size=1).map(tuple)),
        stages=st.none() | st.lists(st.builds(Stage, name=TEXTS, steps=st.integers(1, 9))).map(tuple),
        by_name=st.dictionaries(TEXTS, st.builds(Stage)),
        shape=st.builds(Circle, radius=st.floats(allow_nan=False)) | st.builds(Square),
    )
)
def test_settings_survive_being_written_as_yaml(example):
    assert validate(parse_yaml(to_yaml(example), place="a.yaml"), Example, place="a.yaml") == example


def test_written_settings_name_every_default_and_keep_korean_readable():
    text = to_yaml(Example(recipe="splade", note="한국어"))
    assert text.startswith("recipe: splade\nseed: 13\n")
    assert "note: 한국어\n" in text
