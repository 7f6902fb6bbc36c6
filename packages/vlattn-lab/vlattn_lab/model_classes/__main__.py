"""python -m vlattn_lab.model_classes [mappings] [options]."""

from vlattn_lab.model_classes.run import main

if __name__ == "__main__":
    main()
