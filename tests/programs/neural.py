"""Programs with networks: of images, of sequences, of cells, of documents, of scenes."""

import math

import pyro
import pyro.distributions as dist
import torch
import torch.nn.functional as F
from pyro import poutine
from pyro.contrib.cevae import CEVAE
from pyro.distributions import transforms
from pyro.distributions.transforms import affine_autoregressive
from pyro.infer import Trace_ELBO, TraceEnum_ELBO, TraceGraph_ELBO, TraceMeanField_ELBO, config_enumerate
from torch import nn

from tests.programs.registry import Pair, program

PIXELS, CLASSES = 12, 3


def net(inputs, outputs, hidden=8, last=None):
    return nn.Sequential(nn.Linear(inputs, hidden), nn.Softplus(), nn.Linear(hidden, outputs), last or nn.Identity())


def blobs(number=6):
    """Bits that go together in three ways, and which of the three."""
    which = torch.arange(number) % CLASSES
    return torch.bernoulli(0.1 + 0.8 * (torch.rand(CLASSES, PIXELS) < 0.5).float()[which]), which


class Plain(nn.Module):
    """The first example: one latent, two networks."""

    def __init__(self):
        super().__init__()
        self.decoder, self.encoder = net(2, PIXELS), net(PIXELS, 4)

    def model(self, x):
        pyro.module("decoder", self.decoder)
        with pyro.plate("data", x.shape[0]):
            z = pyro.sample("latent", dist.Normal(x.new_zeros(len(x), 2), x.new_ones(len(x), 2)).to_event(1))
            pyro.sample("obs", dist.Bernoulli(self.decoder(z).sigmoid(), validate_args=False).to_event(1), obs=x)

    def guide(self, x):
        pyro.module("encoder", self.encoder)
        with pyro.plate("data", x.shape[0]):
            loc, log_scale = self.encoder(x).chunk(2, -1)
            pyro.sample("latent", dist.Normal(loc, log_scale.exp()).to_event(1))


@program()
def vae():
    own = Plain()
    return Pair(own.model, own.guide, (blobs()[0],))


class Labelled(nn.Module):
    """Kingma's M2: the label is a latent where it is not known. Plates without a size."""

    def __init__(self):
        super().__init__()
        self.encoder_y, self.encoder_z = net(PIXELS, CLASSES, last=nn.Softmax(-1)), net(PIXELS + CLASSES, 4)
        self.decoder = net(2 + CLASSES, PIXELS, last=nn.Sigmoid())

    def joined(self, *parts):
        shape = torch.broadcast_shapes(*(part.shape[:-1] for part in parts))
        return torch.cat([part.expand(*shape, -1) for part in parts], -1)

    def model(self, xs, ys=None):
        pyro.module("ss_vae", self)
        with pyro.plate("data"):
            zs = pyro.sample("z", dist.Normal(xs.new_zeros(len(xs), 2), xs.new_ones(len(xs), 2)).to_event(1))
            uniform = xs.new_ones(len(xs), CLASSES) / CLASSES
            ys = pyro.sample("y", dist.OneHotCategorical(uniform), obs=ys)
            loc = self.decoder(self.joined(zs, ys))
            pyro.sample("x", dist.Bernoulli(loc, validate_args=False).to_event(1), obs=xs)

    def guide(self, xs, ys=None):
        with pyro.plate("data"):
            if ys is None:
                ys = pyro.sample("y", dist.OneHotCategorical(self.encoder_y(xs)))
            loc, log_scale = self.encoder_z(self.joined(xs, ys)).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))

    def model_classify(self, xs, ys=None):
        pyro.module("ss_vae", self)
        with pyro.plate("data"):
            if ys is not None:
                with poutine.scale(scale=0.5):
                    pyro.sample("y_aux", dist.OneHotCategorical(self.encoder_y(xs)), obs=ys)

    def guide_classify(self, xs, ys=None):
        """The auxiliary loss has no latents."""


