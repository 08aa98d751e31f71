"""``python -m fused_adafactor``: what is installed, and what it does."""

from __future__ import annotations

import argparse
import sys

from fused_adafactor import __version__
from fused_adafactor.cli import bench, build, codegen, demo, info

COMMANDS = (info, demo, bench, build, codegen)


def main(argv: list[str] | None = None) -> int:
    """Parse the command line and run a command.

    Args:
        argv: Arguments without the program's name; None for those of the process.

    Returns:
        Exit status: 0 if the command did what it says, 1 if it found something broken, 2 for a
        command line that cannot be understood.
    """
    parser = argparse.ArgumentParser(prog="python -m fused_adafactor", description=__doc__)
    parser.add_argument("--version", action="version", version=f"fused_adafactor {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    for command in COMMANDS:
        command.add_parser(commands)
    args = parser.parse_args(argv)
    status: int = args.run(args)
    return status


if __name__ == "__main__":
    sys.exit(main())
