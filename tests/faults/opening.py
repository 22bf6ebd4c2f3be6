"""Opening, resuming and comparing runs: whose code is imported, whose results are shown, on which data."""

import json
import sys
from pathlib import Path
from unittest import mock

from tests.faults.matrix import command, fault, once, small_run

EVIL = "from pathlib import Path\nPath({!r}).write_text('imported')\nfrom torch.nn import Linear as M\n"
OWN = """
import pyro, pyro.distributions as dist
from torch import nn

class MyPair(nn.Module):
    def __init__(self, input_shape=(1, 8, 8)):
        super().__init__()
        self.config = {"input_shape": list(input_shape)}
        self.decoder, self.encoder = nn.Linear(2, 64), nn.Linear(64, 2)

    def model(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            logits = self.decoder(z).unflatten(-1, (1, 8, 8))
            pyro.sample("x", dist.Bernoulli(logits=logits).to_event(3), obs=x)

    def guide(self, x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(self.encoder(x.flatten(1)), 1.0).to_event(1))
"""
QUICK = ("--epochs", "1", "--samples", "5", "--device", "cpu")


def forged(run: Path, folder: Path, **changes: object) -> Path:
    """A run that is whole and says something else: a copy under the changed config, as the library writes it."""
    from pyrovae.runs import Run

    source, made = Run(run), Run(folder)
    config = source.config()
    for path, value in changes.items():
        *parents, last = path.split("__")
        inner = config
        for name in parents:
            inner = inner[name]
        inner[last] = value
    made.start(config)
    for row in source.history():
        made.log(row)
    made.save("last", source.weights(), source.state())
    return folder


def planted(folder: Path, where: str) -> str:
    """A module that leaves a file when it is imported, as a class path that would import it."""
    mark = folder / "imported"
    code = EVIL.format(str(mark))
    if where == "beside the run":
        (folder / "evil.py").write_text(code)
        return "evil:M"
    if where == "inside the run":
        (folder / "run" / "evil.py").write_text(code)
        return "run.evil:M"
    if where == "a link out of the run":
        (folder / "elsewhere").mkdir()
        (folder / "elsewhere" / "evil.py").write_text(code)
        (folder / "run" / "evil.py").symlink_to(folder / "elsewhere" / "evil.py")
        return "run.evil:M"
    if where == "a parent package":
        (folder / "package").mkdir()
        (folder / "package" / "__init__.py").write_text(code)
        return "package.no.such:M"
    return where


PLACES = {
    "beside the run": "beside the run", "inside the run": "inside the run", "a link": "a link out of the run",
    "a parent": "a parent package", "venv": "venv.__main__:X", "antigravity": "antigravity:X",
    "torch": "torch.nn:Linear", "exec": "builtins:exec", "our main": "pyrovae.__main__:X",
    "through ours": "pyrovae.models:vae.nn.Linear",
    "not exported": "pyrovae.models:Pair", "parts": "pyrovae.parts:Flow",
}  # fmt: skip


def untouched(folder: Path, before: set[str]) -> None:
    assert not (folder / "imported").exists()
    assert not {"evil", "run", "run.evil", "package", "venv", "venv.__main__", "antigravity"} & (
        set(sys.modules) - before
    )


def foreign(folder: Path, where: str, model: bool = True) -> Path:
    """A run whose config names a class that is not ours, as its model's or as its settings'."""
    forged(small_run(folder / "kept"), folder / "run")
    path = planted(folder, where)
    described = {"class": path, "arguments": {}}
    return forged(folder / "kept", folder / "run", **({"model": described} if model else {"settings__model": path}))


@fault("B2", "evaluate", 4, "is not pyrovae's.*--trust", each=PLACES)
def a_run_names_a_class_of_a_strangers(folder: Path, where: str):
    run, before = foreign(folder, where), set(sys.modules)
    yield "evaluate", run, "--samples", "5"
    untouched(folder, before)


@fault("B2", "evaluate", 4, "is not pyrovae's.*--trust", each=PLACES)
def the_settings_of_a_run_name_a_class_of_a_strangers(folder: Path, where: str):
    run, before = foreign(folder, where, model=False), set(sys.modules)
    yield "evaluate", run, "--samples", "5"
    untouched(folder, before)


@fault("B2", "sample", 4, "is not pyrovae's.*--trust", each=dict(list(PLACES.items())[:5]))
def a_run_to_sample_from_names_a_class_of_a_strangers(folder: Path, where: str):
    run, before = foreign(folder, where), set(sys.modules)
    yield "sample", run
    untouched(folder, before)


