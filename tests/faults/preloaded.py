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
import pyrovae.app.samples
import pyrovae.app.train
import pyrovae.data.published
import pyrovae.train.replicas
from pyrovae.models import MODELS
from pyrovae.objectives import OBJECTIVES
from tests.faults.matrix import rows

PIL.Image.preinit()
assert [*MODELS.values(), *OBJECTIVES.values()]
rows()
