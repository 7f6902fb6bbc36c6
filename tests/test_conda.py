"""conda/recipe.yaml, which tools/conda.py builds, beside pyproject.toml."""

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_the_recipe_has_the_facts_of_pyproject() -> None:
    """conda-forge has torch under the name pytorch."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    recipe = [line.strip() for line in (ROOT / "conda" / "recipe.yaml").read_text().splitlines()]
    facts = project["project"]
    assert f'version: "{facts["version"]}"' in recipe and f"summary: {facts['description']}" in recipe
    assert recipe.count(f"- python {facts['requires-python']}") == 2
    needs = [re.sub(r"^(\w+)(>=.*)$", r"\1 \2", need) for need in (*facts["dependencies"], *project["build-system"]["requires"])]
    needs = [need.replace("torch ", "pytorch ") for need in needs]
    assert not {f"- {need}" for need in needs} - {*recipe}
    (command,) = facts["scripts"].items()
    assert f"- {' = '.join(command)}" in recipe
