"""Run `bwla-convert` as `python -m bwla_converter`."""

from bwla_converter.cli.convert import main

if __name__ == "__main__":
    main()