@fault("B2", "train --resume", 4, "is not pyrovae's.*--trust", each=dict(list(PLACES.items())[:5]))
def a_run_to_go_on_with_names_a_class_of_a_strangers(folder: Path, where: str):
    run, before = foreign(folder, where, model=False), set(sys.modules)
    yield "train", "--resume", "--run-dir", run
    untouched(folder, before)


@fault("B2", "load", 4, "is not pyrovae's.*trust=True", each=PLACES)
def a_run_to_load_names_a_class_of_a_strangers(folder: Path, where: str):
    import pyrovae as pv

    run, before = foreign(folder, where), set(sys.modules)
    yield lambda: pv.load(run)
    untouched(folder, before)


@fault("B2", "evaluate", 4, "is not pyrovae's.*--trust", each={"settings": "settings__model", "model": "model"})
def the_codes_are_those_of_a_strangers_class(folder: Path, what: str):
    inner = foreign(folder, "beside the run", model=what == "model")
    forged(folder / "kept", folder / "outer", settings__data=f"codes:{inner}", data__name=f"codes:{inner}")
    before = set(sys.modules)
    yield "evaluate", folder / "outer"
    untouched(folder, before)


@fault("B2", "train", 4, "is not pyrovae's.*--trust")
def codes_are_asked_for_of_a_strangers_run(folder: Path):
    inner, before = foreign(folder, "beside the run"), set(sys.modules)
    yield "train", "code_prior", "--data", f"codes:{inner}", *QUICK
    untouched(folder, before)


@fault("C", "evaluate", 4, "codes themselves")
def the_codes_of_a_run_are_its_own(folder: Path):
    name = f"codes:{folder / 'run'}"
    yield "evaluate", forged(small_run(folder / "kept"), folder / "run", settings__data=name, data__name=name)


def own_run(folder: Path, *more: str) -> Path:
    """A run of a user's own class, made by the command line."""
    (folder / "mine.py").write_text(OWN)
    assert command("train", "mine:MyPair", *QUICK, "--run-dir", folder / "run", *more).code == 0
    return folder / "run"


@fault("B2", "evaluate", 0, r"test NLL +\d")
def ones_own_class_is_trusted(folder: Path):
    yield "evaluate", own_run(folder), "--trust", "--samples", "5"


@fault("B2", "evaluate", 4, '"mine:MyPair" is not pyrovae')
def ones_own_class_is_not_trusted(folder: Path):
    yield "evaluate", own_run(folder), "--samples", "5"


@fault("B2", "sample", 0, "wrote")
def ones_own_class_is_trusted_to_sample(folder: Path):
    yield "sample", own_run(folder), "--trust", "-n", "4"


@fault("B2", "train --resume", 0, "finished")
def ones_own_class_is_named_again(folder: Path):
    yield "train", "mine:MyPair", "--resume", "--run-dir", own_run(folder)


@fault("B2", "train --resume", 0, "finished")
def ones_own_class_is_trusted_to_go_on(folder: Path):
    yield "train", "--resume", "--trust", "--run-dir", own_run(folder)


@fault("B2", "train --resume", 4, '"mine:MyPair" is not pyrovae')
def ones_own_class_is_not_trusted_to_go_on(folder: Path):
    yield "train", "--resume", "--run-dir", own_run(folder)


@fault("B2", "load", each={"trust": True, "pair": False})
def ones_own_class_is_loaded(folder: Path, trust: bool):
    import pyrovae as pv

    run = own_run(folder)
    import mine

    outcome = yield lambda: pv.load(run, trust=True) if trust else pv.load(run, pair=mine.MyPair())
    weights = pv.runs.Run(run).weights()
    assert all((value == weights[name]).all() for name, value in outcome.value.state_dict().items())


def arguments(**more: object) -> dict[str, object]:
    return {"model__arguments": {"input_shape": [1, 8, 8], **more}}


WRONG = {
    "objective": {"settings__objective": "os:system"}, "likelihood": arguments(likelihood="os:system"),
    "activation": arguments(activation="builtins.eval"), "unknown argument": arguments(colour=3),
    "arguments of another shape": {"model__arguments": [1, 8]}, "prior": arguments(prior="mine:prior"),
    "data": {"settings__data": "http://example.org"}, "unknown setting": {"settings__colour": 3},
    "setting of another type": {"settings__model": 3}, "seed": {"settings__seed": "os"},
    "settings of another shape": {"settings": [3]}, "shape": {"model": None, "data__shape": "abc"},
}  # fmt: skip


