"""The versions that are supported, those that tests ran with, and those that `make` installs."""

import re
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from tools import environments, versions
from tools.requirements import requirements

ROOT = Path(__file__).parents[1]
LOCK = dict(line.lower().split("==") for line in (ROOT / "tools" / "lock.txt").read_text(encoding="utf-8").split())


def test_make_installs_what_is_asked_for() -> None:
    """Each package has a locked version that fits pyproject.toml and the Makefile. No line names a file or a registry."""
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    models = re.findall(r"^MODELS \?= (.+)$", makefile, re.M)[0].split()
    named = [Requirement(line) for line in (*requirements("all", "test"), *models)]
    for one in named:
        if one.name not in ("torch", "triton"):  # the Makefile has them
            assert one.specifier.contains(LOCK[one.name.lower()]), one
    assert all(re.fullmatch(r"[\w.]+", version) for version in LOCK.values())


def test_supported_versions_are_those_of_the_project() -> None:
    words = versions.supported()
    assert words["python"] == "3.11 or newer" and words["transformers"] == "5.18 to 5.24"
    assert {Requirement(one).name for one in requirements()} <= {*words}


def test_rows_hold_what_the_pages_say() -> None:
    rows = versions.stored()
    assert all(row.keys() == {*versions.PACKAGES, "tests", "passed", "skipped", "failed", "date"} for row in rows)
    assert all(row["passed"] for row in rows)
    whole = [row for row in rows if row["tests"] == "all" and not row["failed"]]
    lowest, highest = re.findall(r"\d+\.\d+", versions.supported()["transformers"])
    assert any(row["transformers"].startswith(f"{lowest}.") for row in whole)
    assert any(row["transformers"].startswith(f"{highest}.") for row in whole)


def test_the_hubs_page_installs_what_make_hub_tries() -> None:
    """Else transformers, which reads the folder, has two versions."""
    page = ROOT / "packages" / "vlattn-native" / "README.md"
    if page.exists():  # the package can be deleted
        installs = re.findall(r'^pip install "(kernels.+)" "(transformers.+)"$', page.read_text(encoding="utf-8"), re.M)
        assert installs and {*installs[0]} == {*environments.HUB[:2]}


def test_a_run_that_failed_is_no_proof(monkeypatch: pytest.MonkeyPatch) -> None:
    row = {**dict.fromkeys(versions.PACKAGES, "9.8.0"), "tests": "tests/a.py", "passed": 5, "skipped": 0, "date": "2026-01-01"}
    older = {**row, **dict.fromkeys(versions.PACKAGES, "9.7.10+cpu"), "failed": 0}
    monkeypatch.setattr(versions, "stored", lambda: [{**row, "failed": 1}, older, {**older, "triton": None}])
    assert versions.requirements().count("9.7.10 to 9.7.10") == len(versions.PACKAGES) and "9.8" not in versions.requirements()
    assert "| 9.8.0 |" in versions.runs().splitlines()[2] and "| `tests/a.py` | 5 | 0 | 1 |" in versions.runs()
    assert "| none |" in versions.runs()


def test_counts_are_those_of_pytest(tmp_path: Path) -> None:
    suite = '<testsuite errors="1" failures="2" skipped="3" tests="10" />'
    (tmp_path / "report.xml").write_text(f"<testsuites>{suite}</testsuites>")
    assert versions.counts(tmp_path / "report.xml") == {"passed": 4, "skipped": 3, "failed": 3}
