"""keras.optimizers.Adafactor as a torch optimizer: its arguments, numbers and checkpoints."""

from fused_adafactor.dialects.keras.optimizer import Adafactor

__all__ = ["Adafactor"]
