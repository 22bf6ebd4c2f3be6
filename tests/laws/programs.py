"""What the tests of Pyro's semantics share: two plain programs, and what was seen in a run of a pair."""

import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import torch

import pyrovae as pv

X = torch.tensor([[0.5, -1.0], [1.5, 0.2], [-0.3, 0.8]], dtype=torch.float64)
B = len(X)


def normal(loc, scale=1.0):
    return dist.Normal(loc, scale)


def plain_model(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", normal(x.new_zeros(2)).to_event(1))
        pyro.sample("x", normal(z, 0.7).to_event(1), obs=x)


def plain_guide(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", normal(0.5 * x, 0.8).to_event(1))


def run_of(call, model, guide, *args):
    """What ``call`` returns, and the values of all sites in its last run of the programs."""
    seen = {}

    class Keep(poutine.messenger.Messenger):
        def _pyro_post_sample(self, msg):
            seen[msg["name"]] = msg["value"].detach()

    def kept(program):
        def run(*args):
            with Keep():
                program(*args)

        return run

    return call(kept(model), kept(guide), *args), seen


def weights_and_values(model, guide, *args, num_particles=4, **options):
    def call(*programs_and_args):
        return pv.log_weights(*programs_and_args, num_particles=num_particles, **options)

    return run_of(call, model, guide, *args)


def lp(fn, value, event_dim=0):
    """Log-probability by hand, event dimensions summed."""
    out = fn.log_prob(value)
    return out.sum(tuple(range(-event_dim, 0))) if event_dim else out


def seeded_loss(objective, model, guide, *args, params=()):
    pyro.set_rng_seed(3)
    loss = objective.differentiable_loss(model, guide, *args)
    grads = torch.autograd.grad(loss, params, allow_unused=True) if params else ()
    return loss.item(), grads
