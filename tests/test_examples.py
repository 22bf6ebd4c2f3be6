"""The examples and the README's code run as they stand, at a small size."""

import re
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize(
    ("example", "arguments", "prints"),
    [
        ("plain_functions.py", ["--epochs", "1", "--samples", "10"], r"(?s)ELBO.*IWAE.*Renyi.*MIWAE.*CIWAE.*NLL"),
        ("pyro_both_ways.py", ["--epochs", "1"], r"(?s)pyro\.RenyiELBO.*pyro\.infer\.SVI.*AutoNormal.*exact"),
    ],
)
def test_example(example, arguments, prints, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", [example, *arguments])
    runpy.run_path(str(ROOT / "examples" / example), run_name="__main__")
    assert re.search(prints, capsys.readouterr().out)


def test_every_example_is_tested():
    assert {path.name for path in (ROOT / "examples").glob("*.py")} == {"plain_functions.py", "pyro_both_ways.py"}


def test_the_code_in_the_readme(capsys):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    assert blocks
    for block in blocks:
        small = block.replace("epochs=100", "epochs=1").replace("num_samples=1000", "num_samples=10")
        assert small != block
        exec(compile(small, "README.md", "exec"), {})
    assert capsys.readouterr().out.count("NLL") == 5
