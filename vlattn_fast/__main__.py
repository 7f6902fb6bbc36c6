"""`python -m vlattn_fast` is the `vlattn` command; torchrun starts it as `-m vlattn_fast`."""

from vlattn_fast.cli import main

if __name__ == "__main__":
    main()
