"""What the documents name exists, what they show runs and prints what they say, and the site's pages are complete."""

import ast
import importlib
import importlib.util
import inspect
import json
import re
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import vlattn_fast as va
from tools import navigation
from vlattn_fast.checking.cases import Sizes, examples
from vlattn_fast.interpret.adapters import registry
from vlattn_fast.interpret.relevancy.methods.registry import method_list

ROOT = Path(__file__).parent.parent
PAGES = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").rglob("*.md"))
DOCUMENTS = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md", "examples/README.md", *PAGES]
MADE = (
    "demo/",
    "site/",
    ".venv",
    ".venv-docs",
    "build/compiled/",
    "build/docs/",
    "build/cuda/libvlattn_cuda.so",
    "build/hub/",
    "build/rehearsal/",
    "page.html",
)  # by the commands themselves
GENERATED = ("docs/index.md", "docs/report.md")  # pages of the site that python -m tools.pages makes whole
SHOWN = ("cpu", "published")  # by README, of the costs of a map
SECTIONS = navigation.sections_of((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
LOOKED_UP = ("Reference", "Evidence", "Developers")  # sections whose pages are not read from the first line to the last
WORDS = 1500  # of any other page
CALLS = sorted(name for name in va.__all__ if inspect.isfunction(getattr(va, name)))


def text(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def blocks(name: str, language: str) -> list[str]:
    return [body for kind, body in re.findall(r"^```(\w*)\n(.*?)^```$", text(name), re.M | re.S) if kind == language]


def there(path: Path) -> bool:
    """Whether a path exists, or is of a package that this clone was made without."""
    top, *inner = path.relative_to(ROOT).parts if path.is_relative_to(ROOT) else [""]
    return path.exists() or (top == "packages" and not ROOT.joinpath(top, *inner[:1]).exists())


@pytest.mark.parametrize("name", DOCUMENTS)
def test_every_path_exists(name):
    """A path is what stands in backticks and has a slash or a file's ending, and no blank; a link counts from its page.

    A stored benchmark has a slash in its name, too.
    """
    prose = re.sub(r"^```.*?^```$", "", text(name), flags=re.M | re.S)
    named = {
        path for path in re.findall(r"`([\w./-]+)`", prose) if "/" in path or re.search(r"\.(py|md|toml|png|html|json)$", path)
    }
    known = {*MADE, *(row["benchmark"] for row in json.loads(text("benchmarks/results/cpu.json")))}
    written = {  # by the page's own code: the figures that the site puts into a folder of the page's name
        f"{Path(name).stem}/{figure}" for figure in re.findall(r'"([\w-]+\.\w+)"', "".join(blocks(name, "python")))
    }
    missing = [path for path in named - known if not there(ROOT / path)]
    for path in re.findall(r"\]\(([\w./-]+)(?:#[\w-]*)?\)", prose):
        target = ((ROOT / name).parent / path).resolve()
        if path not in written and not there(target) and target not in {ROOT / page for page in GENERATED}:
            missing.append(path)
    assert not missing, f"{name} names {sorted(missing)}"


@pytest.mark.parametrize("name", [name for name in DOCUMENTS if blocks(name, "")])
def test_every_command_exists(name):
    typer_main = pytest.importorskip("typer.main")
    from vlattn_fast import cli

    targets = set(re.findall(r"^([\w-]+):", text("Makefile"), re.M))
    commands = typer_main.get_command(cli.app).commands
    lines = [line for block in blocks(name, "") for line in block.splitlines() if line]
    assert lines
    for line in lines:
        program, subject, *rest = line.split("#")[0].split()
        if program == "uv" and ".[" not in line:
            assert (subject, *rest[:1]) in (("venv",), ("pip", "install"), ("run", "--no-sync")), line
            continue
        if program in ("pip", "uv"):
            extras = re.search(r"\[(.+)\]", line)
            assert extras and all(f"\n{extra} = [" in text("pyproject.toml") for extra in extras[1].split(",")), line
            continue
        if program == "python":
            module = rest[0]  # those of vlattn_lab are known to its tests
            assert subject == "-m" and (module.startswith("vlattn_lab.") or importlib.util.find_spec(module)), line
            continue
        known = {"make": targets, "vlattn": commands}[program]
        assert subject in known, line
        if program == "vlattn":
            options = {option for parameter in commands[subject].params for option in parameter.opts}
            assert {word for word in rest if word.startswith("--")} <= options, line


@pytest.mark.parametrize("name", DOCUMENTS)
def test_every_command_in_a_sentence_exists(name):
    typer_main = pytest.importorskip("typer.main")
    from vlattn_fast import cli

    known = {"make": set(re.findall(r"^([\w-]+):", text("Makefile"), re.M)), "vlattn": typer_main.get_command(cli.app).commands}
    for program, subject in re.findall(r"`(make|vlattn) (\w[\w-]*)", text(name)):
        assert subject in known[program], f"{program} {subject}"


def of_packages(name: str) -> bool:
    """Whether a page's code imports a package next to this one, whose tests run it; README's runs here."""
    return name != "README.md" and bool(re.search(r"^import vlattn_lab", "".join(blocks(name, "python")), re.M))


def save_what_readme_opens(folder: Path) -> None:
    """A small model under the name of a large one, where from_pretrained looks first, and a photo."""
    from PIL import Image
    from transformers import GenerationConfig

    from tests.helpers import saved_models

    model = saved_models.save_llava(folder / "llava-hf" / "llava-interleave-qwen-0.5b-hf")
    GenerationConfig(suppress_tokens=[1, 2, 8]).save_pretrained(model)  # random weights say neither <end> nor <image>
    Image.new("RGB", (60, 40), "white").save(folder / "photo.jpg")


def check_what_readme_made(folder: Path, explanation: Any) -> None:
    """The figure that README shows is that of its code, up to the drawing library's version; the page is of the other model."""
    import numpy as np
    from PIL import Image

    shown, made = (
        np.asarray(Image.open(path).convert("RGB"), dtype=float) for path in (ROOT / "docs" / "answer.png", folder / "answer.png")
    )
    assert shown.shape == made.shape and abs(shown - made).mean() < 1
    assert "![" in text("README.md") and text("README.md").count("](docs/answer.png)") == 1
    assert len(explanation.answer[0]) == 20 and len(explanation.image) == 1
    assert (folder / "page.html").stat().st_size > 10_000


@pytest.mark.parametrize("name", [name for name in DOCUMENTS if blocks(name, "python") and not of_packages(name)])
def test_the_code_runs(name, tmp_path, monkeypatch, capsys):
    """The blocks of a page run in turn, and each `print(...)  # text` prints that text."""
    pytest.importorskip("matplotlib")
    for package in re.findall(r"^(?:import|from) (\w+)", "\n".join(blocks(name, "python")), re.M):
        pytest.importorskip(package)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(registry, "ADAPTERS", dict(registry.ADAPTERS))  # a guide adds an adapter
    if name == "README.md":
        save_what_readme_opens(tmp_path)
    variables = {"__name__": "document"}
    for number, code in enumerate(blocks(name, "python")):
        exec(compile(code, f"{name}, block {number}", "exec"), variables)
        said = re.findall(r"^ *print\(.*\)  # (.+)$", code, re.M)
        assert len(said) == len(re.findall(r"^ *print\(", code, re.M)), "a print without its result beside it"
        printed = capsys.readouterr().out.splitlines()
        assert [line for line in printed if line in said or not line.startswith("{'")] == said  # Trainer prints its numbers
    if name == "README.md":
        check_what_readme_made(tmp_path, variables["explanation"])


def test_every_page_is_in_the_navigation_once():
    listed = [f"docs/{page}" for pages in SECTIONS.values() for page in pages]
    assert sorted(listed) == sorted([*PAGES, *GENERATED])


@pytest.mark.parametrize("page", [page for name in SECTIONS if name not in LOOKED_UP for page in SECTIONS[name]])
def test_a_page_can_be_read_at_one_sitting(page):
    """Code, comments that become tables, and what mkdocstrings writes are not counted."""
    source = text("README.md" if page == "index.md" else f"docs/{page}")  # the site's first page is README
    prose = re.sub(r"^ *```.*?^ *```$|<!--.*?-->|^::: [^\n]*\n(?:    [^\n]*\n)*", "", source, flags=re.M | re.S)
    words = sum(bool(re.search(r"\w", word)) for word in prose.split())
    assert words <= WORDS, f"docs/{page} has {words} words"


def test_what_a_page_shows_is_there():
    """Each public call is shown on a page without an empty section, and CHANGELOG.md names it."""
    empty = {page: found for page in PAGES if (found := re.findall(r"^## (.+)\n\s*(?=## |\Z)", text(page), re.M))}
    assert not empty, f"write these sections: {empty}"
    unnamed = [name for name in CALLS if name not in text("CHANGELOG.md")]
    assert not unnamed, f"CHANGELOG.md does not say what a user can do with {unnamed}"
    named = {name for page in PAGES for name in re.findall(r"^::: vlattn_fast\.(\S+)$", text(page), re.M)}
    assert {*CALLS} <= named and {example.operator for example in examples(Sizes())} <= {*CALLS}
    for name in named:
        module, _, attribute = f"vlattn_fast.{name}".rpartition(".")
        documented = getattr(importlib.import_module(module), attribute)
        assert inspect.getdoc(documented), f"{name} has no docstring"
        prose = re.sub(r"`[^`]*`|^>>>.*", "", inspect.getdoc(documented), flags=re.M)
        assert not re.search(r"[\w)]\*[\w(]", prose), f"{name}: a product without blanks is set in italics"


@pytest.mark.parametrize("name", CALLS)
def test_docstrings_describe_the_arguments_there_are(name):
    """Each name before a colon under Args is an argument; one line may describe several."""
    call = getattr(va, name)
    parameters = set(inspect.signature(call).parameters)
    section = re.search(r"^Args:\n(.*?)(?=^\S|\Z)", inspect.getdoc(call), re.M | re.S)
    heads = re.findall(r"^    (\w+(?:, \w+)*):", section[1], re.M) if section else []
    assert {word for head in heads for word in head.split(", ")} <= parameters


def test_the_site_lists_the_methods(monkeypatch):
    """It reads the sources, and says what `help(va.explain)` says."""
    stand_in = SimpleNamespace(Extension=object, Function=object, Class=object)
    monkeypatch.setitem(sys.modules, "griffe", stand_in)
    extension = runpy.run_path(str(ROOT / "docs" / "arguments.py"))
    assert extension["method_list"]() == method_list() and method_list() in inspect.getdoc(va.explain)
    call = SimpleNamespace(docstring=SimpleNamespace(value="Methods:\n\n<methods>\n"), parameters=[])
    extension["OneLinePerArgument"]().on_function(func=call)
    assert call.docstring.value == f"Methods:\n\n{method_list()}\n"


def messages() -> set[str]:
    """The texts in the sources, with … for what a call fills in."""
    found = set()
    for path in (ROOT / "vlattn_fast").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.add(node.value)
            elif isinstance(node, ast.JoinedStr):
                found.add("".join(part.value if isinstance(part, ast.Constant) else "…" for part in node.values))
    return found


@pytest.mark.slow
def test_the_messages_of_troubleshooting_are_in_the_sources():
    known = messages()
    shown = re.findall(r"^### `(.+)`$", text("docs/troubleshooting.md"), re.M)
    gone = [one for one in shown if not any(re.search(".*".join(map(re.escape, one.split("…"))), each, re.S) for each in known)]
    assert len(shown) > 20 and not gone, f"no message: {gone}"


def test_backends_are_those_of_the_table():
    """The guide's table names each backend, in the order in which "auto" asks."""
    from vlattn_fast.ops import score_attention

    named = re.findall(r"^\| `(\w+)` \| .+ \| .+ \|$", text("docs/guides/choose_a_backend.md"), re.M)
    assert [backend for backend in named if backend in score_attention.BACKENDS] == list(score_attention.BACKENDS)


@pytest.mark.parametrize("page", [page for page in PAGES if "<!-- cost" in text(page)])
def test_a_page_has_the_costs_of_all_that_it_names(page):
    for on_gpu, stems in re.findall(r"<!-- cost( on an H100)?: (.+?) -->", text(page)):
        table = extension()["cost_on_gpu" if on_gpu else "cost"](stems.split())
        assert set(re.findall(r"^\| (\w+)/", table, re.M)) == set(stems.split())


def extension() -> dict[str, Any]:
    return runpy.run_path(str(ROOT / "docs" / "extension.py"))


def test_costs_that_another_machine_measured(tmp_path):
    """Its newest rows, if the setting with most rows has none of the benchmark; an error if there are none."""
    cost = extension()["cost"]
    row = next(row for row in json.loads(text("benchmarks/results/cpu.json")) if row["benchmark"].startswith("attention_map/"))
    elsewhere = {**row, "benchmark": "new/small", "device": "another CPU", "time": "9999", "p50_us": 7e6}
    cost.__globals__["ROWS"] = stored = tmp_path / "cpu.json"
    stored.write_text(json.dumps([row, row, elsewhere]))
    line, _, said = cost(["new"]).splitlines()[2:]
    assert line.startswith("| new/small (") and "| 7000.0 / " in line and "; another CPU, " in said
    assert "another CPU" not in cost(["attention_map"])
    with pytest.raises(ValueError, match=r"a cost comment must name benchmarks with rows in .*; got \['old'\]"):
        cost(["old"])


def test_costs_of_a_gpu_are_over_those_of_sdpa(tmp_path):
    cost = extension()["cost_on_gpu"]
    row = json.loads(text("benchmarks/results/h100-80gb-hbm3.json"))[0]
    older, ours = ({**row, "variant": "triton", "p50_us": us, "ratio_to_bound": us / 1e3} for us in (7e3, 2e3))
    left_out = [{**ours, "variant": variant} for variant in ("triton, graph", "SDPA flash", "reference")]
    cost.__globals__["ROWS_OF_GPU"] = stored = tmp_path / "gpu.json"
    stored.write_text(json.dumps([older, ours, *left_out, {**row, "variant": "SDPA", "is_bound": True, "p50_us": None}]))
    head, _, line, _, said = cost(["score_attention"]).splitlines()
    assert head == "| row in `benchmarks/results/gpu.json` | triton | *SDPA* |" and line.endswith(" | 2.00 (2.00) | not run |")
    assert f"over that of SDPA; {row['device']}, torch {row['versions']['torch']}, Triton" in said


def test_the_sites_costs_are_the_stored_rows():
    from tools.pages import report

    table = extension()["cost"](["attention_map"])
    stored = json.loads(text("benchmarks/results/cpu.json"))
    opening, *_ = report._by_setting(report.newest(stored), stored)  # of the report
    most = [r for r in stored if report._setting(r) == opening]
    rows = {(r["benchmark"], r["variant"]): r for r in most if r["benchmark"].startswith("attention_map/")}  # the newest of each
    heading, _, *lines = table.splitlines()
    names = [name.strip("* ") for name in heading.strip("|").split("|")][1:]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| attention_map/")]
    assert len(cells) == len({benchmark for benchmark, _ in rows}) > 0
    shown = {
        (cell[0].split(" (")[0], name): value for cell in cells for name, value in zip(names, cell[1:], strict=True) if value
    }
    assert shown == {key: f"{r['p50_us'] / 1e3:.1f} / {r['peak_bytes'] / 2**20:.1f}" for key, r in rows.items()}


def test_the_sites_counts_are_the_stored_run(tmp_path):
    fuzz = extension()["fuzz"]
    assert "compared" in fuzz() or "Not yet run." == fuzz()  # of the file that is stored, if one is
    stored = tmp_path / "results.json"
    fuzz.__globals__["FUZZED"] = stored
    assert fuzz() == "Not yet run."
    run = {"configurations": 1200, "compared": {"sdpa": 30, "triton": 1000}, "refused": {"triton": 170}, "failures": []}
    stored.write_text(json.dumps({**run, "worst_ratio": 0.984, "worst": "vlattn verify ...", "commit": "abc"}))
    assert "| `sdpa` | 30 | 0 |" in fuzz() and "| all 1,200 | 1,030 | 170 |" in fuzz()
    assert "Failed: 0. The worst error is 0.98 of what is allowed: `vlattn verify ...`. Commit abc." in fuzz()


def test_the_site_has_a_line_for_each_emulated_run():
    runs = json.loads(text("tests/fuzz/emulated.json"))
    lines = extension()["fuzz_emulated"]().splitlines()[2:]
    assert [line.split(" | ")[0] for line in lines] == [f"| `{run['backend']}`, {run['architecture']}" for run in runs]
    assert f" | {sum(runs[0]['compared'].values()):,} | " in lines[0]


def test_the_costs_of_a_map_are_stored():
    """Each line of the table is a stored row of that variant, rounded; README has numbers of two."""
    benchmark = "task_explain_clip/relevancy/clip-tower"
    assert f"`{benchmark}`" in text("docs/costs.md")
    table = re.findall(r"^\| ([\w+, ]+) \| (\d+\.\d+) \| (\d+) \|$", text("docs/costs.md"), re.M)
    took = {variant: (taken, peak) for variant, taken, peak in table}
    times, peaks = (re.findall(pattern, text("README.md")) for pattern in (r"takes (\d+\.\d+) s", r"(\d+) MiB"))
    assert [*zip(times, peaks, strict=True)] == [took[variant] for variant in SHOWN]
    assert float(took["cpu"][0]) < float(took["plain forward+backward"][0])
    stored = {
        (row["variant"], f"{row['p50_us'] / 1e6:.3g}", f"{row['peak_bytes'] / 2**20:.0f}")
        for row in json.loads(text("benchmarks/results/cpu.json"))
        if row["benchmark"] == benchmark
    }
    assert len(table) >= 5 and set(table) <= stored


def test_a_million_images_cost_what_the_table_above_them_says():
    heading, _, row = extension()["cost"](["task_explain_clip"]).splitlines()[:3]
    cells = dict(zip((cell.strip(" *") for cell in heading.split("|")), row.split("|"), strict=True))
    days, theirs = (f"{float(cells[name].split('/')[0]) * 1e3 / 86_400:.0f}" for name in ("cpu", "published"))
    said = " ".join(text("docs/guides/many_inputs.md").split())
    assert f"A million images are {days} days on that machine, and {theirs} days with the published" in said
    assert f"W such machines take {days} / W days" in said


DERIVATIVES = "jvp", "hvp", "over forward", "second derivatives"  # which SDPA has not


def test_what_is_said_of_most_calls_is_so_in_the_stored_rows():
    """Our fastest backend over SDPA, in every setting of the machine."""
    from tools.pages import report
    from vlattn_fast.benchmarks._formula import OURS

    ratios = []
    stored = report.newest(json.loads(text("benchmarks/results/cpu.json")))
    for (_, benchmark, *_), variants in report._by_benchmark(stored).items():
        if not benchmark.startswith("task_") and not any(words in benchmark for words in DERIVATIVES) and "SDPA" in variants:
            ours = min((variants[backend] for backend in OURS if backend in variants), key=lambda row: row["p50_us"])
            ratios.append(ours["ratio_to_bound"])
    assert sum(ratio <= 1 for ratio in ratios) > len(ratios) / 2 and 7 < max(ratios) < 7.5, "costs.md: up to seven times"
    for name in ("README.md", "docs/costs.md"):
        assert "On a CPU most measured calls cost no more than torch's attention" in " ".join(text(name).split())


def test_ci_runs_make_test():
    assert "\nmake test" in text(".ci/run")


def test_what_github_runs_is_what_a_contributor_runs():
    workflow = text(".github/workflows/test.yml")
    assert "run: bash .ci/run" in workflow
    assert set(re.findall(r"run: make (\w+)", workflow)) <= set(re.findall(r"^(\w+):", text("Makefile"), re.M))


def test_hooks_before_a_commit_are_make_lints():
    hooks, makefile = text(".pre-commit-config.yaml"), text("Makefile")
    assert re.findall(r"repo: (\S+)", hooks) == ["local"]
    for command in re.findall(r"-m (ruff \w+)", hooks):
        assert f"-m {command}" in makefile, command


def test_c_and_python_lines_have_one_length():
    (of_c,), (of_python,) = (
        re.findall(rf"{key}(\d+)", text(name))
        for key, name in (("ColumnLimit: ", ".clang-format"), ("line-length = ", "pyproject.toml"))
    )
    assert of_c == of_python


def test_the_citation_is_of_this_version():
    citation, project = text("CITATION.cff"), text("pyproject.toml")
    (version,), (url,) = (re.findall(rf'^{key} = "(.+)"', project, re.M) for key in ("version", "Repository"))
    assert f"\nversion: {version}\n" in citation and f'repository-code: "{url}"' in citation
    assert f"repo_url: {url}\n" in text("mkdocs.yml")
