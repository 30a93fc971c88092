"""The generate command under its historical name: see `python mamba_generate.py --help`."""

import sys

from mamba_ssm.commands.generate import main

if __name__ == "__main__":
    sys.exit(main(prog="mamba_generate.py"))
