"""Every row of the fault matrix is answered right."""

import os
from collections.abc import Iterator

import pytest

from tests.faults.matrix import Row, alone, rows, run


@pytest.fixture(scope="module", autouse=True)
def matrix(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    base = tmp_path_factory.getbasetemp()
    with alone((base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "kept"):  # of all workers, or of this
        yield


@pytest.mark.parametrize("row", rows(), ids=str)
def test_answers(row: Row, tmp_path):
    verdict = run(row, tmp_path)
    assert verdict.kind == "right", verdict
