"""The examples and the README's code run at a small size, and the figures that they print are what they must be.

What is known of a figure is a closed form, another library's answer, or a relation to the other figures beside it. The
sizes are too small for anything to be learned well: bounds on accuracies are those that chance does not reach.
"""

import itertools
import math
import re
import runpy
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn import decomposition

import pyrovae as pv

ROOT = Path(__file__).resolve().parents[1]
PIXELS = 64  # of an embedded digit
COIN = PIXELS * math.log(2)  # what a fair coin for every pixel is worth, nats
NLL = r"NLL (\d+\.\d+) ± (\d\.\d+) nats \(± \d\.\d+ over data\), (\d+) samples"


def figures(out, pattern):
    """The groups of every match as numbers, a row for each."""
    return np.array([[float(group.replace(",", "")) for group in m.groups()] for m in re.finditer(pattern, out)])


def dense(*widths):
    """Parameters of a perceptron."""
    return sum((into + 1) * out for into, out in itertools.pairwise(widths))


def plain_functions(out):
    nll = figures(out, NLL)
    assert re.findall(r"^\w+", out, re.MULTILINE) == ["ELBO", "IWAE", "Renyi", "MIWAE", "CIWAE"]
    assert len(nll) == 5
    assert (nll[:, 0] < COIN).all()
    assert (nll[:, 2] == 10).all()


def pyro_both_ways(out):
    theirs, ours = figures(out, r"Renyi(?:ELBO)?: bound (-\d+\.\d+) nats").squeeze(1)
    assert abs(theirs - ours) < 0.5  # one bound; every epoch draws anew
    torch.manual_seed(0)
    x = 1.0 + torch.randn(20)
    n = len(x)
    # x has covariance I + 11ᵀ: the determinant is 1 + n, the inverse I - 11ᵀ / (1 + n).
    exact = -0.5 * (n * math.log(2 * math.pi) + math.log(1 + n) + x.square().sum() - x.sum().square() / (1 + n))
    ((estimate, error, printed),) = figures(out, r"log p\(x\) (-\d+\.\d+) ± (\S+), exact (-\d+\.\d+)")
    assert printed == pytest.approx(float(exact), abs=1e-4)
    assert abs(estimate - printed) < 5 * error


def rbm(out):
    found = figures(out, r"(?:CD-1|CD-10|persistent): 1 epochs.*log Z (\d+\.\d+) ± (\S+), test log p\(x\) (-\d+\.\d+)")
    digits = pv.data.load("digits", binarization="dynamic")
    rate = digits.train.x.mean(0).clamp(1e-3, 1 - 1e-3)
    independent = torch.distributions.Bernoulli(rate).log_prob(digits.test.x).flatten(1).sum(1).mean()
    assert len(found) == 3
    assert found[:, 2] == pytest.approx(float(independent), abs=1)  # where it begins; one epoch changes little
    assert (found[:, 1] < 0.1).all()


def vqvae(out):
    ((perplexity, codes),) = figures(out, r"perplexity (\S+) of (\d+) codes")
    ((nll, uniform),) = figures(out, r"code NLL (\S+) nats on test images, uniform (\S+)")
    (loose, loose_bits), (tight, tight_bits) = figures(out, r"prior: test NLL <= (\S+) nats, (\S+) bits/dim")
    assert 1 <= perplexity <= codes == 16
    assert uniform == pytest.approx(16 * math.log(16), abs=0.05)
    assert loose - tight == pytest.approx(uniform - nll, abs=0.2)  # the codes are the same, their price is another
    assert [loose_bits * COIN, tight_bits * COIN] == pytest.approx([loose, tight], abs=0.1)