@program("ss_vae_M2_supervised", "ss_vae_M2_classify", "ss_vae_M2", "ss_vae_M2_enumerated")
def ss_vae_m2(name):
    own, (xs, which) = Labelled(), blobs()
    ys = F.one_hot(which, CLASSES).float()
    if name == "ss_vae_M2_supervised":
        return Pair(own.model, own.guide, (xs, ys))
    if name == "ss_vae_M2_classify":
        return Pair(own.model_classify, own.guide_classify, (xs, ys))
    marked = config_enumerate(own.guide, expand=True) if name.endswith("enumerated") else own.guide
    return Pair(own.model, marked, (xs,), TraceEnum_ELBO if name.endswith("enumerated") else TraceGraph_ELBO)


class Completed(nn.Module):
    """The conditional example: what is missing of an image (-1), by a prior that a fixed network helps."""

    def __init__(self):
        super().__init__()
        self.baseline, self.prior, self.recognition = (
            net(PIXELS, PIXELS, last=nn.Sigmoid()),
            net(PIXELS, 4),
            net(PIXELS, 4),
        )
        self.generation = net(2, PIXELS, last=nn.Sigmoid())

    def encoded(self, network, xs, ys):
        both = xs.clone()
        both[xs == -1] = ys[xs == -1]
        loc, log_scale = network(both).chunk(2, -1)
        return dist.Normal(loc, log_scale.exp()).to_event(1)

    def model(self, xs, ys=None):
        pyro.module("cvae", self)
        with pyro.plate("data"):
            with torch.no_grad():
                guess = self.baseline(xs)
            loc = self.generation(pyro.sample("z", self.encoded(self.prior, xs, guess)))
            missing = xs == -1
            known = loc[missing].view(len(xs), -1) if loc.dim() == 2 else loc[:, missing].view(len(loc), len(xs), -1)
            seen = ys[missing].view(len(xs), -1)
            pyro.sample("y", dist.Bernoulli(known, validate_args=False).to_event(1), obs=seen)

    def guide(self, xs, ys=None):
        with pyro.plate("data"):
            pyro.sample("z", self.encoded(self.recognition, xs, ys))


class CompletedAsWritten(Completed):
    """With a decoder that is indexed as one batch, as the example has it: with particles, folded or one by one."""

    def model(self, xs, ys=None):
        pyro.module("cvae", self)
        with pyro.plate("data"):
            with torch.no_grad():
                guess = self.baseline(xs)
            loc = self.generation(pyro.sample("z", self.encoded(self.prior, xs, guess)))
            known = loc[(xs == -1).view(-1, PIXELS)].view(xs.shape[0], -1)
            seen = ys[xs == -1].view(xs.shape[0], -1)
            pyro.sample("y", dist.Bernoulli(known, validate_args=False).to_event(1), obs=seen)


