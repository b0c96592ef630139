"""`python -m nmoe` is `nmoe`."""

from nmoe.cli.main import main

if __name__ == "__main__":
    main()
