"""``python -m mamba_ssm info | build | convert | generate``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from . import __version__

COMMANDS = {
    "info": "versions, devices, and which backend serves each op",
    "build": "compile the kernels for the installed torch",
    "convert": "a checkpoint from one format to the other, without loss",
    "generate": "generate text with a language model (the same as mamba-generate)",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command with the rest of the arguments; returns the exit status."""
    listing = "\n".join(f"  {name:9} {meaning}" for name, meaning in COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="python -m mamba_ssm",
        description=f"commands:\n{listing}",
        epilog="python -m mamba_ssm COMMAND --help lists the options of a command",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"mamba_ssm {__version__}")
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.command == "info":
        from .info import main as run
    elif args.command == "build":
        from ._build import main as run
    elif args.command == "convert":
        from .commands.convert import main as run
    else:
        from .commands.generate import main as run
    return run(args.arguments) or 0


if __name__ == "__main__":
    sys.exit(main())
