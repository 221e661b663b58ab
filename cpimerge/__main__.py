"""`python -m cpimerge` is the command `cpimerge`."""

from .cli import main

if __name__ == "__main__":
    main(prog_name="cpimerge")
