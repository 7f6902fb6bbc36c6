"""What README and CONTRIBUTING name exists, and what they show runs."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
DOCUMENTS = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")
MADE = ("demo/", ".venv")  # by the commands themselves


def text(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def blocks(name: str, language: str) -> list[str]:
    return [body for kind, body in re.findall(r"^```(\w*)\n(.*?)^```$", text(name), re.M | re.S) if kind == language]


@pytest.mark.parametrize("name", DOCUMENTS)
def test_every_path_exists(name):
    """A path is what stands in backticks or a link and has a slash or a file's ending, and no blank."""
    prose = re.sub(r"^```.*?^```$", "", text(name), flags=re.M | re.S)
    found = {*re.findall(r"`([\w./-]+)`", prose), *re.findall(r"\]\(([\w./-]+)\)", prose)}
    paths = {path for path in found if "/" in path or re.search(r"\.(py|md|toml|png|html|json)$", path)}
    assert name == "CHANGELOG.md" or paths
    missing = sorted(path for path in paths if path not in MADE and not (ROOT / path).exists())
    assert not missing, f"{name} names {missing}"


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md"])
def test_every_command_exists(name):
    typer_main = pytest.importorskip("typer.main")
    from vlattn_fast import cli

    targets = set(re.findall(r"^(\w+):", text("Makefile"), re.M))
    commands = typer_main.get_command(cli.app).commands
    lines = [line for block in blocks(name, "") for line in block.splitlines() if line]
    assert lines
    for line in lines:
        program, subject, *rest = line.split("#")[0].split()
        known = {"make": targets, "vlattn": commands}[program]
        assert subject in known, line
        if program == "vlattn":
            options = {option for parameter in commands[subject].params for option in parameter.opts}
            assert {word for word in rest if word.startswith("--")} <= options, line
    for program, subject in re.findall(r"`(make|vlattn) (\w+)", text(name)):
        assert subject in {"make": targets, "vlattn": commands}[program], subject


@pytest.mark.parametrize("number", range(len(blocks("README.md", "python"))))
def test_the_readme_runs(number, tmp_path, monkeypatch, capsys):
    pytest.importorskip("transformers")
    monkeypatch.chdir(tmp_path)
    code = blocks("README.md", "python")[number]
    exec(compile(code, "README.md", "exec"), {"__name__": "readme"})
    printed = capsys.readouterr().out.split("torch.Size(")[1:]
    said = re.findall(r"print\(.*?\)\s+# \(([\d, ]+)\)", code)
    assert [shape.split("])")[0].strip("[") for shape in printed] == said
    assert (tmp_path / "relevancy.png").exists()


def test_the_picture_is_the_demos(tmp_path):
    """Same size and, up to the drawing library's version, same pixels."""
    image = pytest.importorskip("PIL.Image")
    np = pytest.importorskip("numpy")
    from vlattn_fast import _demo

    _demo.picture(tmp_path)
    shown, made = (
        np.asarray(image.open(path).convert("RGB"), dtype=float)
        for path in (ROOT / "docs" / "digitscenes.png", tmp_path / "digitscenes.png")
    )
    assert shown.shape == made.shape
    assert abs(shown - made).mean() < 2


def test_ci_runs_make_test():
    assert "exec make test" in text(".ci/run")
