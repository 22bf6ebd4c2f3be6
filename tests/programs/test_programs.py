"""Each of Pyro's programs with two objectives, eagerly; ``table.py`` has all objectives and all checks."""

import pytest

from tests.programs import ALL, checks

#: What no objective but the ELBO takes, by the sentence it is refused with.
REFUSED = {
    "ss_vae_M2_enumerated": "is marked for enumeration", "scanvi_enumerated": "is marked for enumeration",
    "gmm_full_guide": "is marked for enumeration", "tracking_1d": "is marked for enumeration",
    "svi_torch_minibatch": "cannot subsample plate", "svi_part_ii_subsampled": "cannot subsample plate",
    "lda_minibatch": "cannot subsample plate",
}  # fmt: skip


@pytest.mark.parametrize("objective", ["ELBO", "IWAE"])
@pytest.mark.parametrize("program", ALL)
def test_a_program_of_pyros(program, objective):
    came = checks.outcomes(program, objective, ("loss", "gradient", "fit"), quick=True)
    if objective != "ELBO" and program in REFUSED:
        assert REFUSED[program] in came["gradient"]
    else:
        assert {what for what in came.values() if what not in ("ok", "-")} == set()