@fault("B2", "evaluate", 4, "asks for what there is not", each=WRONG)
def a_run_asks_for_what_there_is_not(folder: Path, changes: dict[str, object]):
    run = forged(small_run(folder / "kept"), folder / "run", **changes)
    yield "evaluate", run, "--samples", "5"
    assert not (run / "results.json").exists()


# --- results belong to weights ---------------------------------------------------------------------

SMALL = ("--epochs", "2", "--samples", "20", "--latent-dim", "3", "--set", "hidden=[16]", "--device", "cpu")


def results_of(run: Path) -> dict[str, object]:
    found: dict[str, object] = json.loads((run / "results.json").read_text())
    return found


def cut(folder: Path, *more: str) -> Path:
    """A run that was interrupted in its second epoch."""
    from pyrovae.runs import Run

    log = Run.log

    def dying(run: Run, metrics: dict[str, object]) -> None:
        if metrics["epoch"] == 2:
            raise KeyboardInterrupt
        log(run, metrics)

    with mock.patch.object(Run, "log", dying):
        assert command("train", *SMALL, *more, "--run-dir", folder / "cut").code == 130
    return folder / "cut"


@fault("A3", "train --resume", 0, r"test NLL +\d")
def an_interrupted_run_that_was_evaluated_goes_on(folder: Path):
    run, whole = cut(folder), results_of(small_run(folder / "whole"))
    assert command("evaluate", run, "--samples", "20").code == 0
    early = results_of(run)["nll"]
    yield "train", "--resume", "--run-dir", run
    assert results_of(run)["nll"] == whole["nll"] != early
    assert results_of(run)["weights"] == whole["weights"]


def trained_on(folder: Path) -> Path:
    """A run that was measured, trained on, and stopped before it was measured again."""
    run = cut(folder)
    assert command("evaluate", run, "--samples", "20").code == 0
    with mock.patch("pyrovae.app.train.measure", side_effect=KeyboardInterrupt):
        assert command("train", "--resume", "--run-dir", run).code == 130
    return run


@fault("A3", "compare", 0, r"stale")
def results_are_of_weights_that_are_there_no_more(folder: Path):
    run = trained_on(folder)
    outcome = yield "compare", run
    assert f"{results_of(run)['nll']:.2f}" not in outcome.printed


@fault("A3", "compare", 0, r"\d ± \d")
def stale_results_were_measured_anew(folder: Path):
    run = trained_on(folder)
    assert command("evaluate", run, "--samples", "20").code == 0
    outcome = yield "compare", run
    assert f"{results_of(run)['nll']:.2f}" in outcome.printed
    assert "\u00b1" in outcome.printed.split("error:")[0]
    assert "stale" not in outcome.printed.split("error:")[0]


@fault("A3", "train --resume", 0, r"test NLL +\d")
def training_ended_before_anything_was_measured_again(folder: Path):
    run, whole = trained_on(folder), results_of(small_run(folder / "whole"))
    yield "train", "--resume", "--run-dir", run
    assert results_of(run)["nll"] == whole["nll"]


@fault("A3", "train --resume", 0, "is finished; its results")
def the_results_of_a_finished_run_are_current(folder: Path):
    run = small_run(folder / "run")
    before = (run / "results.json").read_bytes()
    yield "train", "--resume", "--run-dir", run
    assert (run / "results.json").read_bytes() == before


def aged(run: Path) -> Path:
    """The run as a release wrote it whose results did not say of which weights they are."""
    found = results_of(run)
    found.pop("weights", None)
    (run / "results.json").write_text(json.dumps(found))
    return run


@fault("A3", "train --resume", 0, r"test NLL +\d")
def results_do_not_say_of_which_weights_they_are(folder: Path):
    yield "train", "--resume", "--run-dir", aged(small_run(folder / "run"))
    assert len(str(results_of(folder / "run")["weights"])) == 64


@fault("A3", "compare", 0, r"does not say which weights.*\d ± \d")
def results_to_compare_do_not_say_of_which_weights_they_are(folder: Path):
    yield "compare", aged(small_run(folder / "run"))


@fault("A3", "evaluate", 0, r"test NLL +\d")
def an_evaluation_says_of_which_weights_it_is(folder: Path):
    from pyrovae.runs import Run

    run = small_run(folder / "run")
    (run / "results.json").unlink()
    yield "evaluate", run, "--samples", "5"
    assert results_of(run)["weights"] == Run(run).digest()


@fault("A3", "compare", 0, r"\d ± \d")
def results_are_of_the_best_checkpoint(folder: Path):
    run = small_run(folder / "run", "--set", "validation=100")
    assert command("evaluate", run, "--samples", "20", "--checkpoint", "best").code == 0
    outcome = yield "compare", run
    assert "stale" not in outcome.printed.split("error:")[0]


