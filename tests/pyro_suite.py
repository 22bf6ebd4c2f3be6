"""Pyro's own tests of inference, with our objectives in the place of its own.

    python tests/pyro_suite.py FOLDER [--all] [--theirs] [pytest's arguments]

FOLDER is a checkout of pyro-ppl/pyro; its ``tests/infer`` are run with the Pyro that is installed. Nothing of them is
copied here: before they are imported, Pyro's names for its objectives are made to mean ours (``OURS``). The objectives
that are no bound stay Pyro's, and one that enumerates, but in Pyro's tests of the sums themselves (``SUMMED``); a test
that makes none of ours is left out.

What we refuse by design, and what tests the inside of Pyro's own objectives, stands in ``LISTED``, with the reason and
the message that must be raised; an entry of which no test fails any more is reported as a failure. At the end comes a
table. ``--all`` runs the tests that train to convergence as well, which takes an hour and more on one thread;
``--theirs`` substitutes nothing, to see what fails with Pyro's own objectives too.
"""

from __future__ import annotations

import inspect
import math
import os
import re
import sys
from collections import Counter
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, NamedTuple

import pyro.infer
import pytest

import pyrovae as pv

# --- our objectives under Pyro's names -------------------------------------------------------------------------------


class Plain(pv.ELBO):
    """The ELBO."""

    def __init__(self, num_particles: int = 1, vectorize_particles: bool = True) -> None:
        super().__init__(num_particles, vectorize_particles=vectorize_particles)


class ClosedForm(Plain):
    """The ELBO with every KL in closed form that has one."""

    def __init__(self, num_particles: int = 1, vectorize_particles: bool = True) -> None:
        super().__init__(num_particles, vectorize_particles)
        self.free_bits = -math.inf  # below which no unit ever is


class Renyi(pv.Renyi):
    """Pyro's defaults are alpha = 0 and two particles."""

    def __init__(self, alpha: float = 0.0, num_particles: int = 2, vectorize_particles: bool = True) -> None:
        super().__init__(alpha, num_particles, vectorize_particles=vectorize_particles)


class WakeSleep(pv.RWS):
    """The wake phase alone, as is Pyro's default."""

    def __init__(self, num_particles: int = 2, model_has_params: bool = True, vectorize_particles: bool = True) -> None:
        super().__init__(num_particles, vectorize_particles=vectorize_particles)


OURS = {
    "Trace_ELBO": Plain,
    "TraceGraph_ELBO": Plain,
    "TraceMeanField_ELBO": ClosedForm,
    "JitTrace_ELBO": Plain,
    "JitTraceGraph_ELBO": Plain,
    "JitTraceMeanField_ELBO": ClosedForm,
    "RenyiELBO": Renyi,
    "ReweightedWakeSleep": WakeSleep,
}
NAMES = re.compile("|".join(OURS))
#: Ours sums out what this file marks; other tests of enumeration are of Pyro's warnings, and of shapes in each run.
SUMS, SUMMED = "TraceEnum_ELBO", "test_enum.py"
#: What ours find out for themselves, or have no use for.
DROPPED = {
    "max_plate_nesting", "max_iarange_nesting", "strict_enumeration_warning", "ignore_jit_warnings", "jit_options",
    "retain_graph",
}  # fmt: skip

# --- what fails, and why ---------------------------------------------------------------------------------------------


class Entry(NamedTuple):
    """Tests that fail for a reason: patterns of their ids, and of what is raised; ``always``, or by chance."""

    tests: str
    raises: str
    reason: str
    always: bool = True


EMPTY = "refused: a model must observe or draw something"
WORDS = "refused as Pyro does, in other words or by another exception"
METHOD = "asks for what is a method of Pyro's objective alone; ours draw from the same conditional by num_draws"
ONCE = "asserts the shapes, or the number, of all runs; ours look at a pair once with one particle"

