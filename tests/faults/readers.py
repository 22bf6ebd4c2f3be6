"""Files and arrays that data are read from: damaged, ambiguous, hostile; each rule of the readers, by its refusal."""

import errno
import hashlib
import io
import os
import pickle
import socket
import socketserver
import struct
import threading
import time
import warnings
import zipfile
import zlib
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import scipy.io
import scipy.sparse
import torch
from PIL import Image

import pyrovae as pv
from tests.faults.matrix import fault, small_run

REAL = Path(os.environ.get("PYROVAE_DATA") or Path(__file__).resolve().parents[3] / "shared" / "data")
RNG = np.random.default_rng(0)
GREY = RNG.random((40, 6), dtype=np.float32)
TRAIN = ("train", "--epochs", "1", "--samples", "2", "--device", "cpu", "--data")


def load(name: str, **options):
    return lambda: pv.data.load(name, **options)


def untouched(folder: Path) -> None:
    """Nothing was begun: what cannot be read is refused before there is a run."""
    assert not (folder / "runs").exists()


# Writers of bad files --------------------


def npz(folder: Path, **arrays) -> str:
    np.savez(folder / "a.npz", **arrays)
    return "npz:a.npz"


def npy(descr: object, shape: tuple[int, ...], content: bytes = b"") -> bytes:
    """A .npy file that declares what it likes."""
    header = repr({"descr": descr, "fortran_order": False, "shape": shape}).encode()
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + content


def lying_npz(folder: Path, content: bytes, method: int = zipfile.ZIP_STORED) -> str:
    with zipfile.ZipFile(folder / "a.npz", "w", method) as archive:
        archive.writestr("x.npy", content)
    return "npz:a.npz"


