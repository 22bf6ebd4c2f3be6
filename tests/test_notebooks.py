"""What notebooks show: tables of estimates, fits and models, figures, and progress bars."""

import re
import sys
from types import SimpleNamespace

import pytest
import torch

import pyrovae as pv
from pyrovae import html
from pyrovae.progress import ProgressBar
from tests.zoo import ZOO

DIGITS = pv.data.load("digits", binarization="static")


@pytest.fixture(scope="module")
def trained():
    torch.manual_seed(0)
    vae = pv.models.VAE((1, 8, 8), latent_dim=3, hidden=(8,))
    few = DIGITS.train.subset(slice(0, 200))
    return vae, pv.fit(vae.model, vae.guide, few, objective=pv.ELBO(), epochs=3, validation=few, device="cpu")


def test_names_are_text_and_no_markup():
    shown = html.table("<script>", ["<b>"], [["<i>", 1234, 0.123456, True]], "<u>")
    assert "<" not in re.sub("</?(p|strong|table|tr|th|td)>", "", shown)
    for text in ("&lt;script&gt;", "&lt;b&gt;", "&lt;i&gt;", "1,234", "0.1235", "True", "&lt;u&gt;"):
        assert text in shown


def test_a_fit_shows_its_first_best_and_last_epoch(trained):
    shown = trained[1]._repr_html_()
    assert "3 epochs, " in shown
    assert "<td>first (1)</td>" in shown
    assert "last (3)" in shown
    for row in (trained[1].history[0], trained[1].history[2]):
        assert f"<td>{row['bound']:.4g}</td>" in shown
        assert f"<td>{row['validation_bound']:.4g}</td>" in shown
    assert "3 at z" in shown
    assert "0 epochs" in type(trained[1])()._repr_html_()


def test_an_estimate_shows_its_figures_and_its_warning(trained):
    vae = trained[0]
    found = pv.log_likelihood(vae.model, vae.guide, DIGITS.test, num_samples=20, seed=0)
    shown = found._repr_html_()
    assert f"<strong>{found}</strong>" in shown
    assert f"<td>{found.log_prob.min().item():.4g}</td><td>{found.log_prob.median().item():.4g}</td>" in shown
    assert "carrying_draws" not in shown  # which are of discrete latents
    assert "Pareto k &gt; 0.7" in shown
    annealed = pv.ais_log_likelihood(vae.model, DIGITS.test.x[:3], num_temperatures=5, num_chains=4, seed=0)
    assert "<td>acceptance</td>" in annealed._repr_html_()


@pytest.mark.parametrize("variant", [v for v in ZOO if v.brief], ids=lambda v: v.name)
def test_a_model_shows_its_sites_and_parameters(variant):
    pair = variant.make()
    state = torch.get_rng_state()
    shown = pair._repr_html_()
    assert torch.equal(torch.get_rng_state(), state)
    assert pair.training
    assert f"{sum(p.numel() for p in pair.parameters()):,} parameters" in shown
    assert ("<td>x</td>" in shown) or ("not known: PCA has no components yet" in shown)


def test_a_vae_says_what_is_drawn_from_what():
    shown = pv.models.VAE((1, 8, 8), latent_dim=3, hidden=(8,))._repr_html_()
    assert "<td>z</td><td>Normal</td><td>Normal</td><td>[3]</td><td>latent</td>" in shown
    assert "<td>x</td><td>Bernoulli</td><td></td><td>[1, 8, 8]</td><td>observed</td>" in shown


@pytest.fixture
def notebook(monkeypatch):
    """What is displayed, where IPython says that a kernel is behind it."""
    shown = []
    monkeypatch.setitem(
        sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: SimpleNamespace(kernel=True), version_info=(9,))
    )
    display = SimpleNamespace(display=lambda data, **options: shown.append((data, options)))
    monkeypatch.setitem(sys.modules, "IPython.display", display)
    return shown


def test_a_notebook_has_one_bar_that_goes_away(notebook, capsys):
    with ProgressBar("epoch", 4) as bar:
        for done in range(1, 5):
            bar.update(done, "<b>")
    assert len({options["display_id"] for _, options in notebook}) == 1
    assert [options["update"] for _, options in notebook] == [False] + [True] * (len(notebook) - 1)
    assert all(options["raw"] for _, options in notebook)
    assert 'value="4" max="4"' in notebook[-2][0]["text/html"]
    assert "epoch 4/4 &lt;b&gt;, 0 s left" in notebook[-2][0]["text/html"]
    assert notebook[-1][0] == {"text/plain": "", "text/html": ""}
    assert capsys.readouterr() == ("", "")


def test_a_bar_without_a_total_and_after_an_error(notebook):
    with pytest.raises(ZeroDivisionError), ProgressBar("data", None):
        1 / 0  # noqa: B018
    assert notebook[0][0]["text/html"] == "<progress></progress> data"
    assert notebook[-1][0]["text/html"] == ""


@pytest.mark.parametrize("shown", [False, None])
def test_no_bar_where_none_is_asked_for(notebook, shown, capsys, monkeypatch):
    if shown is None:
        monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: None))
    with ProgressBar("epoch", 4, shown) as bar:
        bar.update(1)
    assert not notebook
    assert capsys.readouterr() == ("", "")