LISTED = [
    Entry("test_valid_models.py::test_empty_model_empty_guide_ok*", "the model has no sample site", EMPTY),
    Entry("test_valid_models.py::test_factor_in_guide_*", "the model has no sample site", EMPTY),
    Entry("test_valid_models.py::test_*variable_clash_*", 'two sample sites named "x"', WORDS),
    Entry("test_inference.py::SafetyTests::test_duplicate_names", '"loc_q_2" is not a latent site of the model', WORDS),
    Entry("test_inference.py::SafetyTests::test_duplicate_obs_name", 'two sample sites named "loc_q"', WORDS),
    Entry(
        "test_inference.py::SafetyTests::test_extra_samples", '"loc_q_2" is not a latent site of the model',
        "refused, where Pyro warns: a draw of the guide that the model lacks and that is not marked as auxiliary",
    ),
    Entry(
        "test_valid_models.py::test_enum_discrete_misuse_warning(Trace*", "No warnings were raised",
        "taken exactly, where Pyro warns: what a guide marks for enumeration",
    ),
    Entry("test_enum.py::test_*marginals_*", "no attribute 'compute_marginals'", METHOD),
    Entry("test_enum.py::test_backwardsample_*", "no attribute 'sample_posterior'", METHOD),
    Entry("test_enum.py::test_enumerate_sequential_model", "mark it.*alone, by which it is summed out exactly", WORDS),
    Entry("test_enum.py::test_elbo_enumerate_plates_6*", '"a", "b", "c" hang together across plates', WORDS),
    Entry("test_enum.py::test_enumerate_sequential_guide", r"\[1.0, 1.0, 0.0\]|\[0.0, 1.0, 0.0\]", ONCE),
    Entry(
        "test_valid_models.py::test_iplate_in_guide_not_model_error(True-*", "DID NOT RAISE",
        "accepted: a plate of the guide alone, which is around no site",
    ),
    Entry("test_valid_models.py::test_vectorized_num_particles*", r"torch.Size\(\[2\]\) == torch.Size", ONCE),
    Entry(
        "test_autoguide.py::test_exact_batch(AutoLowRankMultivariateNormal)", r"3.8\d+ vs 3.837",
        "chance: a loss of 100 draws, of standard error .006, is held to .01 at one seed", always=False,
    ),
    Entry(
        "test_gradient.py::test_plate(*-nonreparam)", "",
        "noise above .06: what a guide draws after a plate may hang on all of it, and is then scored with all of it",
    ),
]  # fmt: skip
#: Of Pyro's unit tests, those that take minutes each.
SLOW = ["test_posterior_predictive_svi_manual_guide"]

# --- the plugin ------------------------------------------------------------------------------------------------------


