"""Decoders as a page computes them: its own scripts, run by node, against PyTorch."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import subprocess
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import pyrovae as pv
from pyrovae.app.report import decoder as decoders
from pyrovae.app.report.decoder import Decoder, NotInPage, operations
from pyrovae.app.report.explorer import decode_as
from pyrovae.app.report.pages import VENDORED

FOLDER = decoders.PAGE.parent
CODES = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
W = torch.randn(4, 8, generator=torch.Generator().manual_seed(1)) / 2
GRID = torch.randn(4, 2 * 6 * 6, generator=torch.Generator().manual_seed(2))
KERNEL = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(3)) / 4


def image(z):
    """A code as two channels of 6 x 6."""
    return (z @ GRID).view(1, 2, 6, 6)


def by_parts(z):
    """Slices, steps, unevenly split, put together again."""
    x = (z @ W).unsqueeze(-1)
    a, b, c = x.split([1, 4, 3], 1)
    return torch.cat(
        [x[:, 1:7:2], b[:, -2:], c.squeeze(-1).unsqueeze(2), a.expand(1, 2, 1), x.select(1, 3).unsqueeze(1)], 1
    )


#: Functions of a code that together use every operation of the page.
FUNCTIONS = {
    "elementwise": lambda z: torch.cat([f(z @ W) for f in (torch.abs, torch.neg, torch.sin, torch.cos, torch.sign)], 1),
    "positive": lambda z: torch.cat(
        [f((z @ W).abs() + 0.1) for f in (torch.log, torch.log1p, torch.sqrt, torch.rsqrt, torch.reciprocal)], 1
    ),
    "powers": lambda z: torch.cat([z.exp(), z.expm1(), torch.pow(z.abs() + 1, 1.7), z**2, z / (z * z + 1)], 1),
    "activations": lambda z: torch.cat(
        [f(3 * z @ W) for f in (F.elu, F.selu, F.celu, F.gelu, partial(F.gelu, approximate="tanh"), F.silu, F.mish,
                                F.softplus, F.leaky_relu, F.hardtanh, F.relu6, F.logsigmoid, torch.tanh, F.relu)], 1
    ),
    "compared": lambda z: torch.where(
        (z > 0).logical_and(z < 1).logical_or(z <= -1).logical_or((z >= -1.5).logical_not()).logical_or(z == 0),
        torch.maximum(z, z * z), torch.minimum(-z, z.mean()),
    ),
    "clamped": lambda z: z.clamp(-0.5, 0.5) + z.clamp_min(0.1) + z.clamp(max=0.2) - torch.sub(z, z * z, alpha=2),
    "parts": by_parts,
    "means": lambda z: (z @ W).view(2, 4).mean(-1, keepdim=True) + (z @ W).view(2, 4).amax(1, keepdim=True),
    "products": lambda z: torch.bmm((z @ W).view(2, 2, 2), (z @ W).view(2, 2, 2)) + (z @ W).sum(),
    "softmax": lambda z: F.softmax((z @ W).view(2, 4), 0) + F.log_softmax((z @ W).view(2, 4), -1),
    "linear": lambda z: torch.addmm(torch.ones(8), z, W, beta=0.5, alpha=2.0),
    "layer norm": lambda z: F.layer_norm(z @ W, (8,), torch.arange(8.0), torch.ones(8)),
    "group norm": lambda z: nn.GroupNorm(2, 2)(image(z)),
    "batch norm": nn.Sequential(nn.Unflatten(1, (1, 2, 2)), nn.BatchNorm2d(1)).eval(),
    "in place": nn.Sequential(nn.Linear(4, 8), nn.ReLU(inplace=True), nn.Linear(8, 3)),
    "convolution": lambda z: F.conv2d(image(z), KERNEL.transpose(0, 1), torch.ones(3), (2, 1), (1, 2)),
    "dilated": lambda z: F.conv2d(image(z), KERNEL.transpose(0, 1), None, 1, (1, 2), (1, 2)),
    "transposed": lambda z: F.conv_transpose2d(image(z), KERNEL, torch.ones(3), 2, 1, output_padding=(1, 0)),
    "pixel shuffle": lambda z: F.pixel_shuffle((z @ GRID)[:, :64].view(1, 4, 4, 4), 2),
    "nearest": lambda z: F.interpolate(image(z), scale_factor=2),
    "nearest, sized": lambda z: F.interpolate(image(z), size=(9, 7)),
    "bilinear": lambda z: F.interpolate(image(z), scale_factor=2, mode="bilinear", align_corners=False),
    "bilinear, corners": lambda z: F.interpolate(image(z), size=(9, 7), mode="bilinear", align_corners=True),
}  # fmt: skip


def zoo():
    """Decoders of the zoo, each with its latents' number and its labels' number."""
    square, colour = (1, 12, 12), (3, 11, 14)
    hidden = {"hidden": (16,), "latent_dim": 4}
    families = {
        **{a: pv.models.VAE(square, activation=a, **hidden) for a in pv.nn.ACTIVATIONS},
        **{k: pv.models.VAE(square, likelihood=k, **hidden) for k in pv.parts.LIKELIHOODS},
        "convolutions": pv.models.VAE(colour, network="conv", channels=(4, 6), **hidden),
        "hierarchical": pv.models.HierarchicalVAE(square, latent_dims=(4, 2), hidden=((8,), (4,))),
        "autoencoder": pv.models.Autoencoder(square, **hidden),
        "rbm": pv.models.RBM(square, 4),
        "conditional": pv.models.ConditionalVAE(square, 3, **hidden),
        "semi_supervised": pv.models.SemiSupervisedVAE(square, 3, **hidden),
    }
    for name, pair in families.items():
        pair.eval()
        labels = range(3) if pair.conditional else ()
        yield name, [partial(decode_as, pair, torch.tensor([y])) for y in labels] or [pair.decode]


@pytest.fixture(scope="module")
def in_the_page():
    """By name the images that PyTorch and node make of the same codes, and the steps that they took."""
    if shutil.which("node") is None:
        pytest.skip("needs node")
    torch.manual_seed(0)
    ways = {**{name: [f] for name, f in FUNCTIONS.items()}, **dict(zoo())}
    made, wanted = {name: Decoder(w, CODES) for name, w in ways.items()}, {}
    asked = [
        {"decoder": d.payload(), "asked": [(y, z.tolist()) for y in range(len(ways[name])) for z in CODES]}
        for name, d in made.items()
    ]
    done = subprocess.run(
        ["node", str(FOLDER.parents[2] / "tests/report/decode.js"), str(FOLDER)], input=json.dumps(asked),
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, re.findall("(?m)^.*Error: .*$", done.stderr)
    with torch.no_grad():
        wanted = {name: [way(z).flatten() for way in w for z in CODES[:, None]] for name, w in ways.items()}
    found = dict(zip(made, json.loads(done.stdout), strict=True))
    return made, {name: (torch.stack(wanted[name]), torch.tensor(found[name])) for name in made}


@pytest.mark.parametrize("name", [*FUNCTIONS, *dict(zoo())])
def test_the_page_decodes_as_pytorch_does(in_the_page, name):
    wanted, found = in_the_page[1][name]
    assert found.shape == wanted.shape
    assert (found - wanted).abs().max() < 1e-3 * max(1, wanted.abs().max())


def test_every_operation_of_the_page_is_tried(in_the_page):
    used = {step[0] for decoder in in_the_page[0].values() for program in decoder.programs for step in program.steps}
    assert used == operations()


def test_weights_are_halved_where_that_costs_little():
    fine, coarse = (Decoder([lambda z, s=s: s * (z @ W)], CODES) for s in (0.1, 300.0))
    assert (fine.dtype, coarse.dtype) == ("float16", "float32")
    assert 0 < fine.error < decoders.TOLERANCE
    assert len(coarse.payload()["weights"]) == pytest.approx(2 * len(fine.payload()["weights"]), rel=0.1)


def test_labels_share_their_weights(in_the_page):
    shapes = in_the_page[0]["conditional"].payload()["shapes"]
    assert sum(shape == [16, 144] for shape in shapes) == 1


class Steered(nn.Module):
    def forward(self, z):
        return z @ W if float(z[0, 0]) > 0 else z @ -W


@pytest.mark.parametrize(
    ("decode", "why"),
    [
        (Steered(), "reads numbers"),
        (lambda z: z + torch.randn(4), "random"),
        (lambda z: z.cumsum(-1), "cumsum"),
        (lambda z: F.conv2d(image(z), KERNEL[:, :1], groups=2), "in groups"),
        (lambda z: F.conv_transpose2d(image(z), KERNEL, dilation=2), "holes"),
        (lambda z: z @ torch.ones(4, 5_000_000), "million multiplications"),
        (lambda z: z.sum() * torch.arange(2_000_000.0), "MB"),
    ],
)
def test_what_the_page_cannot_is_refused_with_the_reason(decode, why):
    with pytest.raises(NotInPage, match=why):
        Decoder([decode], CODES)


def test_what_is_not_ours_is_as_published():
    table = (VENDORED / "README.md").read_text()
    stated = dict(re.findall(r"^\| `([\w.-]+\.js)` .*`([0-9a-f]{64})` \|$", table, re.M))
    assert {path.name for path in VENDORED.glob("*.js")} == stated.keys()
    for name, digest in stated.items():
        assert hashlib.sha256((VENDORED / name).read_bytes()).hexdigest() == digest
