"""Dialects: one thin class per Adafactor in use, with its constructor, param group keys and state
keys.
"""
