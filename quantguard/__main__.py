"""Run the command line as ``python -m quantguard``."""

from .cli.main import main

if __name__ == "__main__":
    main(prog_name="quantguard")
