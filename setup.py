"""The package is declared in pyproject.toml; the native library of csrc/ will be declared here."""

from setuptools import setup

setup()
