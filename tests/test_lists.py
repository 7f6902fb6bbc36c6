"""What follows from the code stands in the lists of exports, pages and methods: `make lists` writes them."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tools import navigation
from tools.lists import VERSIONED, Lists
from vlattn_fast.interpret.relevancy.methods.registry import first_lines

ROOT = Path(__file__).parents[1]
METHODS = "vlattn_fast.interpret.relevancy.methods"
SCORE = """
class Shifted(Score):
    name = "shifted"
"""
METHOD = """
class LayerMean(CachedCalls):
    \"\"\"The mean over the layers.

    More.
    \"\"\"

    name = "layer_mean"


class Half(LayerMean):
    \"\"\"Half of it.\"\"\"

    name = "layer_mean:half"
"""


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of what the command reads."""
    ignored = shutil.ignore_patterns("*.so", "*.safetensors", "__pycache__", "*.png", "*.jpg")
    for folder in ("vlattn_fast", "docs"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=ignored)
    for name in ("pyproject.toml", *VERSIONED):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    return tmp_path


def test_the_lists_are_up_to_date() -> None:
    assert Lists().stale() == [], "run make lists"


def test_the_page_of_methods_has_the_lines_of_the_help_text() -> None:
    shown = re.findall(r'^\| `"([\w:]+)"` \| (.+) \|$', Lists().methods_page(), re.M)
    assert dict(shown) == first_lines() and [name for name, _ in shown] == [*first_lines()]


def test_what_is_added_is_written_everywhere(tree: Path) -> None:
    (tree / "vlattn_fast/ops/toy.py").write_text("OPERATOR = Operator(toy, describe_call, BACKENDS)\n")
    (tree / "vlattn_fast/backends/reference/toy.py").write_text("def toy(x): ...\n")
    (tree / "vlattn_fast/scores/shifted.py").write_text(SCORE)
    (tree / "vlattn_fast/interpret/relevancy/methods/layer_mean.py").write_text(METHOD)
    (tree / "vlattn_fast/nn/new_loss.py").write_text("class NewLoss: ...\n")
    with (tree / "vlattn_fast/nn/__init__.py").open("a") as layers:
        layers.write("from vlattn_fast.nn.new_loss import NewLoss\n")
    (tree / "docs/guides/see.md").write_text("# See: a model\n")
    (tree / "docs/guides/masks.md").unlink()
    lists = Lists(tree)
    lists.write()
    for name, lines in {
        "vlattn_fast/__init__.py": ["from vlattn_fast.ops.toy import toy", '    "toy",'],
        "vlattn_fast/backends/reference/__init__.py": ["from vlattn_fast.backends.reference.toy import toy", '    "toy",'],
        "vlattn_fast/scores/__init__.py": ["from vlattn_fast.scores.shifted import Shifted", '    "Shifted",'],
        "vlattn_fast/methods.py": [f"from {METHODS}.layer_mean import LayerMean", '    "LayerMean",'],
        "vlattn_fast/nn/__init__.py": ['    "NewLoss",'],
        "docs/api.md": ["::: vlattn_fast.scores.Shifted", "::: vlattn_fast.nn.NewLoss"],
        "docs/operators/toy.md": ["# toy", "::: vlattn_fast.toy"],
        "mkdocs.yml": ["          - toy: operators/toy.md", '      - "See: a model": guides/see.md'],
        "docs/methods.md": [
            '| `"layer_mean"` | The mean over the layers. |', '| `"layer_mean:half"` | Half of it. |',
            "## layer_mean", "::: vlattn_fast.methods.LayerMean",
        ],
    }.items():  # fmt: skip
        assert {*lines} <= {*lists.text(name).splitlines()}, name
    assert "Half" not in lists.text("vlattn_fast/methods.py") and "methods.Half" not in lists.text("docs/methods.md")
    assert "masks.md" not in lists.text("mkdocs.yml")
    assert lists.text("docs/api.md").index("scores.Shifted") < lists.text("docs/api.md").index("## Layers and losses")
    groups = navigation.sections_of(lists.text("mkdocs.yml"))
    assert groups["Guides"][-1] == "guides/see.md" and "operators/toy.md" in groups["Reference"]
    assert lists.stale() == lists.write() == []


def test_the_version_is_written_where_it_is_repeated(tree: Path) -> None:
    lists = Lists(tree)
    before = {name: lists.text(name).splitlines() for name in VERSIONED}
    (tree / "pyproject.toml").write_text(lists.text("pyproject.toml").replace(f'"{lists.version()}"', '"12.3.0rc1"'))
    assert lists.stale() == lists.write() and {*lists.write()} == set()
    lines = [["version: 12.3.0rc1"], ['  version: "12.3.0rc1"'], ["copyright: vlattn_fast 12.3.0rc1"]]
    lines.append(['version = "12.3.0rc1"', 'dependencies = ["vlattn_fast==12.3.0rc1", "torch>=2.10"]'])
    for (name, old), expected in zip(before.items(), lines, strict=False):  # the last file is of a package that can be deleted
        assert [new for new, was in zip(lists.text(name).splitlines(), old, strict=True) if new != was] == expected, name


def test_options_and_order_stay(tree: Path) -> None:
    lists = Lists(tree)
    before = {name: lists.text(name) for name in ("docs/api.md", "mkdocs.yml", "vlattn_fast/methods.py")}
    for name in ("docs/api.md", "vlattn_fast/methods.py"):
        text = lists.text(name).replace("::: vlattn_fast.scores.Dot\n    options: {members: false}\n\n", "")
        (tree / name).write_text(text.replace('    "Weighted",\n', ""))
    assert lists.stale() == ["vlattn_fast/methods.py", "docs/api.md"] == lists.write()
    for name in ("vlattn_fast/methods.py", "mkdocs.yml"):
        assert lists.text(name) == before[name]
    assert sorted(lists.text("docs/api.md").split()) == sorted(before["docs/api.md"].split())


def test_the_command_checks_and_writes_nothing() -> None:
    done = subprocess.run([sys.executable, "-m", "tools.lists", "--check"], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, ""), done.stdout
