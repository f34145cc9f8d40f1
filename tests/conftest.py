"""Settings for every test: property tests without deadlines, because the machine may be shared.

Their examples are the same every time, so that a failure is a regression; ``--hypothesis-profile=explore`` draws new
ones.
"""

from hypothesis import HealthCheck, settings

settings.register_profile("explore", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("same-every-time", parent=settings.get_profile("explore"), derandomize=True)
settings.load_profile("same-every-time")
