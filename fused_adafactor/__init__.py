"""Adafactor as you use it today, fused: torch.optim's by default, other libraries' in
``fused_adafactor.dialects``.
"""

from fused_adafactor.dialects.torch import Adafactor

__all__ = ["Adafactor"]
__version__ = "0.1.0.dev0"