DAMAGED = {
    "a list": "[1]", "a number": "3", "deep": "[" * 100_000, "deep objects": '{"a":' * 100_000,
    "cut short": '{"nll": 3',
    "other entries": '{"colour": 3}', "text": '{"likelihood_is": "estimate", "active_units": {}, "nll": "3"}',
    "no nll": '{"likelihood_is": "estimate", "active_units": {}}', "Latin": '{"likelihood_is": "\xe9"}',
    "units": '{"likelihood_is": null, "active_units": [3]}',
    "units of another shape": '{"likelihood_is": null, "active_units": {"z": {"active": "all"}}}', "empty": "",
}  # fmt: skip


def damaged(folder: Path, text: str) -> Path:
    run = small_run(folder / "run")
    (run / "results.json").write_text(text, encoding="latin1")
    return run


@fault("C", "compare", 4, "results.json.*run pyrovae evaluate", each=DAMAGED)
def results_are_of_another_shape(folder: Path, text: str):
    yield "compare", damaged(folder, text)


@fault("C", "train --resume", 0, r"test NLL +\d", each=dict(list(DAMAGED.items())[:6]))
def the_results_of_a_run_to_go_on_with_are_of_another_shape(folder: Path, text: str):
    yield "train", "--resume", "--run-dir", damaged(folder, text)
    assert results_of(folder / "run")["num_samples"] == 20


@fault("C", "evaluate", 0, r"test NLL +\d", each=dict(list(DAMAGED.items())[:6]))
def the_results_to_replace_are_of_another_shape(folder: Path, text: str):
    yield "evaluate", damaged(folder, text), "--samples", "5"
    assert results_of(folder / "run")["num_samples"] == 5


# --- what is shown ---------------------------------------------------------------------------------


@fault("A11", "compare", 0, r"\d ± inf")
def one_sample_has_an_infinite_error(folder: Path):
    run = small_run(folder / "run")
    assert command("evaluate", run, "--samples", "1").code == 0
    yield "compare", run


@fault("A11", "compare", 0, r"nan ± ")
def the_nll_is_no_number(folder: Path):
    run = small_run(folder / "run")
    (run / "results.json").write_text(json.dumps(results_of(run) | {"nll": None}))
    yield "compare", run


@fault("A11", "evaluate", 0, r"\d ± inf")
def one_sample_is_measured(folder: Path):
    yield "evaluate", small_run(folder / "run"), "--samples", "1"


def table(folder: Path, number: int = 40, bits: bool = False, images: bool = False) -> str:
    import numpy as np

    x = np.random.RandomState(0).rand(number, *((1, 4, 4) if images else (5,))).astype(np.float32)
    np.savez(folder / "data.npz", x=(x > 0.5).astype(np.float32) if bits else x)
    return f"npz:{folder / 'data.npz'}"


@fault(
    "A11", "train", 0, r"test NLL +\d",
    each={
        "densities of tables": ("vae", {}, False), "densities of tables, exactly": ("pca", {}, False),
        "bits": ("vae", {"bits": True}, True), "images": ("vae", {"images": True}, True),
    },
)  # fmt: skip
def bits_per_dim_are_of(folder: Path, case: tuple[str, dict[str, bool], bool]):
    model, kind, shown = case
    more = () if model == "pca" else QUICK
    likelihood = (
        () if "bits" in kind or model == "pca" else ("--set", "likelihood=gaussian", "--set", "binarization=none")
    )
    words = ("--latent-dim", "2", *likelihood, "--run-dir", folder / "run")
    outcome = yield "train", model, "--data", table(folder, **kind), *more, *words
    assert ("bits/dim" in outcome.printed) == ("bits_per_dim" in results_of(folder / "run")) == shown


# --- the data under a run --------------------------------------------------------------------------


def npz(path: Path, seed: int = 0, number: int = 60, **more: object) -> Path:
    """Bits ``[N, 1, 4, 4]``, and a test part."""
    import numpy as np

    draw = np.random.RandomState(seed)
    arrays = {"x": draw.rand(number, 1, 4, 4) > 0.5, "x_test": draw.rand(20, 1, 4, 4) > 0.5, **more}
    np.savez(path, **{name: np.asarray(array, dtype=np.float32) for name, array in arrays.items()})
    return path


