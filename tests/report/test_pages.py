"""What the pages say and show of runs of every kind, whole and incomplete."""

from __future__ import annotations

import base64
import io
import json
import os
import re
import shutil
import subprocess
import sys
import warnings
from html.parser import HTMLParser

import matplotlib.image
import numpy as np
import pyro
import pytest
import torch

import pyrovae as pv
from pyrovae import runs
from pyrovae.app.report import words
from pyrovae.app.tables import compared_rows
from pyrovae.objectives import OBJECTIVES
from pyrovae.runs import as_json
from tests.report.conftest import pyrovae

VOID = {"meta", "link", "img", "input", "br"}


class Page(HTMLParser):
    """A page's text and tags; every tag must be closed."""

    def __init__(self, path):
        super().__init__()
        self.source, self.open, self.tags, self.text = path.read_text(encoding="utf-8"), [], [], []
        self.feed(self.source)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1:] not in (["script"], ["style"]):
            self.text.append(data)

    @property
    def said(self):
        return " ".join(" ".join(self.text).split())

    @property
    def explorer(self):
        found = re.search(r'<script type="application/json" id="explorer-data">(.*?)</script>', self.source, re.S)
        return found and json.loads(found[1])


def report(run, *options):
    printed = pyrovae("report", run, *options)
    return Page(run / "report.html"), printed


def test_a_whole_run_lacks_nothing(made, written):
    path, printed = written("plane")
    page = Page(path)
    assert "note" not in printed
    results = json.loads((made("plane") / "results.json").read_text())
    assert f"{results['nll']:.2f}" in page.said
    assert "In doubt or missing" not in page.said
    for heading in (
        "Explore",
        "How well does it fit?",
        "What it draws",
        "What the latents carry",
        "How it was trained",
    ):
        assert heading in page.said
    assert len(page.explorer["units"]) == 2
    assert all(image.get("alt") is not None for tag, image in page.tags if tag == "img")


def test_a_page_asks_nothing_of_a_network(written):
    page = Page(written("plane")[0])
    for _, attributes in page.tags:
        for name in ("src", "href", "srcset", "action"):
            assert re.match(r"data:|#|$", attributes.get(name) or "")
    assert "url(" not in page.source.replace("url(#", "")
    assert "default-src 'none'" in page.source


def test_a_page_does_not_tell_where_ones_data_lie(copied):
    run = copied("plane")
    config = json.loads((run / "config.json").read_text())
    config["settings"]["data_dir"] = "/home/somebody"
    (run / "config.json").write_text(json.dumps(config))
    assert "somebody" not in report(run)[0].source


@pytest.mark.parametrize(
    ("kind", "shown", "absent"),
    [
        ("sliders", ["IWAE(num_particles=3)"], []),
        ("conditional", ["a column for each class"], []),
        ("vqvae", ["Use of the codebook", "A bound on the likelihood"], ["Explore"]),
        ("autoencoder", ["no log p(x)", "Explore"], ["Most likely"]),
        ("rbm", ["a rule of its own", "Explore"], []),
    ],
)
def test_every_kind_of_model_has_a_page(written, kind, shown, absent):
    page = Page(written(kind)[0])
    assert all(words in page.said for words in [*shown, "pyrovae train "])
    assert "<span" not in page.said, "markup of ours is none to read"
    assert not any(words in page.said for words in absent)


def test_what_a_run_says_of_itself_is_no_markup(copied):
    name = "<script>alert(1)<!-- & 'x"
    run = copied("plane", name)
    config = json.loads((run / "config.json").read_text())
    config["settings"]["data"] = config["data"]["name"] = "</script><img src=x onerror=alert(1)>"
    (run / "config.json").write_text(json.dumps(config))
    page, _ = report(run)
    assert page.source.count("<script") == page.source.count("</script>") == 6
    assert not any("onerror" in attributes for _, attributes in page.tags)
    assert name in page.said
    pyrovae("compare", run, run, "--override", "--output", run / "compared.html")
    assert Page(run / "compared.html").source.count("<script") == 1


def test_a_run_that_was_never_evaluated_is_measured_on_a_few_data(copied):
    run = copied("sliders")
    (run / "results.json").unlink()
    page, printed = report(run)
    assert "never evaluated" in printed
    assert "Measured for this page only" in page.said
    assert not (run / "results.json").exists()


