"""`pytest tests/engines --url http://localhost:9200` runs the OpenSearch tests against a live cluster."""

import uuid

import pytest

from engines.engine_models import save_static_model, write_corpus
from engines.fake_opensearch import FakeOpenSearch
from soju.search.opensearch import OpenSearchEngine


def pytest_addoption(parser):
    parser.addoption("--url", default=None, help="OpenSearch cluster instead of the one in this process")


@pytest.fixture
def fake():
    with FakeOpenSearch() as server:
        yield server


@pytest.fixture
def cluster(request):
    """An engine on a live cluster when --url is given, else on the server of this process; and an unused name."""
    url = request.config.getoption("--url", default=None)
    engine = OpenSearchEngine.connect(url or request.getfixturevalue("fake").url)
    name = f"soju-test-{uuid.uuid4().hex[:8]}"
    yield engine, name
    if engine.exists(name):
        engine.client.indices.delete(index=name)
    engine.close()


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    return save_static_model(tmp_path_factory.mktemp("engines") / "model")


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("engines") / "corpus.jsonl")