class Suite:
    """Substitutes objectives, and sorts what comes of each test."""

    def __init__(self, substitute: bool) -> None:
        self.made, self.file = False, ""
        self.counts: Counter[str] = Counter()
        self.listed: dict[Entry, bool] = {}  # whether a test of it has failed, of those that have run
        for name, base in (OURS | {SUMS: Plain}).items():
            theirs = getattr(pyro.infer, name)
            mine = self.stand_in(name, base if substitute else theirs, theirs)
            for module in (pyro.infer, sys.modules[theirs.__module__]):
                setattr(module, name, mine)

    def stand_in(self, name: str, base: type, theirs: type) -> type:
        """An objective under Pyro's name: its keywords translated, and each making of it noticed."""
        dropped = DROPPED if issubclass(base, pv.Objective) else set()

        def __init__(this: Any, *args: Any, **options: Any) -> None:
            self.made = True
            base.__init__(this, *args, **{key: value for key, value in options.items() if key not in dropped})

        def __new__(cls: type, *args: Any, **options: Any) -> Any:
            return object.__new__(cls) if name in OURS or self.file == SUMMED else theirs(*args, **options)

        return type(name, (base,), {"__init__": __init__, "__new__": __new__})

    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        """Keep the tests of our objectives; unless all are asked for, without the slow ones."""
        slow = [] if "all" in config.getoption("stage") else SLOW
        kept = [item for item in items if is_ours(item) and not any(name in item.nodeid for name in slow)]
        config.hook.pytest_deselected(items=[item for item in items if item not in set(kept)])
        items[:] = kept

    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        self.made, self.file = False, item.path.name

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
        """Sort the outcome; a failure that is listed, or is none of ours, is no failure."""
        report = (yield).get_result()  # type: ignore[attr-defined]
        if report.when != "call" and report.passed:
            return
        kind: str = report.outcome
        for entry in filter(lambda entry: fnmatch(name_of(item), entry.tests), LISTED):
            self.listed.setdefault(entry, False)
        if report.failed and self.made:
            if entry := entry_of(item, call.excinfo and call.excinfo.value):
                self.listed[entry] = True
                kind, report.outcome, report.wasxfail = entry.reason, "skipped", entry.reason
        elif not self.made:
            kind = "no objective of ours" + (", failed" if report.failed else "")
            if report.failed:
                report.outcome, report.wasxfail = "skipped", kind
        if report.failed:
            sys.stderr.write(f"\n{item.nodeid}: {call.excinfo and call.excinfo.exconly().splitlines()[0]}\n")
        self.counts[kind] += 1

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        """The table."""
        terminalreporter.section("Pyro's tests, our objectives")
        for kind, number in sorted(self.counts.items(), key=lambda item: -item[1]):
            terminalreporter.write_line(f"{number:6}  {kind}")
        for entry in self.unused():
            terminalreporter.write_line(f"no test of this entry fails any more, remove it: {entry}")

    def unused(self) -> list[Entry]:
        """Entries of the list that excuse nothing."""
        return [entry for entry, needed in self.listed.items() if entry.always and not needed]


def is_ours(item: Any) -> bool:
    """Whether a test makes one of our objectives, by its parameters, or else by its source."""
    if item.path.name == SUMMED:
        return True
    named = re.search("ELBO|WakeSleep|EnergyDistance|MMD", item.name)
    return bool(NAMES.search(item.name if named else inspect.getsource(item.cls or item.function)))


def name_of(item: pytest.Item) -> str:
    """File and name of a test, without brackets, which mean something to fnmatch."""
    return item.nodeid.rpartition("/")[2].replace("[", "(").replace("]", ")")


def entry_of(item: pytest.Item, error: BaseException | None) -> Entry | None:
    """The entry that lists a test's failure, if one does."""
    said = []
    while error is not None:
        said.append(str(error))
        error = error.__cause__ or error.__context__
    return next((e for e in LISTED if fnmatch(name_of(item), e.tests) and re.search(e.raises, "\n".join(said))), None)


def main(folder: str, *options: str) -> int:
    """Run the tests of a checkout; 0 if none fails that is not listed."""
    own = {"--all", "--theirs"}
    suite = Suite(substitute="--theirs" not in options)
    os.chdir(folder)  # its tests are a package of the same name as ours
    sys.path[:] = [folder for folder in sys.path if Path(folder).resolve() != Path(__file__).resolve().parent]
    names = re.compile(f"{NAMES.pattern}|{SUMS}")
    files = [str(f) for f in sorted(Path("tests/infer").rglob("test_*.py")) if names.search(f.read_text())]
    stage = "all" if "--all" in options else "unit"
    rest = [option for option in options if option not in own]
    chosen = [] if any(option.startswith("tests/") for option in rest[:1]) else files
    newer = r"ignore:`torch.jit:FutureWarning"
    done = pytest.main(
        ["-q", "--tb=short", "-p", "no:cacheprovider", "--stage", stage, "-W", newer, *chosen, *rest], plugins=[suite]
    )
    return int(done) or int(bool(suite.unused()))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
