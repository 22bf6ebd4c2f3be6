"""pyrovae: variational autoencoders as Pyro programs.

Every generative model is a Pyro model/guide pair, every training objective a :class:`pyro.infer.ELBO`, any pair meets
any objective, and log p(x) is measured by importance sampling with a standard error.
"""

import lazy_loader

__version__ = "0.1.0"

# What the stub beside this file imports is imported when it is first asked for.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
