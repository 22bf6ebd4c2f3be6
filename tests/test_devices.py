"""Where programs run, and where they are found; the device "meta", whose tensors hold no data, is the other one."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

import pyrovae as pv
from pyrovae.engine.devices import beside, home_of
from pyrovae.engine.sites import record
from tests.state import refused


@pytest.fixture(autouse=True)
def unchecked():
    """Without Pyro's checks of values, which a tensor on "meta" has not."""
    with pyro.validation_enabled(False):
        yield


def model(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 0.5), obs=x)


MADE = {
    "a distribution's numbers": lambda: dist.Normal(0.0, 1.0).sample(),
    "a number": lambda: torch.tensor(2.0),
    "a list": lambda: torch.tensor([1, 2]),
    "zeros": lambda: torch.zeros(3),
    "noise": lambda: torch.rand(()),
    "normal noise": lambda: torch.normal(0.0, 1.0, (2,)),
    "indices": lambda: torch.arange(3),
}
HERE = torch.ones(2)
STAYING = {
    "a device that is named": lambda: torch.zeros(3, device="cpu"),
    "a number on a device that is named": lambda: torch.tensor(1.0, device="cpu"),
    "a generator": lambda: torch.rand(3, generator=torch.Generator()),
    "a tensor": lambda: torch.as_tensor(HERE),
    "noise around a tensor": lambda: torch.normal(HERE, 1.0),
    "what is like a tensor": lambda: torch.zeros_like(HERE),
}


@pytest.mark.parametrize("make", [*MADE, *STAYING])
def test_what_a_program_makes_is_where_its_batch_is_unless_it_says_otherwise(make):
    """A number in the place of a batch is not on any device, nor is a batch of them."""
    with beside((3, torch.ones(2), torch.ones(2, device="meta"))):
        assert (MADE | STAYING)[make]().device.type == ("meta" if make in MADE else "cpu")


def test_numbers_keep_their_dtypes():
    with beside((torch.ones(2, device="meta"),)):
        kinds = [torch.tensor(v).dtype for v in (True, 1, 1.0)] + [torch.tensor(1, dtype=torch.float64).dtype]
    assert kinds == [torch.bool, torch.int64, torch.float32, torch.float64]


def test_sites_lie_beside_the_batch():
    sites = record(model, (torch.ones(3, device="meta"),), {})
    assert {site["value"].device.type for site in sites.values()} == {"meta"}


def test_on_the_cpu_there_is_nothing_between_a_program_and_torch():
    modes = []
    record(lambda *_, **__: modes.append(torch._C._len_torch_function_stack()), (torch.ones(3),), {"y": torch.ones(3)})
    record(lambda *_, **__: modes.append(torch._C._len_torch_function_stack()), (), {"y": torch.ones(3, device="meta")})
    assert modes == [0, 1]


# --- programs that are no modules -------------------------------------------------------------------------------------

X = torch.ones(3, 2)


def closing_over(kind, device):
    """A program whose only parameter lives on the device."""
    layer, loose = nn.Linear(2, 2, device=device), torch.zeros(2, device=device, requires_grad=True)
    if kind == "pyro.param":
        pyro.param("stored", torch.zeros(2, device=device))
    if kind == "frozen":
        layer.requires_grad_(False)

    def program(x):
        torch.rand(2)
        pyro.param("new", torch.zeros(2))
        own = {"leaf": loose, "pyro.param": pyro.param("stored") if kind == "pyro.param" else None}.get(kind)
        mean = layer(x) if own is None else x + own
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(mean, 1.0).to_event(1), obs=x)

    return program


@pytest.mark.parametrize("kind", ["network", "frozen", "leaf", "pyro.param"])
@pytest.mark.parametrize(("there", "here"), [("cpu", "meta"), ("meta", "cpu"), ("cpu", "cpu")])
def test_functions_live_where_the_first_parameter_does_that_they_meet(kind, there, here, monkeypatch):
    """Looking for it leaves no trace; where it is at the batch already, there is nothing to say."""
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    pyro.clear_param_store()
    program = closing_over(kind, there)
    names, state = set(pyro.get_param_store().keys()), torch.get_rng_state()
    found = home_of(lambda x: None, program, args=(X.to(here),))
    assert found == (None if there == here else torch.device(there))
    assert torch.equal(torch.get_rng_state(), state)
    if found is not None:
        assert set(pyro.get_param_store().keys()) == names
    pyro.clear_param_store()


def test_an_error_of_a_program_is_told_by_the_run_proper(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)

    def broken(x):
        raise ValueError("it is broken")

    assert home_of(broken, args=(X,)) is None
    refused(ValueError, "it is broken", pv.log_likelihood, broken, broken, X)


def test_modules_are_asked_and_not_run():
    assert home_of(nn.Linear(2, 2, device="meta").forward, args=(X,)) == torch.device("meta")


def test_a_module_without_parameters_lives_where_its_buffers_do():
    module = nn.BatchNorm1d(2, affine=False, device="meta")
    assert home_of(module, args=(X,)) == torch.device("meta")
    assert pv.sampling.blank(pv.models.PCA((2, 3), 2).to("meta").model, 4, None, (), {}).device == torch.device("meta")