@program("cvae", "cvae_as_written")
def cvae(name):
    own, (ys, _) = Completed() if name == "cvae" else CompletedAsWritten(), blobs()
    xs = ys.clone()
    xs[:, PIXELS // 2 :] = -1
    return Pair(own.model, own.guide, (xs, ys))


# --- deep Markov model ------------------------------------------------------------------------------------------------


class DeepMarkov(nn.Module):
    """Latents of a sequence by a gated transition; the guide reads the data backwards, and may flow."""

    def __init__(self, flows=0, size=3, width=6):
        super().__init__()
        self.size, self.width = size, width
        self.emitter, self.gate, self.proposed = net(size, PIXELS), net(size, size), net(size, size)
        self.identity, self.spread = nn.Linear(size, size), nn.Linear(size, size)
        nn.init.eye_(self.identity.weight)
        nn.init.zeros_(self.identity.bias)
        self.rnn = nn.RNN(PIXELS, width, nonlinearity="relu", batch_first=True)
        self.combine, self.to_loc, self.to_scale = (
            nn.Linear(size, width),
            nn.Linear(width, size),
            nn.Linear(width, size),
        )
        self.flows = [affine_autoregressive(size, hidden_dims=[5]) for _ in range(flows)]
        self.flow_modules = nn.ModuleList(self.flows)
        self.z_0, self.z_q_0 = nn.Parameter(torch.zeros(size)), nn.Parameter(torch.zeros(size))
        self.h_0 = nn.Parameter(torch.zeros(1, 1, width))

    def step(self, z):
        gate, proposed = self.gate(z).sigmoid(), self.proposed(z)
        return (1 - gate) * self.identity(z) + gate * proposed, F.softplus(self.spread(proposed.relu()))

    def model(self, x, backwards, mask, lengths, annealing=1.0):
        pyro.module("dmm", self)
        z = self.z_0.expand(len(x), self.size)
        with pyro.plate("z_minibatch", len(x)):
            for t in pyro.markov(range(1, x.size(1) + 1)):
                loc, scale = self.step(z)
                here = mask[:, t - 1 : t]
                with poutine.scale(scale=annealing):
                    z = pyro.sample(f"z_{t}", dist.Normal(loc, scale).mask(here).to_event(1))
                emitted = dist.Bernoulli(self.emitter(z).sigmoid()).mask(here).to_event(1)
                pyro.sample(f"obs_x_{t}", emitted, obs=x[:, t - 1])

    def guide(self, x, backwards, mask, lengths, annealing=1.0):
        pyro.module("dmm", self)
        read, _ = self.rnn(backwards, self.h_0.expand(1, len(x), self.width).contiguous())
        read = torch.stack([turned(row, int(n)) for row, n in zip(read, lengths, strict=True)])
        z = self.z_q_0.expand(len(x), self.size)
        with pyro.plate("z_minibatch", len(x)):
            for t in pyro.markov(range(1, x.size(1) + 1)):
                h = 0.5 * (self.combine(z).tanh() + read[:, t - 1])
                drawn = dist.Normal(self.to_loc(h), F.softplus(self.to_scale(h)))
                if self.flows:
                    drawn = dist.TransformedDistribution(drawn, self.flows).mask(mask[:, t - 1])
                else:
                    drawn = drawn.mask(mask[:, t - 1 : t]).to_event(1)
                with poutine.scale(scale=annealing):
                    z = pyro.sample(f"z_{t}", drawn)


def turned(row, length):
    """A row whose first entries stand in the other order."""
    return torch.cat([row[:length].flip(0), row[length:]])


@program("dmm", "dmm_iaf", "dmm_annealed")
def dmm(name):
    own, lengths = DeepMarkov(flows=2 if name == "dmm_iaf" else 0), torch.tensor([4, 2, 3, 4])
    mask = (torch.arange(4) < lengths[:, None]).float()
    x = (torch.rand(4, 4, PIXELS) < 0.3).float() * mask[..., None]
    backwards = torch.stack([turned(row, int(n)) for row, n in zip(x, lengths, strict=True)])
    args = (x, backwards, mask.bool(), lengths, 0.3)
    return Pair(own.model, own.guide, args if name == "dmm_annealed" else args[:4])


# --- cells, causes, documents -----------------------------------------------------------------------------------------


class Cells(nn.Module):
    """Counts of genes by type and by size of a cell; types are known of some cells."""

    def __init__(self, genes=6, latent=3):
        super().__init__()
        self.genes, self.latent = genes, latent
        self.z2_decoder = nn.Sequential(
            nn.Linear(latent + CLASSES, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2 * latent)
        )
        self.x_decoder = nn.Sequential(nn.Linear(latent, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2 * genes))
        self.encoder = nn.Sequential(nn.Linear(genes, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2 * latent + 2))
        self.classifier, self.z1_encoder = net(latent, CLASSES), net(latent + CLASSES, 2 * latent)

    def halves(self, network, *inputs):
        shape = torch.broadcast_shapes(*(part.shape[:-1] for part in inputs))
        x = torch.cat([part.expand(*shape, -1) for part in inputs], -1)
        flat = network(x.reshape(-1, x.shape[-1]))  # BatchNorm1d knows one batch dimension
        return flat.reshape(*x.shape[:-1], -1).chunk(2, -1)

    def model(self, x, y=None):
        pyro.module("scanvi", self)
        theta = pyro.param("inverse_dispersion", 10.0 * x.new_ones(self.genes), constraint=dist.constraints.positive)
        with pyro.plate("batch", len(x)), poutine.scale(scale=0.05):
            z1 = pyro.sample("z1", dist.Normal(0, x.new_ones(self.latent)).to_event(1))
            y = pyro.sample("y", dist.OneHotCategorical(logits=x.new_zeros(CLASSES)), obs=y)
            loc, scale = self.halves(self.z2_decoder, z1, y)
            z2 = pyro.sample("z2", dist.Normal(loc, F.softplus(scale)).to_event(1))
            size = pyro.sample("l", dist.LogNormal(2.0, x.new_ones(1)).to_event(1))
            gate, mu = self.halves(self.x_decoder, z2)
            logits = (size * mu.softmax(-1) + 5e-3).log() - (theta + 5e-3).log()
            counts = dist.ZeroInflatedNegativeBinomial(gate_logits=gate, total_count=theta, logits=logits)
            pyro.sample("x", counts.to_event(1), obs=x)

    def guide(self, x, y=None):
        pyro.module("scanvi", self)
        with pyro.plate("batch", len(x)), poutine.scale(scale=0.05):
            first, second = self.halves(self.encoder, x.log1p())
            pyro.sample("l", dist.LogNormal(first[..., -1:], F.softplus(second[..., -1:])).to_event(1))
            z2 = pyro.sample("z2", dist.Normal(first[..., :-1], F.softplus(second[..., :-1])).to_event(1))
            of_types = dist.OneHotCategorical(logits=self.classifier(z2))
            if y is None:
                y = pyro.sample("y", of_types)
            else:
                pyro.factor("classification_loss", -0.3 * of_types.log_prob(y), has_rsample=False)
            loc, scale = self.halves(self.z1_encoder, z2, y)
            pyro.sample("z1", dist.Normal(loc, F.softplus(scale)).to_event(1))


@program("scanvi", "scanvi_labelled", "scanvi_enumerated")
def scanvi(name):
    own, y = Cells(), F.one_hot(torch.arange(8) % CLASSES, CLASSES).float()
    x = dist.Poisson(1.0 + 6.0 * (torch.rand(CLASSES, 6) < 0.4).float()[y.argmax(-1)]).sample()
    if name == "scanvi_labelled":
        return Pair(own.model, own.guide, (x, y))
    if name == "scanvi":
        return Pair(own.model, own.guide, (x,), TraceGraph_ELBO)
    return Pair(own.model, config_enumerate(own.guide, "parallel", expand=True), (x,), TraceEnum_ELBO)


@program()
def cevae():
    z = dist.Bernoulli(0.5).sample((8,))
    x = dist.Normal(z, 5 * z + 3 * (1 - z)).sample((3,)).t()
    t = dist.Bernoulli(0.75 * z + 0.25 * (1 - z)).sample()
    y = dist.Bernoulli(logits=3 * (z + 2 * (2 * t - 2))).sample()
    own = CEVAE(feature_dim=3, latent_dim=2, hidden_dim=8, num_layers=2)

    class Theirs(Trace_ELBO):
        """What the guide observes is no part of log q."""

        def _get_trace(self, model, guide, args, kwargs):
            run, drawn = super()._get_trace(model, guide, args, kwargs)
            for name in ("t", "y"):
                drawn.remove_node(name)
            return run, drawn

    return Pair(own.model, own.guide, (x, t, y), Theirs)


class Documents(nn.Module):
    """ProdLDA: a logistic-normal mixture of topics, with dropout and batch norm."""

    def __init__(self, words=9, topics=3):
        super().__init__()
        self.topics = topics
        self.encoder, self.mu, self.variance = (
            net(words, 8, last=nn.Dropout(0.2)),
            nn.Linear(8, topics),
            nn.Linear(8, topics),
        )
        self.norms = nn.ModuleList(nn.BatchNorm1d(n, affine=False) for n in (topics, topics, words))
        self.beta, self.drop = nn.Linear(topics, words, bias=False), nn.Dropout(0.2)

    def model(self, docs):
        pyro.module("prodlda", self)
        with pyro.plate("documents", docs.shape[0]):
            flat = docs.new_zeros(len(docs), self.topics)
            theta = F.softmax(pyro.sample("logtheta", dist.Normal(flat, flat + 1).to_event(1)), -1)
            words = F.softmax(self.norms[2](self.beta(self.drop(theta))), dim=-1)
            pyro.sample("obs", dist.Multinomial(int(docs.sum(-1).max()), words), obs=docs)

    def guide(self, docs):
        pyro.module("prodlda", self)
        with pyro.plate("documents", docs.shape[0]):
            h = self.encoder(docs)
            loc, log_variance = self.norms[0](self.mu(h)), self.norms[1](self.variance(h))
            pyro.sample("logtheta", dist.Normal(loc, (0.5 * log_variance).exp()).to_event(1))


@program()
def prodlda():
    own = Documents()
    docs = dist.Poisson(3.0).sample((8, 9))
    return Pair(own.model, own.guide, (docs,), TraceMeanField_ELBO)


# --- flows ------------------------------------------------------------------------------------------------------------


class FlowPrior(Plain):
    """The flow as prior of a VAE."""

    def __init__(self):
        super().__init__()
        self.flow = transforms.spline_autoregressive(2, [6], count_bins=4)

    def model(self, x):
        pyro.module("flow", self.flow)
        pyro.module("decoder", self.decoder)
        with pyro.plate("data", x.shape[0]):
            base = dist.Normal(x.new_zeros(2), 1.0).to_event(1)
            z = pyro.sample("latent", dist.TransformedDistribution(base, [self.flow]))
            pyro.sample("obs", dist.Bernoulli(logits=self.decoder(z)).to_event(1), obs=x)


class FlowGuide(nn.Module):
    """An inverse autoregressive flow, conditional on the data, for a location and a correlation."""

    def __init__(self):
        super().__init__()
        self.flow = transforms.conditional_affine_autoregressive(3, 4, [8])

    def likelihood(self, z):
        rho = z[..., 2].tanh() * 0.9
        one = torch.ones_like(rho)
        covariance = 0.1 * torch.stack([one, rho, rho, one], -1).unflatten(-1, (2, 2))
        return dist.MultivariateNormal(z[..., :2], covariance)

    def model(self, x):
        with pyro.plate("data", x.shape[1], dim=-1):
            z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))
            with pyro.plate("obs", x.shape[0], dim=-2):
                pyro.sample("x", self.likelihood(z), obs=x)

    def guide(self, x):
        pyro.module("flow", self.flow)
        context = torch.cat([x.mean(0), x.std(0)], -1)
        with pyro.plate("data", x.shape[1], dim=-1):
            base = dist.Normal(torch.zeros(3), 0.3).to_event(1)
            flow = dist.ConditionalTransformedDistribution(base, [self.flow])
            pyro.sample("z", flow.condition(context))


