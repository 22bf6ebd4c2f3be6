"""Data sets, binarisation, and the checks on data. Draws are seeded unless a test states its false-alarm rate."""

import gzip
import hashlib
import math
import os
import pickle
import re
import socket
import struct
import subprocess
import sys
import warnings
import zipfile
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import scipy.io
import sklearn.datasets
import torch
from PIL import Image
from torch import Tensor
from torch.distributions import Bernoulli, MixtureSameFamily, Normal, Uniform, constraints
from torch.distributions.categorical import Categorical
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, TensorDataset
from torchvision.datasets import CIFAR10, Omniglot

import pyrovae as pv
from pyrovae.data import DataError, Images, as_dataset, check_support, load, published
from pyrovae.data.fingerprint import fingerprint, repeated
from tests.state import unwaiting

REAL = Path(os.environ.get("PYROVAE_DATA") or Path(__file__).resolve().parents[2] / "shared" / "data")


def needs(*parts: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(not REAL.joinpath(*parts).exists(), reason=f"no {'/'.join(parts)} under $PYROVAE_DATA")


def fails(error: type[Exception], *fragments: str):
    """Expect ``error`` in one line that holds the fragments in this order."""
    return pytest.raises(error, match=r"\A" + r"[^\n]*".join(["", *map(re.escape, fragments), ""]) + r"\Z")


def refused(function, *arguments, says, error=DataError, **options) -> None:
    """Expect a call to fail so."""
    with fails(error, *([says] if isinstance(says, str) else says)):
        function(*arguments, **options)


@pytest.fixture
def grey() -> Tensor:
    return torch.rand(50, 1, 4, 4, generator=torch.Generator().manual_seed(1))


# Images --------------------


def test_images_hold_data_and_describe_themselves(grey):
    images = Images(grey, torch.arange(50, dtype=torch.int16), name="some")
    assert len(images) == 50
    assert images.event_shape == (1, 4, 4)
    assert images.labels.dtype == torch.int64
    assert torch.equal(images.mean, grey.mean(0))
    assert torch.equal(images[3][0], grey[3])
    assert images[3][1] == 3
    assert repr(images) == "Images('some', 50 of [1, 4, 4], float32, binarization='none', labelled, cpu)"
    assert "no labels" in repr(Images(grey))
    assert torch.equal(Images(grey)[-1], grey[-1])
    with pytest.raises(IndexError):
        images[50]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.bool])
def test_other_types_become_floats_unscaled(dtype):
    x = Images(torch.ones(3, 2, dtype=dtype)).x
    assert x.dtype == torch.float32
    assert x.eq(1).all()


def test_float64_stays_and_gradients_end(grey):
    x = Images(grey.double().requires_grad_()).x
    assert x.dtype == torch.float64
    assert not x.requires_grad


def test_batch_gathers(grey):
    index = torch.tensor([4, 4, 0])
    x, y = Images(grey, torch.arange(50)).batch(index)
    assert torch.equal(x, grey[index])
    assert torch.equal(y, index)
    assert torch.equal(Images(grey).batch(index), grey[index])


@pytest.mark.parametrize("binarization", ["none", "dynamic", "static", "threshold"])
def test_batch_never_leaves_the_device(grey, binarization):
    """Tracing refuses whatever would bring a value to the host."""
    images = Images(grey, torch.arange(50), binarization=binarization)
    graph = make_fx(lambda index: images.batch(index))(torch.arange(5))
    assert any("rand_like" in str(node.target) for node in graph.graph.nodes) == (binarization == "dynamic")


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda_batches_without_sync_and_fixed_to_the_same_bits(grey):
    images = Images(grey, binarization="dynamic")
    there, index = images.to("cuda"), torch.arange(5, device="cuda")
    with unwaiting():
        there.batch(index)
    assert torch.equal(there.fixed(3).x.cpu(), images.fixed(3).x)


def test_dynamic_draws_anew_with_the_right_mean():
    """False-alarm rate: below 1e-6 for each (|mean error| under 5 standard errors; 800 equal fair bits)."""
    images = Images(torch.full((800, 1), 0.3), binarization="dynamic")
    first, second = images.batch(torch.arange(800)), images.batch(torch.arange(800))
    assert first.unique().tolist() == [0, 1]
    assert not torch.equal(first, second)
    assert abs(first.mean() - 0.3) < 5 * (0.3 * 0.7 / 800) ** 0.5
    assert images.x.eq(0.3).all()
    assert images.mean.item() == pytest.approx(0.3)
    assert images[0].item() in (0, 1)
    assert next(iter(DataLoader(images, 7))).shape == (7, 1)


def test_static_draws_once_by_seed(grey):
    one, same, other = (Images(grey, binarization="static", seed=s) for s in (0, 0, 1))
    assert torch.equal(one.x, same.x)
    assert not torch.equal(one.x, other.x)
    assert torch.equal(one.batch(torch.arange(50)), one.x)
    assert torch.equal(one[7], one.x[7])
    assert torch.equal(one.subset([1, 2]).x, one.x[1:3])
    assert torch.equal(one.to("cpu").x, one.x)


def test_threshold():
    assert Images(torch.tensor([[0.2, 0.5, 0.7]]), binarization="threshold").x.tolist() == [[0, 0, 1]]


def test_drawing_static_or_fixed_leaves_the_global_generator_alone(grey):
    state = torch.get_rng_state()
    Images(grey, binarization="static")
    Images(grey, binarization="dynamic").fixed()
    assert torch.equal(torch.get_rng_state(), state)


def test_fixed_draws_a_dynamic_set_once(grey):
    dynamic = Images(grey, torch.arange(50), binarization="dynamic", name="d")
    fixed = dynamic.fixed(seed=4)
    assert torch.equal(fixed.x, dynamic.fixed(seed=4).x)
    assert not torch.equal(fixed.x, dynamic.fixed(seed=5).x)
    assert fixed.binarization == "static"
    assert fixed.name == "d"
    assert torch.equal(fixed.labels, dynamic.labels)
    assert torch.equal(fixed.x, Images(grey, binarization="static", seed=4).x)
    assert fixed.fixed(9) is fixed
    assert dynamic.binarization == "dynamic"