def test_results_of_other_weights_are_left_out(copied):
    run = copied("plane")
    results = json.loads((run / "results.json").read_text())
    (run / "results.json").write_text(json.dumps(results | {"weights": "0" * 64, "nll": 1234.5}))
    page, printed = report(run)
    assert "of other weights" in printed
    assert "1234.5" not in page.said


def test_a_run_that_has_not_begun_shows_its_config(copied):
    run = copied("plane")
    for name in ("last", "results.json", "metrics.jsonl"):
        os.rename(run / name, run.parent / name)
    page, printed = report(run)
    assert "no checkpoint yet" in page.said
    assert "note: The test data and the model: " in printed
    assert "IWAE" not in page.said
    assert "ELBO(num_particles=1)" in page.said
    assert "β is kl_weight" in " ".join(page.said.split())


ODD = {
    "model": ["VAE", {"class": 3}, {"class": "pyrovae.models:VAE", "arguments": [1]}],
    "objective": ["ELBO", [], {"class": {}}, {"class": "pyrovae.objectives:ELBO", "arguments": None}],
    "data": [None, "digits", {"name": {"<b>": 1}}], "settings": [None, [], {"settings": 1}, {"model": 7}],
    "training": [[1], {"epochs": "many"}],
}  # fmt: skip


@pytest.mark.parametrize(("part", "value"), [(part, value) for part, values in ODD.items() for value in values])
def test_an_odd_config_is_shown_all_the_same(copied, part, value):
    run = copied("plane")
    shutil.rmtree(run / "last")
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(config | {part: value}))
    (run / "metrics.jsonl").write_text('{"epoch": 1, "bound": "low", "kl_per_unit": 3, "seconds": []}\n')
    page, printed = report(run)
    assert "note: " in printed
    assert "The whole config" in page.said


def test_large_images_are_made_smaller():
    from pyrovae.app.report.drawing import pictures

    uri = pictures(torch.rand(1, 3, 300, 200, generator=torch.Generator().manual_seed(0)))[0]
    image = matplotlib.image.imread(io.BytesIO(base64.b64decode(uri.partition(",")[2])), format="jpeg")
    assert image.shape == (100, 66, 3)


def test_a_run_that_goes_on_says_how_far_it_is(copied):
    run = copied("plane")
    state = torch.load(run / "last" / "state.pt", weights_only=True)
    torch.save(state | {"finished": False, "epoch": 1}, run / "last" / "state.pt")
    page, printed = report(run)
    assert "not finished: epoch 1 of 2" in page.said
    assert "damaged or was changed" in printed
    assert page.explorer


def test_a_run_of_a_newer_version_is_shown_with_a_note(copied):
    run = copied("plane")
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(config | {"format_version": 99}))
    page, printed = report(run)
    assert "newer than this pyrovae" in printed
    assert page.explorer


def test_without_its_data_a_run_is_explored_by_its_own_samples(copied):
    run = copied("conditional")
    config = json.loads((run / "config.json").read_text())
    config["settings"]["data"] = f"npz:{run}/gone.npz"
    (run / "config.json").write_text(json.dumps(config))
    page, printed = report(run)
    assert "note: The test data" in printed
    assert page.explorer["own"]
    assert page.explorer["classes"] == 10
    assert "a sample of the model" in page.said


def test_a_table_has_no_images(tmp_path):
    rows = torch.randn(120, 4, generator=torch.Generator().manual_seed(0))
    np.savez(tmp_path / "rows.npz", x=rows[:100].numpy(), x_test=rows[100:].numpy())
    run = tmp_path / "run"
    small = ["--set", "likelihood=gaussian", "--set", "hidden=[8]", "--latent-dim", "2", "--epochs", "2"]
    pyrovae("train", "vae", "--data", f"npz:{tmp_path}/rows.npz", *small, "--samples", 10, "--run-dir", run)
    page, printed = report(run)
    assert "no images" in printed
    assert "Codes of" in page.said
    assert page.explorer is None


def test_a_run_made_in_python_has_a_page(tmp_path, digits):
    torch.manual_seed(0)
    vae = pv.models.VAE((1, 8, 8), latent_dim=2, hidden=(8,))
    pv.fit(
        vae.model,
        vae.guide,
        digits[:200].round(),
        objective=pv.ELBO(),
        epochs=2,
        run_dir=tmp_path / "run",
        compile=False,
    )
    page, printed = report(tmp_path / "run")
    assert "made in Python" in printed
    assert page.explorer["own"]


