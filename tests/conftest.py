"""Settings shared by every test: hypothesis repeats its examples on every run; without a GPU, Triton interprets."""

import os
import signal

import torch
from hypothesis import settings

settings.register_profile("full", deadline=None, max_examples=40, derandomize=True)
settings.register_profile("quick", deadline=None, max_examples=8, derandomize=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "full"))

# A shell starts background jobs with Ctrl-C ignored; the tests of interruption need it as in the foreground.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Parity is of float32 itself, not of TF32.
torch.set_float32_matmul_precision("highest")
torch.backends.cudnn.allow_tf32 = False

# Read when a kernel is defined, so before anything imports one.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
