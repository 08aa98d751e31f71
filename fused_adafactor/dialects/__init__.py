"""Dialects: one thin class per Adafactor in use, with its constructor and its keys."""
