"""Each row of the tables of engines is an engine, and names reach settings and the command line from there alone."""

import numpy as np
import pytest
from scipy.sparse import csr_array
from typer.testing import CliRunner

from search.segments import write
from soju.cli import app
from soju.core.config import validate
from soju.core.errors import ConfigError, UserError
from soju.search.engines import ENGINES, FAST, OWN, SERVERS, fast_engine, server
from soju.search.exact import ExactEngine
from soju.search.folder import IndexSettings


@pytest.mark.parametrize("name", FAST)
@pytest.mark.parametrize("chunks_a_document", [1, 3])
def test_a_fast_engine_built_or_opened_finds_what_exact_search_finds_in_that_order(tmp_path, name, chunks_a_document):
    random, rows, terms = np.random.default_rng(7), 600, 200
    share = 1 / np.arange(1, terms + 1)
    columns = random.choice(terms, rows * 12, p=share / share.sum())
    weights = random.uniform(0.1, 5, rows * 12).astype(np.float32)
    vectors = csr_array((weights, (np.repeat(np.arange(rows), 12), columns)), (rows, terms))
    postings, documents = write(tmp_path / "index", vectors), (np.arange(rows) // chunks_a_document).astype(np.int32)
    exact, engine = ExactEngine(postings, documents), fast_engine(name)
    assert engine.auto_up_to > 0
    for fast in (
        engine.build(tmp_path / "index", postings, documents),
        engine.open(tmp_path / "index", postings, documents),
    ):
        for _ in range(20):
            query = np.sort(random.choice(terms, 6, replace=False)).astype(np.int32), random.random(6, dtype=np.float32)
            (chunks, scores), (found, found_scores) = exact.search(*query, 10), fast.search(*query, 10)
            np.testing.assert_allclose(found_scores, scores, rtol=1e-3)
            assert (np.diff(found_scores) <= 0).all()
            assert set(found.tolist()) == set(chunks.tolist())


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
