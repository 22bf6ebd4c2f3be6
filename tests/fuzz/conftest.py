"""Examples that are the same in every run, few of them; ``HYPOTHESIS_PROFILE=long`` searches anew, for long."""

import os

from hypothesis import HealthCheck, settings

ALIKE = {"deadline": None, "database": None, "suppress_health_check": list(HealthCheck), "print_blob": False}
settings.register_profile("quick", derandomize=True, max_examples=15, **ALIKE)
settings.register_profile("long", derandomize=False, max_examples=2000, **ALIKE)


settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "quick"))