@pytest.mark.parametrize("index", [torch.tensor([1, 3]), [1, 3], range(1, 5, 2), slice(1, 5, 2), np.array([1, 3])])
def test_subset(grey, index):
    subset = Images(grey, torch.arange(50), binarization="dynamic").subset(index)
    assert torch.equal(subset.x, grey[[1, 3]])
    assert subset.labels.tolist() == [1, 3]
    assert subset.binarization == "dynamic"


def test_subset_by_mask_and_empty(grey):
    images = Images(grey)
    assert len(images.subset(torch.arange(50) < 7)) == 7
    for empty in ([], slice(0, 0), torch.zeros(50, dtype=torch.bool)):
        with fails(DataError, "0 of 50"):
            images.subset(empty)


def test_images_refuse_bad_data(grey):
    refused(Images, torch.empty(0, 3), says=("N >= 1", "[0, 3]"))
    refused(Images, torch.tensor(1.0), says="shape []")
    with fails(TypeError, "received list"):
        Images([1.0])  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        Images(torch.zeros(3, dtype=torch.complex64))
    for value in ("nan", "inf", "-inf"):
        x = grey.clone()
        x[17, 0, 3, 2] = float(value)
        refused(Images, x, name="some", says=(f"some[17, 0, 3, 2] = {value}", "finite"))


@pytest.mark.parametrize("binarization", ["dynamic", "static", "threshold"])
@pytest.mark.parametrize("value", [-0.25, 1.5, 255.0])
def test_binarization_needs_the_unit_interval(grey, binarization, value):
    grey[2, 0, 1, 3] = value
    assert len(Images(grey)) == 50
    refused(Images, grey, binarization=binarization, says=(f"data[2, 0, 1, 3] = {value}", "[0, 1]", "255"))


def test_unknown_binarization_names_the_nearest(grey):
    with fails(ValueError, "'dynamc'", "'dynamic'", "threshold") as caught:
        Images(grey, binarization="dynamc")
    assert not isinstance(caught.value, DataError)


def test_labels_are_checked(grey):
    refused(Images, grey, torch.arange(49), says=("[50]", "[49]"))
    refused(Images, grey, torch.zeros(50, 1, dtype=torch.long), says=("[50]", "[50, 1]"))
    for bad in (torch.zeros(50), torch.zeros(50, dtype=torch.bool)):
        refused(Images, grey, bad, says=("integers", str(bad.dtype), "long()"))


# load: arguments and digits --------------------


def test_digits_need_no_files():
    train, validation, test = load(root="/nowhere", labels=True)
    assert (len(train), validation, len(test)) == (1437, None, 360)
    assert train.event_shape == (1, 8, 8)
    assert train.x.min() == 0
    assert train.x.max() == 1
    assert train.labels.unique().tolist() == list(range(10))
    assert load().train.labels is None


def test_digits_are_those_of_scikit_learn_which_is_not_imported():
    script = "import pyrovae as pv, sys; pv.data.load(); assert 'sklearn' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], check=True, cwd=Path(published.__file__).parents[2])
    theirs, parts = sklearn.datasets.load_digits(), load("digits", labels=True)
    order = np.random.RandomState(0).permutation(1797)
    for part, rows in ((parts.test, order[:360]), (parts.train, order[360:])):
        assert (part.x.squeeze(1).numpy() * 16 == theirs.images[rows]).all()
        assert (part.labels.numpy() == theirs.target[rows]).all()


def test_digits_split_is_the_same_whatever_the_seed():
    a, b = load(seed=0), load(seed=1)
    assert torch.equal(a.train.x, b.train.x)
    assert torch.equal(a.test.x, b.test.x)
    everything = torch.cat([a.train.x, a.test.x]).flatten(1)
    assert len(everything.unique(dim=0)) == 1797, "the parts overlap"


@pytest.mark.parametrize(("validation", "count"), [(100, 100), (0.1, 144), (0.0, 0), (1e-9, 1), (1436, 1436)])
def test_validation_is_cut_from_the_training_data(validation, count):
    train, held_out, test = load(validation=validation, seed=3)
    assert len(train) == 1437 - count
    assert (len(held_out) if held_out else 0) == count
    assert torch.equal(test.x, load().test.x)
    if held_out:
        together = torch.cat([train.x, held_out.x]).flatten(1)
        assert len(together.unique(dim=0)) == 1437, "the parts overlap"
        assert torch.equal(held_out.x, load(validation=validation, seed=3).validation.x)


def test_validation_cut_depends_on_the_seed():
    assert not torch.equal(load(validation=100, seed=0).validation.x, load(validation=100, seed=1).validation.x)


@pytest.mark.parametrize("validation", [-1, 1.0, 1.5, -0.1, float("nan"), True, 1437])
def test_validation_out_of_range(validation):
    with fails(ValueError, "1437" if validation == 1437 else str(validation)) as caught:
        load(validation=validation)
    assert not isinstance(caught.value, DataError)


def test_dynamic_evaluation_parts_are_fixed_by_seed():
    train, validation, test = load(binarization="dynamic", validation=100, seed=2)
    assert [s.binarization for s in (train, validation, test)] == ["dynamic", "static", "static"]
    grey = load(validation=100, seed=2)
    assert torch.equal(train.x, grey.train.x)
    assert torch.equal(test.x, Images(grey.test.x, binarization="dynamic").fixed(2).x)
    assert torch.equal(test.x, load(binarization="dynamic", seed=2).test.x)
    assert not torch.equal(test.x, load(binarization="dynamic", seed=3).test.x)


@pytest.mark.parametrize("binarization", ["static", "threshold"])
def test_other_binarizations(binarization):
    train, _, test = load(binarization=binarization)
    assert train.x.unique().tolist() == test.x.unique().tolist() == [0, 1]


