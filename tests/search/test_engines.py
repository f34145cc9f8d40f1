"""Each row of the tables of engines is an engine, and names reach settings and the command line from there alone."""

import pytest
from typer.testing import CliRunner

from soju.cli import app
from soju.core.config import validate
from soju.core.errors import ConfigError, UserError
from soju.search.engines import ENGINES, FAST, OWN, SERVERS, fast_engine, server
from soju.search.folder import IndexSettings


@pytest.mark.parametrize("name", FAST)
def test_a_fast_engine_builds_opens_and_searches(name):
    engine = fast_engine(name)
    assert all(callable(getattr(engine, method)) for method in ("build", "open", "search"))
    assert engine.auto_up_to > 0


@pytest.mark.parametrize("name", SERVERS)
def test_a_server_is_called_as_its_row_and_has_settings(name):
    engine = server(name)
    assert engine.name == name
    assert "bulk" in engine.index_settings.model_fields
    engine.query_settings()


def test_settings_take_the_engines_of_the_table_and_name_them_all():
    for name in OWN:
        assert validate({"engine": name}, IndexSettings, place="test").engine == name
    with pytest.raises(ConfigError, match=f'test: engine: got "seismic"; choose one of {", ".join(OWN)}'):
        validate({"engine": "seismic"}, IndexSettings, place="test")


@pytest.mark.parametrize("verb", [["search", "index", "물"], ["index", "ko-en-static", "corpus.txt", "index"]])
def test_the_command_line_takes_the_engines_of_the_table_and_no_other(verb):
    result = CliRunner().invoke(app, [*verb, "--engine", "seismic"], env={"COLUMNS": "200"})
    assert result.exit_code == 2
    assert f"'seismic' is not one of {', '.join(ENGINES)}" in result.output
    assert isinstance(CliRunner().invoke(app, [*verb, "--engine", "qdrant"]).exception, UserError)