def bomb(folder: Path, gigabytes: int) -> str:
    """An archive whose x unpacks to zeros without end."""
    size = gigabytes * 2**30 // 4
    header = npy("<f4", (size // 1024, 1024))
    with zipfile.ZipFile(folder / "a.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x.npy", header + bytes(2**20))
    data = bytearray((folder / "a.npz").read_bytes())
    at = data.index(b"PK\x01\x02")
    # The size is declared in two places, and nobody unpacks the whole before he believes them.
    data[at + 24 : at + 28] = struct.pack("<I", min(len(header) + size * 4, 2**32 - 2))
    (folder / "a.npz").write_bytes(data)
    return "npz:a.npz"


def png(width: int, height: int, depth: int = 8, colour: int = 0, rows: bytes | None = None, *chunks: bytes) -> bytes:
    """A PNG, whose pixels need not be there."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    body = chunk(b"IDAT", zlib.compress(b"" if rows is None else rows))
    return b"\x89PNG\r\n\x1a\n" + head + b"".join(chunks) + body + chunk(b"IEND", b"")


def picture(path: Path, value: int = 0, size: tuple[int, int] = (5, 4), mode: str = "L", **options) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, value).save(path, **options)


def classes(folder: Path, names: str = "ab", count: int = 6) -> Path:
    """A set of images in class folders, each image with a value of its own."""
    for i, name in enumerate(names):
        for j in range(count):
            picture(folder / "set" / name / f"{j}.png", 10 * i + j + 2)
    return folder / "set"


def idx(array: np.ndarray) -> bytes:
    return struct.pack(f">I{array.ndim}I", 0x800 + array.ndim, *array.shape) + array.tobytes()


def mnist(folder: Path, kind: str = "MNIST") -> Path:
    """A small set in MNIST's format under data/; the original, as far as checksums are concerned."""
    raw = folder / "data" / kind / "raw"
    raw.mkdir(parents=True)
    for part, count in (("train", 20), ("t10k", 6)):
        (raw / f"{part}-images-idx3-ubyte").write_bytes(idx(RNG.integers(0, 256, (count, 28, 28), np.uint8)))
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(idx(RNG.integers(0, 10, count, np.uint8)))
    return raw


def trust(raw: Path) -> None:
    """Take the files of a folder for the originals."""
    known = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in raw.iterdir() if path.is_file()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            from pyrovae.data import published
        except ImportError:  # a package that verifies nothing
            return
    published.MNIST_SHA256.update(known)


def chardata(folder: Path, **arrays) -> None:
    columns = {"data": RNG.random((784, 20)), "testdata": RNG.random((784, 10))}
    scipy.io.savemat(folder / "chardata.mat", columns | arrays)


def amat(folder: Path, rows: list[str] | None = None, part: str = "train") -> None:
    bits = [" ".join(map(str, row)) for row in RNG.integers(0, 2, (6, 784))]
    for name in ("train", "valid", "test"):
        lines = rows if rows is not None and name == part else bits
        (folder / f"binarized_mnist_{name}.amat").write_text("\n".join(lines) + "\n")


@contextmanager
def nobody():
    """Without the powers of root, whom no permission stops."""
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)


def as_nobody(action):
    """Try something that way, once it was tried with them: modules of root's are imported by then."""
    with suppress(Exception):
        action()

    def run():
        with nobody():
            return action()

    return run


# npz: kinds of numbers --------------------

TAKEN = {
    "bool": np.bool_, "int8": np.int8, "int64": np.int64, "uint64": np.uint64, "float16": np.float16,
    "float64": np.float64, "big-endian": np.dtype(">f4"),
}  # fmt: skip


@fault("A7", "load", 0, each=TAKEN)
def numbers_of_many_kinds_keep_their_values(folder: Path, dtype):
    x = RNG.integers(0, 2, (40, 6)).astype(dtype)
    splits = (yield load(npz(folder, x=x, x_test=x))).value
    assert splits.test.x.dtype == torch.float32
    assert splits.test.x.tolist() == x.astype(float).tolist()


WRONG = {
    "complex": (GREY.astype(np.complex64), r"x must be .*numbers.*complex64.*array\.real, array\.imag"),
    "strings": (np.array([["a", "b"]] * 20), r"x must be .*numbers.*<U1.*numpy\.unique"),
    "dates": (np.array([["2020-01-01"]] * 20, "datetime64[D]"), r"x must be .*datetime64.*astype\('int64'\)"),
    "records": (np.zeros(20, [("a", "f4"), ("b", "f4")]), r"x must be .*numbers.*one array for each of its fields"),
    "objects": (np.array([[1, None]] * 20, dtype=object), r"x must be .*numbers.*object.*not objects"),
    "beyond int64": (np.full((20, 2), 2**63 + 5, np.uint64), r"x must fit 64-bit integers.*9223372036854775813"),
    "overflow": (np.full((20, 2), 1e300), r"\[0, 0\] = inf: data must be finite"),
    "nan": (np.full((20, 2), np.nan), r"\[0, 0\] = nan: data must be finite"),
    "no rows": (GREY[:0], r"shape \[0, 6\]"),
    "a number": (np.float32(1.0), r"shape \[\]"),
}


@fault("A7", "train", 3, r"a\.npz", each=WRONG)
def arrays_that_are_no_data_are_refused(folder: Path, wrong):
    array, says = wrong
    outcome = yield *TRAIN, npz(folder, x=array)
    assert_says(outcome, says)
    untouched(folder)


def assert_says(outcome, says: str) -> None:
    import re

    assert re.search(says, outcome.message), outcome.message


# npz: the order of axes --------------------

FIRST = {
    "8-bit N H W": (RNG.integers(0, 256, (20, 6, 5), np.uint8), (1, 6, 5), None),
    "8-bit N H W 3": (RNG.integers(0, 256, (20, 6, 5, 3), np.uint8), (3, 6, 5), (0, 3, 1, 2)),
    "8-bit N 3 H W": (RNG.integers(0, 256, (20, 3, 6, 5), np.uint8), (3, 6, 5), (0, 1, 2, 3)),
    "real N H W 3": (RNG.random((20, 6, 5, 3), dtype=np.float32), (3, 6, 5), (0, 3, 1, 2)),
    "real N H W 1": (RNG.random((20, 6, 5, 1), dtype=np.float32), (1, 6, 5), (0, 3, 1, 2)),
    "real N 1 H W": (RNG.random((20, 1, 6, 5), dtype=np.float32), (1, 6, 5), (0, 1, 2, 3)),
    "real N 2 H W": (RNG.random((20, 2, 6, 5), dtype=np.float32), (2, 6, 5), (0, 1, 2, 3)),
    "features N 8 4 4": (RNG.random((20, 8, 4, 4), dtype=np.float32), (8, 4, 4), (0, 1, 2, 3)),
    "vectors": (GREY, (6,), (0, 1)),
}


@fault("A7", "load", 0, each=FIRST)
def channels_are_in_front(folder: Path, case):
    x, event, axes = case
    splits = (yield load(npz(folder, x=x, x_test=x))).value
    expected = x[:, None] if axes is None else x.transpose(axes)
    scale = 255 if x.dtype == np.uint8 else 1
    assert splits.test.event_shape == event
    assert torch.equal(splits.test.x, torch.from_numpy(expected.astype(np.float32)) / scale)


AMBIGUOUS = {
    "N 3 H 3": (20, 3, 8, 3), "N 1 H 1": (20, 1, 8, 1), "N 1 H 3": (20, 1, 8, 3), "N 3 3 3": (20, 3, 3, 3)
}  # fmt: skip


@fault("A7", "load", 3, r"four axes must be \[N, C, H, W\] or \[N, H, W, C\].*both may be channels", each=AMBIGUOUS)
def two_axes_that_may_be_channels_are_refused(folder: Path, shape):
    yield load(npz(folder, x=RNG.random(shape, dtype=np.float32)))


UNCOUNTED = {
    "RGBA": np.zeros((20, 6, 5, 4), np.uint8), "RGBA in front": np.zeros((20, 4, 6, 5), np.uint8),
    "grey and alpha": np.zeros((20, 6, 5, 2), np.uint8), "real RGBA": np.zeros((20, 6, 5, 4), np.float32),
    "spectra": np.zeros((20, 6, 5, 7), np.uint8),
}  # fmt: skip


@fault("A7", "train", 3, r"1 or 3 channels, a\.npz: x has shape \[20, .*x\[\.\.\., :3\]", each=UNCOUNTED)
def other_numbers_of_channels_are_refused(folder: Path, x):
    yield *TRAIN, npz(folder, x=x)
    untouched(folder)


@fault("A7", "load", 3, r"x and x_test must both be 8-bit, or neither.*uint8 and torch\.float32")
def a_test_part_of_another_scale_is_refused(folder: Path):
    yield load(npz(folder, x=np.full((20, 6), 200, np.uint8), x_test=GREY))


@fault("A7", "load", 3, r"divided by 255.*0 and 1 only")
def bits_in_bytes_are_refused(folder: Path):
    yield load(npz(folder, x=RNG.integers(0, 2, (20, 6), np.uint8)))


@fault("A7", "load", 3, r"divided by 255.*0 and 1 only")
def bits_in_images_are_refused(folder: Path):
    for i in range(8):
        picture(folder / "set" / f"{i}.png", i % 2)
    yield load("folder:set")


@fault("A7", "load", 3, r"needs an array 'x_test'.*has: x, y_test")
def test_labels_without_test_data_are_refused(folder: Path):
    yield load(npz(folder, x=GREY, y_test=np.arange(3)))


@fault("A7", "load", 3, r"needs an array 'x'.*has: images, labels")
def arrays_of_other_names_are_refused(folder: Path):
    yield load(npz(folder, images=GREY, labels=np.arange(40)))


@fault("A7", "load", 0)
def labels_of_one_part_are_no_labels(folder: Path):
    splits = (yield load(npz(folder, x=GREY, x_test=GREY, y=np.arange(40)), labels=None)).value
    assert splits.train.labels is None
    assert splits.test.labels is None


@fault("A7", "train", 3, r"labels are needed")
def labels_of_one_part_train_no_conditional_model(folder: Path):
    yield "train", "conditional", *TRAIN[1:], npz(folder, x=GREY, x_test=GREY, y=np.arange(40) % 2)
    untouched(folder)


FEW = {"two": 2, "five": 5, "fourteen": 14}


@fault("C", "train", 3, r"a test figure and its error need two data at least.* 1 to test on", each=FEW)
def under_fifteen_data(folder: Path, count):
    yield *TRAIN, npz(folder, x=GREY[:count])
    untouched(folder)


@fault("C", "train", 0, r"test NLL")
def fifteen_data_are_enough(folder: Path):
    yield *TRAIN, npz(folder, x=GREY[:15])


# Labels --------------------

LABELS = {
    "one-hot reals": (np.eye(4)[np.arange(40) % 4], r"labels must be integers.*labels\.argmax\(1\)"),
    "one-hot integers": (
        np.eye(4, dtype=int)[np.arange(40) % 4],
        r"labels must have shape \[40\].*labels\.argmax\(1\)",
    ),
    "whole reals": (np.arange(40.0), r"labels must be integers.*labels\.long\(\)"),
    "halves": (np.arange(40) / 2, r"labels must be integers.*numpy\.unique"),
    "nan": (np.full(40, np.nan), r"labels must be integers.*unknown ones by -1"),
    "bool": (np.arange(40) > 3, r"labels must be integers.*labels\.long\(\)"),
    "column": (np.arange(40)[:, None], r"labels must have shape \[40\].*labels\.flatten\(\)"),
    "too few": (np.arange(39), r"labels must have shape \[40\].*\[39\]"),
    "strings": (np.array(["cat", "dog"] * 20), r"array of numbers.*numpy\.unique\(array, return_inverse=True\)\[1\]"),
    "beyond int64": (np.full(40, 2**64 - 1, np.uint64), r"must fit 64-bit integers, received 18446744073709551615"),
}


@fault("A7", "Images", 3, "labels", each=LABELS)
def labels_that_are_no_class_numbers(folder: Path, case):
    labels, says = case
    given = labels if labels.dtype.kind == "U" else torch.from_numpy(labels)
    outcome = yield lambda: pv.data.Images(torch.from_numpy(GREY), given)
    assert_says(outcome, says)


@fault("A7", "train", 3, r"a\.npz", each=LABELS)
def labels_of_a_file_that_are_no_class_numbers(folder: Path, case):
    labels, says = case
    outcome = yield "train", "conditional", *TRAIN[1:], npz(folder, x=GREY, x_test=GREY, y=labels, y_test=labels)
    assert_says(outcome, says)
    untouched(folder)


CLASSES = {
    "one class": (np.zeros(40, int), np.zeros(40, int), "0 to 0 and 0 to 0"),
    "negative": (np.arange(40) % 2 - 5, np.arange(40) % 2, "-5 to -4 and 0 to 1"),
    "new in the test part": (np.arange(40) % 2, np.arange(40) % 4, "0 to 1 and 0 to 3"),
    "a billion": (np.arange(40) % 2 * 10**9, np.arange(40) % 2, "0 to 1000000000 and 0 to 1"),
    "more than data": (np.arange(1, 41), np.arange(40), "1 to 40 and 0 to 39"),
}


@fault("C", "train", 3, r"labels must run from 0, over two classes at least.*num_classes", each=CLASSES)
def classes_that_no_model_can_be_built_for(folder: Path, case):
    y, y_test, found = case
    outcome = yield "train", "conditional", *TRAIN[1:], npz(folder, x=GREY, x_test=GREY, y=y, y_test=y_test)
    assert found in outcome.message, outcome.message
    untouched(folder)


@fault("A7", "Images", 3, r"array of numbers.*numpy\.unique")
def labels_by_name_in_a_list(folder: Path):
    yield lambda: pv.data.Images(torch.from_numpy(GREY), ["cat", "dog"] * 20)


NO_DATA = {
    "sparse": lambda: torch.eye(4).to_sparse(), "meta": lambda: torch.zeros(4, 2, device="meta"),
    "complex": lambda: torch.zeros(4, 2, dtype=torch.complex64), "list": lambda: [[0.0, 1.0]],
    "array": lambda: GREY,
}  # fmt: skip


@fault("C", "Images", 2, r"x must be a dense, real tensor \[N, \.\.\.\], received", each=NO_DATA)
def tensors_that_hold_no_plain_numbers(folder: Path, make):
    yield lambda: pv.data.Images(make())


ARRAYS = {
    "complex": (GREY.astype(np.complex64), r"must be an array of numbers, received complex64.*array\.real"),
    "strings": (np.array([["a", "b"]] * 20), r"must be an array of numbers, received <U1.*numpy\.unique"),
    "objects": (np.array([[1, None]] * 20, dtype=object), r"must be an array of numbers, received object.*not objects"),
    "beyond int64": (np.full((20, 2), 2**63 + 5, np.uint64), r"must fit 64-bit integers, received 9223372036854775813"),
    "masked": (np.ma.masked_array(GREY, GREY > 0.9), r"must have no masked values, has \d+: fill them with filled"),
}  # fmt: skip
VERBS = {
    "fit": lambda vae, x: pv.fit(vae.model, vae.guide, x, epochs=1, objective=pv.ELBO()),
    "fit_replicas": lambda vae, x: pv.fit_replicas([(vae.model, vae.guide)], x, epochs=1, objective=pv.ELBO()),
    "validation": lambda vae, x: pv.fit(
        vae.model, vae.guide, torch.rand(20, 6), validation=x, epochs=1, objective=pv.ELBO()
    ),
    "as_dataset": lambda vae, x: pv.data.as_dataset(x),
}


def arrays_in_memory_that_are_no_data(folder: Path, case):
    verb, array, says = case
    vae = pv.models.VAE((6,), likelihood="gaussian", latent_dim=2, hidden=[8])
    before = {name: p.clone() for name, p in vae.state_dict().items()}
    outcome = yield lambda: VERBS[verb](vae, array)
    assert_says(outcome, says)
    assert all(torch.equal(p, before[name]) for name, p in vae.state_dict().items())


for verb in VERBS:
    cases = {kind: (verb, *case) for kind, case in ARRAYS.items()}
    fault("A7", verb, 3, each=cases)(arrays_in_memory_that_are_no_data)


NARROW = {"float8": torch.float8_e4m3fn, "uint64": torch.uint64, "uint16": torch.uint16, "int8": torch.int8}


@fault("A7", "Images", 0, each=NARROW)
def tensors_of_other_kinds_become_reals(folder: Path, dtype):
    x = torch.tensor([[0.0, 1.0], [2.0, 5.0]])
    images = (yield lambda: pv.data.Images(x.to(dtype))).value
    assert images.x.dtype == torch.float32
    assert images.x.equal(x)


# npz: sizes that are declared --------------------


@fault("C", "load", 3, r"a\.npz: x declares \[1000000, 1000000\] of float32, which its size does not fit")
def a_header_that_declares_a_trillion_reals(folder: Path):
    yield load(lying_npz(folder, npy("<f4", (10**6, 10**6), bytes(64))))


@fault("C", "load", 3, r"a\.npz: x declares \[-1, 8\]")
def a_header_that_declares_less_than_nothing(folder: Path):
    yield load(lying_npz(folder, npy("<f4", (-1, 8), bytes(64))))


@fault("C", "load", 3, r"a\.npz.*cannot be read")
def a_header_that_is_code(folder: Path):
    header = b"__import__('os').mkdir('sprung')"
    content = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header
    yield load(lying_npz(folder, content))
    assert not (folder / "sprung").exists()


@fault("C", "load", 3, r"a\.npz.*not objects")
def a_header_of_objects(folder: Path):
    class Trap:
        def __reduce__(self):
            return (os.mkdir, ("sprung",))

    yield load(lying_npz(folder, npy("|O", (20, 2), pickle.dumps([Trap()]))))
    assert not (folder / "sprung").exists()


@fault("C", "load", 3, r"a\.npz cannot be read \(its [\d,]+ bytes cannot hold the [\d,]+ that it declares\)")
def an_archive_that_declares_more_than_it_can_hold(folder: Path):
    yield load(bomb(folder, 3))


@fault("C", "train", 6, r"what a\.npz declares takes [\d,.]+ GiB of memory")
def an_archive_that_unpacks_to_more_than_there_is(folder: Path):
    x = np.zeros((2**18, 256), np.float32)  # 256 MiB, of which next to nothing is in the file
    np.savez_compressed(folder / "a.npz", x=x)
    import resource

    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 400 * 2**20, resource.getrlimit(resource.RLIMIT_AS)[1]))
    yield *TRAIN, "npz:a.npz"
    untouched(folder)


