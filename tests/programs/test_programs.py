"""Each of Pyro's programs with two objectives, eagerly; ``table.py`` has all objectives and all checks."""

import math

import pyro
import pytest
import torch
from pyro.infer.autoguide import AutoNormal
from torch.utils.data import DataLoader, TensorDataset

import pyrovae as pv
from tests.programs import ALL, checks
from tests.programs.hierarchies import Line
from tests.programs.registry import FILES, make

#: What no objective but the ELBO takes, by the sentence it is refused with.
REFUSED = {
    "ss_vae_M2_enumerated": "is marked for enumeration", "scanvi_enumerated": "is marked for enumeration",
    "gmm_full_guide": "is marked for enumeration", "tracking_1d": "is marked for enumeration",
    "svi_torch_minibatch": "cannot subsample plate", "svi_part_ii_subsampled": "cannot subsample plate",
    "lda_minibatch": "cannot subsample plate",
}  # fmt: skip


#: Two objectives of each; of those that are no examples of Pyro's own the table alone has others than the ELBO.
MET = [(p, o) for p in ALL for o in ("ELBO", "IWAE") if o == "ELBO" or FILES[p] not in ("classics", "numpyros")]


@pytest.mark.parametrize(("program", "objective"), MET)
def test_a_program_of_pyros(program, objective):
    came = checks.outcomes(program, objective, ("loss", "gradient", "fit"), quick=True)
    if objective != "ELBO" and program in REFUSED:
        assert REFUSED[program] in came["gradient"]
    else:
        assert {what for what in came.values() if what not in ("ok", "-")} == set()


#: What the sleep phase says of programs with several observed sites; None: it trains them.
PROGRAMS = {
    "svi_part_i": None, "dmm": None, "dmm_iaf": None, "capture_recapture_1": None, "capture_recapture_5": None,
    "csis": None, "smcfilter": None, "ar2": None, "inclined_plane": None,
    "hmm_1": "a Delta that carries parameters", "hmm_6": "this one draws nothing",
    "mixed_hmm_continuous_discrete": 'sites "still_0"', "tracking_1d_drawn": 'sites "is_real", "is_spurious"',
}  # fmt: skip


@pytest.mark.parametrize("name", PROGRAMS)
def test_programs_that_observe_several_parts_sleep(name):
    pair, why = make(name), PROGRAMS[name]
    if why is None:
        assert math.isfinite(pv.SleepPhi().loss_and_grads(pair.model, pair.guide, *pair.args))
    else:
        with pytest.raises(ValueError, match=why):
            pv.SleepPhi().loss_and_grads(pair.model, pair.guide, *pair.args)


def test_an_objective_is_the_loss_of_a_training_module():
    """As Lightning's modules have it: a module that is called on a batch, and whose parameters an optimizer takes."""
    x = torch.randn(64)
    data = TensorDataset(x, 0.5 + 1.5 * x + 0.1 * torch.randn(64))
    with pyro.settings.context(module_local_params=True):
        model = Line(64)
        loss_fn = pv.ELBO()(model, AutoNormal(model))
        first = loss_fn(*data[:16]).item()  # makes the guide's parameters
        optimizer = torch.optim.Adam(loss_fn.parameters(), lr=0.05)
        for batch in [batch for _ in range(50) for batch in DataLoader(data, 16)]:
            optimizer.zero_grad()
            loss = loss_fn(*batch)
            loss.backward()
            optimizer.step()
        found = AutoNormal.median(loss_fn.guide)
    assert loss.item() < first
    assert abs(found["coeff"] - 1.5) < 0.1
    assert not list(pyro.get_param_store().keys())
