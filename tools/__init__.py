"""What only a developer runs: each as `python -m tools.<name>` in the folder of the repository. Nothing of it is installed."""