def changed(path: Path, how: str) -> None:
    """Other content in a data file."""
    import numpy as np

    x, x_test = (np.load(path)[name] for name in ("x", "x_test"))
    if how == "a bit":
        x[7, 0, 1, 2] = 1 - x[7, 0, 1, 2]
    elif how == "a bit of the test part":
        x_test[7, 0, 1, 2] = 1 - x_test[7, 0, 1, 2]
    elif how == "two bits in one word":
        x_test[3, 0, 2, :2] = 1 - x_test[3, 0, 2, :2]
    elif how == "other content":
        x = 1 - x
    elif how == "rows appended":
        x = np.concatenate([x, x_test])
    elif how == "a row less":
        x = x[:-1]
    elif how == "another order":
        x_test = x_test[::-1]
    elif how == "test data exchanged":
        x, x_test = np.concatenate([x[20:], x_test]), x[:20]
    np.savez(path, x=x, x_test=x_test)


HOWS = (
    "a bit", "a bit of the test part", "two bits in one word", "other content", "rows appended", "a row less",
    "another order", "test data exchanged",
)  # fmt: skip
CHANGES = dict(zip(HOWS, HOWS, strict=True))
TINY = (*QUICK, "--latent-dim", "2", "--set", "hidden=[8]")


def on_file(folder: Path, *more: str) -> Path:
    """A run on a file of bits."""
    npz(folder / "data.npz")
    words = ("train", "--data", "npz:data.npz", *TINY, *more, "--run-dir", "run")
    run = once(str(words), folder / "run", lambda: command(*words))
    assert (run / "results.json").is_file()
    return run


@fault("A6", "evaluate", 3, r"changed since it was begun \(.* was .*, is .*--override", each=CHANGES)
def the_data_of_a_run_to_measure_changed(folder: Path, how: str):
    run = on_file(folder)
    before = (run / "results.json").read_bytes()
    changed(folder / "data.npz", how)
    yield "evaluate", "run", "--samples", "5"
    assert (run / "results.json").read_bytes() == before


@fault("A6", "train --resume", 3, r"changed since it was begun \(.* was .*, is .*--override", each=CHANGES)
def the_data_of_a_run_to_go_on_with_changed(folder: Path, how: str):
    run = on_file(folder)
    before = {path.name: path.read_bytes() for path in run.glob("*.json*")}
    changed(folder / "data.npz", how)
    yield "train", "--resume", "--epochs", "2", "--run-dir", "run"
    assert {path.name: path.read_bytes() for path in run.glob("*.json*")} == before


@fault("A6", "train --resume", 3, "changed since it was begun", each={"pca": "pca", "rbm": "rbm"})
def the_data_of_a_run_by_a_rule_changed(folder: Path, model: str):
    npz(folder / "data.npz")
    more = ("--latent-dim", "2") if model == "pca" else ("--epochs", "1", "--set", "num_hidden=3")
    assert command("train", model, "--data", "npz:data.npz", *more, "--run-dir", "run").code == 0
    changed(folder / "data.npz", "a bit of the test part")
    yield "train", model, "--resume", "--run-dir", "run"


@fault("A6", "evaluate", 3, "changed since it was begun.*validation")
def the_data_to_validate_on_changed(folder: Path):
    on_file(folder, "--set", "validation=10")
    changed(folder / "data.npz", "other content")
    yield "evaluate", "run", "--samples", "5"


@fault("A6", "evaluate", 0, "warning: the data .* changed since it was begun.*test NLL")
def changed_data_are_measured_knowingly(folder: Path):
    on_file(folder)
    changed(folder / "data.npz", "rows appended")
    yield "evaluate", "run", "--samples", "5", "--override"


@fault("A6", "train --resume", 0, "warning: the data .* changed since it was begun")
def a_run_goes_on_knowingly_with_changed_data(folder: Path):
    run = on_file(folder)
    changed(folder / "data.npz", "rows appended")
    yield "train", "--resume", "--epochs", "2", "--run-dir", "run", "--override"
    config = json.loads((run / "config.json").read_text())
    assert config["training"]["num_data"] == 80
    assert config["fingerprints"]["train"].startswith("80 of [1, 4, 4] float32")
    again = command("evaluate", "run", "--samples", "5")  # what it went on with is its data now
    assert again.code == 0
    assert "changed" not in again.message


@fault("A6", "evaluate", 0, r"test NLL +\d", each={"another name": "mv", "another type": "uint8"})
def the_same_data_are_elsewhere(folder: Path, how: str):
    import numpy as np

    on_file(folder)
    if how == "mv":
        (folder / "data.npz").rename(folder / "moved.npz")
        (folder / "data.npz").symlink_to(folder / "moved.npz")
    else:
        np.savez(
            folder / "data.npz", **{k: (255 * v).astype(np.uint8) for k, v in np.load(folder / "data.npz").items()}
        )
    outcome = yield "evaluate", "run", "--samples", "5"
    assert "changed" not in outcome.message


