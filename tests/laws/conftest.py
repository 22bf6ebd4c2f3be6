"""Fixtures of the laws, and the list of their z-scores."""

from __future__ import annotations

import pytest
import torch
from scipy.stats import norm

from tests.state import double_precision

# At most 3000 comparisons with a normal error are made; all together raise a false alarm with probability 1e-6.
COMPARISONS, FALSE_ALARM = 3000, 1e-6
Z_LIMIT = float(norm.isf(FALSE_ALARM / COMPARISONS / 2))  # about 6.3
TABLE = pytest.StashKey[dict]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--law-table", action="store_true", help="print the largest |bias|/standard error per objective and pair"
    )


def pytest_configure(config: pytest.Config) -> None:
    config.stash[TABLE] = {}


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    """The tensors are small: more threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def clean_state():
    """Double precision, one seed, an empty parameter store; Pyro's validation as it is by default."""
    with double_precision(20240607):
        yield


@pytest.fixture
def agree(request: pytest.FixtureRequest):
    """Assert that a mean is what it should be, by its own standard error, and record the z-score."""
    table = request.config.stash[TABLE]

    def check(objective: str, pair: str, what: str, draws: torch.Tensor, truth: torch.Tensor | float) -> None:
        draws = draws.detach().flatten()
        error = draws.std() / len(draws) ** 0.5
        bias = draws.mean() - truth
        # Draws that all agree (posterior-equal guides) leave rounding as the only error.
        z = float(bias / error.clamp(min=1e-11 * (1 + abs(float(truth)))))
        key = (objective, pair)
        table[key] = max(table.get(key, (0.0, "")), (abs(z), what))
        assert abs(z) < Z_LIMIT, (
            f"{objective} on {pair}: {what} is {draws.mean():.6g} +- {error:.2g}, "
            f"should be {float(truth):.6g} (z = {z:.1f})"
        )

    return check


def pytest_terminal_summary(terminalreporter, config: pytest.Config) -> None:
    table = config.stash.get(TABLE, {})
    if not (table and config.getoption("law_table", default=False)):
        return
    pairs = list(dict.fromkeys(pair for _, pair in table))
    width = max(len(objective) for objective, _ in table)
    write = terminalreporter.write_line
    terminalreporter.section(f"laws: largest |bias| / standard error (limit {Z_LIMIT:.1f})")
    write(" " * width + "  " + " ".join(f"{pair[:10]:>10}" for pair in pairs))
    for objective in dict.fromkeys(objective for objective, _ in table):
        cells = (table.get((objective, pair)) for pair in pairs)
        write(f"{objective:<{width}}  " + " ".join(f"{'' if c is None else format(c[0], '.1f'):>10}" for c in cells))
    (objective, pair), (z, what) = max(table.items(), key=lambda item: item[1])
    write(f"largest: {z:.2f}, {objective} on {pair}, {what}")
