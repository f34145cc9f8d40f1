"""What the pages about training say exists: settings, weights, commands, links."""

import re
import shlex
from pathlib import Path

import pytest
import typer
import yaml

from soju.cli import app
from soju.core.config import preset_names, validate
from soju.embedding.config import EvaluationSettings
from soju.sparse.config import LossSettings, PretrainedStudent, ScratchStudent, TeacherSettings, TermsConfig
from soju.sparse.triplets.config import TripletsConfig, TripletsTeacherSettings

ROOT = Path(__file__).resolve().parents[1]
PAGES = {
    path.name: path.read_text(encoding="utf-8") for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
}
OURS = ("splade_terms.md", "splade_triplets.md", "losses.md", "training.md", "mining.md", "measuring.md", "engines.md")
TERMS = PAGES["splade_terms.md"]
COMMANDS = {
    name: {option for parameter in command.params for option in parameter.opts}
    for name, command in typer.main.get_command(app).commands.items()
}
BASE = {
    "recipe": "splade",
    "mode": "terms",
    "name": "page",
    "data": {"terms": ["terms.jsonl"], "pairs": ["pairs.tsv"]},
    "student": {"init": "lexical"},
    "losses": {"distillation": 0},
}


def blocks(page, kind):
    fenced = re.findall(r"^```(\w*)\n(.*?)^```", PAGES[page], re.MULTILINE | re.DOTALL)
    return [text for language, text in fenced if re.fullmatch(kind, language)]