def why_many_samples(out):
    rows = figures(out, r"(?m)^ +(\d+) +(\S+) +(\S+) ± (\S+) +(\S+) +(\S+)$")
    assert rows[:, 0].tolist() == [1, 2, 3, 5, 10, 20, 50, 100, 1000]
    for k, exact, simulated, error, below, approximate in rows:
        terms = [math.comb(int(k), j) * math.log((100 * j + k - j) / k) for j in range(int(k) + 1)] if k < 1000 else []
        if terms:
            assert exact == pytest.approx(sum(terms) / 2**k, abs=1e-4)
        assert below == pytest.approx(math.log(50.5) - exact, abs=2e-4)
        assert approximate == pytest.approx((99 / 101) ** 2 / (2 * k), abs=1e-4)
        assert abs(simulated - exact) < 5 * error
    ((radius,),) = figures(out, r"radius (\S+) ±")
    assert radius == pytest.approx(1 + math.sqrt(math.pi / 2) / 10, abs=0.01)


def autoencoders(out):
    rows = figures(out, r"(?m)^[\w, ]+?([\d,]+) parameters +squared error +(\S+)")
    narrow = dense(PIXELS, 200, 200, 20) + dense(20, 200, 200, PIXELS)
    sparse = dense(PIXELS, 200, 100) + dense(100, 200, PIXELS)
    pca = PIXELS * 20 + PIXELS + 1 + 20
    linear = dense(PIXELS, 20) + dense(20, PIXELS)
    assert rows[:, 0].tolist() == [pca, linear, narrow, sparse, sparse, narrow]
    data = pv.data.load("digits")
    train, test = (part.x.flatten(1).numpy() for part in (data.train, data.test))
    fitted = decomposition.PCA(20).fit(train)
    error = np.square(fitted.inverse_transform(fitted.transform(test)) - test).sum(1).mean()
    assert rows[0, 1] == pytest.approx(error, rel=0.02)
    assert (rows[1:, 1] > rows[0, 1]).all()  # after one epoch
    used = figures(out, r"(\S+) of (\d+) units in use")
    assert used[:, 1].tolist() == [20, 20, 100, 100, 20]
    assert (used[:, 0] <= used[:, 1]).all()
    ((median, most),) = figures(out, r"(\S+) degrees from PCA's subspace \(median\), at most (\S+)")
    assert 0 < median <= most <= 90
    masked = figures(out, r"masked: squared error +(\S+)").squeeze(1)
    assert (masked > rows[[2, 5], 1]).all()


def loss_parts(out):
    rows = figures(out, r"reconstruction +(-\S+)  KL +(\S+)  log p\(x\) +(-\S+)")
    reconstruction, kl, log_p = rows.T
    assert len(rows) == 6
    assert (log_p > reconstruction - kl - 0.3).all()  # each is a bound, estimated from its own draws
    assert kl.argmax() == 0
    assert reconstruction.argmax() == 0


def conditional(out):
    ((nll, _, samples),) = figures(out, r"log p\(x \| y\): " + NLL)
    ((share, accuracy),) = figures(out, r"as their label: (\S+)% \(the classifier reads (\S+)% of")
    assert nll < COIN
    assert samples == 200
    assert 20 < share < 100
    assert 70 < accuracy < 100


def semi_supervised(out):
    ((first, second),) = figures(
        out, r"200 labelled digits: test accuracy (\S+)%\nall 1,437 digits: test accuracy (\S+)%"
    )
    assert second > max(first, 20)
    assert figures(out, r"VAE, log p\(x\): " + NLL)[0, 0] < COIN
    assert len(figures(out, r"log p of codes: " + NLL)) == 1


def attributes(out):
    width, slant = figures(out, r"asked for and drawn: correlation (\S+)").squeeze(1)
    assert 0.5 < width <= 1
    assert 0.5 < slant <= 1


def priors(out):
    rows = figures(out, r"NLL +(\S+) ± (\S+) nats, reconstruction (\S+), KL (\S+); (\S+) s an epoch")
    assert len(rows) == 8
    assert (rows[:, 0] < rows[:, 2] + rows[:, 3] + 0.3).all()  # the bound, of the epoch that led there
    assert (rows[:, 1] < 0.1).all()