@pytest.fixture
def by_own_program(tmp_path, digits):
    """A pair that one's own program trained, and its run."""
    torch.manual_seed(0)
    vae = pv.models.VAE((1, 8, 8), latent_dim=2, hidden=(8,))
    train = pv.data.Images(digits[:200].round(), torch.arange(200) % 10, name="halves").unlabelled()
    pv.fit(vae.model, vae.guide, train, objective=pv.ELBO(), epochs=2, run_dir=tmp_path / "run", compile=False)
    return vae, train, tmp_path / "run"


def noted(*arguments, **options):
    """The page of a report in Python, and what was warned of."""
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always", UserWarning)
        path = pv.report(*arguments, **options)
    assert all(str(warning.message).startswith(f"{path}: ") for warning in heard)
    return Page(path), [str(warning.message).removeprefix(f"{path}: ") for warning in heard]


def test_a_report_in_python_lacks_nothing(by_own_program, digits):
    vae, _, run = by_own_program
    test = pv.data.Images(digits[200:260].round(), torch.arange(60) % 10, name="halves")
    page, notes = noted(run, test, num_samples=300)
    assert notes == []
    assert page.source == (run / "report.html").read_text(encoding="utf-8")
    nll = pv.log_likelihood(vae.model, vae.guide, test.x, num_samples=300, seed=0).nll
    assert f"{nll:.2f}" in page.said
    assert "with 300 samples for each of 60 images" in page.said
    assert "Measured for this page only" not in page.said
    assert "on halves" in page.said
    for heading in ("Explore", "How well does it fit?", "From one test image", "How it was trained"):
        assert heading in page.said
    assert page.explorer["labels"] == test.labels.tolist()
    assert not page.explorer["own"]
    ((_, _, size, _, _, compared, used),) = compared_rows([runs.Run(run)])
    assert compared.startswith(f"{nll:.2f}"), "what it measured is the run's result"
    assert (size, used) == (f"{sum(p.numel() for p in vae.parameters()):,}", "2")


def test_only_a_test_of_the_run_is_its_result(by_own_program, digits):
    _, train, run = by_own_program
    x = digits[200:230].round()
    noted(run, train, num_samples=5)
    noted(run, x)
    noted(run, x, num_samples=5, output=run.parent / "page.html")
    assert not (run / "results.json").exists()
    with pytest.raises(pv.data.DataError, match=r"run pv.report\(.*, data, num_samples=5000\)"):
        compared_rows([runs.Run(run)])


@pytest.mark.parametrize(
    "form",
    [
        lambda x: x.double(),
        lambda x: x.numpy(),
        lambda x: x.to(torch.uint8),
        lambda x: (x, torch.arange(len(x))),
        lambda x: torch.utils.data.TensorDataset(x),
        lambda x: torch.utils.data.DataLoader(list(x), 7),
        lambda x: pv.data.Splits(pv.data.Images(1 - x), None, pv.data.Images(x)),
    ],
    ids=["double", "array", "bytes", "labelled", "dataset", "loader", "splits"],
)
def test_a_report_takes_data_in_any_form(by_own_program, digits, form):
    vae, _, run = by_own_program
    x = digits[200:230].round()
    page, notes = noted(run, form(x), output=run.parent / "page.html", num_samples=50)
    assert notes == []
    assert f"{pv.log_likelihood(vae.model, vae.guide, x, num_samples=50, seed=0).nll:.2f}" in page.said
    assert not (run / "report.html").exists()


def test_a_report_says_that_it_saw_the_training_data(by_own_program):
    _, train, run = by_own_program
    page, notes = noted(run, train)
    assert notes == ["The data are those that the run was trained on: others tell how well it fits"]
    assert notes[0] in page.said
    assert "pv.report(run, data, num_samples=5000)" in page.said


