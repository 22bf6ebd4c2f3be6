"""Every row of the fault matrix is answered right."""

from collections.abc import Iterator

import pytest

from tests.faults.matrix import Row, alone, rows, run


@pytest.fixture(scope="module", autouse=True)
def matrix() -> Iterator[None]:
    with alone():
        yield


@pytest.mark.parametrize("row", rows(), ids=str)
def test_answers(row: Row, tmp_path):
    verdict = run(row, tmp_path)
    assert verdict.kind == "right", verdict
