"""Functions of vectors in compiled graphs, against float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from pyrovae.compile import pages
from pyrovae.compile.inductor import ONE_FILE, lowered


def functions(x: Tensor) -> list[Tensor]:
    """All that are written anew."""
    return [x.exp(), x.sigmoid(), x.tanh()]


@pytest.mark.parametrize("options", [{}, {"cpp.simdlen": 256}], ids=["widest", "AVX2"])
def test_functions_of_vectors_are_right(options: dict[str, object]) -> None:
    """Over all exponents and both signs, ends of a vector included; what is infinite, NaN or zero is so exactly."""
    if not options and torch.backends.cpu.get_cpu_capability() == "DEFAULT":
        pytest.skip("no vector units")
    bits = torch.arange(-(2**31), 2**31, 65_521).int()
    near = torch.linspace(-110, 95, 100_001)
    ends = torch.tensor([0.0, -0.0, 88.7, 88.73, -87.4, -103.9, -104.1, float("inf"), -float("inf"), float("nan")])
    x = torch.cat([bits.view(torch.float32), near, ends])
    with torch.no_grad(), torch._inductor.config.patch(options):
        run = lowered(make_fx(functions)(x), ONE_FILE)
    for found, exact, absolute in zip(run(x), functions(x.double()), (2e-45, 2e-45, 2e-7), strict=True):
        plain = exact.float()
        assert torch.equal(found.isnan(), plain.isnan())
        assert torch.equal(found.isinf(), plain.isinf())
        assert torch.equal(found[x.isinf()], plain[x.isinf()])
        finite, relative = plain.isfinite(), 3e-7 if absolute < 1e-40 else 0.0
        off = (found.double() - exact).abs()
        assert (off <= relative * exact.abs() + absolute)[finite].all()


def test_a_graph_uses_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """What stands in front of a graph is what it computes by; double precision stays the library's."""
    text = pages.source()
    monkeypatch.setattr(pages, "source", lambda: text.replace("return scaled(", "return V(7.f) + scaled("))
    x = torch.randn(64)
    with torch.no_grad():
        (found,) = lowered(make_fx(lambda x: [x.exp()])(x), ONE_FILE)(x)
        (double,) = lowered(make_fx(lambda x: [x.exp()])(x.double()), ONE_FILE)(x.double())
    torch.testing.assert_close(found, x.exp() + 7)
    torch.testing.assert_close(double, x.double().exp())