def test_a_report_on_two_functions(tmp_path, digits):
    encoder, decoder = torch.nn.Linear(64, 2), torch.nn.Linear(2, 64)

    def model(x):
        pyro.module("decoder", decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", pyro.distributions.Normal(x.new_zeros(2), 1.0).to_event(1))
            pyro.sample("x", pyro.distributions.Bernoulli(logits=decoder(z)).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", pyro.distributions.Normal(encoder(x), 1.0).to_event(1))

    x, run = digits[:100].round().flatten(1), tmp_path / "run"
    pv.fit(model, guide, x, objective=pv.IWAE(3), epochs=2, run_dir=run, compile=False)
    page, notes = noted(run)
    assert any("pass pair=" in note for note in notes)
    page, notes = noted(run, digits[100:150].round().flatten(1), pair=(model, guide), num_samples=100)
    assert notes == ["The data are of shape [64], no images: samples and reconstructions are not shown"]
    assert "IWAE(num_particles=3)" in page.said
    assert "test data is" in page.said
    assert "Codes of" in page.said
    assert "322" in page.said  # parameters


def test_a_report_refuses_what_is_none_of_the_pairs(by_own_program, digits):
    _, _, run = by_own_program
    with pytest.raises(pv.data.DataError, match="input_shape"):
        pv.report(run, digits[:5, :, :4])
    with pytest.raises(ValueError, match="no test data"):
        pv.report(run, num_samples=10)
    with pytest.raises(pv.errors.CheckpointError, match="pass the same model"):
        pv.report(run, digits[:5].round(), pair=pv.models.VAE((1, 8, 8), latent_dim=3))
    with pytest.raises(TypeError, match="x and labels"):
        pv.report(run, 3 * (digits[:5],))
    assert not (run / "report.html").exists()


def test_attributes_are_further_units(tmp_path, digits):
    torch.manual_seed(0)
    pair = pv.models.ConditionalVAE((1, 8, 8), latent_dim=2, hidden=(8,), num_attributes=2)
    data = digits[:200].round(), torch.randn(200, 2)
    pv.fit(pair.model, pair.guide, data, objective=pv.ELBO(), epochs=1, run_dir=tmp_path / "run", compile=False)
    explorer = report(tmp_path / "run")[0].explorer
    assert [unit["name"] for unit in explorer["units"]] == ["unit 0", "unit 1", "attribute 0", "attribute 1"]
    assert all(unit["low"] < unit["high"] for unit in explorer["units"])
    assert explorer["size"] == 4


@pytest.mark.parametrize(("kind", "rows", "columns"), [("plane", 15, 15), ("sliders", 5, 11)])
def test_what_the_page_cannot_decode_is_a_grid_of_images(copied, monkeypatch, kind, rows, columns):
    monkeypatch.setattr("pyrovae.app.report.decoder.MOST_PRODUCTS", 10)
    page, _ = report(copied(kind))
    assert "the page cannot decode by itself here, because it takes" in page.said
    start = page.source.index('<div class="gridded"')
    assert page.source[start : page.source.index("</div>", start)].count("<img") == rows * columns
    assert page.explorer is None


def test_a_folder_without_a_run_is_refused(tmp_path, capsys):
    from pyrovae.app.cli import main

    with pytest.raises(SystemExit) as stop:
        main(["report", str(tmp_path)])
    assert stop.value.code == 4
    assert "holds no run" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", [*OBJECTIVES])
def test_every_objective_has_its_equation(name):
    found = words.equation(runs.class_path(OBJECTIVES[name]))
    assert found.startswith("<math")
    assert "merror" not in found
    assert "\\" not in found


def test_a_comparison_has_table_curves_and_differences(made, tmp_path):
    runs_ = [made("plane"), made("sliders"), made("rbm")]
    printed = pyrovae("compare", *runs_, "--output", tmp_path / "page.html")
    page = Page(tmp_path / "page.html")
    assert "3 runs side by side" in page.said
    for run in runs_:
        assert run.name in page.said
        assert f"{json.loads((run / 'results.json').read_text())['nll']:.2f}" in page.said
    assert '"rbm" has no bound by epoch' in page.said
    assert "minutes of training" in page.said
    assert "model.latent_dim" in page.said
    assert str(tmp_path / "page.html") in printed


def test_a_comparison_takes_runs_that_were_not_measured(copied, made):
    run = copied("plane", "young")
    (run / "results.json").unlink()
    pyrovae("compare", run, made("plane"), "--html")
    path = next(p for p in (run.parent, *run.parents) if (p / "compare.html").exists()) / "compare.html"
    page = Page(path)
    assert "not measured" in page.said
    pyrovae("compare", path, run, "--html")  # runs/* names the page, too


def test_help_imports_no_page_and_no_plot(tmp_path):
    heavy = ("jinja2", "matplotlib", "latex2mathml", "torch")
    code = f"import sys; from pyrovae.app import cli; print([m for m in {heavy!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_explorers_half_precision_is_said(written):
    explorer = Page(written("plane")[0]).explorer
    assert explorer["decoder"]["dtype"] == "float16"
    assert 0 < explorer["error"] < 1e-3
    assert as_json(explorer) == explorer