def test_unknown_names():
    with fails(ValueError, "'minst'", "'mnist'", "npz:PATH") as caught:
        load("minst")
    assert not isinstance(caught.value, DataError)
    refused(load, "foldr:x", says=("'foldr:x'", "'folder:PATH'"), error=ValueError)
    with fails(ValueError, "'dynamc'", "'dynamic'"):
        load("mnist", "/nowhere", binarization="dynamc", download=False)
    for name in ("npz:", "folder:"):
        refused(load, name, says="needs a path", error=ValueError)


# torchvision's sets --------------------


def write_idx(path: Path, array: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(struct.pack(f">I{array.ndim}I", 0x800 + array.ndim, *array.shape) + array.tobytes())


@pytest.fixture
def fake_mnist(monkeypatch):
    """Writes a small set in MNIST's format, which then is the original."""

    def write(root: Path, kind: str = "MNIST") -> tuple[np.ndarray, np.ndarray]:
        rng = np.random.default_rng(0)
        x, y = rng.integers(0, 256, (30, 28, 28), np.uint8), rng.integers(0, 10, 30, np.uint8)
        for part, rows in (("train", slice(0, 20)), ("t10k", slice(20, 30))):
            write_idx(root / kind / "raw" / f"{part}-images-idx3-ubyte", x[rows])
            write_idx(root / kind / "raw" / f"{part}-labels-idx1-ubyte", y[rows])
        files = (root / kind / "raw").iterdir()
        originals = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
        monkeypatch.setattr("pyrovae.data.published.MNIST_SHA256", originals)
        return x, y

    return write


@pytest.mark.parametrize(
    ("name", "kind"), [("mnist", "MNIST"), ("fashion_mnist", "FashionMNIST"), ("kmnist", "KMNIST")]
)
def test_mnist_family(tmp_path, fake_mnist, name, kind):
    x, y = fake_mnist(tmp_path, kind)
    with nullcontext() if kind == "MNIST" else pytest.warns(UserWarning, match="taken unverified"):
        train, _, test = load(name, tmp_path, labels=True)
    assert torch.equal(torch.cat([train.x, test.x])[:, 0], torch.from_numpy(x).float() / 255)
    assert torch.cat([train.labels, test.labels]).tolist() == y.tolist()


def test_mnist_like_files_are_held_to_the_packed_ones(tmp_path, fake_mnist, monkeypatch):
    """Nothing but the md5 of the packed files is known of these: they tell a right file from a wrong one."""
    fake_mnist(tmp_path, "KMNIST")
    raw, resources = tmp_path / "KMNIST" / "raw", []
    for path in sorted(raw.iterdir()):
        packed = gzip.compress(path.read_bytes())
        path.with_name(path.name + ".gz").write_bytes(packed)
        resources.append((path.name + ".gz", hashlib.md5(packed).hexdigest()))
    monkeypatch.setattr("torchvision.datasets.KMNIST.resources", resources)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        expected = load("kmnist", tmp_path).train.x
        path = raw / "train-images-idx3-ubyte"
        content = bytearray(path.read_bytes())
        content[500] ^= 1
        path.write_bytes(content)
        refused(load, "kmnist", tmp_path, says=(str(path), "damaged", "npz:PATH"))
        path.unlink()
        assert torch.equal(load("kmnist", tmp_path, download=False).train.x, expected)
        packed = path.with_name(path.name + ".gz")
        packed.write_bytes(packed.read_bytes()[:-1])
        refused(load, "kmnist", tmp_path, says=(str(packed), "md5"))


def test_root_comes_from_the_environment_or_the_cache(tmp_path, fake_mnist, monkeypatch):
    fake_mnist(tmp_path / "env")
    monkeypatch.setenv("PYROVAE_DATA", str(tmp_path / "env"))
    assert len(load("mnist").train) == 20
    monkeypatch.delenv("PYROVAE_DATA")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    refused(load, "mnist", download=False, says=str(tmp_path / "cache" / "pyrovae"))
    fake_mnist(tmp_path / "cache" / "pyrovae")
    assert len(load("mnist").train) == 20


@pytest.mark.parametrize("size", [0, 3, 9, 16, 5000])
@pytest.mark.parametrize("file", ["train-images-idx3-ubyte", "t10k-images-idx3-ubyte", "train-labels-idx1-ubyte"])
def test_truncated_mnist_names_the_file(tmp_path, fake_mnist, monkeypatch, file, size):
    fake_mnist(tmp_path)
    path = tmp_path / "MNIST" / "raw" / file
    path.write_bytes(path.read_bytes()[: min(size, 12)] if "labels" in file else path.read_bytes()[:size])
    refused(load, "mnist", tmp_path, labels=True, says=(str(path), "delete it and fetch it again"))
    original = hashlib.sha256(path.read_bytes()).hexdigest()
    monkeypatch.setitem(published.MNIST_SHA256, file, original)  # so that its header is looked at
    refused(load, "mnist", tmp_path, labels=True, says=str(path.parent))


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("mnist", "train-images-idx3-ubyte, "),
        ("cifar10", "test_batch"),
        ("svhn", "train_32x32.mat"),
        ("omniglot", "images_background.zip"),
    ],
)
def test_absent_files_say_what_goes_where(tmp_path, monkeypatch, name, place):
    refused(load, name, tmp_path, download=False, says=("download=False", place, str(tmp_path), "PYROVAE_DATA"))
    for module in ("mnist", "cifar", "svhn", "omniglot"):
        for function in ("download_and_extract_archive", "download_url"):
            monkeypatch.setattr(f"torchvision.datasets.{module}.{function}", no_network, raising=False)
    refused(load, name, tmp_path, says=("the download failed", "no route to", place, str(tmp_path)))


def no_network(*args, **kwargs):
    raise RuntimeError("no route to\nthe host")


