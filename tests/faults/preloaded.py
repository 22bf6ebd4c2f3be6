"""What the processes of rows have imported before they begin: the package, what it uses late, and the rows."""

import matplotlib.pyplot  # noqa: F401
import PIL.Image  # noqa: F401
import sklearn.datasets  # noqa: F401
import torch._dynamo  # noqa: F401, torch.optim needs it

import pyrovae.app.cli  # noqa: F401
from tests.faults.matrix import rows

rows()
