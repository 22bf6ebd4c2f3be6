"""Jobs for several processes at once: ``python -m tests.ranked RANK SIZE FOLDER NAME...`` runs some, one after another.

What each comes to is written to FOLDER/NAME-SIZE-RANK.pt: its result, or the words of its error.
"""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext, suppress
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pyro.infer
import pytest
import torch
from torch import Tensor, nn
from torch import distributed as torch_distributed
from torch.utils.data import BatchSampler, DataLoader, Dataset, DistributedSampler, IterableDataset, TensorDataset

import pyrovae as pv
from tests import ddp
from tests.pairs import Noisy
from tests.state import counting, double_precision

GREY = torch.rand(23, 6, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
IMAGES = torch.rand(12, 1, 8, 8, generator=torch.Generator().manual_seed(8), dtype=torch.float64)
RANK, SIZE, FOLDER = "RANKED_RANK", "RANKED_SIZE", "RANKED_FOLDER"


def ranks() -> tuple[int, int]:
    """This process's number, and how many there are."""
    return int(os.environ.get(RANK, "0")), int(os.environ.get(SIZE, "1"))


def trained(make: Callable[[], Any], objective: Any, data: Any = None, **options: Any) -> dict[str, Any]:
    """Weights, losses and validation bounds of a pair that is fitted."""
    pair, given = make(), pv.data.Images(GREY, binarization="dynamic") if data is None else data
    settings = {"epochs": 2, "batch_size": 9, "lr": 1e-2, "compile": False, "progress": False} | options
    result = pv.fit(pair.model, pair.guide, given, objective=objective, **settings)
    kept = ("bound", "validation_bound", "left_out", "skipped", "grad_norm")
    rows = [{k: row[k] for k in kept if k in row} for row in result.history]
    return {"weights": {n: t.detach().clone() for n, t in pair.state_dict().items()}, "rows": rows}


def vae(**options: Any) -> pv.models.VAE:
    return pv.models.VAE((6,), latent_dim=2, hidden=(5,), **options)


class Linear(nn.Module):
    """The pair that :mod:`tests.ddp` writes by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = ddp.networks()

    def model(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=self.decoder(z)).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        mean, log_scale = self.encoder(x).chunk(2, -1)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(mean, log_scale.exp()).to_event(1))


class Holding(nn.Module):
    """Programs that hold their data."""

    def __init__(self) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(()))

    def model(self) -> None:
        pyro.sample("x", dist.Normal(self.shift, 1.0), obs=GREY[0, 0])

    def guide(self) -> None:
        pass


class Discrete(nn.Module):
    """Bits and classes as latents, dropout, and draws by rejection that only ``rejecting`` makes."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.5), nn.Linear(8, 6))
        self.decoder = nn.Linear(5, 6)

    def model(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            bits = pyro.sample("bits", dist.Bernoulli(x.new_full((2,), 0.4)).to_event(1))
            kind = pyro.sample("kind", dist.Categorical(logits=x.new_zeros(3)))
            joined = torch.cat([bits, nn.functional.one_hot(kind.long(), 3).to(x).expand(*bits.shape[:-1], 3)], -1)
            pyro.sample("x", dist.Bernoulli(logits=self.decoder(joined)).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        found = self.encoder(x)
        with pyro.plate("data", len(x)):
            pyro.sample("bits", dist.Bernoulli(logits=found[..., :2]).to_event(1))
            pyro.sample("kind", dist.Categorical(logits=found[..., 2:5]))


class Rejecting(nn.Module):
    """A latent whose sampler takes as many numbers as it needs."""

    def __init__(self) -> None:
        super().__init__()
        self.rate = nn.Linear(6, 1)

    def model(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Gamma(x.new_tensor(2.0), 1.0))
            pyro.sample("x", dist.Normal(z.unsqueeze(-1), 1.0).expand((*z.shape, 6)).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Gamma(self.rate(x).squeeze(-1).exp() + 1.0, 1.0))


class Other(nn.Module):
    """A VAE whose guide does one thing more, which depends on the batch as a whole."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.inner, self.what = vae(), what
        self.register_buffer("mean", torch.zeros(6))

    def model(self, x: Tensor) -> None:
        if self.what == "global latent":
            pyro.sample("shift", dist.Normal(x.new_zeros(()), 1.0))
        if self.what == "factor":
            pyro.factor("prior", -x.mean() * next(self.parameters()).sum())
        self.inner.model(x)

    def guide(self, x: Tensor) -> None:
        if self.what == "global latent":
            pyro.sample("shift", dist.Normal(x.new_zeros(()), 1.0))
        if self.what == "centred":
            x = x - x.mean(0)
        if self.what == "numpy":
            x = x + np.random.rand()
        if self.what == "buffer" and self.training:
            self.mean.lerp_(x.mean(0), 0.1)
        self.inner.guide(x)


class Dead(nn.Module):
    """A model under which one datum is impossible."""

    def __init__(self) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(()))

    def model(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z + self.shift, 1.0), obs=x)
            pyro.factor("possible", torch.where(x > 3, -torch.inf, 0.0 * x))

    def guide(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 2 + self.shift, 1.0))


class Breaking(Dead):
    """Where one datum gives a loss that is no number."""

    def model(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z + self.shift + torch.where(x > 3, torch.nan, 0.0 * x), 1.0), obs=x)


SCALARS = torch.cat([torch.linspace(-1, 1, 9, dtype=torch.float64), torch.tensor([5.0], dtype=torch.float64)])


def interpreted(job: Callable[[], Any]) -> Any:
    """A job whose graphs are captured, and run operation by operation."""
    with pytest.MonkeyPatch.context() as patch:
        counting(patch, lambda module: module)
        return job()


class StoppedError(Exception):
    """What a program makes of a signal."""


def stop(number: int, frame: object) -> None:
    raise StoppedError


def stopping(parameters: Any) -> torch.optim.Optimizer:
    """An optimizer by which the last process hears a signal in its fourth step."""
    adam, taken, team = torch.optim.Adam(parameters, 1e-2), itertools.count(1), pv.ranks.ranks()

    def after(*_: object) -> None:
        if next(taken) == 4 and team.rank == team.size - 1:
            signal.raise_signal(signal.SIGTERM)

    adam.register_step_post_hook(after)
    return adam


def resumed(first: int, second: int, data: Callable[[], Any]) -> dict[str, Any]:
    """A run of so many processes that is stopped within its second epoch, and goes on in others; those left wait."""
    folder, (rank, size) = Path(os.environ[FOLDER]) / f"run-{first}-{second}-{data.__name__}-{ranks()[1]}", ranks()
    held_out = pv.data.Images(GREY[:7], binarization="static")
    common = {"validation": held_out, "run_dir": folder, "epochs": 3, "num_workers": 0, "lr": None}
    before, found = signal.signal(signal.SIGTERM, stop), {}
    for number, more in (
        (first, {"optimizer": stopping}),
        (second, {"optimizer": partial(torch.optim.Adam, lr=1e-2), "resume": True}),
    ):
        if number > 1 or not rank:
            with nullcontext() if number > 1 else pv.ranks.alone(), suppress(StoppedError):
                found = trained(vae, pv.IWAE(3), data(), **common, **more)
        if size > 1:
            torch_distributed.barrier()
        if "resume" not in more:
            place = pv.runs.Run(folder).state()
            assert (place["epoch"], place["within"]["steps"]) == (1, 1 if min(first, size) == 1 else 2)
    signal.signal(signal.SIGTERM, before)
    return found if second > 1 or not rank else {}


class Bits(Dataset[Tensor]):
    """Bits, its own if it draws; it counts what is read.

    :ivar own: what this process reads of the batches of an epoch.
    """

    def __init__(self, *, draws: bool = False) -> None:
        self.draws, (rank, size) = draws, ranks()
        self.own = [len(range(n)[pv.ranks.Ranks(rank, size).share(n)]) for n in (9, 9, 5)]
        self.read, self.looked = 0, 9 * min(size, 2)  # all of the first batch, and again where there are several

    def __len__(self) -> int:
        return len(GREY)

    def __getitem__(self, i: int) -> Tensor:
        self.read += 1
        return torch.bernoulli(GREY[i]) if self.draws else GREY[i].round()


class Flow(IterableDataset[Tensor]):
    """Bits that are drawn as they come."""

    def __iter__(self) -> Iterator[Tensor]:
        return map(torch.bernoulli, GREY)


def memory() -> pv.data.Images:
    return pv.data.Images(GREY, binarization="dynamic")


def read_by_rows() -> dict[str, Any]:
    """Each process reads its own rows, after all of the first batch."""
    data, held_out = Bits(), Bits()
    found = trained(vae, pv.IWAE(2), data, num_workers=0, validation=held_out)
    assert [data.read, held_out.read] == 2 * [data.looked + 2 * sum(data.own)]
    return found


def likelihoods() -> dict[str, Any]:
    """What evaluations say of a pair."""
    torch.manual_seed(3)
    pair, data = vae(), pv.data.Images(GREY, binarization="dynamic")
    found = pv.log_likelihood(pair.model, pair.guide, data, num_samples=40, chunk_size=16, batch_size=9, seed=4)
    annealed = pv.ais_log_likelihood(pair.model, data, num_temperatures=4, num_chains=3, batch_size=9, seed=4)
    known = pv.information(pair.model, pair.guide, data, num_data=15)["z"]
    return {
        "log_prob": found.log_prob, "std_error": found.std_error, "ess": found.ess, "pareto": found.pareto_k,
        "ais": annealed.log_prob, "acceptance": annealed.acceptance, **known._asdict(),
    }  # fmt: skip


def programs(pair: Any) -> tuple[Any, Any]:
    return pair.model, pair.guide


def split(data: Tensor) -> Any:
    """A sampler that gives each process data of its own."""
    return DistributedSampler(data, num_replicas=2, rank=ranks()[0] % 2)


def differing(**options: Any) -> dict[str, Any]:
    """A job that each process starts with options of its own, which are functions of its number."""
    return trained(vae, pv.ELBO(), **{name: value(ranks()[0]) for name, value in options.items()})


JOBS: dict[str, Callable[[], Any]] = {
    "elbo": partial(trained, vae, pv.ELBO()),
    "iwae, clipped": partial(trained, vae, pv.IWAE(4), clip_norm=1.0),
    "dreg, interpreted": lambda: interpreted(partial(trained, vae, pv.IWAE(4, gradient="dreg"), compile=True)),
    "stages": partial(
        trained, vae, pv.IWAE(2), particles=(2, 3), kl_warmup=1, epochs=4, patience=1,
        validation=pv.data.Images(GREY[:7], binarization="static"), schedule="cosine",
    ),
    "discrete, dropout": partial(trained, Discrete, pv.VIMCO(3)),
    "pyro": partial(trained, vae, pyro.infer.Trace_ELBO(2)),
    "pyro, renyi": partial(trained, vae, pyro.infer.RenyiELBO(0.5, num_particles=2)),
    "codebook": partial(
        trained, partial(pv.models.VQVAE, (1, 8, 8), num_codes=4, code_dim=2, ema_decay=0.9, num_downsamplings=1),
        pv.ELBO(), pv.data.Images(IMAGES, binarization="dynamic"),
    ),
    "by hand": partial(
        trained, Linear, pv.ELBO(), ddp.data(), seed=ddp.SEED, batch_size=ddp.BATCH, epochs=ddp.EPOCHS, lr=ddp.RATE
    ),
    "few": lambda: trained(  # the last batch has one datum, and that of validation three
        vae, pv.ELBO(), pv.data.Images(GREY[:10], binarization="dynamic"),
        validation=DataLoader(TensorDataset(GREY.round()), 4, shuffle=True),
    ),
    "left out": partial(trained, Dead, pv.ELBO(), SCALARS, batch_size=4),
    "skipped": partial(trained, Breaking, pv.ELBO(), SCALARS, batch_size=4, on_nan="skip"),
    "read by rows": read_by_rows,
    "drawn by rows": lambda: trained(
        vae, pv.IWAE(2), Bits(draws=True), num_workers=2, validation=Bits(draws=True)
    ),
    "skipped, read by rows": lambda: trained(
        Breaking, pv.ELBO(), DataLoader(TensorDataset(SCALARS), 4, shuffle=True, num_workers=1), on_nan="skip"
    ),
    "evaluated": likelihoods,
}  # fmt: skip
ALIKE: dict[str, Callable[[], Any]] = {  # no one process's numbers, but the same in all
    "rejecting": partial(trained, Rejecting, pv.ELBO(2), GREY),
    **{
        f"resumed in {second} of {first}, {data.__name__}": partial(resumed, first, second, data)
        for data in (memory, Bits, Flow)
        for first, second in ((2, 1), (1, 2), (2, 2))
    },
}
REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "free bits": (partial(trained, vae, pv.ELBO(free_bits=0.1)), "free_bits"),
    "norm": (partial(trained, Noisy, pv.ELBO()), '"encoder.1" is a BatchNorm1d'),
    "joint": (partial(trained, partial(Other, "global latent"), pv.ELBO()), '"shift"'),
    "factor": (partial(trained, partial(Other, "factor"), pv.ELBO()), '"prior"'),
    "penalty": (
        partial(trained, partial(pv.models.SparseAutoencoder, (6,), latent_dim=3, penalty="kl", rho=0.1), pv.ELBO()),
        "not the sum of the losses of its data",
    ),
    "centred": (partial(trained, partial(Other, "centred"), pv.ELBO()), "not the sum"),
    "buffer": (partial(trained, partial(Other, "buffer"), pv.ELBO()), '"mean" is moved'),
    "numpy": (partial(trained, partial(Other, "numpy"), pv.ELBO()), "NumPy"),
    "no data": (partial(trained, Holding, pv.ELBO(), ()), "holds its data"),
    "small": (partial(trained, vae, pv.ELBO(), batch_size=1), "a batch of 1 data is not enough for 2 processes"),
    "other data": (
        lambda: trained(vae, pv.ELBO(), (0.5 + 0.1 * ranks()[0] < GREY).double()),
        "processes must work on the same data",
    ),
    "other rows": (
        lambda: trained(vae, pv.ELBO(), DataLoader(TensorDataset(GREY.round()), 9, sampler=split(GREY))),
        "a DistributedSampler gives each process data of its own",
    ),
    "other batches": (
        lambda: trained(
            vae, pv.ELBO(), DataLoader(TensorDataset(GREY.round()), batch_sampler=BatchSampler(split(GREY), 9, False))
        ),
        "processes must work on the same data",
    ),
    "other validation": (
        lambda: trained(vae, pv.ELBO(), validation=GREY[ranks()[0] :: 2].round()),
        "processes must work on the same validation data",
    ),
    "other data measured": (
        lambda: pv.log_likelihood(*programs(vae()), GREY[ranks()[0] : 8 + ranks()[0]].round(), num_samples=4),
        "processes must work on the same data",
    ),
    "other settings": (partial(differing, lr=lambda r: 1e-2, batch_size=lambda r: 9 + r), "the same batch_size"),
    "one fails": (partial(differing, clip_norm=lambda r: [1.0, -1.0][r]), "clip_norm"),
}  # fmt: skip


def launch(size: int, folder: Path, names: Sequence[str]) -> list[dict[str, Any]]:
    """What jobs come to in so many processes, by rank: results, or errors."""
    together(size, "tests.ranked", str(folder), *names)
    return [torch.load(folder / f"{size}-{rank}.pt", weights_only=False) for rank in range(size)]


def together(size: int, module: str, *arguments: str) -> None:
    """Run a module in so many processes, which take their number and how many they are first."""
    environment = {k: v for k, v in os.environ.items() if k != "WORLD_SIZE"} | {"OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", module, str(rank), str(size), *arguments],
            env=environment, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(size)
    ]  # fmt: skip
    said = [process.communicate(timeout=500)[1] for process in processes]
    assert not any(process.returncode for process in processes), said


def main(rank: int, size: int, folder: str, *names: str) -> None:
    """Run jobs in one process of several."""
    os.environ |= {RANK: str(rank), SIZE: str(size), FOLDER: folder}
    torch.set_num_threads(1)
    if size > 1:
        torch_distributed.init_process_group(
            "gloo",
            init_method=f"file://{folder}/meeting-{size}",
            rank=rank,
            world_size=size,
            timeout=timedelta(seconds=300),
        )
    found = {}
    for name in names:
        job = JOBS.get(name) or ALIKE.get(name) or REFUSED[name][0]
        with double_precision(0):
            try:
                found[name] = job()
            except Exception as error:
                found[name] = f"{type(error).__name__}: {error}"
    torch.save(found, Path(folder) / f"{size}-{rank}.pt")
    if size > 1:
        torch_distributed.barrier()
        torch_distributed.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:])