def test_downloads_what_is_absent(tmp_path, fake_mnist, monkeypatch):
    def download(url, download_root, filename, md5):
        assert md5
        assert not Path(download_root, filename).exists()
        assert not (tmp_path / "MNIST").exists(), "it goes aside"
        assert socket.getdefaulttimeout() > 0
        fake_mnist(Path(download_root).parents[1])

    monkeypatch.setattr("torchvision.datasets.mnist.download_and_extract_archive", download)
    assert len(load("mnist", tmp_path).test) == 10
    assert socket.getdefaulttimeout() is None
    assert [path.name for path in tmp_path.iterdir()] == ["MNIST"], "nothing is left behind"


def test_cifar10_and_svhn_are_channels_first(tmp_path, monkeypatch):
    x = np.random.default_rng(0).integers(0, 256, (6, 32, 32, 3), np.uint8)
    monkeypatch.setattr("torchvision.datasets.SVHN._check_integrity", lambda self: True)
    for part in ("train", "test"):
        scipy.io.savemat(tmp_path / f"{part}_32x32.mat", {"X": x.transpose(1, 2, 3, 0), "y": np.arange(5, 11)[:, None]})
    expected = torch.from_numpy(x).permute(0, 3, 1, 2).float() / 255
    train = load("svhn", tmp_path, labels=True).train
    assert torch.equal(train.x, expected)
    assert train.labels.tolist() == [5, 6, 7, 8, 9, 0]

    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    batch = {"data": x.transpose(0, 3, 1, 2).reshape(6, -1), "labels": [0, 1, 2, 3, 4, 5]}
    lists = {"train_list": "data_batch_1", "test_list": "test_batch"}
    for known, file in lists.items():
        content = pickle.dumps(batch)
        (folder / file).write_bytes(content)
        monkeypatch.setattr(f"torchvision.datasets.CIFAR10.{known}", [[file, hashlib.md5(content).hexdigest()]])
    meta = pickle.dumps({"label_names": list("abcdef")})
    (folder / "batches.meta").write_bytes(meta)
    monkeypatch.setitem(CIFAR10.meta, "md5", hashlib.md5(meta).hexdigest())
    test = load("cifar10", tmp_path, labels=True).test
    assert torch.equal(test.x, expected)
    assert test.labels.tolist() == [0, 1, 2, 3, 4, 5]
    assert test.x.is_contiguous()


def test_omniglot_strokes_are_one(tmp_path, monkeypatch):
    refused(load, "omniglot", tmp_path, download=False, says=("omniglot-py",))
    (tmp_path / "omniglot-py").mkdir()
    for part, characters in (("background", 3), ("evaluation", 2)):
        path = tmp_path / "omniglot-py" / f"images_{part}.zip"
        with zipfile.ZipFile(path, "w") as archive:
            for i in range(characters):
                drawing = np.full((105, 105), True)
                drawing[i, 50] = False
                with archive.open(f"images_{part}/Greek/character{i:02}/{i:04}_01.png", "w") as file:
                    Image.fromarray(drawing).save(file, "png")
        refused(load, "omniglot", tmp_path, download=False, says=("omniglot-py",))
        monkeypatch.setitem(Omniglot.zips_md5, f"images_{part}", hashlib.md5(path.read_bytes()).hexdigest())
    train, _, test = load("omniglot", tmp_path, labels=True)
    assert train.x.shape == (3, 1, 105, 105)
    assert len(test) == 2
    assert train.labels.tolist() == [0, 1, 2]
    assert train.x.sum() == 3
    assert train.x[2, 0, 2, 50] == 1


# omniglot28 and binarized_mnist --------------------


@pytest.mark.parametrize("place", ["omniglot28/chardata.mat", "chardata.mat"])
def test_omniglot28_is_upright(tmp_path, place):
    x = np.random.default_rng(0).random((9, 28, 28))
    columns = np.stack([image.flatten(order="F") for image in x], 1)
    arrays = {"data": columns[:, :6], "testdata": columns[:, 6:], "targetchar": np.arange(6)[None].astype(np.int16)}
    (tmp_path / place).parent.mkdir(exist_ok=True)
    scipy.io.savemat(tmp_path / place, arrays)
    train, _, test = load("omniglot28", tmp_path)
    assert torch.equal(torch.cat([train.x, test.x])[:, 0], torch.from_numpy(x).float())
    assert train.labels is None
    refused(load, "omniglot28", tmp_path, labels=True, says=("labels=True", "'omniglot28'"))
    scipy.io.savemat(tmp_path / place, arrays | {"testtargetchar": np.arange(3)[None]})
    assert load("omniglot28", tmp_path, labels=True).test.labels.tolist() == [0, 1, 2]


def test_omniglot28_absent_or_damaged(tmp_path):
    path = tmp_path / "omniglot28" / "chardata.mat"
    refused(load, "omniglot28", tmp_path, says=(str(path), "PYROVAE_DATA"))
    path.parent.mkdir()
    scipy.io.savemat(path, {"data": np.zeros((784, 40)), "testdata": np.zeros((784, 40))}, do_compression=True)
    for content in (path.read_bytes()[:200], b"junk" * 100, b""):
        path.write_bytes(content)
        refused(load, "omniglot28", tmp_path, says=(str(path), "cannot be read", "chardata.mat"))
    for arrays in ({"testdata": np.zeros((784, 2))}, {"data": np.zeros((100, 2)), "testdata": np.zeros((784, 2))}):
        scipy.io.savemat(path, arrays)
        refused(load, "omniglot28", tmp_path, says=(str(path), "784 x N"))


def write_amat(folder: Path, counts=(5, 3, 4)) -> Tensor:
    folder.mkdir(exist_ok=True)
    bits = torch.rand(sum(counts), 784, generator=torch.Generator().manual_seed(0)).round()
    for part, x in zip(("train", "valid", "test"), bits.split(counts), strict=True):
        np.savetxt(folder / f"binarized_mnist_{part}.amat", x.numpy(), fmt="%d")
    return bits.reshape(-1, 1, 28, 28)


