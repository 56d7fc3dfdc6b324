"""Settings shared by every test: hypothesis repeats the same examples on every run."""

import os
import signal

from hypothesis import settings

settings.register_profile("full", deadline=None, max_examples=40, derandomize=True)
settings.register_profile("quick", deadline=None, max_examples=8, derandomize=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "full"))

# A shell starts background jobs with Ctrl-C ignored; the tests of interruption need it as in the foreground.
signal.signal(signal.SIGINT, signal.default_int_handler)