class Flow(nn.Module):
    """The introduction to flows: a density of the plane, and nothing that is latent."""

    def __init__(self):
        super().__init__()
        self.parts = nn.ModuleList([transforms.spline_coupling(2, count_bins=4), transforms.spline(2, count_bins=4)])

    def model(self, x):
        pyro.module("flow", self.parts)
        with pyro.plate("data", len(x)):
            base = dist.Normal(torch.zeros(2), 1.0).to_event(1)
            pyro.sample("x", dist.TransformedDistribution(base, list(self.parts)), obs=x)

    def guide(self, x):
        """There is nothing to draw."""


@program("vae_flow_prior", "svi_flow_guide", "normalizing_flows")
def flows(name):
    if name == "normalizing_flows":
        turn = torch.rand(10) * math.pi
        own = Flow()
        return Pair(own.model, own.guide, (torch.stack([turn.cos(), turn.sin()], -1) + 0.05 * torch.randn(10, 2),))
    if name == "svi_flow_guide":
        own = FlowGuide()
        return Pair(own.model, own.guide, (torch.randn(6, 2) + 0.3 * torch.randn(5, 6, 2),))
    own = FlowPrior()
    return Pair(own.model, own.guide, (blobs()[0],))


# --- scenes -----------------------------------------------------------------------------------------------------------


