"""What every example begins with: its options and its data."""

import argparse

import pyrovae as pv

HELP = {
    "data": 'a data set: a name of "pyrovae list", folder:PATH or npz:PATH',
    "data_dir": "folder of the data sets; else $PYROVAE_DATA, else a cache folder",
    "epochs": "passes over the training data",
    "latent_dim": "latent units",
    "output": "folder for what is drawn",
    "particles": "particles per datum",
    "samples": "importance samples per test datum",
    "train": "images to train on",
    "warmup": "epochs over which the KL's weight rises to 1",
}


def parser(doc, **wanted):
    """A parser with one option for each keyword.

    A value is the option's default, which says its type as well, or a type, where there is no default; with a line of
    help, a tuple of the two; for anything else, a dict of what ``add_argument`` takes. ``data`` brings ``--data-dir``
    with it.
    """
    made = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in wanted.items():
        default, text = value if isinstance(value, tuple) else (value, HELP.get(name))
        how = {"help": text, "default": default, "type": type(default)}
        if isinstance(default, dict):
            how = default
        elif default is False:
            how = {"help": text, "action": "store_true"}
        elif isinstance(default, type):
            how |= {"default": None, "type": default}
        made.add_argument("--" + name.replace("_", "-"), **how)
        if name == "data":
            made.add_argument("--data-dir", help=HELP["data_dir"])
    return made


def options(doc, **wanted):
    """The options as given on the command line."""
    return parser(doc, **wanted).parse_args()


def load(given, **kwargs):
    """The data set that the options name, as :func:`pyrovae.data.load` cuts it."""
    return pv.data.load(given.data, given.data_dir, **kwargs)
