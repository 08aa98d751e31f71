"""Commands of ``python -m fused_adafactor``, a module each: ``add_parser`` and ``run``."""