def hierarchical(out):
    counts = figures(out, r"([\d,]+) parameters").squeeze(1)
    below, above = dense(PIXELS, 40, 40), dense(40, 40, PIXELS)
    one = below + dense(40, 20) + dense(10, 40) + above
    two = below + dense(40, 40) + dense(20, 20, 20, 20) + dense(10, 20, 20, 40) + dense(20, 40) + above
    assert counts[:2].tolist() == [one, two]
    rows = figures(out, r"z\d?: KL (\S+) nats, active units (\d+) \(a\), (\d+) \(b\) of (\d+)")
    assert rows[:, 3].tolist() == [10, 20, 10, 20, 10]
    assert (rows[:, 0] > 0).all()
    assert (rows[:, 1:3] <= rows[:, 3:]).all()
    nll = figures(out, NLL)[:, 0]
    assert len(nll) == 3
    assert (nll < COIN).all()


def agreement(out):
    exact = figures(out, r"exact (-\S+) nats").squeeze(1)
    rows = figures(out, r"(?:importance|annealing), \d+ +(-\S+) ± (\S+)  off by (\S+)")
    assert len(exact) == 3
    assert rows[:, 0] - exact.repeat(2) == pytest.approx(rows[:, 2], abs=2e-4)
    assert (abs(rows[:, 2]) < 6 * rows[:, 1]).all()
    lower, upper, gap = figures(out, r"lie between (-\S+) and (-\S+), gap (\S+)").T
    assert upper - lower == pytest.approx(gap, abs=2e-4)
    ((covered, of),) = figures(out, r"importance, 500: (\S+)% of (\d+) cover")
    assert covered > 70  # fewer than 15 of 20 at 95% each happen once in 3,000 times
    assert of == 20


def binary_latents(out):
    nll = figures(out, NLL)
    assert re.findall(r"^(?:bits|Gaussian VAE), (\w+)", out, re.MULTILINE) == ["ELBO", "VIMCO", "RWS", "TVO", "IWAE"]
    assert len(nll) == 5
    assert (nll[:, 0] < COIN).all()


def zoo(out):
    data = pv.data.load("digits")
    train, test = (part.x.flatten(1).double().numpy() for part in (data.train, data.test))
    assert figures(out, r" pca +digits, grey .* (-?\d+\.\d+)  50")[0, 0] == pytest.approx(
        -decomposition.PCA(50).fit(train).score(test), abs=0.5
    )
    assert re.search(r" autoencoder +digits .* none +50", out)
    assert figures(out, r" vae +digits .* (\d+\.\d+) ± \S+ +50")[0, 0] < COIN


def deep(out):
    rows = figures(out, r"(\S+) bits/dim after \d+ epochs of [\d,]+ images, \S+ minutes; NLL (\S+) ±")
    assert re.findall(r"^(one layer|deep):", out, re.MULTILINE) == ["one layer", "deep"]
    assert rows[:, 0] * COIN == pytest.approx(rows[:, 1], abs=0.05)
    assert (rows[:, 0] < math.log2(17)).all()  # the digits have 17 levels of grey


def tables(out):
    rows = figures(out, r"digits, (\d) layers?, .*NLL (\S+) ± (\S+), (\d+)(?: \+ \d+)? active units, (\d) epochs")
    assert re.findall(r"\w+, k = \d+", out) == 2 * ["VAE, k = 1", "VAE, k = 5", "IWAE, k = 5"]
    assert rows[:, 0].tolist() == [1, 1, 1, 2, 2, 2]
    assert (rows[:3, 1] < COIN).all()  # two layers need more than one epoch
    assert (rows[:, 3] <= 50 * rows[:, 0]).all()


def results(out):
    assert re.search(r"tables\.md: 0 records$", out)


def latent_sizes(out):
    rows = figures(out, r"(\d+) units: reconstruction (-\S+), KL (\S+), (\d+) active; " + NLL)
    assert rows[:, 0].tolist() == [2, 4]
    assert (rows[:, 3] <= rows[:, 0]).all()
    assert (rows[:, 4] < COIN).all()


