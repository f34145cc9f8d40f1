import json
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from soju.core import run as run_directory
from soju.core.config import Settings
from soju.core.errors import UserError
from soju.core.results import Interval, Score
from soju.core.run import Run, describe_environment


class Example(Settings):
    seed: int = 13
    name: str = "demo"


def create(path):
    return Run.create(path, config_text="name: demo  # mine\n", config=Example(), seed=13)


def test_a_run_folder_holds_the_config_as_given_and_as_resolved(tmp_path):
    run = create(tmp_path / "runs" / "demo")
    assert (run.folder / "config.yaml").read_text() == "name: demo  # mine\n"
    assert (run.folder / "resolved.yaml").read_text() == "seed: 13\nname: demo\n"
    assert json.loads((run.folder / "environment.json").read_text())["seed"] == 13
    assert run.final == run.folder / "final"


def test_a_folder_that_holds_a_run_is_refused_and_left_alone(tmp_path):
    run = create(tmp_path / "demo")
    (run.folder / "resolved.yaml").write_text("mine")
    with pytest.raises(UserError, match="holds a run already; choose another folder"):
        create(tmp_path / "demo")
    assert (run.folder / "resolved.yaml").read_text() == "mine"


def test_a_folder_with_other_files_may_become_a_run(tmp_path):
    (tmp_path / "notes.txt").write_text("x")
    assert create(tmp_path).folder == tmp_path


@pytest.mark.parametrize("name", ["file", "file/deeper"])
def test_a_file_in_the_way_is_refused(tmp_path, name):
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="a file is in the way"):
        create(tmp_path / name)


def test_the_environment_holds_no_machine_path_and_no_host_name(monkeypatch):
    arguments = [
        "train",
        "/home/alice/configs/a.yaml",
        "--out",
        "/home/alice/my runs/first",
        "--out=/home/alice/second",
        "~/alice/third",
        "data.root=/home/alice/corpora/",
        "data.pairs=[/home/alice/a.tsv, '/home/alice/b c.tsv', /home/alice/*.gz]",
        r"C:\Users\alice\d.yaml",
        "data.terms=[hub:owner/name:train, samples:terms.train, data/e.tsv]",
    ]
    monkeypatch.setattr(sys, "argv", ["/home/alice/venv/bin/soju", *arguments])
    environment = describe_environment(seed=1)
    text = json.dumps(environment)
    for secret in ("alice", platform.node(), str(Path.home()), str(Path(sys.prefix)), str(Path.cwd())):
        assert secret not in text
    assert environment["arguments"] == [
        "train",
        "a.yaml",
        "--out",
        "first",
        "--out=second",
        "third",
        "data.root=",
        "data.pairs=[a.tsv, 'b c.tsv', *.gz]",
        "d.yaml",
        "data.terms=[hub:owner/name:train, samples:terms.train, data/e.tsv]",
    ]


def test_the_environment_names_versions():
    environment = describe_environment(seed=1)
    assert environment["python"] == platform.python_version()
    assert environment["packages"]["numpy"]
    assert environment["started"].endswith("+00:00")


def test_a_package_that_is_absent_has_no_version(monkeypatch):
    monkeypatch.setattr(run_directory, "_PACKAGES", ("no-such-package-here",))
    assert describe_environment(seed=1)["packages"] == {"no-such-package-here": None}


def git(folder, *arguments):
    identity = ["-c", "user.name=x", "-c", "user.email=x@example.org"]
    return subprocess.run(
        ["git", "-C", str(folder), *identity, *arguments], check=True, capture_output=True, text=True
    ).stdout.strip()


def test_the_commit_is_that_of_the_repository_that_tracks_the_package(tmp_path, monkeypatch):
    module = tmp_path / "src" / "run_directory.py"
    module.parent.mkdir()
    module.write_text("x")
    monkeypatch.setattr(run_directory, "__file__", str(module))
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-q", "-m", "x")
    assert describe_environment(seed=1)["commit"] == git(tmp_path, "rev-parse", "HEAD")


def test_the_commit_of_a_project_that_merely_holds_the_environment_is_not_ours(tmp_path, monkeypatch):
    git(tmp_path, "init", "-q")
    git(tmp_path, "commit", "-q", "--allow-empty", "-m", "x")
    monkeypatch.setattr(run_directory, "__file__", str(tmp_path / "run_directory.py"))
    assert describe_environment(seed=1)["commit"] is None


def test_there_is_no_commit_without_git(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert describe_environment(seed=1)["commit"] is None


SCORES = [
    Score("recall@10", "static", "dev/ko-en", 0.1 + 0.2, "fraction", True, "k:10", Interval(0.25, 1 / 3)),
    Score("size", "static", "모델", 3, "bytes", False, "bytes", None),
]


def test_scores_survive_being_written(tmp_path):
    run = create(tmp_path)
    run.write_scores(SCORES)
    assert run.scores == SCORES


def test_a_run_without_scores_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"no scores\.json; is this the folder of a finished run\?"):
        _ = Run(tmp_path).scores


def test_scores_that_are_not_json_are_refused(tmp_path):
    (tmp_path / "scores.json").write_text('[{"name": "rec')
    with pytest.raises(UserError, match=r"scores\.json: unreadable"):
        _ = Run(tmp_path).scores