@pytest.mark.parametrize("place", ["binarized_mnist", "."])
def test_binarized_mnist_brings_its_own_validation(tmp_path, place):
    bits = write_amat(tmp_path / place)
    train, validation, test = load("binarized_mnist", tmp_path)
    assert torch.equal(torch.cat([train.x, validation.x, test.x]), bits)
    assert len(validation) == 3
    train, validation, test = load("binarized_mnist", tmp_path, validation=2)
    assert (len(train), len(validation), len(test)) == (6, 2, 4)
    assert torch.equal(load("binarized_mnist", tmp_path, binarization="dynamic").test.x, test.x)
    refused(load, "binarized_mnist", tmp_path, labels=True, says="labels")


def test_binarized_mnist_absent_or_damaged(tmp_path):
    refused(load, "binarized_mnist", tmp_path, says=("binarized_mnist_train.amat", "PYROVAE_DATA"))
    write_amat(tmp_path)
    path = tmp_path / "binarized_mnist_valid.amat"
    text = path.read_bytes()
    for content in (b"", text[:-700], text.replace(b"1", b"2", 1), b"0 1\n" * 784, text.replace(b"1", b"0.5", 1)):
        path.write_bytes(content)
        refused(load, "binarized_mnist", tmp_path, says=(str(path), "784"))
    path.write_bytes(text.rstrip().replace(b"\n", b"\r\n"))
    assert len(load("binarized_mnist", tmp_path).validation) == 3


# folder:PATH --------------------


def write_images(folder: Path, n: int = 3, size=(5, 4), mode: str = "RGB", value: int = 0, suffix: str = "png") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(n):
        Image.new(mode, size, value + i if mode == "L" else (value + i, 0, 255)).save(folder / f"{i:03}.{suffix}")


def test_folder_with_parts_and_classes(tmp_path):
    for part, n in (("train", 4), ("test", 2)):
        write_images(tmp_path / part / "cat", n)
        write_images(tmp_path / part / "dog" / "deeper", n, value=100)
        (tmp_path / part / ".cache").mkdir()
        Image.new("L", (1, 1)).save(tmp_path / part / ".cache" / "hidden.png")
        (tmp_path / part / "notes.txt").write_text("no image")
    train, validation, test = load(f"folder:{tmp_path}", labels=True)
    assert train.x.shape == (8, 3, 4, 5)
    assert len(test) == 4
    assert validation is None
    assert train.labels.tolist() == [0] * 4 + [1] * 4
    assert test.labels.tolist() == [0, 0, 1, 1]
    assert train.x[6, :, 0, 0].tolist() == pytest.approx([102 / 255, 0, 1])
    assert load(f"folder:{tmp_path}").train.labels is None


def test_folder_class_indices_agree_between_parts(tmp_path):
    write_images(tmp_path / "train" / "a")
    write_images(tmp_path / "train" / "b")
    write_images(tmp_path / "val" / "b")
    train, validation, test = load(f"folder:{tmp_path}", labels=True)
    assert validation is None
    assert test.labels.tolist() == [1, 1, 1]
    assert train.labels.unique().tolist() == [0, 1]


def test_folder_with_its_own_validation(tmp_path):
    for part, n in (("train", 6), ("valid", 2), ("test", 3)):
        write_images(tmp_path / part, n, mode="L")
    assert [len(s) for s in load(f"folder:{tmp_path}")] == [6, 2, 3]
    assert [len(s) for s in load(f"folder:{tmp_path}", validation=1)] == [7, 1, 3]


def test_flat_grey_folder_is_cut_once_and_for_all(tmp_path):
    write_images(tmp_path, 20, mode="L", suffix="PNG")
    train, _, test = load(f"folder:{tmp_path}", seed=0)
    assert train.x.shape == (18, 1, 4, 5)
    assert len(test) == 2
    assert torch.equal(test.x, load(f"folder:{tmp_path}", seed=1).test.x)
    refused(load, f"folder:{tmp_path}", labels=True, says="labels")


def test_a_class_called_train_is_a_class(tmp_path):
    write_images(tmp_path / "train", 5)
    write_images(tmp_path / "bus", 5)
    assert load(f"folder:{tmp_path}", labels=True).train.labels.unique().tolist() == [0, 1]


def test_folder_follows_links(tmp_path):
    write_images(tmp_path / "elsewhere" / "cat", 3)
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "cat").symlink_to(tmp_path / "elsewhere" / "cat")
    assert len(load(f"folder:{tmp_path / 'set'}", labels=True).train) == 2
    for name, target in (("again", "elsewhere/cat"), ("above", "set"), ("copy.png", "elsewhere/cat/000.png")):
        link = tmp_path / "elsewhere" / "cat" / name
        link.symlink_to(tmp_path / target)
        refused(load, f"folder:{tmp_path / 'set'}", says=("twice", f"cat/{name}"[:4], "remove one"))
        link.unlink()


@pytest.mark.parametrize(
    ("mode", "colour", "kept"),
    [
        ("1", 1, [255]),
        ("L", 130, [130]),
        ("LA", (130, 7), [130]),
        ("P", (10, 20, 30), [10, 20, 30]),
        ("RGB", (10, 20, 30), [10, 20, 30]),
        ("RGBA", (10, 20, 30, 7), [10, 20, 30]),
    ],
)
def test_folder_keeps_grey_and_colour_and_drops_transparency(tmp_path, mode, colour, kept):
    for i in range(2):
        Image.new(mode, (5, 4), colour).save(tmp_path / f"{i}.png")
    train, _, test = load(f"folder:{tmp_path}")
    expected = (torch.tensor(kept) / 255).view(1, -1, 1, 1).expand(1, len(kept), 4, 5)
    assert torch.equal(train.x, expected)
    assert torch.equal(test.x, expected)


