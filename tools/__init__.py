"""Tools for developers: `python -m tools.<name>` in the folder of the repository. No tool is installed."""
