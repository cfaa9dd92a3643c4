"""`python -m resist` is `resist`."""

from resist.cli import main

if __name__ == "__main__":
    main()
