"""Adafactor as you use it today, fused.

``Adafactor`` is that of torch.optim; those of other libraries are in ``fused_adafactor.dialects``.
``convert_state_dict`` takes a checkpoint from one of them to another.
"""

from fused_adafactor.convert import convert_state_dict
from fused_adafactor.dialects.torch import Adafactor

__all__ = ["Adafactor", "convert_state_dict"]
__version__ = "0.1.0.dev0"
