"""Scenario: an engine that compiles the model, as it does without enforce_eager: attention stays in sight, and can be edited."""

from __future__ import annotations

from tests.helpers.steered import checked
from tests.helpers.tiny import saved


def main() -> None:
    checked(saved(), enforce_eager=False, block_size=32)


if __name__ == "__main__":
    main()
