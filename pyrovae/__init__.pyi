__version__: str

from . import data, errors, evaluate, models, nn, objectives, parts, plots, ranks
from .app.export import export_onnx
from .app.hub import from_pretrained, push_to_hub
from .app.report.command import report
from .engine.runner import log_weights
from .evaluate import (
    AISEstimate,
    Bracket,
    GradientSNR,
    Information,
    LikelihoodEstimate,
    PosteriorGap,
    active_units,
    ais_log_likelihood,
    bdmc,
    gradient_snr,
    inflate,
    information,
    log_likelihood,
    posterior_gap,
    refine,
)
from .objectives import (
    CIWAE,
    ELBO,
    IWAE,
    MIWAE,
    PIWAE,
    RWS,
    TVO,
    VIMCO,
    Objective,
    ParticleWeights,
    Renyi,
    SleepPhi,
    VRMax,
)
from .runs import load
from .sampling import sample
from .train.compiled import training_step
from .train.log import Fit
from .train.loop import fit
from .train.replicas import fit_replicas

__all__ = [
    "CIWAE", "ELBO", "IWAE", "MIWAE", "PIWAE", "RWS", "TVO", "VIMCO", "AISEstimate", "Bracket", "Fit", "GradientSNR",
    "Information", "LikelihoodEstimate", "Objective", "ParticleWeights", "PosteriorGap", "Renyi", "SleepPhi", "VRMax",
    "active_units", "ais_log_likelihood", "bdmc", "data", "errors", "evaluate", "export_onnx", "fit", "fit_replicas",
    "from_pretrained", "gradient_snr", "inflate", "information", "load", "log_likelihood", "log_weights", "models",
    "nn", "objectives", "parts", "plots", "posterior_gap", "push_to_hub", "ranks", "refine", "report", "sample",
    "training_step",
]  # fmt: skip
