"""What python -m tools.wheel and python -m tools.release decide; the commands themselves build, which takes minutes."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tools import release, wheel
from tools.lists import ROOT, VERSIONED, Lists


@pytest.fixture
def lists(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Lists:
    """Version 0.2.0 in each file that has it; no command finds anything."""
    files = {
        "pyproject.toml": '[project]\nversion = "0.2.0"\n',
        "CHANGELOG.md": "# Changelog\n\n## 0.2.0 (unreleased)\n\n- See more.\n- Faster.\n\n## 0.1.0 (2026-11-29)\n\n- See.\n",
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(Lists, "stale", lambda self: [])
    monkeypatch.setattr(release, "run", lambda *words: [])
    return Lists(tmp_path)


def test_a_wheel_is_for_the_oldest_glibc_in_its_name() -> None:
    for tags, version in {
        "manylinux_2_27_x86_64.manylinux_2_28_x86_64": "2.27",
        "manylinux_2_17_aarch64.manylinux2014_aarch64": "2.17",
        "manylinux_2_17_x86_64.manylinux_2_5_x86_64": "2.5",
    }.items():
        assert wheel.oldest(Path(f"vlattn_fast-0.1.0-py3-none-{tags}.whl")) == version
    for tags in ("manylinux_2_31_x86_64.manylinux_2_34_x86_64", "linux_x86_64"):
        with pytest.raises(SystemExit, match="must run with glibc 2.28; `auditwheel show .*` names what needs a newer one"):
            wheel.oldest(Path(f"vlattn_fast-0.1.0-py3-none-{tags}.whl"))


def test_the_version_of_a_release(lists: Lists, monkeypatch: pytest.MonkeyPatch) -> None:
    assert release.version(lists) == f"0.2.0 of pyproject.toml, also in {', '.join(VERSIONED)}"
    monkeypatch.setattr(release, "run", lambda *words: [words[-1]])
    with pytest.raises(release.Failed, match="v0.2.0 is released already; write the next version into pyproject.toml"):
        release.version(lists)
    monkeypatch.setattr(Lists, "stale", lambda self: ["docs/api.md", "CITATION.cff"])
    with pytest.raises(release.Failed, match="^CITATION.cff must have the version of pyproject.toml, 0.2.0; run `make lists`"):
        release.version(lists)


def test_the_changelog_of_a_release(lists: Lists) -> None:
    path = lists.root / "CHANGELOG.md"
    text = path.read_text()
    assert release.changelog(lists) == "2 entries of 0.2.0; before the tag, write its date in place of (unreleased)"
    path.write_text(text.replace("unreleased", "2026-12-24"))
    assert release.changelog(lists) == "2 entries of 0.2.0, (2026-12-24)"
    for old, new, words in (
        ("(unreleased)", "(soon)", r"must be \(unreleased\) or like \(2026-11-29\); got '\(soon\)'"),
        ("0.2.0 (unreleased)", "0.1.1 (2026-12-01)", r"begins with 0.1.1; write '## 0.2.0 \(unreleased\)' above it"),
        ("- See more.\n- Faster.\n", "", "says nothing of 0.2.0; write what a user can do now"),
    ):
        path.write_text(text.replace(old, new))
        with pytest.raises(release.Failed, match=words):
            release.changelog(lists)


def test_what_is_not_committed_is_no_part_of_a_release(lists: Lists, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(release, "run", lambda *words: [" M setup.py", "?? new.py"])
    with pytest.raises(release.Failed, match="2 files are not committed, such as setup.py; commit or remove them"):
        release.tree(lists)


def test_the_folder_for_the_hub_is_one_file(lists: Lists) -> None:
    (lists.root / "build" / "hub" / "build").mkdir(parents=True)
    (lists.root / "build" / "hub" / "build.toml").write_text("[general]")
    assert release.hub(lists).startswith("dist/vlattn-fast-hub-0.2.0.zip: ")
    with zipfile.ZipFile(lists.root / "dist" / "vlattn-fast-hub-0.2.0.zip") as archive:
        assert {"build/", "build.toml"} == {*archive.namelist()} and archive.read("build.toml") == b"[general]"


def test_nothing_is_released_from_here() -> None:
    for words, message in (
        ((), "--rehearse does all parts but the upload"),
        (("--rehearse", "x"), "PART must be one of tree, version"),
    ):
        done = subprocess.run([sys.executable, "-m", "tools.release", *words], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 2 and message in done.stderr, done.stderr
