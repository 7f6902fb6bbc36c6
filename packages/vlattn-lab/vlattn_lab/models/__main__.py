"""`make models`: python -m vlattn_lab.models [mappings] [options]."""

from vlattn_lab.models.run import main

if __name__ == "__main__":
    main()
