r"""The bounds: each a sum of power means of the weights, each with its paper."""

from __future__ import annotations

import math
from typing import Unpack

from pyrovae.arguments import in_range, positive_int
from pyrovae.objectives.base import Objective, Options
from pyrovae.objectives.derivatives import Bound
from pyrovae.objectives.means import PowerMeans


class IWAE(Objective):
    r"""Importance-weighted autoencoder.

    .. math:: L_K = \log \frac1K \sum_k w_k, \qquad \mathrm{ELBO} \le L_K \le L_{K+1} \le \log p(x)

    The tightest bound per particle, for the model. The guide's gradient loses signal as K grows; take
    ``gradient="dreg"`` there. Non-reparameterised sites follow VIMCO's leave-one-out signal.

    >>> import torch
    >>> IWAE(num_particles=2).bound(torch.tensor([[0.0], [0.0]]))
    tensor([0.])

    Burda, Grosse, Salakhutdinov (2016), *Importance weighted autoencoders*.
    """

    proportional = True

    def __init__(self, num_particles: int = 50, **options: Unpack[Options]) -> None:
        super().__init__(num_particles, **options)

    @property
    def bound(self) -> Bound:
        return PowerMeans({1.0: 1.0})


class VIMCO(IWAE):
    r"""IWAE, under the name by which users of discrete latent variables know its gradient.

    Each non-reparameterised site k is scored with :math:`L - L_{(k)}`, where :math:`L_{(k)}` replaces
    :math:`\log w_k` by the mean of the others (the geometric mean of their weights); inside a plate that not all sites
    share, each element with only those terms of it that the element reaches.

    >>> VIMCO(5)
    VIMCO(num_particles=5)

    Mnih and Rezende (2016), *Variational inference for Monte Carlo objectives*.
    """

    def __init__(self, num_particles: int = 5, **options: Unpack[Options]) -> None:
        super().__init__(positive_int("num_particles", num_particles, 2), **options)


class Renyi(Objective):
    r"""Rényi's alpha-bound.

    .. math:: L_\alpha = \frac{1}{1-\alpha} \log \frac1K \sum_k w_k^{1-\alpha}

    alpha = 0 is IWAE, alpha = 1 exactly the ELBO; the bound falls as alpha grows, and with finite K its order against
    log p(x) is sure only for alpha in [0, 1]. Any finite alpha is allowed.

    >>> import torch
    >>> Renyi(alpha=1.0, num_particles=2).bound(torch.tensor([[0.0], [-2.0]]))
    tensor([-1.])

    :raises ValueError: if alpha is not finite.

    Li and Turner (2016), *Rényi divergence variational inference*.
    """

    proportional = True

    def __init__(self, alpha: float = 0.5, num_particles: int = 5, **options: Unpack[Options]) -> None:
        super().__init__(num_particles, **options)
        self.alpha = in_range("alpha", alpha, -math.inf)

    @property
    def bound(self) -> Bound:
        return PowerMeans({1 - self.alpha: 1.0})


class VRMax(Objective):
    r"""Variational Rényi at alpha -> -infinity: only the best particle counts.

    .. math:: L_{\max} = \max_k \log w_k

    Cheap when the backward pass is dear; an estimate that may exceed log p(x) by up to log K. No ``"dreg"``: its
    weights jump.

    >>> import torch
    >>> VRMax(num_particles=2).bound(torch.tensor([[0.0], [-2.0]]))
    tensor([0.])

    Li and Turner (2016), *Rényi divergence variational inference*.
    """

    def __init__(self, num_particles: int = 5, **options: Unpack[Options]) -> None:
        super().__init__(num_particles, **options)
        if self.gradient == "dreg":
            raise ValueError('VRMax has no gradient="dreg", for its weights jump: pass gradient="total" or "stl"')

    @property
    def bound(self) -> Bound:
        return PowerMeans({math.inf: 1.0})


class MIWAE(Objective):
    r"""Mean of M independent IWAE bounds with K particles each.

    .. math:: L_{M,K} = \frac1M \sum_m \log \frac1K \sum_k w_{mk}

    Between the ELBO (K = 1) and IWAE (M = 1): more signal for the guide, a looser bound for the model.
    ``num_particles`` is K, per group; log-weights are ``[M * K, ...]``, group after group.

    >>> MIWAE(num_groups=2, num_particles=3).total_particles
    6

    Rainforth et al. (2018), *Tighter variational bounds are not necessarily better*.
    """

    proportional = True

    def __init__(self, num_groups: int = 8, num_particles: int = 8, **options: Unpack[Options]) -> None:
        super().__init__(num_particles, **options)
        self.num_groups = positive_int("num_groups", num_groups)

    @property
    def bound(self) -> Bound:
        return PowerMeans({1.0: 1.0}, self.num_groups)


class PIWAE(MIWAE):
    r"""Partially importance-weighted autoencoder: the model follows IWAE, the guide MIWAE.

    The model follows, and what is reported is, :math:`L_{MK} = \log \frac{1}{MK} \sum_{mk} w_{mk}`; the guide follows
    :math:`\frac1M \sum_m \log \frac1K \sum_k w_{mk}`. A tight bound for the one, signal for the other.

    >>> import torch
    >>> PIWAE(num_groups=2, num_particles=1).bound(torch.tensor([[0.0], [0.0]]))
    tensor([0.])

    Rainforth et al. (2018), *Tighter variational bounds are not necessarily better*.
    """

    @property
    def bound(self) -> Bound:
        return PowerMeans({1.0: 1.0})

    @property
    def path_bound(self) -> Bound:
        return super().bound


class CIWAE(Objective):
    r"""Combination of ELBO and IWAE on the same particles.

    .. math:: L = \beta\, \frac1K \sum_k \log w_k + (1 - \beta) \log \frac1K \sum_k w_k

    beta = 1 is the ELBO, beta = 0 is IWAE.

    >>> import torch
    >>> CIWAE(beta=1.0, num_particles=2).bound(torch.tensor([[0.0], [-2.0]]))
    tensor([-1.])

    :raises ValueError: if beta is outside [0, 1].

    Rainforth et al. (2018), *Tighter variational bounds are not necessarily better*.
    """

    proportional = True

    def __init__(self, beta: float = 0.5, num_particles: int = 64, **options: Unpack[Options]) -> None:
        super().__init__(num_particles, **options)
        self.beta = in_range("beta", beta, 0.0, 1.0)

    @property
    def bound(self) -> Bound:
        return PowerMeans({power: share for power, share in ((0.0, self.beta), (1.0, 1 - self.beta)) if share})