@fault("A6", "evaluate", 0, r"test NLL +\d")
def a_run_says_nothing_of_its_data(folder: Path):
    from pyrovae.runs import Run

    on_file(folder)
    config = Run("run").config()
    del config["fingerprints"]
    Run("run").amend(config)
    changed(folder / "data.npz", "other content")
    yield "evaluate", "run", "--samples", "5"


def fitted(x: object, run_dir: Path, epochs: int = 1, **more: object) -> object:
    """A small fit, always from the same weights."""
    import torch

    import pyrovae as pv

    torch.manual_seed(0)
    pair = pv.models.VAE((16,), latent_dim=2, hidden=(4,))
    settings = {"batch_size": 20, "device": "cpu", "compile": False, "progress": False} | more
    pv.fit(pair.model, pair.guide, x, objective=pv.ELBO(), epochs=epochs, run_dir=run_dir, **settings)
    return pair


def kinds(x: object) -> dict[str, object]:
    import torch

    import pyrovae as pv

    pairs = torch.utils.data.TensorDataset(x)
    return {
        "tensor": x, "array": x.numpy(), "Images": pv.data.Images(x), "TensorDataset": pairs,
        "loader": torch.utils.data.DataLoader(pairs, batch_size=20),
    }  # fmt: skip


@fault(
    "A6", "fit", 3, r"train was 50 of \[16\] float32, \w+, is 5\d of \[16\].*override=True",
    each={f"{kind}, {how}": (kind, how) for kind in ("tensor", "array", "Images", "TensorDataset", "loader")
          for how in ("a value", "a row")},
)  # fmt: skip
def the_data_of_a_fit_changed(folder: Path, case: tuple[str, str]):
    import torch

    kind, how = case
    x = (torch.rand(50, 16) > 0.5).float()
    fitted(kinds(x)[kind], folder / "run")
    other = x.clone() if how == "a value" else torch.cat([x, x[:1]])
    other[0, 0] = 1 - x[0, 0]
    yield lambda: fitted(kinds(other)[kind], folder / "run", 2, resume=True)


@fault("A6", "fit", 3, "validation was")
def the_data_to_validate_a_fit_on_changed(folder: Path):
    import torch

    x = (torch.rand(50, 16) > 0.5).float()
    fitted(x, folder / "run", validation=x[:5])
    yield lambda: fitted(x, folder / "run", 2, resume=True, validation=x[1:6])


@fault("A6", "fit", 0, "changed since it was begun")
def changed_data_are_fitted_knowingly(folder: Path):
    import torch

    x = (torch.rand(50, 16) > 0.5).float()
    fitted(x, folder / "run")
    yield lambda: fitted(1 - x, folder / "run", 2, resume=True, override=True)


@fault("A6", "load", 0, "7 of the 20 test data .* are training data as well")
def test_data_are_training_data(folder: Path):
    import numpy as np

    import pyrovae as pv

    npz(folder / "data.npz")
    x, x_test = (np.load(folder / "data.npz")[name] for name in ("x", "x_test"))
    np.savez(folder / "data.npz", x=np.concatenate([x, x_test[:7]]), x_test=x_test)
    outcome = yield lambda: pv.data.load("npz:data.npz")
    assert outcome.message.count("training data as well") == 1


@fault("A6", "train", 0, "warning: 20 of the 20 test data .* are training data as well")
def all_test_data_are_training_data(folder: Path):
    npz(folder / "data.npz")
    changed(folder / "data.npz", "rows appended")
    outcome = yield "train", "--data", "npz:data.npz", *TINY, "--run-dir", "run"
    assert outcome.message.count("training data as well") == 1


@fault("A6", "load")
def no_test_data_are_training_data(folder: Path):
    import pyrovae as pv

    outcome = yield lambda: pv.data.load("digits")
    assert "training data as well" not in outcome.message


# --- more epochs -----------------------------------------------------------------------------------


def weights_of(run: Path) -> dict[str, list[float]]:
    from pyrovae.runs import Run

    return {name: value.flatten().tolist() for name, value in Run(run).weights().items()}


EAGER = ("--set", "compile=false")
STEADY = (*EAGER, "--set", "schedule=constant")  # which does not depend on the number of epochs