def test_folder_refuses_what_it_cannot_hold(tmp_path):
    refused(load, f"folder:{tmp_path / 'none'}", says=(str(tmp_path / "none"), "absent", "existing folder"))
    refused(load, f"folder:{tmp_path}", says=("needs images", str(tmp_path)))
    write_images(tmp_path / "a", 3)
    write_images(tmp_path / "b", 1, size=(7, 4))
    with fails(
        DataError, str(tmp_path / "b" / "000.png"), "7x4 with 3", str(tmp_path / "a" / "000.png"), "5x4", "resize"
    ):
        load(f"folder:{tmp_path}")
    write_images(tmp_path / "b", 1, mode="L")
    with fails(DataError, str(tmp_path / "b" / "000.png"), "5x4 with 1 channel,", "5x4 with 3 channels", "convert"):
        load(f"folder:{tmp_path}")
    write_images(tmp_path, 1)
    refused(load, f"folder:{tmp_path}", says=(str(tmp_path), "beside its class folders"))


def test_folder_names_the_damaged_image(tmp_path):
    write_images(tmp_path, 3, size=(40, 40))
    path = tmp_path / "001.png"
    for content in (path.read_bytes()[:60], b"junk", b""):
        path.write_bytes(content)
        refused(load, f"folder:{tmp_path}", says=(str(path), "cannot be read", "damaged"))
    Image.fromarray(np.zeros((40, 40), np.uint16)).save(path)
    refused(load, f"folder:{tmp_path}", says=("8 bits", str(path), "I;16"))


def test_folder_of_one_image_cannot_be_cut(tmp_path):
    write_images(tmp_path, 1)
    refused(load, f"folder:{tmp_path}", says="1 of 1")


# npz:PATH --------------------


def saved(path: Path, **arrays) -> str:
    np.savez(path, **arrays)
    return f"npz:{path}"


@pytest.mark.parametrize(
    ("shape", "event"), [((20, 6, 5), (1, 6, 5)), ((20, 6, 5, 3), (3, 6, 5)), ((20, 6, 5, 1), (1, 6, 5)),
                         ((20, 3, 6, 5), (3, 6, 5)), ((20, 7), (7,))]
)  # fmt: skip
def test_npz_8_bit(tmp_path, shape, event):
    x = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    train, _, test = load(saved(tmp_path / "a.npz", x=x, x_test=x[:4]))
    assert train.event_shape == event
    assert len(train) == 20
    assert len(test) == 4
    assert train.x.dtype == torch.float32
    expected = x.transpose(0, 3, 1, 2) if shape[-1] in (1, 3) else x
    assert torch.equal(train.x.flatten(), torch.from_numpy(expected.copy()).flatten().float() / 255)


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", ">f8", "int32", "uint16", "bool"])
def test_npz_other_numbers_are_taken_as_they_are(tmp_path, dtype):
    x = np.array([[0, 1, 3]] * 10, dtype=dtype)
    train, _, test = load(saved(tmp_path / "a.npz", x=x))
    assert train.x.dtype == torch.float32
    assert len(train) == 9
    assert len(test) == 1
    assert train.x[0].tolist() == x[0].astype(float).tolist()


def test_npz_real_vectors(tmp_path):
    x = np.random.default_rng(0).normal(0, 100, (20, 2)).astype(np.float32)
    y = np.arange(20, dtype=np.uint8)
    train, validation, test = load(saved(tmp_path / "a.npz", x=x, y=y), labels=True, validation=3)
    assert (len(train), len(validation), len(test)) == (15, 3, 2)
    for part in (train, validation, test):
        assert torch.equal(part.x, torch.from_numpy(x)[part.labels])
    refused(load, f"npz:{tmp_path / 'a.npz'}", binarization="static", says="[0, 1]")


def test_a_refused_datum_of_a_part_is_named_by_its_place_in_the_file(tmp_path):
    def model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Poisson(pyro.param("rate", torch.ones(2))).to_event(1), obs=x)

    def guide(x):
        pass

    x = -1 - np.arange(40, dtype=np.float32).reshape(20, 2)
    for part in load(saved(tmp_path / "a.npz", x=x), validation=4):
        place = int(-1 - part.x[1, 0]) // 2
        part.x[0] = 1
        for train in (partial(pv.fit, model, guide, objective=pv.ELBO()), pv.models.RBM((2,), 3).fit):
            for size in (1, 100):  # among the first that are looked at, and later
                says = "data[1, 0] = ", f"(from 0, data[1] is number {place} of 'npz:"
                refused(train, part, epochs=1, batch_size=size, says=says)


def test_npz_labels(tmp_path):
    x, y = np.zeros((10, 2), np.float32), np.arange(10)
    assert load(saved(tmp_path / "a.npz", x=x, y=y, x_test=x, y_test=y), labels=True).test.labels.tolist() == [
        *range(10)
    ]
    for arrays in ({}, {"y": y, "x_test": x}):
        refused(load, saved(tmp_path / "a.npz", x=x, **arrays), labels=True, says="labels")
    refused(load, saved(tmp_path / "a.npz", x=x, y=y[:9]), labels=True, says=("[10]", "[9]"))
    refused(load, saved(tmp_path / "a.npz", x=x, y=y / 2), labels=True, says="integers")


def test_npz_never_unpickles(tmp_path):
    class Trap:
        def __reduce__(self):
            return (Path(tmp_path / "sprung").touch, ())

    for array in (np.array([Trap(), None], dtype=object), np.array([[1, 2], None], dtype=object)):
        refused(load, saved(tmp_path / "a.npz", x=array), says=(str(tmp_path / "a.npz"), "objects"))
    assert not (tmp_path / "sprung").exists()


def test_npz_absent_damaged_or_of_another_kind(tmp_path):
    path = tmp_path / "a.npz"
    refused(load, f"npz:{path}", says=(str(path), "absent", "numpy.savez"))
    np.savez_compressed(path, x=np.random.default_rng(0).random((50, 10)))
    whole = path.read_bytes()
    flipped = whole[:1000] + bytes(b ^ 255 for b in whole[1000:1400]) + whole[1400:]
    for content in (whole[:1000], b"", b"junk", gzip.compress(b"x"), flipped):
        path.write_bytes(content)
        with fails(DataError, str(path), "numpy.savez") as caught:
            load(f"npz:{path}")
        assert "allow_pickle" not in str(caught.value)
    np.save(tmp_path / "b.npy", np.zeros(3))
    refused(load, f"npz:{tmp_path / 'b.npy'}", says=("b.npy", "not a zip file", "numpy.savez"))


