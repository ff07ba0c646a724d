"""Tests that import this draw the same tensors for the same example of hypothesis."""

import torch
from hypothesis import register_random


class TorchRandom:
    """Lets hypothesis seed PyTorch's numbers, so that an example is the same every time."""

    seed = staticmethod(torch.manual_seed)
    getstate = staticmethod(torch.get_rng_state)
    setstate = staticmethod(torch.set_rng_state)


RANDOM = TorchRandom()
register_random(RANDOM)