def rate_distortion(out):
    beta, rate, distortion, total, _ = figures(
        out, r"beta +(\S+)  rate +(\S+)  distortion +(\S+)  sum +(\S+)  -log p\(x\) +(\S+)"
    ).T
    assert beta.tolist() == [0.01, 1, 20]
    assert (np.diff(rate) < 0).all()
    assert (np.diff(distortion) > 0).all()
    assert rate + distortion == pytest.approx(total, abs=0.02)


def overfitted(out):
    rows = figures(out, r"squared error +(\S+) in training, +(\S+) on test data")
    data = pv.data.load("digits")
    train, test = (part.x.flatten(1).numpy() for part in (data.train.subset(slice(10)), data.test))
    around = [np.square(part - train.mean(0)).sum(1).mean() for part in (train, test)]
    assert rows[0] == pytest.approx(around, abs=1e-3)
    fitted = decomposition.PCA(1).fit(train)
    best = np.square(fitted.inverse_transform(fitted.transform(train)) - train).sum(1).mean()
    assert rows[1, 0] > best - 1e-3  # no linear autoencoder is better than PCA
    assert rows[2, 0] < best < rows[2, 1]


def bound_against_k(out):
    rows = figures(out, r"(?m)^ +(\d+)  bound +(-\S+)  below by (\S+) ± (\S+)$")
    exact = figures(out, r"exact log p\(x\) (-\S+) nats").squeeze(1)
    assert rows[:, 0].tolist() == 2 * [2**i for i in range(7)]
    for part, log_p in zip(np.split(rows, 2), exact, strict=True):
        assert (np.diff(part[:, 2]) < 0).all()
        assert part[:, 1] + part[:, 2] == pytest.approx(log_p, abs=2e-4)
    # The guide has the posterior's mean, and its diagonal, 1.3 times as wide: the first distance is that KL.
    torch.manual_seed(0)
    loading = torch.randn(10, 3).double()
    precision = torch.eye(3, dtype=torch.float64) + loading.T @ loading / 0.25
    scale = 1.3 * precision.inverse().diagonal().sqrt()
    guide = torch.distributions.MultivariateNormal(torch.zeros(3).double(), scale_tril=scale.diag())
    posterior = torch.distributions.MultivariateNormal(torch.zeros(3).double(), precision_matrix=precision)
    kl = float(torch.distributions.kl_divergence(guide, posterior))
    assert abs(rows[0, 2] - kl) < 5 * rows[0, 3]
    slope, _ = figures(out, r"over the last half: (\S+)").squeeze(1)
    assert slope == pytest.approx(-1, abs=0.15)


def galaxies(out):
    ((components, evidence, error, published, its_error, off),) = figures(
        out, r"(?m)^ +(\d)  one +(-\S+) ± (\S+)  (-\S+) ± (\S+)  ([+-]\S+) +\d+$"
    )
    assert (components, published, its_error) == (2, -239.764, 0.005)  # Neal (1999), by 100 million draws
    assert evidence - published == pytest.approx(off, abs=1e-6)
    assert abs(off) < 5 * (error + its_error) < 0.2


def signal_to_noise(out):
    rows = figures(out, r"(?:model|guide), .*?(\d\S+) +(\S+) +(\S+)   ([+-]\S+)\n")
    assert len(rows) == 3
    assert rows[:, :3] == pytest.approx(rows[:, :3].clip(min=0.05))
    assert rows[0, 3] == pytest.approx(0.5, abs=0.2)
    assert rows[1, 3] == pytest.approx(-0.5, abs=0.3)
    assert rows[2, 3] == pytest.approx(0.5, abs=0.2)


