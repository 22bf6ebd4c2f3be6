"""The examples and the README's code run as they stand, at a small size."""

import re
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


HELPERS = {"morphology.py"}  # what several examples import
EXAMPLES = [  # what is run, with which arguments, and what it prints; files go to {tmp}
    ("plain_functions.py", ["--epochs", "1", "--samples", "10"], r"(?s)ELBO.*IWAE.*Renyi.*MIWAE.*CIWAE.*NLL"),
    ("pyro_both_ways.py", ["--epochs", "1"], r"(?s)pyro\.RenyiELBO.*pyro\.infer\.SVI.*AutoNormal.*exact"),
    (
        "rbm.py",
        ["--epochs", "1", "--hidden", "21", "--ais-steps", "20", "--output", "{tmp}"],
        r"(?s)CD-1: 1 epochs.*log Z \d+.*± .*CD-10.*persistent.*test log p\(x\) -\d+",
    ),
    (
        "vqvae.py",
        ["--epochs", "1", "1", "--train", "100", "--output", "{tmp}"],
        r"(?s)perplexity \d+.* of 16 codes.*code NLL .*uniform 44\.4.*uniform prior: .*learned prior: .*bits/dim",
    ),
    (
        "why_many_samples.py",
        ["--repeats", "100", "--output", "{tmp}"],
        r"(?s)log E\[X\] = 3\.9220.*\n +1 +2\.3026 .*\n +1000 +3\.9215.*radius 1\.1",
    ),
    (
        "autoencoders.py",
        ["--epochs", "1", "--output", "{tmp}"],
        r"(?s)PCA +1,365 parameters.*linear.*degrees from PCA's.*L1.*of 100 units.*KL.*denoising.*masked.*samples in",
    ),
    (
        "loss_parts.py",
        ["--epochs", "1", "--samples", "10", "--output", "{tmp}"],
        r"(?s)(reconstruction +-\d+\.\d+  KL +\d+\.\d+  log p\(x\) +-\d.*?){6}",
    ),
    (
        "conditional.py",
        ["--epochs", "1", "--output", "{tmp}"],
        r"(?s)log p\(x \| y\): NLL \d+.*as their label: \d+.*% \(.*reads \d\d.*% of",
    ),
    (
        "semi_supervised.py",
        ["--code-epochs", "1", "--first", "1", "--epochs", "1"],
        r"(?s)log p\(x\): NLL \d+.*200 labelled digits: test accuracy \d+.*all 1,437 digits: .*log p of codes: NLL",
    ),
    (
        "attributes.py",
        ["--epochs", "1", "--output", "{tmp}"],
        r"stroke width asked for and drawn: correlation -?0\.\d+\nslant asked for and drawn: correlation -?0\.\d+",
    ),
    (
        "priors.py",
        ["--epochs", "1", "--samples", "10", "--output", "{tmp}"],
        r"(?s)plain +NLL +\d+\.\d\d \+- .*prior vamp +NLL .*posterior iaf .*flow and iaf .* s an epoch",
    ),
    (
        "hierarchical.py",
        ["--epochs", "2", "--samples", "10"],
        r"(?s)one layer, .*NLL \d+.*z: KL.*bottom-up, .*z1: KL.*z2: KL \d.*\(a\), \d+ \(b\) of 10\n.*ladder.*z2: KL",
    ),
    (
        "agreement.py",
        ["--epochs", "1", "--images", "3", "--samples", "50", "--temperatures", "5", "--repetitions", "20"],
        r"(?s)1 latent units: exact.*importance, 50 .*annealing, 5 .*between.*linear Gaussian: exact.*cover the truth",
    ),
    (
        "binary_latents.py",
        ["--epochs", "1", "--samples", "10"],
        r"(?s)bits, ELBO +NLL \d.*bits, VIMCO .*bits, RWS .*bits, TVO .*Gaussian VAE, IWAE +NLL",
    ),
    (
        "zoo.py",
        ["--epochs", "1", "--samples", "5", "--output", "{tmp}", "--only", "pca", "autoencoder", "vae"],
        r"(?s)run +data .*\n *pca +digits, grey .*\n *autoencoder +digits .* none .*\n *vae +digits .*\d+ *\n",
    ),
    (
        "deep.py",
        ["--epochs", "1", "--samples", "10", "--images", "50", "--output", "{tmp}"],
        r"one layer: \d\.\d+ bits/dim after 1 epochs of 1,437 .*\ndeep: \d\.\d+ bits/dim after 1 epochs of 1,437 ",
    ),
    (
        "deep.py",
        ["--train", "200", "--batch-size", "50", "--minutes", "0.01", "--samples", "10", "--images", "50"],
        r"one layer: \d\.\d+ bits/dim after \d+ epochs of \d+ images.*\ndeep: \d\.\d+ bits/dim after \d+ epochs of ",
    ),
]


@pytest.mark.parametrize(("example", "arguments", "prints"), EXAMPLES)
def test_example(example, arguments, prints, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr("sys.argv", [example, *(argument.format(tmp=tmp_path) for argument in arguments)])
    runpy.run_path(str(ROOT / "examples" / example), run_name="__main__")
    assert re.search(prints, capsys.readouterr().out)


def test_every_example_is_tested():
    assert {path.name for path in (ROOT / "examples").glob("*.py")} - HELPERS == {example for example, *_ in EXAMPLES}


def test_the_code_in_the_readme(capsys):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    assert blocks
    for block in blocks:
        small = block.replace("epochs=100", "epochs=1").replace("num_samples=1000", "num_samples=10")
        assert small != block
        exec(compile(small, "README.md", "exec"), {})
    assert capsys.readouterr().out.count("NLL") == 5