@fault("C", "load", 3, r"a\.npz holds one array twice")
def an_archive_with_two_arrays_of_one_name(folder: Path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with zipfile.ZipFile(folder / "a.npz", "w") as archive:
            for value in (0, 1):
                file = io.BytesIO()
                np.save(file, np.full((20, 2), value, np.float32))
                archive.writestr("x.npy", file.getvalue())
    yield load("npz:a.npz")


@fault("C", "load", 3, r"a\.npz.*cannot be read")
def a_bit_of_an_array_is_flipped(folder: Path):
    name = npz(folder, x=GREY)
    data = bytearray((folder / "a.npz").read_bytes())
    data[300] ^= 1
    (folder / "a.npz").write_bytes(data)
    yield load(name)


CUT = {"half": 0.5, "nothing": 0.0, "all but a byte": 0.999}


@fault("C", "train", 3, r"a\.npz cannot be read .*zip.*numpy\.savez", each=CUT)
def an_archive_is_cut_short(folder: Path, share):
    name = npz(folder, x=GREY)
    data = (folder / "a.npz").read_bytes()
    (folder / "a.npz").write_bytes(data[: int(share * len(data))])
    yield *TRAIN, name
    untouched(folder)


# What is no regular file --------------------


def pipe(path: Path) -> None:
    os.mkfifo(path)


def sock(path: Path) -> None:
    socket.socket(socket.AF_UNIX).bind(path.name if path.parent == Path.cwd() else str(path))


def circle(path: Path) -> None:
    path.symlink_to(path.name)


def nowhere(path: Path) -> None:
    path.symlink_to("nowhere")


def device(path: Path) -> None:
    path.symlink_to("/dev/zero")


IRREGULAR = {"pipe": (pipe, "a pipe"), "socket": (sock, "a socket"), "folder": (Path.mkdir, "a folder"),
             "device": (device, "a device"), "circle": (circle, "a link that leads nowhere"),
             "broken link": (nowhere, "a link that leads nowhere")}  # fmt: skip


@fault("C", "train", 3, r"a\.npz", each=IRREGULAR)
def an_archive_that_is_no_file(folder: Path, case):
    make, says = case
    make(folder / "a.npz")
    outcome = yield *TRAIN, "npz:a.npz"
    assert says in outcome.message, outcome.message
    untouched(folder)


@fault("C", "load", 3, r"chardata\.mat", each=IRREGULAR)
def a_mat_file_that_is_no_file(folder: Path, case):
    make, says = case
    make(folder / "chardata.mat")
    outcome = yield load("omniglot28", root=".")
    assert says in outcome.message, outcome.message


@fault("C", "load", 3, r"train-images-idx3-ubyte", each={k: v for k, v in IRREGULAR.items() if "a link" not in v[1]})
def a_file_of_mnist_that_is_no_file(folder: Path, case):
    make, says = case
    raw = mnist(folder)
    trust(raw)
    (raw / "train-images-idx3-ubyte").unlink()
    os.chdir(raw)
    make(raw / "train-images-idx3-ubyte")
    os.chdir(folder)
    outcome = yield load("mnist", root="data", download=False)
    assert says in outcome.message, outcome.message


@fault("C", "load", 3, r"x\.png", each={k: v for k, v in IRREGULAR.items() if k != "folder"})
def an_image_that_is_no_file(folder: Path, case):
    make, says = case
    root = classes(folder)
    os.chdir(root / "a")
    make(root / "a" / "x.png")
    os.chdir(folder)
    outcome = yield load("folder:set", labels=True)
    assert says in outcome.message, outcome.message


@fault("C", "load", 3, r"folder:PATH needs an existing folder")
def a_folder_that_is_a_file(folder: Path):
    (folder / "set").write_text("no folder")
    yield load("folder:set")


@fault("C", "load", 3, r"absent")
def a_path_with_a_zero_byte(folder: Path):
    yield load("npz:a\0.npz")


@fault("C", "load", 3, r"absent")
def a_path_too_long_for_any_file(folder: Path):
    yield load("npz:" + "a" * 5000)


VALIDATION = {"text": "abc", "list": [1], "minus": -1, "one": 1.0, "nan": float("nan"), "yes": True, "none": None}


@fault("D", "load", 2, r"validation must be a count or a fraction in \[0, 1\), received", each=VALIDATION)
def validation_parts_of_no_size(folder: Path, value):
    yield load("digits", validation=value)


@fault("C", "load", 0)
def digits_without_a_home(folder: Path):
    os.environ.pop("HOME")
    os.environ.pop("PYROVAE_DATA", None)
    with homeless():
        splits = (yield load("digits")).value
    assert len(splits.train) == 1437


@fault("C", "load", 3, r"MNIST is not under ~/\.cache/pyrovae and download=False.*--data-dir")
def mnist_without_a_home(folder: Path):
    os.environ.pop("HOME")
    os.environ.pop("PYROVAE_DATA", None)
    with homeless():
        yield load("mnist", download=False)


@contextmanager
def homeless():
    """A user whom the system does not know."""
    before, os.path.expanduser = os.path.expanduser, lambda path: path
    try:
        yield
    finally:
        os.path.expanduser = before


def endless(path: Path) -> None:
    """A terabyte of nothing, which takes no room on the disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    os.truncate(path, 2**40)


HUGE = {
    "omniglot28": ("chardata.mat", 6), "binarized_mnist": ("binarized_mnist_train.amat", 6),
    "mnist": ("MNIST/raw/train-images-idx3-ubyte", 6), "kmnist": ("KMNIST/raw/train-images-idx3-ubyte", 6),
    "kmnist packed": ("KMNIST/raw/train-images-idx3-ubyte.gz", 3), "cifar10": ("cifar-10-batches-py/data_batch_1", 3),
    "svhn": ("train_32x32.mat", 3), "omniglot": ("omniglot-py/images_background.zip", 3),
}  # fmt: skip
REST = {
    "omniglot28": [], "binarized_mnist": ["binarized_mnist_valid.amat", "binarized_mnist_test.amat"],
    "svhn": ["test_32x32.mat"], "omniglot": ["omniglot-py/images_evaluation.zip"],
    "cifar10": [f"cifar-10-batches-py/{n}" for n in ("data_batch_2", "data_batch_3", "data_batch_4")]
    + ["cifar-10-batches-py/data_batch_5", "cifar-10-batches-py/test_batch", "cifar-10-batches-py/batches.meta"],
}  # fmt: skip


def a_file_of_a_terabyte(folder: Path, case):
    name, path = case
    if "mnist" in name and "binarized" not in name:
        mnist(folder, "MNIST" if name == "mnist" else "KMNIST")
    for other in REST.get(name, []):
        (folder / "data" / other).parent.mkdir(parents=True, exist_ok=True)
        (folder / "data" / other).touch()
    endless(folder / "data" / path)
    yield load(name.split()[0], root="data", download=False)


for code, says in ((6, r"[\d,.]+ GiB of memory"), (3, r"is larger than any of the originals: delete it")):
    cases = {name: (name, path) for name, (path, wanted) in HUGE.items() if wanted == code}
    fault("C", "load", code, says, each=cases)(a_file_of_a_terabyte)


@fault("C", "load", 3, r"cannot be read", each={"npz": "npz:set/x.png", "folder": "folder:set"})
def a_file_of_a_terabyte_of_ones_own(folder: Path, name):
    endless(folder / "set" / "x.png")
    yield load(name)


# Verbs that read data again --------------------


def trained(folder: Path) -> Path:
    """A run on an archive beside it."""
    x = np.random.default_rng(1).random((60, 6, 5), dtype=np.float32)
    return small_run(folder / "run", "--data", npz(folder, x=x, x_test=x[:20]))


def gone(path: Path) -> None:
    path.unlink()


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:500])


def replaced_by(make):
    def change(path: Path) -> None:
        path.unlink()
        make(path)

    return change


def other_numbers(path: Path) -> None:
    np.savez(path, x=GREY.astype(complex))


CHANGES = {
    "gone": gone, "cut": cut_short, "pipe": replaced_by(pipe), "folder": replaced_by(Path.mkdir),
    "device": replaced_by(device), "complex": other_numbers,
}  # fmt: skip


@fault("C", "evaluate", 3, r"a\.npz", each=CHANGES)
def the_archive_of_a_run_is_no_longer_one(folder: Path, change):
    run = trained(folder)
    before = (run / "results.json").read_bytes()
    change(folder / "a.npz")
    yield "evaluate", run, "--samples", "2", "--device", "cpu"
    assert (run / "results.json").read_bytes() == before


@fault("C", "sample", 0, each={"gone": gone, "pipe": replaced_by(pipe)})
def a_run_without_its_archive_is_sampled(folder: Path, change):
    run = trained(folder)
    change(folder / "a.npz")
    yield "sample", run, "--output", folder / "samples.png"


# Permissions --------------------


@fault("A7", "load", 6, r"PermissionError.*set.b.*permissions")
def a_class_that_may_not_be_read(folder: Path):
    root = classes(folder)
    for path in (folder, root, root / "a"):
        path.chmod(0o755)
    (root / "b").chmod(0)
    yield as_nobody(load("folder:set", labels=True))
    (root / "b").chmod(0o755)


@fault("A7", "load", 6, r"set.b.3\.png.*PermissionError.*permissions")
def an_image_that_may_not_be_read(folder: Path):
    root = classes(folder)
    for path in (folder, root, root / "a", root / "b"):
        path.chmod(0o755)
    (root / "b" / "3.png").chmod(0)
    yield as_nobody(load("folder:set", labels=True))


@fault("C", "load", 6, r"a\.npz.*PermissionError.*permissions")
def an_archive_that_may_not_be_read(folder: Path):
    name = npz(folder, x=GREY)
    folder.chmod(0o755)
    (folder / "a.npz").chmod(0)
    yield as_nobody(load(name))


# Folders: what counts --------------------


@fault("A7", "load", 3, r"no image may count twice, but links make .* the same as .*: remove one")
def classes_link_to_each_other(folder: Path):
    root = classes(folder, "abcd")
    for name in "abcd":
        for other in "abcd":
            if other != name:
                (root / name / f"to_{other}").symlink_to(root / other)
    yield load("folder:set", labels=True)


TWICE = {
    "a link to a class": lambda root: (root / "c").symlink_to(root / "a"),
    "a link to an image": lambda root: (root / "b" / "again.png").symlink_to(root / "a" / "0.png"),
    "a second name": lambda root: (root / "b" / "again.png").hardlink_to(root / "a" / "0.png"),
    "a link to the whole": lambda root: (root / "a" / "loop").symlink_to(root),
    "a link to itself from above": lambda root: (root / "a" / "loop").symlink_to(root / "a"),
}


@fault("A7", "load", 3, r"no image may count twice", each=TWICE)
def a_link_makes_an_image_count_twice(folder: Path, link):
    link(classes(folder))
    yield load("folder:set", labels=True)


@fault("A7", "load", 3, r"no image may count twice, but links make .*train.*the same as|.*test")
def a_link_makes_the_test_part_the_training_part(folder: Path):
    for i in range(8):
        picture(folder / "set" / "train" / f"{i}.png", i + 2)
    (folder / "set" / "test").symlink_to(folder / "set" / "train")
    yield load("folder:set")


@fault("A7", "load", 0)
def a_class_elsewhere_is_followed(folder: Path):
    root = classes(folder)
    (root / "b").rename(folder / "elsewhere")
    (root / "b").symlink_to(folder / "elsewhere")
    splits = (yield load("folder:set", labels=True)).value
    assert len(splits.train) + len(splits.test) == 12
    assert sorted(torch.cat([splits.train.labels, splits.test.labels]).tolist()) == [0] * 6 + [1] * 6


@fault("A7", "train", 3, r"every class folder needs images, set/c has none")
def an_empty_class(folder: Path):
    (classes(folder) / "c").mkdir()
    yield *TRAIN, "folder:set"
    untouched(folder)


@fault("A7", "load", 3, r"set/c is a link that leads nowhere")
def a_class_behind_a_broken_link(folder: Path):
    (classes(folder) / "c").symlink_to("gone")
    yield load("folder:set", labels=True)


@fault("A7", "load", 3, r"every class folder needs images, set/c has none: put .*\.png")
def a_class_of_images_by_another_name(folder: Path):
    picture(classes(folder) / "c" / "0.jfif", format="jpeg")
    yield load("folder:set", labels=True)


@fault("A7", "load", 0, r"1 files below set are left out, not being named .*\.png.*: the first is 7\.jfif")
def an_image_by_another_name_is_named(folder: Path):
    picture(classes(folder) / "b" / "7.jfif", format="jpeg")
    splits = (yield load("folder:set", labels=True)).value
    assert len(splits.train) + len(splits.test) == 12


PARTS = {
    "train only": (["train/a", "train/b"], [12], ["a", "b"]),
    "Train and Test": (["Train/a", "Train/b", "Test/a", "Test/b"], [12, 12], ["a", "b"]),
    "training and testing": (["training/a", "testing/a"], [6, 6], ["a"]),
    "train and validation": (["train/a", "validation/a"], [6, 6], ["a"]),
    "all three": (["train", "dev", "test"], [6, 6, 6], None),
}


@fault("A7", "load", 0, each=PARTS)
def parts_are_known_by_their_names(folder: Path, case):
    folders, counts, names = case
    for i, name in enumerate(folders):
        for j in range(6):
            picture(folder / "set" / name / f"{j}.png", 6 * i + j + 2)
    splits = (yield load("folder:set", labels=None)).value
    found = [len(s) for s in splits if s is not None]
    assert found == counts if len(counts) > 1 else sum(found) == counts[0]
    assert (None if splits.train.labels is None else int(splits.train.labels.max()) + 1) == (names and len(names))


MIXED = {
    "two for validation": ["train", "val", "valid", "test"],
    "a class beside the parts": ["train", "test", "cat"],
    "two for training": ["train", "Training", "test"],
}


@fault("A7", "load", 3, r"set has parts, one folder train and at most one each.*beside them", each=MIXED)
def a_part_that_is_one_too_many(folder: Path, names):
    for name in names:
        for j in range(6):
            picture(folder / "set" / name / f"{j}.png", j + 2)
    yield load("folder:set")


@fault("A7", "load", 3, r"set has parts.*and 0\.png beside them")
def images_beside_the_parts(folder: Path):
    for name in ("train/0.png", "test/0.png", "0.png"):
        picture(folder / "set" / name, 9)
    yield load("folder:set")


@fault("A7", "load", 3, r"set has test, but no train beside it")
def a_test_part_alone(folder: Path):
    picture(folder / "set" / "test" / "0.png", 9)
    yield load("folder:set")


# Folders: what an image is --------------------

FOREIGN = {
    "eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 5 4\n%%EndComments\n(sprung) (w) file closefile\nshowpage\n",
    "pdf": b"%PDF-1.4\n1 0 obj<</Type/Catalog>>endobj\ntrailer<</Root 1 0 R>>\n",
    "svg": b"<svg xmlns='http://www.w3.org/2000/svg' width='5' height='4'/>",
    "icns": b"icns\x00\x00\x00\x08", "text": b"no image", "nothing": b"", "html": b"<html>404</html>",
    "psd": b"8BPS\x00\x01" + bytes(40), "fits": b"SIMPLE  =                    T" + bytes(100),
}  # fmt: skip


@fault("B3", "train", 3, r"set/x\.png cannot be read", each=FOREIGN)
def another_format_under_the_name_of_a_png(folder: Path, content):
    """A program of this name that is found first would be started, as ghostscript is."""
    tools = folder / "tools"
    tools.mkdir()
    (tools / "gs").write_text(f"#!/bin/sh\ntouch {folder}/sprung\n")
    (tools / "gs").chmod(0o755)
    os.environ["PATH"] = f"{tools}{os.pathsep}{os.environ['PATH']}"
    picture(folder / "set" / "a.png", 9)
    (folder / "set" / "x.png").write_bytes(content)
    yield *TRAIN, "folder:set"
    assert not (folder / "sprung").exists()
    untouched(folder)


@fault("B3", "train", 6, r"40 images of 13300x13300 pixels, held as reals, takes? .*GiB of memory")
def forty_images_of_177_megapixels(folder: Path):
    content = png(13300, 13300)
    (folder / "set").mkdir()
    for i in range(40):
        (folder / "set" / f"{i}.png").write_bytes(content)
    yield *TRAIN, "folder:set"
    untouched(folder)


@fault("B3", "load", 3, r"huge\.png.*cannot be read.*DecompressionBomb")
def an_image_of_ten_gigapixels(folder: Path):
    picture(folder / "set" / "a.png", 9)
    (folder / "set" / "huge.png").write_bytes(png(100_000, 100_000))
    yield load("folder:set")


@fault("B3", "load", 3, r"one size and number of channels: set/b\.png is 9000x9000 with 1 channel, set/a\.png is 5x4")
def a_large_image_among_small_ones_is_never_decoded(folder: Path):
    picture(folder / "set" / "a.png", 9)
    (folder / "set" / "b.png").write_bytes(png(9000, 9000))  # it has no pixels, so that decoding it would fail
    yield load("folder:set")


DEEP = {
    "16-bit grey png": lambda path: Image.fromarray(np.full((4, 5), 3000, np.uint16)).save(path, "png"),
    "16-bit colour png": lambda path: path.write_bytes(png(2, 2, 16, 2, (b"\0" + bytes(12)) * 2)),
    "16-bit alpha png": lambda path: path.write_bytes(png(2, 2, 16, 6, (b"\0" + bytes(16)) * 2)),
    "16-bit colour ppm": lambda path: path.write_bytes(b"P6 2 2 65535\n" + bytes(24)),
    "16-bit grey ppm": lambda path: path.write_bytes(b"P5 2 2 65535\n" + bytes(8)),
    "12-bit colour ppm": lambda path: path.write_bytes(b"P6 2 2 4095\n" + bytes(24)),
    "real tiff": lambda path: Image.fromarray(np.zeros((4, 5), np.float32)).save(path, "tiff"),
    "32-bit tiff": lambda path: Image.fromarray(np.zeros((4, 5), np.int32)).save(path, "tiff"),
}


@fault("B3", "load", 3, r"images must have 8 bits a channel, set/x\.png has mode", each=DEEP)
def more_than_8_bits_a_channel(folder: Path, save):
    (folder / "set").mkdir()
    save(folder / "set" / "x.png")
    yield load("folder:set")


FRAMES = {"gif": ("gif", "P"), "tiff": ("tiff", "L"), "webp": ("webp", "RGB"), "png": ("png", "L")}


@fault("B3", "load", 3, r"images must have one frame, set/x\.\w+ has more", each=FRAMES)
def an_image_of_several_frames(folder: Path, case):
    suffix, mode = case
    (folder / "set").mkdir()
    frames = [Image.fromarray(np.full((4, 5), 50 * i + 20, np.uint8)).convert(mode) for i in range(3)]
    frames[0].save(folder / "set" / f"x.{suffix}", save_all=True, append_images=frames[1:])
    yield load("folder:set")


@fault("B3", "load", 0)
def an_image_of_a_palette_keeps_its_colours(folder: Path):
    (folder / "set").mkdir()
    image = Image.new("P", (5, 4), 1)
    image.putpalette([0, 0, 0, 10, 20, 30])
    for i in range(4):
        image.save(folder / "set" / f"{i}.png", transparency=bytes([0, 0]))
    splits = (yield load("folder:set")).value
    assert splits.test.x[0, :, 0, 0].mul(255).round().tolist() == [10, 20, 30]


@fault("B3", "load", 0)
def a_transparent_image_keeps_its_colours(folder: Path):
    (folder / "set").mkdir()
    for i in range(4):
        Image.new("RGBA", (5, 4), (10, 20, 30, 0)).save(folder / "set" / f"{i}.png")
    splits = (yield load("folder:set")).value
    assert splits.test.x[0, :, 3, 4].mul(255).round().tolist() == [10, 20, 30]


@fault("B3", "load", 0)
def a_photograph_is_turned_upright(folder: Path):
    (folder / "set").mkdir()
    scene = np.zeros((8, 16), np.uint8)
    scene[:, :8] = 200  # bright to the left
    exif = Image.Exif()
    exif[0x0112] = 6  # stored on its side: turn it clockwise
    for i in range(4):
        Image.fromarray(np.ascontiguousarray(np.rot90(scene))).save(folder / "set" / f"{i}.png", exif=exif)
    splits = (yield load("folder:set")).value
    assert splits.test.event_shape == (1, 8, 16)
    assert splits.test.x[0, 0].mul(255).round().byte().equal(torch.from_numpy(scene))


@fault("B3", "load", 3, r"1\.png is 8x16 with 1 channel, set/0\.png is 16x8")
def a_photograph_on_its_side_without_a_word_about_it(folder: Path):
    for name, size in (("0.png", (16, 8)), ("1.png", (8, 16))):
        picture(folder / "set" / name, 9, size)
    yield load("folder:set")


@fault("C", "load", 3, r"3\.png cannot be read.*replace or remove the damaged image")
def an_image_is_cut_short(folder: Path):
    root = classes(folder)
    Image.fromarray(RNG.integers(0, 256, (4, 5), np.uint8)).save(root / "b" / "3.png")
    path = root / "b" / "3.png"
    path.write_bytes(path.read_bytes()[:-30])
    yield load("folder:set")


@fault("C", "load", 0)
def a_tiff_whose_pages_go_in_a_circle(folder: Path):
    (folder / "set").mkdir()
    path = folder / "set" / "x.tif"
    Image.new("L", (5, 4), 9).save(path)
    data = bytearray(path.read_bytes())
    start = struct.unpack("<I", data[4:8])[0]
    count = struct.unpack("<H", data[start : start + 2])[0]
    data[start + 2 + 12 * count : start + 6 + 12 * count] = data[4:8]
    for i in range(4):
        (folder / "set" / f"{i}.tif").write_bytes(data)
    splits = (yield load("folder:set")).value
    assert len(splits.train) == 4


@fault("C", "load", 0)
def names_that_are_not_utf_8(folder: Path):
    root = os.fsencode(folder / "set")
    for label in (b"caf\xe9", b"th\xe9"):
        os.makedirs(os.path.join(root, label))
        for i in range(4):
            with open(os.path.join(root, label, b"\xff%d.png" % i), "wb") as file:
                Image.new("L", (5, 4), 9 + i).save(file, "png")
    splits = (yield load("folder:set", labels=True)).value
    assert len(splits.train) == 7
    assert splits.train.labels.unique().tolist() == [0, 1]


@fault("C", "train", 3, r"cannot be read")
def a_damaged_image_whose_name_is_not_utf_8(folder: Path):
    (folder / "set").mkdir()
    with open(os.path.join(os.fsencode(folder / "set"), b"caf\xe9.png"), "wb") as file:
        file.write(b"no image")
    yield *TRAIN, "folder:set"


@fault("C", "load", 0)
def one_class(folder: Path):
    classes(folder, "a")
    splits = (yield load("folder:set", labels=True)).value
    assert splits.train.labels.tolist() == [0] * 5


# OMNIGLOT's .mat and the .amat of MNIST --------------------

MATS = {
    "transposed": ({"data": RNG.random((1568, 784))}, r"must have data \[784, N\], has \[1568, 784\]"),
    "transposed test": ({"testdata": RNG.random((10, 784))}, r"must have testdata \[784, N\]"),
    "three axes": ({"data": RNG.random((784, 2, 3))}, r"must have data \[784, N\]"),
    "text": ({"data": np.array(["a" * 784])}, r"must have data \[784, N\], has \[0\]"),
    "sparse": ({"data": scipy.sparse.eye(784, 5)}, r"must have data \[784, N\], has \[0\]"),
    "complex": ({"data": RNG.random((784, 5)) * 1j}, r"data is complex"),
    "cells": ({"data": np.array([[np.ones(3)]] * 784, dtype=object)}, r"must have data \[784, N\], has \[0\]"),
    "nan": ({"data": np.full((784, 5), np.nan)}, r"must have data in \[0, 1\], has nan"),
    "bytes of bits": ({"data": RNG.integers(0, 2, (784, 5), np.uint8), "testdata": np.zeros((784, 3), np.uint8)},
                      r"0 and 1 only"),
    "half labels": ({"targetchar": np.arange(20) / 2}, r"targetchar must be whole numbers, number 1 is 0\.5"),
    "nan labels": ({"targetchar": np.full(20, np.nan)}, r"targetchar must be whole numbers, number 0 is nan"),
    "infinite labels": ({"targetchar": np.full(20, np.inf)}, r"targetchar must be whole numbers, number 0 is inf"),
    "one-hot labels": ({"targetchar": np.eye(20)}, r"targetchar must be one row or column of labels.*\[20, 20\]"),
    "few labels": ({"targetchar": np.arange(7)}, r"labels must have shape \[20\]"),
}  # fmt: skip


@fault("A7", "load", 3, r"chardata\.mat|omniglot28", each=MATS)
def a_mat_file_of_other_arrays(folder: Path, case):
    arrays, says = case
    chardata(folder, **({"testtargetchar": np.arange(10), "targetchar": np.arange(20)} | arrays))
    outcome = yield load("omniglot28", root=".", labels=True)
    assert_says(outcome, says)


@fault("A7", "load", 0)
def whole_labels_of_matlab_are_integers(folder: Path):
    chardata(folder, targetchar=np.arange(20.0), testtargetchar=np.arange(10.0)[:, None])
    splits = (yield load("omniglot28", root=".", labels=True)).value
    assert splits.train.labels.tolist() == [*range(20)]
    assert splits.test.labels.tolist() == [*range(10)]


@fault("C", "load", 3, r"chardata\.mat cannot be read")
def a_mat_file_that_declares_more_than_it_has(folder: Path):
    scipy.io.savemat(folder / "chardata.mat", {"data": np.zeros((784, 7)), "testdata": np.zeros((784, 2))})
    data = (folder / "chardata.mat").read_bytes()
    (folder / "chardata.mat").write_bytes(data.replace(struct.pack("<ii", 784, 7), struct.pack("<ii", 784, 2**30)))
    yield load("omniglot28", root=".")


@fault("C", "load", 3, r"chardata\.mat cannot be read \(ValueError: data does not hold the numbers \[784, 2\]")
def a_mat_file_of_no_kind_of_number(folder: Path):
    """SciPy looks this kind up beyond the end of its table."""
    scipy.io.savemat(folder / "chardata.mat", {"data": np.zeros((784, 2)), "testdata": np.zeros((784, 2))})
    data = bytearray((folder / "chardata.mat").read_bytes())
    data[177] = 215
    (folder / "chardata.mat").write_bytes(data)
    yield load("omniglot28", root=".")


@fault("C", "load", 3, r"chardata\.mat cannot be read.*error|chardata\.mat.*packed")
def a_bit_of_a_packed_mat_file_is_flipped(folder: Path):
    arrays = {"data": RNG.random((784, 20)), "testdata": RNG.random((784, 10))}
    scipy.io.savemat(folder / "chardata.mat", arrays, do_compression=True)
    data = bytearray((folder / "chardata.mat").read_bytes())
    data[60_000] ^= 4
    (folder / "chardata.mat").write_bytes(data)
    yield load("omniglot28", root=".")


def packed(size: int, content: bytes) -> bytes:
    """A MATLAB file whose one matrix is packed, and says of itself what it likes."""
    body = zlib.compress(struct.pack("<II", 14, size) + content)
    head = b"MATLAB 5.0 MAT-file".ljust(124) + b"\x00\x01IM"
    return head + struct.pack("<II", 15, len(body)) + body


SIZES = {"four gigabytes": (2**32 - 8, bytes(100)), "none": (0, bytes(2**20)), "less": (8, bytes(2**20))}


@fault("C", "load", 3, r"chardata\.mat cannot be read", each=SIZES)
def a_packed_matrix_of_another_size_than_it_declares(folder: Path, case):
    (folder / "chardata.mat").write_bytes(packed(*case))
    yield load("omniglot28", root=".")


@fault("C", "load", 3, r"chardata\.mat cannot be read")
def a_mat_file_is_cut_short(folder: Path):
    chardata(folder)
    data = (folder / "chardata.mat").read_bytes()
    (folder / "chardata.mat").write_bytes(data[: len(data) // 2])
    yield load("omniglot28", root=".")


@fault("A7", "load", 0)
def a_mat_file_is_read_as_matlab_reads_it(folder: Path):
    """Packed or not, in either order of bytes, in any kind of number."""
    for kind in ("<f8", ">f8", "<f4", "u2", ">i2"):
        for pack in (False, True):
            arrays = {key: RNG.integers(0, 2, (784, n)).astype(kind) for key, n in (("data", 6), ("testdata", 3))}
            scipy.io.savemat(folder / "chardata.mat", arrays, do_compression=pack)
            splits = pv.data.load("omniglot28", root=".")
            columns = (arrays["data"] > 0).astype("f").T.reshape(-1, 1, 28, 28)
            assert torch.equal(splits.train.x, torch.from_numpy(columns).mT), kind
    yield lambda: None


def bits(*counts: int) -> list[str]:
    return [" ".join(["0", "1"] * (n // 2) + ["1"] * (n % 2)) for n in counts]


ROWS = {
    "one long, one short": (bits(784, 783, 785), "line 2 has 783"),
    "an empty line": (bits(784, 0, 784), "line 2 has 0"),
    "all in one line": (bits(784 * 3), "line 1 has 2352"),
    "no spaces": (["".join(row.split()) for row in bits(784, 784)], "it holds other text"),
    "reals": ([bits(784)[0].replace("1", "0.5", 1)], "it holds other text"),
    "minus": ([bits(784)[0].replace("1", "-1", 1)], "it holds other text"),
}


@fault("A7", "load", 3, r"binarized_mnist_train\.amat must have 784 values 0 or 1 on each of its lines", each=ROWS)
def lines_of_other_lengths(folder: Path, case):
    rows, says = case
    amat(folder, rows)
    outcome = yield load("binarized_mnist", root=".")
    assert says in outcome.message, outcome.message


# MNIST and its kin --------------------


@fault("D", "load", 3, r"train-images-idx3-ubyte is damaged, or not the one that was published.*delete it")
def a_bit_of_mnist_is_flipped(folder: Path):
    raw = mnist(folder)
    trust(raw)
    path = raw / "train-images-idx3-ubyte"
    data = bytearray(path.read_bytes())
    data[5000] ^= 1
    path.write_bytes(data)
    yield load("mnist", root="data", download=False)


@fault("D", "train", 3, r"is damaged, or not the one that was published.*npz:PATH reads data of your own")
def other_images_under_the_name_of_mnist(folder: Path):
    mnist(folder)
    yield *TRAIN, "mnist", "--data-dir", "data"
    untouched(folder)


@fault("D", "load", 0)
def mnist_is_read(folder: Path):
    raw = mnist(folder)
    trust(raw)
    splits = (yield load("mnist", root="data", labels=True, download=False)).value
    image = np.frombuffer((raw / "t10k-images-idx3-ubyte").read_bytes()[16:], np.uint8).reshape(-1, 1, 28, 28)
    assert torch.equal(splits.test.x, torch.from_numpy(image.copy()).float() / 255)


HEADERS = {
    "more images than there are": (4, struct.pack(">I", 60_000)), "no images": (4, struct.pack(">I", 0)),
    "4 billion images": (4, struct.pack(">I", 2**32 - 1)), "reals": (2, b"\x0d"), "two axes": (3, b"\x02"),
    "not idx": (0, b"PK"),
}  # fmt: skip


@fault("C", "load", 3, r"train-images-idx3-ubyte is no idx file of 3 axes, or not whole", each=HEADERS)
def a_header_of_mnist_that_lies(folder: Path, case):
    place, content = case
    raw = mnist(folder)
    path = raw / "train-images-idx3-ubyte"
    data = bytearray(path.read_bytes())
    data[place : place + len(content)] = content
    path.write_bytes(data)
    trust(raw)
    yield load("mnist", root="data", download=False)


@fault("D", "load", 3, r"a label below 10 for each image, has 7 labels")
def labels_of_mnist_for_other_images(folder: Path):
    raw = mnist(folder)
    (raw / "train-labels-idx1-ubyte").write_bytes(idx(np.zeros(7, np.uint8)))
    trust(raw)
    yield load("mnist", root="data", download=False)


@fault("D", "load", 0, r"is taken unverified: nothing is known of it without train-images-idx3-ubyte\.gz")
def kmnist_without_its_packed_files_is_read_with_a_warning(folder: Path):
    mnist(folder, "KMNIST")
    splits = (yield load("kmnist", root="data", download=False)).value
    assert len(splits.train) == 20


@fault("B3", "load", 3, r"MNIST is not under data and download=False")
def tensors_that_torchvision_once_wrote_are_no_mnist(folder: Path):
    """No checksum of theirs is known."""
    processed = folder / "data" / "MNIST" / "processed"
    processed.mkdir(parents=True)
    for name in ("training.pt", "test.pt"):
        torch.save((torch.zeros(20, 28, 28, dtype=torch.uint8), torch.zeros(20, dtype=torch.int64)), processed / name)
    yield load("mnist", root="data", download=False)


@fault("D", "load", 3, r"cifar-10-batches-py/data_batch_1 is damaged, its md5 is not c99cafc152244af753f735de768cd75f")
def pickles_under_the_name_of_cifar_are_not_opened(folder: Path):
    class Trap:
        def __reduce__(self):
            return (os.mkdir, ("sprung",))

    batches = folder / "data" / "cifar-10-batches-py"
    batches.mkdir(parents=True)
    for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch", "batches.meta"):
        (batches / name).write_bytes(pickle.dumps({"data": Trap()}))
    yield load("cifar10", root="data", download=False)
    assert not (folder / "sprung").exists()


OTHERS = {"svhn": "train_32x32.mat", "omniglot": "omniglot-py/images_background.zip"}


@fault("D", "load", 3, r"is damaged, its md5 is not", each=OTHERS)
def other_files_under_published_names(folder: Path, name):
    files = {"train_32x32.mat": "test_32x32.mat", "images_background.zip": "images_evaluation.zip"}
    path = folder / "data" / name
    path.parent.mkdir(parents=True)
    for file in (path, path.with_name(files[path.name])):
        file.write_bytes(b"junk" * 100)
    yield load("svhn" if name.endswith("mat") else "omniglot", root="data", download=False)


# Downloads --------------------


@contextmanager
def server(answer):
    """A server of this machine, from which torchvision fetches everything meanwhile."""

    class Handler(socketserver.StreamRequestHandler):
        def handle(self):
            self.rfile.readline()
            answer(self.wfile)

    class Server(socketserver.ThreadingTCPServer):
        daemon_threads, block_on_close = True, False

    from torchvision.datasets import MNIST

    before, MNIST.mirrors = MNIST.mirrors, []
    with Server(("127.0.0.1", 0), Handler) as running:
        MNIST.mirrors = [f"http://127.0.0.1:{running.server_address[1]}/"]
        threading.Thread(target=running.serve_forever, daemon=True).start()
        try:
            yield
        finally:
            running.shutdown()
            MNIST.mirrors = before


def silence(out) -> None:
    time.sleep(30)


def stall(out) -> None:
    out.write(b"HTTP/1.0 200 OK\r\nContent-Length: 100000\r\n\r\n" + bytes(1000))
    out.flush()
    time.sleep(30)


def half(out) -> None:
    out.write(b"HTTP/1.0 200 OK\r\nContent-Length: 100000\r\n\r\n" + bytes(1000))


def refuse(out) -> None:
    out.write(b"HTTP/1.0 503 Busy\r\n\r\n")


@fault("C", "load", 3, r"MNIST is not under data and the download failed \(.*put train-images-idx3-ubyte",
       each={"silent": silence, "stalled": stall, "cut": half, "refused": refuse})  # fmt: skip
def a_download_fails(folder: Path, answer):
    try:
        from pyrovae.data import published

        published.STALLED = 0.5
    except ImportError:  # a package that waits for ever
        pass
    (folder / "data").mkdir()
    (folder / "data" / "mine.txt").write_text("kept")
    with server(answer):
        yield load("mnist", root="data")
    assert [path.name for path in (folder / "data").iterdir()] == ["mine.txt"], "half of it is left"
    assert socket.getdefaulttimeout() is None


@fault("C", "load", 6, r"MNIST is not under data and the download failed \(OSError: .*No space left")
def a_download_that_fills_the_disk(folder: Path):
    def full(*arguments, **options):
        Path(options["download_root"], "half").write_bytes(bytes(100))
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    from torchvision.datasets import mnist as module

    module.download_and_extract_archive = full
    yield load("mnist", root="data")
    assert not any((folder / "data").iterdir())


@fault("C", "load", 6, "what a.npz declares takes")
def a_control_group_leaves_too_little(folder: Path):
    limit_memory(folder, given_back=0)
    yield load(npz(folder, x=np.zeros((2**20, 16), np.float32)))


@fault("C", "load", 0)
def what_a_control_group_keeps_of_files_is_free(folder: Path):
    limit_memory(folder, given_back=900)
    splits = (yield load(npz(folder, x=np.zeros((2**20, 16), np.float32)))).value
    assert len(splits.test) == 2**20 // 10 + 1


def limit_memory(folder: Path, given_back: int) -> None:
    """Pretend that this process may have 1,000 MiB and has 990, some of which are pages of files."""
    for name, text in (
        ("most", 1000 * 2**20), ("now", 990 * 2**20), ("memory.stat", f"anon 1\ninactive_file {given_back * 2**20}\n")
    ):  # fmt: skip
        (folder / name).write_text(f"{text}\n")
    from pyrovae import memory

    memory.CONTROL_GROUPS = ((str(folder), "most", "now"),)


@fault("C", "load", 6, r"MNIST is not under .*full.*download failed|see to")
def a_download_to_where_nothing_can_be_written(folder: Path):
    folder.chmod(0o755)
    import torchvision.datasets  # noqa: F401

    (folder / "full").mkdir()
    (folder / "full").chmod(0o555)
    with nobody():
        yield load("mnist", root="full")