def test_npz_contents_are_checked(tmp_path):
    path, x = tmp_path / "a.npz", np.zeros((10, 2), np.float32)
    refused(load, saved(path, images=x), says=(str(path), "images", "numpy.savez"))
    refused(load, saved(path, x=np.array(["a", "b"])), says=(str(path), "numbers", "<U1"))
    refused(load, saved(path, x=x, x_test=np.zeros((10, 3))), says=("one shape", "[2]", "[3]"))
    refused(load, saved(path, x=np.eye(4, dtype=np.uint8)), says=("0 and 1 only", "bool or float"))
    refused(load, saved(path, x=x[:0]), says="[0, 2]")
    x[3, 1] = np.nan
    refused(load, saved(path, x=x), says="[3, 1] = nan")


# as_dataset --------------------


def test_as_dataset_makes_images(grey):
    y = torch.arange(50)
    for given in (grey, (grey,), TensorDataset(grey), grey.numpy(), grey.double().numpy()):
        images = as_dataset(given, name="mine")
        assert isinstance(images, Images)
        assert torch.equal(images.x, grey)
        assert images.name == "mine"
    for given in ((grey, y), TensorDataset(grey, y), (grey.numpy(), y.numpy().astype(np.uint8))):
        assert torch.equal(as_dataset(given).labels, y)
    assert as_dataset(torch.tensor([[0, 255]], dtype=torch.uint8)).x.tolist() == [[0, 255]]
    assert as_dataset(np.array([[True]])).x.dtype == torch.float32


def test_as_dataset_keeps_other_forms(grey):
    class Squares(Dataset):
        def __getitem__(self, i):
            return torch.tensor([i * i])

    class Stream(IterableDataset):
        def __iter__(self):
            return iter(grey)

    for given in (Images(grey), Squares(), Stream(), DataLoader(TensorDataset(grey)), Subset(Squares(), [1])):
        assert as_dataset(given) is given


def test_as_dataset_covariates_are_not_labels(grey):
    """A second tensor that is no vector of integers goes to the model as it is."""
    for rest in ((torch.rand(50, 3),), (torch.rand(50),), (torch.arange(50), torch.rand(50))):
        dataset = as_dataset((grey, *rest))
        assert isinstance(dataset, TensorDataset)
        assert all(map(torch.equal, dataset.tensors, (grey, *rest)))


def test_as_dataset_reads_subsets_of_images_at_once(grey):
    subset = as_dataset(Subset(Images(grey, binarization="dynamic"), [3, 1]))
    assert isinstance(subset, Images)
    assert torch.equal(subset.x, grey[[3, 1]])
    assert subset.binarization == "dynamic"


def test_as_dataset_refuses(grey):
    for given in ([grey], {"x": [grey]}, None, 3, (), (grey, "y"), "mnist", load()):
        refused(as_dataset, given, says=("DataLoader", f"received {type(given).__name__}"), error=TypeError)
    for given in ((grey, torch.arange(49)), (grey, torch.tensor(1))):
        refused(as_dataset, given, says=("one length", "[50, 1, 4, 4]", str(list(given[1].shape))))
    refused(as_dataset, np.array([None, grey], dtype=object), says=("numbers", "object"))
    refused(as_dataset, (torch.tensor([0.0, math.nan]), torch.rand(2)), name="mine", says="mine[1] = nan")
    assert as_dataset(torch.tensor([0.0, math.nan]), raw=True).x.isnan().tolist() == [False, True]


# check_support --------------------


@pytest.mark.parametrize(
    "support",
    [
        constraints.boolean, constraints.independent(constraints.boolean, 3), constraints.unit_interval,
        constraints.real, constraints.independent(constraints.real, 3), constraints.nonnegative_integer,
        constraints.dependent, None, constraints.multinomial(1),
    ],
)  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int64, torch.bool])
def test_bits_are_inside_many_supports(support, dtype):
    check_support(torch.ones(9, 1, 2, 2, dtype=dtype), support)


def test_grey_values_under_bernoulli():
    x = torch.zeros(20, 1, 8, 8)
    x[17, 0, 3, 4] = 0.53
    expected = (
        "data[17, 0, 3, 4] = 0.53 is outside the support of site \"pixels\" (boolean: 0 or 1, likelihood 'bernoulli'); "
        "the values run from 0.0 to 0.53: grey values need binarization='dynamic' (or 'static', 'threshold'), or a "
        "likelihood for them such as 'continuous_bernoulli'"
    )
    for support in (constraints.boolean, Bernoulli(torch.full((1, 8, 8), 0.5)).support):
        with pytest.raises(DataError) as caught:
            check_support(x, constraints.independent(support, 3), site="pixels", likelihood="bernoulli")
        assert str(caught.value) == expected