@fault("D", "train --resume", 0, r"trained 4 epochs.*test NLL +\d")
def a_finished_run_goes_on(folder: Path):
    run, whole = small_run(folder / "run", *STEADY), small_run(folder / "whole", *STEADY, epochs=4)
    first = results_of(run)["nll"]
    yield "train", "--resume", "--epochs", "4", "--run-dir", run
    assert weights_of(run) == weights_of(whole)
    assert results_of(run)["nll"] == results_of(whole)["nll"] != first
    config = json.loads((run / "config.json").read_text())
    assert config["training"]["epochs"] == config["settings"]["epochs"] == 4
    assert command("train", "--resume", "--run-dir", run).code == 0
    assert weights_of(run) == weights_of(whole)


@fault("D", "train --resume", 0, r"trained 4 epochs.*test NLL +\d")
def an_interrupted_run_goes_on_to_more_epochs(folder: Path):
    run, whole = cut(folder, *STEADY), small_run(folder / "whole", *STEADY, epochs=4)
    yield "train", "--resume", "--epochs", "4", "--run-dir", run
    assert weights_of(run) == weights_of(whole)


@fault("D", "train --resume", 0, r"trained 1 epoch in.*test NLL +\d")
def an_interrupted_run_ends_where_it_is(folder: Path):
    run, whole = cut(folder, *STEADY), small_run(folder / "whole", *STEADY, epochs=1)
    yield "train", "--resume", "--epochs", "1", "--run-dir", run
    assert weights_of(run) == weights_of(whole)


@fault("D", "train --resume", 2, "has begun 2 epochs, got epochs=1: pass 2 or more")
def fewer_epochs_than_are_done(folder: Path):
    run = small_run(folder / "run")
    before = (run / "config.json").read_bytes()
    yield "train", "--resume", "--epochs", "1", "--run-dir", run
    assert (run / "config.json").read_bytes() == before


@fault(
    "D", "train --resume", 0, r"warning: the run goes on to 3 epochs, it was begun with 2: from epoch 3 on",
    each={"cosine": ("schedule=cosine",), "linear": ("schedule=linear",), "iwae": ("schedule=iwae",),
          "stages": ("particles=[1,2]",)},
)  # fmt: skip
def what_another_total_changes_is_said(folder: Path, options: tuple[str, ...]):
    run = small_run(folder / "run", "--objective", "iwae", "--set", *options)
    yield "train", "--resume", "--epochs", "3", "--run-dir", run
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 3


@fault("D", "train --resume", 2, "rule of its own, which does not go on", each={"pca": "pca", "rbm": "rbm"})
def a_run_by_a_rule_does_not_go_on(folder: Path, model: str):
    npz(folder / "data.npz")
    more = ("--latent-dim", "2") if model == "pca" else ("--epochs", "1", "--set", "num_hidden=3")
    assert command("train", model, "--data", "npz:data.npz", *more, "--run-dir", "run").code == 0
    other = ("--latent-dim", "2", "--seed", "1") if model == "pca" else ("--epochs", "2")
    yield "train", model, "--resume", *other, "--run-dir", "run"


@fault("D", "fit", 0, each={"finished": False, "with validation": True})
def a_fit_goes_on_to_more_epochs(folder: Path, validated: bool):
    import torch

    x = (torch.rand(50, 16) > 0.5).float()
    more = {"validation": x[:10]} if validated else {}
    fitted(x, folder / "run", 2, **more)
    fitted(x, folder / "whole", 5, **more)
    yield lambda: fitted(x, folder / "run", 5, resume=True, **more)
    assert weights_of(folder / "run") == weights_of(folder / "whole")


@fault("D", "fit", 0, "stopped early")
def a_fit_that_stopped_early_has_no_more_to_train(folder: Path):
    import torch

    x = (torch.rand(50, 16) > 0.5).float()
    more = {"validation": x[:10], "patience": 1, "lr": 1.0}
    fitted(x, folder / "whole", 60, **more)
    epochs = len((folder / "whole" / "metrics.jsonl").read_text().splitlines())
    assert epochs < 60
    fitted(x, folder / "run", epochs, **more)
    yield lambda: fitted(x, folder / "run", 60, resume=True, **more)
    assert weights_of(folder / "run") == weights_of(folder / "whole")


@fault("D", "fit", 2, "has begun 3 epochs, got epochs=2")
def a_fit_is_to_end_before_where_it_is(folder: Path):
    import torch

    x = (torch.rand(50, 16) > 0.5).float()
    fitted(x, folder / "run", 3)
    yield lambda: fitted(x, folder / "run", 2, resume=True)


# --- the test part, before anything is trained -----------------------------------------------------