class Scene(nn.Module):
    """Attend, infer, repeat: an image of objects, up to a number that is a latent, each with place and look."""

    def __init__(self, steps=2, side=6, window=3, look=2, width=8):
        super().__init__()
        self.steps, self.side, self.window, self.look = steps, side, window, look
        self.where_loc, self.where_scale = torch.tensor([3.0, 0.0, 0.0]), torch.tensor([0.1, 1.0, 1.0])
        inputs = side**2 + 3 + look + 1
        self.rnn, self.predict = nn.LSTMCell(inputs, width), nn.Linear(width, 7)
        self.encode, self.decode = net(window**2, 2 * look), net(look, window**2, last=nn.Sigmoid())
        self.bl_rnn, self.bl_predict = nn.LSTMCell(inputs, width), nn.Linear(width, 1)
        self.h_0, self.c_0 = nn.Parameter(torch.zeros(1, width)), nn.Parameter(torch.zeros(1, width))
        self.start = nn.Parameter(torch.zeros(1, 3 + look))

    def warped(self, where, source, size, inverse=False):
        """Windows put into an image, or taken out of it."""
        n = len(where)
        if inverse:
            where = torch.cat([torch.ones_like(where[:, :1]), -where[:, 1:]], 1) / where[:, :1]
        rows = torch.cat([torch.zeros_like(where[:, :1]), where], 1)[:, [1, 0, 2, 0, 1, 3]].view(n, 2, 3)
        places = F.affine_grid(rows, [n, 1, size, size], align_corners=False)
        return F.grid_sample(source.view(n, 1, *source.shape[-2:]), places, align_corners=False).view(n, size, size)

    def model(self, data, batch_size=None):
        pyro.module("decode", self.decode)
        with pyro.plate("data", len(data), subsample_size=batch_size) as index:
            batch = data[index]
            n = len(batch)
            present, x = torch.ones(n, 1), torch.zeros(n, self.side, self.side)
            for t in range(self.steps):
                present = pyro.sample(f"z_pres_{t}", dist.Bernoulli(0.5 * present).to_event(1))
                place = dist.Normal(self.where_loc.expand(n, 3), self.where_scale.expand(n, 3))
                where = pyro.sample(f"z_where_{t}", place.mask(present).to_event(1))
                looks = dist.Normal(torch.zeros(n, self.look), torch.ones(n, self.look))
                what = pyro.sample(f"z_what_{t}", looks.mask(present).to_event(1))
                drawn = self.warped(where, self.decode(what).view(n, self.window, self.window), self.side)
                x = x + drawn * present.view(-1, 1, 1)
            pixels = dist.Normal(x.view(n, -1), 0.3 * torch.ones(n, self.side**2))
            pyro.sample("obs", pixels.to_event(1), obs=batch.view(n, -1))

    def guide(self, data, batch_size=None):
        pyro.module("air", self)
        with pyro.plate("data", len(data), subsample_size=batch_size) as index:
            batch = data[index]
            n, flat = len(batch), batch.flatten(1)
            h, c = self.h_0.expand(n, -1), self.c_0.expand(n, -1)
            bl = h.detach(), c.detach()
            where, what = self.start.expand(n, -1).split([3, self.look], 1)
            present = torch.ones(n, 1)
            for t in range(self.steps):
                inputs = torch.cat([flat, where, what, present], 1)
                h, c = self.rnn(inputs, (h, c))
                bl = self.bl_rnn(inputs.detach(), bl)
                baseline = self.bl_predict(bl[0]) * present
                p, loc, scale = self.predict(h).split([1, 3, 3], 1)
                present = pyro.sample(
                    f"z_pres_{t}", dist.Bernoulli(p.sigmoid() * present).to_event(1),
                    infer={"baseline": {"baseline_value": baseline.squeeze(-1)}},
                )  # fmt: skip
                place = dist.Normal(loc + self.where_loc, F.softplus(scale) * self.where_scale)
                where = pyro.sample(f"z_where_{t}", place.mask(present).to_event(1))
                seen = self.warped(where, batch, self.window, inverse=True).flatten(1)
                mean, spread = self.encode(seen).chunk(2, 1)
                what = pyro.sample(f"z_what_{t}", dist.Normal(mean, F.softplus(spread)).mask(present).to_event(1))


@program("air", "air_minibatch")
def air(name):
    own = Scene()
    images = (torch.rand(5, 6, 6) < 0.2).float()
    return Pair(
        own.model, own.guide, (images, 3) if name == "air_minibatch" else (images,), TraceGraph_ELBO, aside="bl_"
    )
