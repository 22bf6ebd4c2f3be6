"""Conjugate normals of any shape: with the exact posterior for a guide, every weight is p(x), whatever the layout."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass

import pyro
import pyro.distributions as dist
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import pyrovae as pv

pytestmark = pytest.mark.double(0)
Program = Callable[[Tensor], None]


@dataclass(frozen=True)
class Linear:
    r"""z ~ N(0, I), x = W z + b + N(0, s^2): log p(x) and p(z | x) are known.

    :ivar split: of the latent units, how many are a site of their own.
    :ivar inner: data of a datum in a plate of its own, each with its latents; 0 for none.
    """

    event: tuple[int, ...]
    latents: int
    split: int
    inner: int
    widened: float  # the guide's scale, in the posterior's

    @property
    def weight(self) -> Tensor:
        size = math.prod(self.event)
        return torch.linspace(-1, 1, size * self.latents).sin().reshape(size, self.latents)

    @property
    def noise(self) -> Tensor:
        return torch.linspace(0.5, 1.5, math.prod(self.event))

    def log_prob(self, x: Tensor) -> Tensor:
        """Of each datum, and of each that lies in its inner plate, which all sites share."""
        covariance = self.weight @ self.weight.T + self.noise.square().diag()
        flat = x.flatten(-len(self.event)) if self.event else x.unsqueeze(-1)
        return dist.MultivariateNormal(torch.full((len(covariance),), 0.3), covariance).log_prob(flat)

    def posterior(self, x: Tensor) -> dist.MultivariateNormal:
        flat = x.flatten(-len(self.event)) if self.event else x.unsqueeze(-1)
        scaled = self.weight.T / self.noise.square()
        covariance = (torch.eye(self.latents) + scaled @ self.weight).inverse()
        mean = (flat - 0.3) @ (covariance @ scaled).T
        return dist.MultivariateNormal(mean, scale_tril=self.widened * torch.linalg.cholesky(covariance))

    def programs(self) -> tuple[Program, Program]:
        """Model and guide; x is ``[B, *event]``, or ``[inner, B, *event]``."""

        def model(x: Tensor) -> None:
            with self.plates(x):
                parts = [
                    pyro.sample(name, dist.Normal(torch.zeros(size), 1.0).to_event(1))
                    for name, size in (("first", self.split), ("z", self.latents - self.split))
                    if size
                ]
                mean = 0.3 + torch.cat(parts, -1) @ self.weight.T
                mean = mean.unflatten(-1, self.event) if self.event else mean.squeeze(-1)
                scale = self.noise.reshape(self.event)
                pyro.sample("x", dist.Normal(mean, scale).to_event(len(self.event)), obs=x)

        def guide(x: Tensor) -> None:
            with self.plates(x):
                joint = self.posterior(x)
                if not self.split:
                    pyro.sample("z", joint)
                    return
                a, b = self.split, self.latents - self.split
                covariance, mean = joint.covariance_matrix, joint.loc
                first = dist.MultivariateNormal(mean[..., :a], covariance[..., :a, :a])
                drawn = pyro.sample("first", first)
                if b:
                    gain = covariance[..., a:, :a] @ covariance[..., :a, :a].inverse()
                    rest = covariance[..., a:, a:] - gain @ covariance[..., :a, a:]
                    shift = (gain @ (drawn - mean[..., :a]).unsqueeze(-1)).squeeze(-1)
                    pyro.sample("z", dist.MultivariateNormal(mean[..., a:] + shift, rest))

        return model, guide

    def plates(self, x: Tensor) -> ExitStack:
        stack = ExitStack()
        stack.enter_context(pyro.plate("data", x.shape[1 if self.inner else 0], dim=-1))
        if self.inner:
            stack.enter_context(pyro.plate("inner", x.shape[0], dim=-2))
        return stack


@st.composite
def layouts(draw: st.DrawFn, widened: float = 1.0) -> tuple[Linear, Tensor]:
    event = tuple(draw(st.lists(st.integers(1, 3), max_size=3)))
    latents = draw(st.integers(1, 3))
    case = Linear(event, latents, draw(st.integers(0, latents)), draw(st.sampled_from([0, 0, 1, 2])), widened)
    shape = ((case.inner,) if case.inner else ()) + (draw(st.integers(1, 5)), *event)
    return case, torch.linspace(-2, 2, math.prod(shape)).reshape(shape)


CUTS = st.sampled_from([None, 1, 2, 5, 100])


@given(layout=layouts(), samples=st.integers(1, 6), chunk=CUTS, batch=CUTS, draws=st.sampled_from([0, 2]))
def test_an_exact_guide_gives_log_p_exactly(layout, samples, chunk, batch, draws):
    case, x = layout
    cut = {} if case.inner else {"batch_size": batch}
    found = pv.log_likelihood(
        *case.programs(), x, num_samples=samples, chunk_size=chunk, num_draws=draws, seed=0, **cut
    )  # fmt: skip
    torch.testing.assert_close(found.log_prob, case.log_prob(x), rtol=1e-9, atol=1e-9)
    if samples > 1:
        torch.testing.assert_close(found.ess, torch.full_like(found.ess, float(samples)))
        assert found.std_error.max() < 1e-6
    for name, value in found.draws.items():
        size = case.split if name == "first" else case.latents - case.split
        assert value.shape == (draws, *reversed(found.log_prob.shape), size)


@given(layout=layouts(widened=1.3), chunk=CUTS)
def test_another_guide_is_right_within_its_error(layout, chunk):
    case, x = layout
    found = pv.log_likelihood(*case.programs(), x, num_samples=500, chunk_size=chunk, seed=0)
    assert ((found.log_prob - case.log_prob(x)).abs() < 6 * found.std_error + 1e-9).all()


OBJECTIVES = [
    pv.ELBO(2), pv.IWAE(3, gradient="dreg"), pv.Renyi(0.3, 3), pv.VRMax(2), pv.MIWAE(2, 2), pv.PIWAE(2, 2),
    pv.CIWAE(0.5, 2), pv.VIMCO(2), pv.RWS(2), pv.TVO(2),
]  # fmt: skip


@pytest.mark.parametrize("objective", OBJECTIVES, ids=repr)
@given(layout=layouts())
def test_every_bound_is_log_p_where_the_guide_is_exact(objective, layout):
    case, x = layout
    with torch.no_grad():
        assert objective.loss(*case.programs(), x) == pytest.approx(-case.log_prob(x).sum().item(), rel=1e-9, abs=1e-9)


@given(layout=layouts(), number=st.integers(1, 4), returns=st.sampled_from(["means", "draws"]))
def test_samples_have_the_shape_of_data(layout, number, returns):
    case, x = layout
    if not case.inner:
        drawn = pv.sample(case.programs()[0], number, like=x, seed=0, returns=returns)
        assert drawn.shape == (number, *case.event)
        assert torch.isfinite(drawn).all()


@given(layout=layouts(widened=1.2), draws=st.sampled_from([0, 3]))
def test_arviz_holds_what_was_estimated(layout, draws):
    case, x = layout
    found = pv.log_likelihood(*case.programs(), x, num_samples=20, num_draws=draws, seed=0)
    data = found.to_arviz()
    each = torch.from_numpy(data.log_likelihood["log_prob"].values.mean((0, 1)))
    torch.testing.assert_close(each, found.log_prob.flatten(), rtol=1e-8, atol=1e-8)
    assert data.sample_stats["ess"].values.tolist() == found.ess.flatten().tolist()
    for name, value in found.draws.items():
        assert data.posterior[name].shape == (1, *value.shape)
