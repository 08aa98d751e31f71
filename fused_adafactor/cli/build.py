"""``build``: build a native library on demand, into a cache of this user's own."""

from __future__ import annotations

import argparse
import subprocess
import sys

from fused_adafactor import building


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to a parser."""
    text = "build a native library into a private cache, from the sources that are installed"
    parser = commands.add_parser("build", help=text, description=f"{text.capitalize()}.")
    parser.add_argument("--backend", choices=("cuda", "cpp"), default="cuda")
    parser.add_argument("--force", action="store_true", help="even if it is there")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Build a library, unless it is there and would come out the same.

    Returns:
        0, or 1 if there is none.
    """
    try:
        library = building.build_into_cache(args.backend, args.force)
    except subprocess.CalledProcessError as error:
        print(f"build: {error.cmd[0]} failed; what it said is above", file=sys.stderr)
        return 1
    except (OSError, building.CannotBuild) as error:
        print(f"build: {error}", file=sys.stderr)
        return 1
    print(library)
    used = building.find_library(args.backend)
    if used != library:
        print(f"build: {used}, which was installed, is loaded and not this one", file=sys.stderr)
    return 0