SMALL = ["--epochs", "1", "--samples", "10"]
DRAWN = ["--output", "{tmp}"]
EXAMPLES = [  # what is run, with which arguments, and who checks what it prints; files go to {tmp}
    (plain_functions, SMALL),
    (pyro_both_ways, ["--epochs", "1"]),
    (rbm, ["--epochs", "1", "--hidden", "21", "--ais-steps", "20", *DRAWN]),
    (vqvae, ["--epochs", "1", "1", "--train", "100", *DRAWN]),
    (why_many_samples, ["--repeats", "100", *DRAWN]),
    (autoencoders, ["--epochs", "1", *DRAWN]),
    (loss_parts, [*SMALL, *DRAWN]),
    (conditional, ["--epochs", "1", *DRAWN]),
    (semi_supervised, ["--code-epochs", "1", "--first", "1", "--epochs", "1"]),
    (attributes, ["--epochs", "1", *DRAWN]),
    (priors, [*SMALL, *DRAWN]),
    (hierarchical, ["--epochs", "2", "--samples", "10"]),
    (agreement, ["--epochs", "1", "--images", "3", "--samples", "50", "--temperatures", "5", "--repetitions", "20"]),
    (galaxies, ["--epochs", "300", "--components", "2"]),
    (binary_latents, SMALL),
    (zoo, ["--epochs", "1", "--samples", "5", *DRAWN, "--only", "pca", "autoencoder", "vae"]),
    (tables, ["a", *SMALL, "--particles", "1", "5", "--runs", "{tmp}", "--records", "{tmp}"]),
    (results, ["--records", "{tmp}", "--page", "{tmp}/tables.md"]),
    (latent_sizes, [*SMALL, *DRAWN, "--sizes", "2", "4"]),
    (rate_distortion, ["--epochs", "15", "--samples", "10", *DRAWN, "--betas", "0.01", "1", "20"]),
    (overfitted, ["--train", "10", "--epochs", "200", *DRAWN]),
    (bound_against_k, ["--epochs", "1", "--images", "20", "--draws", "1024", *DRAWN]),
    (signal_to_noise, ["--repetitions", "200", "--particles", "2", "8", "32", *DRAWN]),
    (deep, [*SMALL, "--images", "50", *DRAWN]),
    (deep, ["--train", "200", "--batch-size", "50", "--minutes", "0.01", "--samples", "10", "--images", "50"]),
]


@pytest.mark.parametrize(("check", "arguments"), EXAMPLES, ids=lambda value: getattr(value, "__name__", ""))
def test_example(check, arguments, monkeypatch, capsys, tmp_path):
    example = f"{check.__name__}.py"
    monkeypatch.setattr("sys.argv", [example, *(argument.format(tmp=tmp_path) for argument in arguments)])
    runpy.run_path(str(ROOT / "examples" / example), run_name="__main__")
    check(capsys.readouterr().out)
    if "--output" in arguments:
        assert any(tmp_path.rglob("*.png"))


def test_every_example_is_tested():
    helpers = {"cells", "head", "morphology", "published", "records"}  # what the examples import
    helpers |= {"gallery"}  # tests/test_gallery.py
    examples = {path.stem for path in (ROOT / "examples").glob("*.py")}
    assert examples - helpers == {check.__name__ for check, _ in EXAMPLES}


def test_the_code_in_the_readme_prints_what_stands_below_it(capsys):
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    ((code, shown),) = re.findall(r"```python\n(.*?)```\n+```text\n(.*?)```", text, re.DOTALL)
    assert text.count("```python") == 1
    exec(compile(code, "README.md", "exec"), {})
    printed = capsys.readouterr().out
    assert [line.split(" NLL ")[0] for line in printed.splitlines()] == [
        line.split(" NLL ")[0] for line in shown.splitlines()
    ]
    # Other processors round otherwise, and after fifty epochs it shows; the objectives lie further apart.
    assert figures(printed, NLL)[:, 0] == pytest.approx(figures(shown, NLL)[:, 0], abs=0.1)
    assert (figures(printed, NLL)[:, 2] == 1000).all()
