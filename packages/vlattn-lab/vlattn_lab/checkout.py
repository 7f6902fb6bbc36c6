"""The repository that holds this package: documents are made of its stored rows, and written into its docs/."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
