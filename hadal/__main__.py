"""`python -m hadal` is the same as `hadal`."""

from hadal.cli import main

if __name__ == "__main__":
    main()
