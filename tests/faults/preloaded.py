"""What the processes of rows have imported before they begin: the package, what it uses late, and the rows."""
# ruff: noqa: F401

import matplotlib.backends.backend_agg
import matplotlib.pyplot
import PIL.Image
import setuptools  # Inductor needs it
import sklearn.datasets.data
import torch._dynamo  # torch.optim needs it
import torch._inductor.compile_fx
import typer._adapters

import pyrovae.app.cli
import pyrovae.train.replicas
from tests.faults.matrix import rows

PIL.Image.preinit()
rows()
