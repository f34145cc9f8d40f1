from pathlib import Path

import pytest

from soju.data.log import ReadLog
from soju.data.readers import read_rows
from soju.data.rows import KINDS


@pytest.fixture
def read(tmp_path):
    """Write `content` under `name`, read it, and return the rows and the log."""

    def write_and_read(content, kind="pairs", name="data.tsv", **options):
        path = Path(tmp_path / name)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        log = ReadLog()
        return list(read_rows([name], KINDS[kind], log=log, root=tmp_path, **options)), log

    return write_and_read
