"""`python -m factsmith`: the same as the `factsmith` command."""

from factsmith.cli import main

if __name__ == "__main__":
    main()
