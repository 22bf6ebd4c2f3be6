"""What models are put together from: likelihoods, priors, posteriors, flows, quantisers, labels, codes."""

from pyrovae.parts.codes import AutoregressiveCodes, CodebookPrior, GatedConvolutions
from pyrovae.parts.flows import Autoregressive, Coupling, FlowNormal, Step
from pyrovae.parts.labels import Attributes, Classes, PartialLabel, SoftOneHot, Weighted, hide_labels
from pyrovae.parts.likelihoods import (
    LIKELIHOODS,
    BernoulliLikelihood,
    ContinuousBernoulliLikelihood,
    DiscretizedLogisticLikelihood,
    GaussianLikelihood,
    Likelihood,
    ScaledLikelihood,
    make_likelihood,
)
from pyrovae.parts.pixels import BernoulliPixels, ContinuousBernoulli, DiscretizedLogistic, Gaussian
from pyrovae.parts.posteriors import (
    POSTERIORS,
    AutoregressivePosterior,
    CouplingPosterior,
    DiagonalNormal,
    FlowPosterior,
    FullNormal,
    centre,
    make_posterior,
    share_options,
)
from pyrovae.parts.priors import (
    PRIORS,
    FlowPrior,
    MixturePrior,
    NormalMixture,
    Prior,
    StandardNormal,
    VampPrior,
    make_prior,
)
from pyrovae.parts.quantizer import Quantized, VectorQuantizer

__all__ = [
    "LIKELIHOODS", "POSTERIORS", "PRIORS", "Attributes", "Autoregressive", "AutoregressiveCodes",
    "AutoregressivePosterior", "BernoulliLikelihood", "BernoulliPixels", "Classes", "CodebookPrior",
    "ContinuousBernoulli", "ContinuousBernoulliLikelihood", "Coupling", "CouplingPosterior", "DiagonalNormal",
    "DiscretizedLogistic", "DiscretizedLogisticLikelihood", "FlowNormal", "FlowPosterior", "FlowPrior", "FullNormal",
    "GatedConvolutions", "Gaussian", "GaussianLikelihood", "Likelihood", "MixturePrior", "NormalMixture",
    "PartialLabel", "Prior", "Quantized", "ScaledLikelihood", "SoftOneHot", "StandardNormal", "Step", "VampPrior",
    "VectorQuantizer", "Weighted", "centre", "hide_labels", "make_likelihood", "make_posterior", "make_prior",
    "share_options",
]  # fmt: skip
