"""Encoders and decoders as ONNX give what the model gives, for any number of data; what ONNX cannot hold is refused."""

import pytest
import torch
from torch import nn

import pyrovae as pv
from tests.zoo import ZOO

onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
ROWS = ("vae, convolutions", "hierarchical, top_down", "conditional", "conditional, attributes", "pca", "rbm", "vqvae")


def run(path, **inputs):
    (found,) = onnxruntime.InferenceSession(path).run(None, {name: value.numpy() for name, value in inputs.items()})
    return torch.from_numpy(found)


@pytest.mark.parametrize("variant", [v for v in ZOO if v.name in ROWS], ids=lambda v: v.name)
@torch.no_grad()
def test_onnx_gives_what_the_model_gives(variant, tmp_path):
    torch.manual_seed(0)
    pair = variant.used(0.3).train()
    encoder, decoder = pv.export_onnx(pair, tmp_path / "new")
    assert [encoder.name, decoder.name] == ["encoder.onnx", "decoder.onnx"]
    assert pair.training
    pair.eval()
    kind = next((p.dtype for p in pair.parameters()), torch.float32)
    for size in (1, 9):
        x, *labels = (a.to(kind) if a.is_floating_point() else a for a in variant.batch(size))
        named = dict(zip("y", labels, strict=False))
        z = pair.encode(x, *labels)
        found = run(encoder, x=x, **named)
        assert found.dtype == z.dtype
        assert (found.double() - z.double()).abs().max() < 1e-5
        assert (run(decoder, z=z, **named) - pair.decode(z, *labels)).abs().max() < 1e-5


def test_a_pair_of_doubles_stays_one(tmp_path):
    vae = pv.models.VAE((6,), latent_dim=2, hidden=(3,)).double()
    encoder, _ = pv.export_onnx(vae, tmp_path)
    x = torch.rand(4, 6, dtype=torch.float64)
    assert (run(encoder, x=x) - vae.encode(x)).abs().max() < 1e-12


class Own(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 2)

    def model(self, x): ...

    def guide(self, x): ...


class Encodes(Own):
    input_shape = (6,)

    def encode(self, x):
        return self.layer(x)


class Random(Encodes):
    def encode(self, x):
        return self.layer(x) + torch.randn(len(x), 2)


class Branches(Encodes):
    def encode(self, x):
        return self.layer(x) if x.sum() > 3 else -self.layer(x)


def test_a_module_of_ones_own(tmp_path):
    own = Encodes()
    (encoder,) = pv.export_onnx(own, tmp_path)
    x = torch.rand(4, 6)
    assert (run(encoder, x=x) - own.encode(x)).abs().max() < 1e-5
    assert [path.name for path in tmp_path.iterdir()] == ["encoder.onnx"]


@pytest.mark.parametrize(
    ("pair", "error", "match"),
    [
        (Own(), ValueError, "no input_shape: pass shape"),
        (Random(), pv.errors.NumericalError, r"Random.encode as ONNX is off by .* for 3 data: nothing was written"),
        (Branches(), ValueError, r"Branches.encode cannot be written as ONNX: \S"),
        (nn.Linear(2, 2), ValueError, r"Linear has no \.model"),
    ],
)
def test_what_cannot_be_exported_is_refused(pair, error, match, tmp_path, capfd):
    with pytest.raises(error, match=match) as raised:
        pv.export_onnx(pair, tmp_path)
    assert "\n" not in str(raised.value)
    assert not list(tmp_path.iterdir())
    assert capfd.readouterr().out == ""


def test_a_pair_without_a_code_is_refused(tmp_path):
    with pytest.raises(ValueError, match="Own has no encode to write"):
        pv.export_onnx(Own(), tmp_path, shape=(6,))


def test_absent_packages_are_named(monkeypatch, tmp_path):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "onnxscript" else True)
    with pytest.raises(pv.errors.ResourceError, match=r'onnxscript, which .* pip install "pyrovae\[onnx\]"'):
        pv.export_onnx(Encodes(), tmp_path)