@fault(
    "A1", "train", 3, r"data\[3, 0, 1, 2\] = .* is outside the support|must be finite|binarization needs values",
    each={"2": 2.0, "grey": 0.5, "negative": -1.0, "255": 255.0},
)  # fmt: skip
def a_test_datum_is_outside_the_support(folder: Path, value: float):
    import numpy as np

    npz(folder / "data.npz")
    arrays = dict(np.load(folder / "data.npz"))
    arrays["x_test"][3, 0, 1, 2] = value
    np.savez(folder / "data.npz", **arrays)
    outcome = yield "train", "--data", "npz:data.npz", *TINY, "--set", "binarization=none", "--run-dir", "run"
    assert "trained" not in outcome.printed
    assert not (folder / "run").exists()


# --- programs that are functions -------------------------------------------------------------------


def functions(kind: str) -> tuple[object, object]:
    """A pair of functions, new tensors every time."""
    import pyro
    import pyro.distributions as dist
    import torch
    from torch import nn
    from torch.distributions import constraints

    decoder, leaf = nn.Linear(2, 16), torch.zeros(2, requires_grad=True)

    def model(x):
        bias = pyro.param("bias", lambda: torch.zeros(16)) if kind == "params" else 0.0
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=decoder(z) + bias).to_event(1), obs=x)

    def guide(x):
        if kind == "params":
            scale = pyro.param("scale", lambda: torch.ones(2), constraint=constraints.positive)
            place = pyro.param("place", lambda: torch.zeros(2))
        else:
            scale, place = torch.ones(2), leaf
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(place.expand(len(x), 2), scale).to_event(1))

    return model, guide


@fault("D", "load", each={"pyro.param": "params", "leaves": "leaves"})
def functions_are_loaded(folder: Path, kind: str):
    import pyro
    import torch

    import pyrovae as pv

    x = (torch.rand(50, 16) > 0.5).float()
    pair = functions(kind)
    pv.fit(*pair, x, objective=pv.ELBO(), epochs=2, run_dir=folder / "run", device="cpu", compile=False)
    expected = pv.log_likelihood(*pair, x, num_samples=5, seed=0).log_prob
    stored = {name: value.detach().clone() for name, value in pyro.get_param_store().items()}
    pyro.clear_param_store()
    again = functions(kind)
    outcome = yield lambda: pv.load(folder / "run", pair=again, data=x)
    assert outcome.value is again
    assert torch.equal(pv.log_likelihood(*again, x, num_samples=5, seed=0).log_prob, expected)
    assert stored.keys() == dict(pyro.get_param_store().items()).keys()
    assert all(torch.equal(value, pyro.param(name)) for name, value in stored.items())


@fault("D", "load")
def an_autoguide_is_loaded(folder: Path):
    import pyro
    import pyro.distributions as dist
    import torch
    from pyro.infer.autoguide import AutoNormal

    import pyrovae as pv

    def model(x):
        mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(mean, 1.0), obs=x)

    x, guide, again = torch.randn(20), AutoNormal(model), AutoNormal(model)
    pv.fit(model, guide, x, objective=pv.ELBO(), epochs=2, run_dir=folder / "run", device="cpu", batch_size=20)
    yield lambda: pv.load(folder / "run", pair=(model, again), data=x)
    assert {k: v.tolist() for k, v in guide.state_dict().items()} == {
        k: v.tolist() for k, v in again.state_dict().items()
    }


@fault("D", "load", 2, "pass data=")
def functions_are_loaded_without_data(folder: Path):
    import torch

    import pyrovae as pv

    x = (torch.rand(50, 16) > 0.5).float()
    pv.fit(*functions("params"), x, objective=pv.ELBO(), epochs=1, run_dir=folder / "run", device="cpu", compile=False)
    yield lambda: pv.load(folder / "run", pair=functions("params"))


@fault("D", "load", 2, r"pair=\(model, guide\) with data=")
def functions_are_to_be_built_from_a_run(folder: Path):
    import torch

    import pyrovae as pv

    x = (torch.rand(50, 16) > 0.5).float()
    pv.fit(*functions("params"), x, objective=pv.ELBO(), epochs=1, run_dir=folder / "run", device="cpu", compile=False)
    yield lambda: pv.load(folder / "run")


@fault("D", "load", 4, "weights of .* are of another model: missing leaf")
def functions_of_another_kind_are_loaded(folder: Path):
    import torch

    import pyrovae as pv

    x = (torch.rand(50, 16) > 0.5).float()
    pv.fit(*functions("params"), x, objective=pv.ELBO(), epochs=1, run_dir=folder / "run", device="cpu", compile=False)
    yield lambda: pv.load(folder / "run", pair=functions("leaves"), data=x)
