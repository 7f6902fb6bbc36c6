"""Explains a tiny model of each class of transformers, and compares with stored maps.

    python -m tools.model_classes [MAPPING ...]

`--edits`, `--held` and `--unchanged` compare more.
"""

from tools.model_classes.run import main

if __name__ == "__main__":
    main()
