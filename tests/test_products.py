"""Matrix products of compiled graphs, against float64 and against torch's own."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from pyrovae.compile import pages
from pyrovae.compile.inductor import ONE_FILE, lowered, through_inductor
from pyrovae.train.threads import threads

pytestmark = pytest.mark.skipif(not pages.multiplies(), reason="no processor of AMD, or one without vector units")

# rows, columns, depth: on both sides of a vector, of a tile, of a panel, of what pays for a copy and of what is kept
SHAPES = [
    (1, 16, 1), (3, 17, 2), (5, 80, 7), (20, 200, 784), (63, 96, 33), (64, 97, 512), (65, 31, 513), (300, 83, 1030),
    (530, 170, 300), (2, 15, 40),
]  # fmt: skip


def made(*shape: int, transposed: bool = False) -> Tensor:
    """A matrix of that shape, whose columns lie together where it is transposed."""
    return torch.randn(shape[::-1]).mT if transposed else torch.randn(shape)


@pytest.fixture
def given() -> list[list[Tensor]]:
    """Bias, left and right factor: each shape as forward pass, gradient of the input and gradient of the weight."""
    torch.manual_seed(0)
    lies = [(False, True), (False, False), (True, False), (True, True)]
    return [
        [torch.randn(columns), made(rows, depth, transposed=left), made(depth, columns, transposed=right)]
        for rows, columns, depth in SHAPES
        for left, right in lies
    ]


def multiply(*flat: Tensor) -> list[Tensor]:
    """The products, half of them with their bias, and one each with a bias of rows and with one that is doubled."""
    rows = list(zip(flat[::3], flat[1::3], flat[2::3], strict=True))
    found = [
        left @ right if (i + i // 4) % 2 else torch.addmm(bias, left, right)
        for i, (bias, left, right) in enumerate(rows)
    ]
    return [*found, torch.addmm(found[0], *rows[0][1:]), torch.addmm(*rows[0], beta=2.0)]


def compiled(flat: list[Tensor], **options: object) -> Callable[..., list[Tensor]]:
    """The products of such matrices as a graph."""
    with torch.no_grad(), torch._inductor.config.patch(options):
        run = lowered(make_fx(multiply)(*flat), ONE_FILE)
    return lambda *given: list(run(*given))


@pytest.mark.parametrize("options", [{}, {"cpp.simdlen": 256}], ids=["widest", "AVX2"])
def test_products_are_right(given: list[list[Tensor]], options: dict[str, object]) -> None:
    """Within what rounding explains, in every layout, by one thread and, to the same bits, by two.

    What is infinite or no number is so where torch has it.
    """
    flat = [t for row in given for t in row]
    run = compiled(flat, **options)
    found = run(*flat)
    for one, exact in zip(found, multiply(*[t.double() for t in flat]), strict=True):
        torch.testing.assert_close(one.double(), exact, rtol=1e-5, atol=2e-4)
    with threads(2):
        again = run(*flat)
    own = [i for i, (_, a, b) in enumerate(given) if b.shape[1] >= 16 and (b.stride(1) == 1 or len(a) >= 64)]
    assert all(torch.equal(found[i], again[i]) for i in own)
    for left, right in zip(flat[1::3], flat[2::3], strict=True):
        left[0, 0], right[-1, -1] = float("inf"), float("nan")
    for one, plain in zip(run(*flat), multiply(*flat), strict=True):
        assert torch.equal(one.isnan(), plain.isnan())
        assert torch.equal(one.isinf(), plain.isinf())


def test_graphs_multiply_by_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """What stands in front of a graph is what it multiplies by, and a graph of another text is another one."""
    text = pages.source()
    flat = [torch.randn(32), torch.randn(8, 5), torch.randn(5, 32)]
    monkeypatch.setattr(pages, "source", lambda: text.replace("sums[i][j].store(", "V(7.f).store("))
    assert (compiled(flat)(*flat)[0] == 7).all()
    monkeypatch.undo()
    torch.testing.assert_close(compiled(flat)(*flat)[0], torch.addmm(*flat))


def test_other_kinds_go_where_they_went() -> None:
    """float64 and bfloat16 are multiplied as before."""
    torch.manual_seed(0)
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.bfloat16, 1e-1)):
        flat = [torch.randn(96).to(dtype), torch.randn(80, 40).to(dtype), torch.randn(40, 96).to(dtype)]
        for found, plain in zip(compiled(flat)(*flat), multiply(*flat), strict=True):
            torch.testing.assert_close(found, plain, rtol=tolerance, atol=tolerance)


def test_a_torch_without_what_they_take_compiles_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another release may write its C++ by other functions."""
    from torch._inductor.codegen.cpp_wrapper_cpu import CppWrapperCpu

    monkeypatch.delattr(CppWrapperCpu, "write_header")
    a, b = torch.randn(8, 5), torch.randn(5, 32)
    (found,) = through_inductor(make_fx(lambda a, b: [a @ b])(a, b))(a, b)
    torch.testing.assert_close(found, a @ b)
