"""Repeats an experiment on DigitScenes: python -m vlattn_lab.experiments NAME [options]."""

from vlattn_lab.experiments.run import main

if __name__ == "__main__":  # processes that measure import this file, too
    main()
