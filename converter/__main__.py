"""`python -m bwla_converter`: the same as `bwla-convert`."""

from bwla_converter.cli.convert import main

if __name__ == "__main__":
    main()
