"""What data sets are called: of what there is to read, one row each. Nothing here takes time to import."""

from __future__ import annotations

from pyrovae.arguments import one_of

#: Of each set its reader, as file and name there, and a line about it.
SOURCES = {
    "digits": ("readers:read_digits", "scikit-learn's 1,797 digits, 8x8 grey; needs no files"),
    "mnist": ("published:MNIST", "70,000 digits, 28x28 grey"),
    "fashion_mnist": ("published:FASHION_MNIST", "70,000 pieces of clothing, 28x28 grey"),
    "kmnist": ("published:KMNIST", "70,000 cursive Japanese characters, 28x28 grey"),
    "omniglot": (
        "published:OMNIGLOT",
        "32,460 drawings of 1,623 characters, 105x105 black and white, new alphabets in test",
    ),
    "omniglot28": ("readers:read_omniglot28", "OMNIGLOT in the IWAE paper's 28x28 form, from chardata.mat"),
    "binarized_mnist": (
        "readers:read_binarized_mnist",
        "Larochelle's fixed binarisation of MNIST, from its .amat files",
    ),
    "cifar10": ("published:CIFAR10", "60,000 photographs of 10 classes, 32x32 colour"),
    "svhn": ("published:SVHN", "99,289 house numbers, 32x32 colour"),
    "folder:PATH": ("folders:read_folder", "a folder of images of one size, one subfolder per class or none"),
    "npz:PATH": ("readers:read_npz", "arrays x and, where present, y, x_test, y_test of a NumPy archive"),
}
DATASETS: dict[str, str] = {name: description for name, (_, description) in SOURCES.items()}
"""The names that :func:`~pyrovae.data.load` knows, each with a line about it."""


def source_of(name: str) -> str:
    """The key in :data:`SOURCES` of a set's name, with a path or without, or one clear error."""
    scheme, colon, _ = str(name).partition(":")
    key = f"{scheme}:PATH" if colon else name
    return one_of("data set", key if key in SOURCES else name, SOURCES)