def anchors(page):
    titles = re.findall(r"^#+ (.*)$", PAGES[page], re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


ABOUT_TRIPLETS = "splade_triplets.md"
BASE_OF_TRIPLETS = {**BASE, "mode": "triplets", "data": {**BASE["data"], "triplets": ["triplets.jsonl"]}}


@pytest.mark.parametrize("text", [block for page in OURS if page != ABOUT_TRIPLETS for block in blocks(page, "yaml")])
def test_every_yaml_block_is_a_valid_configuration(text):
    validate({**BASE, **yaml.safe_load(text)}, TermsConfig, place="page")


@pytest.mark.parametrize("text", blocks(ABOUT_TRIPLETS, "yaml"))
def test_every_yaml_block_about_triplets_is_a_valid_configuration(text):
    validate({**BASE_OF_TRIPLETS, **yaml.safe_load(text)}, TripletsConfig, place="page")


def test_every_setting_that_a_page_names_exists():
    named = {
        match
        for page in OURS
        for match in re.findall(r"`(data|student|teacher|losses|training|evaluation)\.(?!json)(\w+)", PAGES[page])
    }
    groups = ("data", "losses", "training", "evaluation")
    modes = (TermsConfig, TripletsConfig)
    fields = {
        name: set().union(*(mode.model_fields[name].annotation.model_fields for mode in modes)) for name in groups
    }
    teachers = TeacherSettings.model_fields.keys() | TripletsTeacherSettings.model_fields.keys()
    fields |= {"student": {*ScratchStudent.model_fields, *PretrainedStudent.model_fields}, "teacher": teachers}
    fields["evaluation"] |= EvaluationSettings.model_fields.keys()
    assert len(named) > 20
    assert {f"{group}.{name}" for group, name in named if name not in fields[group]} == set()


def test_the_table_of_weights_is_the_published_preset_and_our_defaults():
    rows = re.findall(r"^\| [^|]+ \| `losses\.(\w+)` \| ([\d.e-]+) \| ([\d.e-]+) \|$", TERMS, re.MULTILINE)
    preset = yaml.safe_load((ROOT / "src/soju/presets/splade/splade-v19.yaml").read_text(encoding="utf-8"))["losses"]
    assert len(rows) == 9
    for name, published, ours in rows:
        assert (preset[name], getattr(LossSettings(), name)) == (float(published), float(ours)), name


@pytest.mark.parametrize("page", ["README.md", "embedding.md", "explore.md", "expansion.md", *OURS])
def test_every_command_and_option_that_a_page_shows_exists(page):
    lines = [line for block in blocks(page, "(?:bash)?") for line in block.splitlines()]
    shown = [line.split("soju ", 1)[1] for line in lines if re.match(r"(torchrun .*-m )?soju ", line)]
    assert shown or page == "losses.md"
    for line in shown:
        verb, *arguments = shlex.split(line, comments=True)
        assert verb in COMMANDS, line
        assert {word.split("=")[0] for word in arguments if word.startswith("-")} <= COMMANDS[verb], line
    presets = {word for line in shown for word in re.findall(r"\b(?:splade|embedding)-[\w-]+", line.split("runs/")[0])}
    assert presets <= set(preset_names())


@pytest.mark.parametrize("page", ["embedding.md", "explore.md", "expansion.md", *OURS])
def test_every_link_of_a_page_leads_somewhere(page):
    for target in re.findall(r"\]\(([^)]+)\)", PAGES[page]):
        name, _, anchor = target.partition("#")
        if not name.startswith("http"):
            assert (ROOT / "docs" / name).exists(), target
            assert not anchor or anchor in anchors(name or page), target


ALL_PAGES = {
    **PAGES,
    **{
        name: (ROOT / name).read_text(encoding="utf-8")
        for name in (
            "CONTRIBUTING.md",
            "CHANGELOG.md",
            "src/soju/samples/README.md",
            "src/soju/packaged/ko-en-static/README.md",
        )
    },
}
FORMER_PACKAGES = {"soju.recipes", "soju.models", "soju.losses", "soju.export", "soju.quality"}


def is_there(name):
    """Tell whether a dotted name is a module of soju, or something that is defined in one."""
    place, rest = ROOT / "src", name.split(".")
    while rest and (place / rest[0]).is_dir():
        place, rest = place / rest[0], rest[1:]
    if not rest:
        return True
    module = place / f"{rest[0]}.py"
    module, rest = (module, rest[1:]) if module.is_file() else (place / "__init__.py", rest)
    return all(re.search(rf"\b{part}\b", module.read_text(encoding="utf-8")) for part in rest)


@pytest.mark.parametrize("page", ALL_PAGES)
def test_every_module_that_a_page_names_exists(page):
    text = ALL_PAGES[page]
    shared = "|".join(path.name for path in (ROOT / "src/soju").iterdir() if path.is_dir())
    named = set(re.findall(r"(?<![\w/.@])soju(?:\.\w+)+", text))
    named |= {f"soju.{name}" for name in re.findall(rf"`((?:{shared})\.\w+\.\w+(?:\.\w+)*)`", text)}
    gone = FORMER_PACKAGES if page == "CHANGELOG.md" else set()
    assert {name for name in named - gone if not is_there(name)} == set()


@pytest.mark.parametrize("page", ALL_PAGES)
def test_every_file_that_a_page_names_exists(page):
    paths = set(re.findall(r"(?<![\w./-])((?:src|tests|benchmarks|docs)/[\w./-]*\w)", ALL_PAGES[page]))
    paths |= set(re.findall(r"`(\w+(?:/\w+)+\.(?:py|html))\b", ALL_PAGES[page]))
    written = {path for path in paths if path.startswith("benchmarks/results")}  # by `make bench`
    roots = (ROOT, ROOT / "src/soju")
    assert {path for path in paths - written if not any((root / path).exists() for root in roots)} == set()


def test_the_tree_of_the_architecture_page_names_every_file_and_no_other():
    tree = next(block for block in blocks("architecture.md", "") if block.startswith("src/soju/"))
    files = {path.stem for path in (ROOT / "src/soju").rglob("*.py")}
    assert files - {"__init__", "__main__"} - set(re.findall(r"\w+", tree)) == set()
    assert set(re.findall(r"(\w+)\.py\b", tree)) - files == set()