@pytest.mark.parametrize(
    ("values", "support", "fragments"),
    [
        ([0.0] * 63 + [255.0], constraints.boolean, ("[0, 63] = 255.0", "0.0 to 255.0", "by 255", "binarise")),
        ([0] * 63 + [255], constraints.boolean, ("[0, 63] = 255", "by 255")),
        ([0.0] * 63 + [128.0], constraints.unit_interval, ("= 128.0", "by 255")),
        ([0.0, 128.0], constraints.unit_interval, ("= 128.0", "rescale them")),  # a table's, and no pixels
        ([0.0, 2.0], constraints.boolean, ("= 2.0", "rescale them to 0 and 1")),
        ([0.0, 2 / 255], constraints.nonnegative_integer, ("counts in integers", "8-bit numbers of a file")),
        ([0.0, 0.5], constraints.boolean, ("= 0.5", "values in between need binarization")),
        ([0.0, 4000.0], constraints.unit_interval, ("= 4000.0", "rescale")),
        ([-0.5, 1.0], constraints.boolean, ("[0, 0] = -0.5", "negative", "gaussian")),
        ([-1.0, 0.3], constraints.unit_interval, ("[0, 0] = -1.0", "negative")),
        ([1.0, -1.0], constraints.positive, ("[0, 1] = -1.0", "-1.0 to 1.0", "gaussian")),
        ([0.5, 1.0], constraints.integer_interval(0, 255), ("[0, 0] = 0.5", "counts in integers")),
        ([0.5, 1.0], constraints.multinomial(3), ("[0, 0] = 0.5", "counts in integers")),
        ([0.0, float("nan")], constraints.real, ("[0, 1] = nan", "finite")),
        ([float("inf"), 0.0], constraints.real, ("[0, 0] = inf", "finite")),
        ([float("inf"), 0.0], constraints.dependent, ("[0, 0] = inf", "finite")),
        ([0.0, -float("inf")], None, ("[0, 1] = -inf", "finite")),
        ([0.3, 0.7], constraints.one_hot, ("data[0] = [0.3, 0.7]", "OneHot", "transform")),
        ([True, False], constraints.positive, ("[0, 1] = False",)),
    ],
)
def test_values_outside(values, support, fragments):
    refused(check_support, torch.tensor([values]), support, says=fragments)


def test_first_offender_is_found_across_pieces(monkeypatch):
    monkeypatch.setattr("pyrovae.engine.support.CHUNK_BYTES", {"cpu": 3 * 5 * 4})
    x = torch.zeros(20, 5)
    x[10, 4], x[10, 2], x[15, 0] = 0.1, 0.2, 0.3
    refused(check_support, x, constraints.boolean, says=("data[10, 2] = 0.2", "0.0 to 0.3"))
    pieces = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pyrovae.engine.support.all_inside", lambda x, support: pieces.append(x.nbytes) or True)
        check_support(x, constraints.boolean)
    assert sum(pieces) == x.nbytes
    assert max(pieces) == 60


def test_bounds_of_another_batch_count_with_their_widest_values():
    support = Uniform(torch.tensor([[0.0, -1.0]] * 3), torch.tensor([[1.0, 2.0]] * 3)).support
    check_support(torch.tensor([[-1.0, 2.0]] * 7), constraints.independent(support, 1))
    with fails(DataError, "data[4, 0] = 2.5"):
        check_support(torch.tensor([[0.0, 0.0]] * 4 + [[2.5, 0.0]]), constraints.independent(support, 1))


def test_mixture_supports():
    mixture = MixtureSameFamily(Categorical(torch.ones(4, 2)), Normal(torch.zeros(4, 2), 1.0))
    check_support(torch.randn(9, 4, generator=torch.Generator().manual_seed(0)), mixture.support)


# Fingerprints and rows that come twice --------------------

BITS = torch.bernoulli(torch.full((90, 7, 5), 0.3), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float16, torch.float32, torch.float64, torch.int64])
def test_any_change_changes_the_fingerprint(dtype, monkeypatch):
    x = BITS.to(dtype)
    first, seen = fingerprint(x), {fingerprint(x)}
    flat = x.view(90, -1)
    changes = [*((row, i) for row in (0, 41, 89) for i in range(35)), *((row, 3) for row in range(90))]
    for row, i in dict.fromkeys(changes):
        changed = flat.clone()
        changed[row, i] = 1 - changed[row, i]
        seen.add(fingerprint(changed.view_as(x)))
    swaps = [(i, j) for i in range(35) for j in range(i) if flat[0, i] != flat[0, j]]  # which a sum of values misses
    for i, j in swaps:
        swapped = flat.clone()
        swapped[0, [i, j]] = flat[0, [j, i]]
        seen.add(fingerprint(swapped.view_as(x)))
    seen.add(fingerprint(x.flip(0)))
    seen.add(fingerprint(x.mT.reshape(90, 7, 5)))
    assert len(seen) == 1 + len(dict.fromkeys(changes)) + len(swaps) + 2
    monkeypatch.setattr("pyrovae.engine.support.CHUNK_BYTES", {"cpu": 100})
    assert fingerprint(x) == first


@pytest.mark.parametrize("event", [(3,), (9, 40)])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_rows_that_come_twice_are_counted(event, dtype):
    draw = torch.Generator().manual_seed(0)
    among = torch.randint(2, (300, *event), generator=draw).to(dtype)
    rows = torch.cat([torch.randint(2, (100, *event), generator=draw).to(dtype), among[50:57], among[:1]])
    edges = among[100:120].clone()  # alike but for the last value
    edges.view(20, -1)[:, -1] = 1 - edges.view(20, -1)[:, -1]
    rows = torch.cat([rows, edges])
    there = {tuple(row.flatten().tolist()) for row in among}
    assert repeated(rows, among) == sum(tuple(row.flatten().tolist()) in there for row in rows)
    assert repeated(rows, among) >= 8


# Real data --------------------


@needs("MNIST", "raw")
def test_real_mnist():
    train, _, test = load("mnist", REAL, labels=True, download=False)
    assert train.x.shape == (60_000, 1, 28, 28)
    assert test.x.shape == (10_000, 1, 28, 28)
    assert train.x.mean().item() == pytest.approx(0.1307, abs=5e-5)
    assert train.x.max() == 1
    assert train.labels[:5].tolist() == [5, 0, 4, 1, 9]
    assert train.labels.bincount().min() == 5421
    assert train.mean.shape == (1, 28, 28)


@needs("omniglot28", "chardata.mat")
def test_real_omniglot28():
    train, _, test = load("omniglot28", REAL, labels=True)
    assert train.x.shape == (24_345, 1, 28, 28)
    assert test.x.shape == (8_070, 1, 28, 28)
    assert train.x.min() == 0
    assert train.x.max() == 1
    assert 0.05 < train.x.mean() < 0.2
    assert train.labels.max() == 1622
