"""Adafactor as you use it today, fused.

``Adafactor`` is that of torch.optim; those of other libraries are in ``fused_adafactor.dialects``.

"""

from fused_adafactor.dialects.torch import Adafactor

__all__ = ["Adafactor"]
__version__ = "0.1.0.dev0"
