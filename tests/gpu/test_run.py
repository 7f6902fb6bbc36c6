"""`make gpu` rehearsed without one: its parts run on the compiled kernels, emulated, and go on where they were killed."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.helpers.ops.backends import ready
from tests.helpers.releases import WITHOUT_PTX

pytest.importorskip("ptx", reason=WITHOUT_PTX)
from tools import building
from tools.emulated.cuda import emulated
from tools.gpu import full, launch, lengths, ncu, production, run, session, suite, tiles
from tools.host import without_launches
from vlattn_fast.checking import verify
from vlattn_fast.kernels import _configurations
from vlattn_fast.ops import OPERATORS

ROOT = Path(__file__).parents[2]
ARCHITECTURE = "90"  # for which tests/cuda/ builds the CUDA C++ kernels as well
CUDA = shutil.which("nvcc") is not None
# one kernel of Triton and one of CUDA C++
SELECT = "|".join(
    (
        "^launcher$",
        "attention_map/gradient(/uniter/|/clip)",
        r"congruence_loss/cacr(/uniter/bfloat16|, forward\+backward/uniter).cuda",
        "^attention_map map gradient D64",
        "^relevancy_step$",
        "^1024 tokens of 64",
        "test_launches",
        "(triton attention_map|cuda congruence_loss)$",
    )
)

# racecheck ends the whole call the first time, as a machine that is taken away would
SANITIZER = """#!/bin/sh
tool="$2"
echo "$@" >> "{log}"
if [ "$tool" = racecheck ] && mkdir "{log}.killed" 2>/dev/null; then kill -9 $PPID; exit; fi
test "$tool" = synccheck && echo "1 race" && exit 9
exit 0
"""
TABLE = """==PROF== Connected to process 7
"ID","Process ID","Kernel Name","Device","gpu__time_duration.sum",\
"smsp__average_warps_issue_stalled_wait_per_issue_active.ratio",\
"smsp__average_warps_issue_stalled_long_scoreboard_per_issue_active.ratio",\
"sm__inst_executed_pipe_xu.avg.pct_of_peak_sustained_active",\
"sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_active","launch__registers_per_thread","launch__thread_count"
"","","","","ns","inst","inst","%","%","register/thread","thread"
"0","7","_map_kernel","0","1,234,567.00","0.52","2.25","61.50","30.25","168","n/a"
"""
NCU = """#!/bin/sh
echo "$@" >> "{log}"
cat "{table}"
"""


SMI = """#!/bin/sh
echo 1980, 2619, 512.3, 61, 0x0000000000000004
"""


class Call:
    """A call of run.py with --device cpu."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.out, tools = folder, folder / "out", folder / "tools"
        tools.mkdir(parents=True)
        (folder / "table.csv").write_text(TABLE)
        for name, text in (("compute-sanitizer", SANITIZER), ("ncu", NCU), ("nvidia-smi", SMI)):
            program = tools / name
            program.write_text(text.format(log=folder / name, table=folder / "table.csv"))
            program.chmod(0o755)
        path = os.pathsep.join((str(tools), os.environ["PATH"]))
        self.environment = {**os.environ, "PATH": path, "VLATTN_COMMIT": "abc123", "VLATTN_PTX": ARCHITECTURE}

    def __call__(self, *parts: str) -> tuple[int, str]:
        words = [sys.executable, "-m", "tools.gpu.run", *parts, "--device", "cpu", "--select", SELECT, "--workers", "1"]
        words += ["--minutes", "inf", "--seconds", "inf"]  # however slow this machine is
        done = subprocess.run([*words, "--out", self.out], cwd=ROOT, env=self.environment, capture_output=True, text=True)
        return done.returncode, done.stdout + done.stderr

    def rows(self, part: str) -> list[dict[str, Any]]:
        return [row for row in json.loads((self.out / session.ROWS).read_text()) if row["part"] == part]

    def by_item(self, part: str) -> dict[str, dict[str, Any]]:
        stored = [row for row in self.rows(part) if not row["item"].startswith("nvidia-smi")]
        rows = {row["item"]: row for row in stored}
        assert len(rows) == len(stored), "an item ran twice"
        rows.pop("build", None)  # where nothing had built the CUDA C++ kernels before
        return rows


@pytest.fixture(scope="module")
def rehearsed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Call, list[tuple[int, str]]]:
    """Every step, killed at racecheck; then all of them again."""
    call = Call(tmp_path_factory.mktemp("gpu"))
    return call, [call(), call()]


@pytest.mark.slow
def test_kernels_out_of_an_archive_have_the_bits_of_tritons_loader(rehearsed):
    call, ((_, said), _) = rehearsed
    (row,) = call.by_item("launcher").values()
    assert row["passed"] and row["item"] == "launcher", said
    assert len(row["kernels"]) >= 10 and 0 < row["ratio"] <= 1
    assert {len(times) for times in row["host_us"].values()} == {3} and row["host_us"].keys() == {"Triton", "archive"}
    states = {row["part"]: row["watts"] for part in run.PARTS for row in call.rows(part) if row["item"].startswith("nvidia-smi")}
    assert states == dict.fromkeys(run.PARTS, "512.3")


@pytest.mark.slow
def test_verify_runs_the_compiled_kernels_and_goes_on(rehearsed):
    call, ((_, said), (_, again)) = rehearsed
    rows = call.by_item("verify")
    triton, none = (f"attention_map/gradient/uniter/bfloat16/{backend}" for backend in production.BACKENDS)
    cuda = "congruence_loss/cacr/uniter/bfloat16/cuda"
    assert rows.keys() == {triton, none, cuda}, said
    assert "verify, all: passed" in said and "verify, all: passed" in again and "(0 new)" in again
    for row in rows.values():
        # nothing is compared where the backend refuses the call
        assert row["passed"] is (None if "refused" in row else True) and row["commit"] == "abc123"
        assert {"sources", "versions", "time", "seconds"} <= row.keys()
        assert row["device"].endswith(f", sm_{ARCHITECTURE} emulated")
    assert rows[none]["refused"] == ["the operator has no backend 'cuda'"]
    assert "the CUDA C++ kernels are not built" in str(rows[cuda].get("refused")) or CUDA
    for row in (rows[triton], *([rows[cuda]] if CUDA else [])):
        assert 0 <= row["ratio"] <= 1 and "numbers of 1 draws" in row["says"]
    assert rows[triton]["kernels"] == [
        "_map_backward_kv_kernel",
        "_map_backward_q_kernel",
        "_map_backward_rows_kernel",
        "_map_kernel",
        "_rows_kernel",
    ]
    assert {tile["kernel"] for tile in rows[triton]["tiles"]} == {*rows[triton]["kernels"]}
    assert all({"BLOCK_Q", "BLOCK_KV", "num_warps", "num_stages"} <= tile.keys() for tile in rows[triton]["tiles"])


@pytest.mark.slow
def test_tiles_store_each_candidate_and_the_winner(rehearsed):
    call, ((_, said), _) = rehearsed
    *tried, won = call.by_item("tiles").values()
    assert [row["is_default"] for row in tried] == [True, *[False] * (run.CPU_TRIES - 1)], said
    assert len({tiles.label(row["config"]) for row in tried}) == run.CPU_TRIES
    key = "attention_map map gradient torch.bfloat16 1024 1024 64 False"
    assert all(row["us"] > 0 and row["regs"] > 0 and row["item"].startswith(f"{key}: ") for row in tried)
    assert won["key"] == key and won["winner"] in [row["config"] for row in tried] and won["best_us"] <= won["present_us"]
    assert won["passed"] is (True if won["changed"] else None)
    table = call.out / "configurations.json"
    assert table.exists() == won["changed"]


@pytest.mark.slow
def test_a_step_is_rehearsed_by_its_name(tmp_path):
    call = Call(tmp_path)
    status, said = call("cudnn")
    rows = call.by_item("cudnn")
    assert status == 0 and rows.keys() == {"1024 tokens of 64", "1024 tokens of 64, causal"}, said
    for row in rows.values():
        passes = {"ours", "cuDNN", "ours, forward+backward", "cuDNN, forward+backward"}
        assert row["us"].keys() >= passes and all(us > 0 for us in row["us"].values())
        tiles = {name for name in row["us"].keys() - passes if name.startswith("ours, BLOCK_Q")}
        assert tiles and row["us"].keys() - passes - tiles == {"relevancy, triton, forward+backward"}


@pytest.mark.slow
def test_ncu_stores_times_stalls_and_pipes(rehearsed):
    call, (_, (_, said)) = rehearsed
    rows = call.by_item("ncu")
    assert rows["attention_map/gradient/clip triton"]["kernels"].keys() == {"_rows_kernel", "_map_kernel"}, said
    refused = rows["attention_map/gradient/clip cuda"]
    assert "does not take" in refused["not_run"] and refused["passed"] is None
    cuda = rows["congruence_loss/cacr, forward+backward/uniter cuda"]
    assert all(us > 0 and name.endswith("kernel") for name, us in cuda["kernels"].items()) and bool(cuda["kernels"]) == CUDA
    profiled = rows["ncu attention_map _map_kernel triton"]
    assert profiled["passed"] and len(rows) == 5 + len(cuda["kernels"])
    assert (profiled["ns"], profiled["registers"]) == (1234567.0, 168.0)
    assert list(profiled["stalls"].items()) == [("long_scoreboard", 2.25), ("wait", 0.52)]
    assert profiled["pipes"] == {"xu": 61.5, "tensor_cycles_active": 30.25}
    (asked,) = [line for line in (call.folder / "ncu").read_text().splitlines() if "_map_kernel" in line]
    assert "--clock-control none" in asked and "--kernel-name regex:^_map_kernel$ --launch-skip 1 --launch-count 1" in asked
    assert asked.endswith(f"{sys.executable} -m tools.gpu.launch cpu triton attention_map/gradient/clip")
    assert "ncu, all: passed" in said


@pytest.mark.slow
def test_benchmarks_store_their_rows(rehearsed):
    call, ((_, said), _) = rehearsed
    named = f"attention_map/gradient/clip{run.BESIDE}"
    assert [*call.by_item("benchmarks")] == [named, "attention_map/gradient/clip"], said
    rows = {row["variant"]: row for row in json.loads((call.out / "cpu.json").read_text())}
    assert rows.keys() >= {"triton", "streaming", "published", "SDPA"}
    assert all(row["commit"] == "abc123" and row["dtype"] == "bfloat16" for row in rows.values())
    assert rows["triton"]["p50_us"] > 0 and rows["triton"]["error"] < 0.01
    assert {tile["kernel"] for tile in rows["triton"]["tiles"]} == {"_map_kernel", "_rows_kernel"}


@pytest.mark.slow
def test_tests_go_on_where_they_were_killed(rehearsed):
    call, ((killed, _), (status, said)) = rehearsed
    assert killed == -signal.SIGKILL
    rows = call.by_item("tests")
    kernels = ("triton attention_map", *(["cuda congruence_loss"] if CUDA else []))
    sanitized = [f"{tool} {kernel}" for tool in suite.TOOLS for kernel in kernels]
    assert {*rows} == {"tests/kernels/test_launches.py 1 of 1", *sanitized}
    assert rows["tests/kernels/test_launches.py 1 of 1"]["tests"] > 10
    # every tool ran once for a kernel, and those that were cut a second time
    asked = [line.split()[1] for line in (call.folder / "compute-sanitizer").read_text().splitlines()]
    assert list(dict.fromkeys(asked)) == list(suite.TOOLS)
    assert asked.count("racecheck") > len(kernels) and {asked.count(tool) for tool in {*suite.TOOLS} - {"racecheck"}} == {
        len(kernels)
    }
    assert {name for name, row in rows.items() if not row["passed"]} == {f"synccheck {kernel}" for kernel in kernels}
    assert status == 1 and "tests, all: FAILED" in said and "ended with 9: 1 race" in said


def test_ncu_gets_a_process_that_launches(cuda_library):
    with emulated(int(ARCHITECTURE), library=cuda_library) as launches:
        launch.main("cpu", "cuda", "congruence_loss/cacr, forward+backward/uniter")
    names = [production.function_name(one.name) for one in launches]
    assert names and names == names[: len(names) // launch.CALLS] * launch.CALLS


def test_compute_sanitizer_gets_a_process_that_runs_all_cases(cuda_library, monkeypatch):
    """At a size that the kernels take, and emulated where the rehearsal says so."""
    ran, installed = [], []
    monkeypatch.setenv("VLATTN_PTX", ARCHITECTURE)
    monkeypatch.setattr("tools.emulated.package.install", installed.append)
    monkeypatch.setattr(verify, "_run", lambda case, tensors, backend: ran.append((case.name, tensors["text_query"].shape[2])))
    with ready("cuda", cuda_library):
        launch.main("cpu", "cuda", "congruence_loss")
    queries = production.SIZES["uniter"].queries
    assert installed == [ARCHITECTURE]
    assert ran == [(kind, queries) for kind in ("cacr", "iais_distributed")]


def test_the_most_telling_evidence_comes_first():
    """Calls of models, then each case once in bfloat16 at the smallest size, before any other size or dtype."""
    checks = production.checks()
    models = checks[: len(full.FULL)]
    assert all(check.is_full for check in models) and not any(check.is_full for check in checks[len(models) :])
    for check in models:
        example = check.example("cpu")
        assert (example.operator, example.name) == (check.operator, check.name)
        assert check.operator in full.CASES or len(example.tensors["query"]) <= 2
    checks = checks[len(models) :]
    first = checks[: len(production.cases("uniter"))]
    assert {(check.operator, check.name) for check in first} == {(check.operator, check.name) for check in checks}
    for size in production.SIZES:
        assert {(case.operator, case.name) for case in production.cases(size)} == {check[:2] for check in first}
    assert {(check.sizes, check.dtype) for check in first} == {("uniter", torch.bfloat16)}
    dtypes = [check.dtype for check in checks if check.sizes == "D64"]
    assert set(dtypes[: len(first)]) == {torch.bfloat16} and len({check.item for check in checks}) == len(checks)


def test_the_first_steps_fit_one_call_and_the_last_ones_leave_nothing_out(tree, monkeypatch):
    """A call takes each of the first steps, whose items the last steps have, too."""
    shares = [step.seconds for step in run.ORDER]
    assert shares == sorted(shares, key=math.isinf) and sum(x for x in shares if x < math.inf) <= 60 * run.MINUTES
    assert {step.part for step in run.ORDER if math.isinf(step.seconds)} == set(run.PARTS)
    asked: dict[bool, dict[str, list[str]]] = {True: {}, False: {}}
    compiled: dict[str, list[str]] = {}
    monkeypatch.setattr(suite, "TREE", ROOT)
    monkeypatch.setattr(tiles, "kept", lambda *_: {"candidates": []})
    monkeypatch.setattr(shutil, "which", lambda name: f"/bin/{name}")
    tree.built = Future()
    tree.built.set_result(True)
    tree.device, tree.options.out = "cuda", tree.options.out / "cuda"
    for step in run.ORDER:
        names = asked[step.seconds < math.inf].setdefault(step.part, [])

        def asks(part: str, items: list[dict[str, Any]], *_: Any, stored: bool = True, names: list[str] = names) -> bool:
            (names if stored else compiled.setdefault(part, [])).extend(item["item"] for item in items)
            return True

        monkeypatch.setattr(tree, "run", asks)
        assert step.run(tree)
    for part, names in asked[True].items():
        assert names and {name.removesuffix(run.BESIDE) for name in names} <= set(asked[False][part]), part
    benchmarks, named = asked[False]["benchmarks"], [f"{name}{run.BESIDE}" for name in production.NAMED]
    assert benchmarks[-1] == "host" and asked[True]["benchmarks"] == named
    assert compiled["benchmarks"] == [*named, *production.NAMED]  # before one of them is timed
    # plain dot products come first
    assert [name.split("/")[1] for name in production.NAMED[:3]] == ["scaled dot, forward+backward", *["scaled dot, forward"] * 2]
    tests = asked[True]["tests"]
    assert tests[0].startswith("tests/gpu/device_streams.py") and tests[-1] == "memcheck triton score_attention uniter groups"


def test_a_call_of_each_kernel_comes_first() -> None:
    """Those that no passed row has before all others."""
    every = production.of_each_kernel([])
    launched = [production.launched_by(check) for check in every]
    assert {"_forward_kernel", "_units_backward_kernel", "gradient_kernel", "_document_gradient_kernel"} < set().union(*launched)
    assert {check[:3] for check in every} >= {*production.IN_CUDA} and len(every) < 60
    rows = [
        {"item": check.item, "passed": check.operator != "maxsim", "kernels": [*some]}
        for check, some in zip(every, launched, strict=True)
    ]
    first = production.of_each_kernel(rows)
    assert {check.operator for check in first[:4]} == {"maxsim"} | {operator for operator, *_ in production.IN_CUDA}
    assert {*first} == {*every}


def test_nvidia_smi_is_asked_once_a_step(tree, tmp_path, monkeypatch) -> None:
    program = tmp_path / "nvidia-smi"
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin")
    monkeypatch.setattr(session, "TREE", tmp_path)
    step = run.Step("tests", "some", 20.0, lambda made: True)
    for text, facts in (
        ("1980, 2619, 512.3, 61, 0x0000000000000004", {"sm_mhz": "1980", "watts": "512.3", "throttled_by": "0x0000000000000004"}),
        ("Field is not a valid field to query", {"not_run": "Field is not a valid field to query\n"}),
    ):
        program.write_text(f"#!/bin/sh\necho $@ >> {tmp_path}/log\necho {text}\n")
        program.chmod(0o755)
        assert run.taken(tree, step)
        assert tree.known("tests")["nvidia-smi, some"].items() >= facts.items()
    assert (tmp_path / "log").read_text().count("--query-gpu=clocks.sm,") == 2


def test_each_call_of_a_model_has_its_dtype() -> None:
    dtypes = {check.dtype for check in production.checks() if check.is_full}
    assert dtypes == {torch.bfloat16, torch.float16, torch.float32}


@pytest.mark.slow("paged_attention_statistics")
@pytest.mark.parametrize("hot", production.HOTTEST, ids=lambda hot: hot.name)
def test_what_is_timed_is_what_was_checked(hot, monkeypatch):
    """The case and the call of a hot launch, at their real sizes and without launches, ask for tiles with the same facts."""
    asked = []
    (case,) = [one for one in production.cases(hot.check[1]) if (one.operator, one.name) == (hot.operator, hot.check[0])]
    with without_launches():
        call = production.call_of(hot.benchmark, "triton", "cpu", batch=1)
    for run_it in (lambda: verify._run(case, case.in_dtype(torch.bfloat16), "triton"), call):
        recorder, launched = tiles.Recorder(hot.key, None), []
        monkeypatch.setattr(_configurations, "OVERRIDES", recorder)
        with without_launches(launched):
            run_it()
        assert set(hot.kernels) <= set(launched)
        asked.append(recorder.asked)
    assert len(asked[0]) == 1 and asked[0] == asked[1]


def test_what_ncu_says_without_a_table_is_no_row():
    assert ncu.table("==ERROR== ERR_NVGPUCTRPERM\n") == {} and ncu.table(TABLE.rsplit("\n", 2)[0]) == {}


@pytest.mark.parametrize("status, cases, passed", [(5, "", None), (0, "", False), (2, "", False), (0, "<testcase/>", True)])
def test_a_file_may_have_no_test_for_a_device(tree, monkeypatch, status, cases, passed):
    """A shard of such a file is empty, the first one too, and has not passed; what pytest could not collect is a failure."""
    monkeypatch.setattr(suite, "TREE", session.ROOT)

    def command(words: list[str], seconds: float, **more: str) -> tuple[int, str]:
        Path(words[-2].removeprefix("--junitxml=")).write_text(f"<testsuites><testsuite>{cases}</testsuite></testsuites>")
        return status, "what pytest says"

    monkeypatch.setattr(tree, "command", command)
    row = suite._pytest(tree, {"item": "tests/ops/test_x.py 1 of 2", "file": "tests/ops/test_x.py", "shard": "0/2"}, 60.0)
    assert row is not None and row["passed"] is passed and row["tests"] == cases.count("testcase")


def test_it_builds_by_cmake_for_this_gpu_and_says_what_went_wrong(tree, tmp_path, monkeypatch, capsys):
    log, library = tmp_path / "log", tmp_path / "build" / "cuda" / "libvlattn_cuda.so"
    monkeypatch.setattr(building, "ROOT", tmp_path)
    monkeypatch.setattr(building, "tools", lambda: dict(os.environ))
    monkeypatch.setenv("PATH", "/bin")
    tree.library, tree.option = library, "-DVLATTN_TARGETS=90a-real"

    def build() -> bool:
        building.build.cache_clear()  # as in another process
        return run.build(tree)

    assert build() and "CUDA C++ is not built: cmake is not installed" in capsys.readouterr().out or shutil.which("cmake")
    library.parent.mkdir(parents=True)
    library.write_text("old")
    for tool, status in (("nvcc", 0), ("ninja", 0), ("c++", 0), ("cmake", 3)):
        (tmp_path / tool).write_text(f"#!/bin/sh\necho {tool} $@ >> {log}\necho what it said\nexit {status}\n")
        (tmp_path / tool).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin")
    assert not build() and not library.exists()
    assert tree.known("verify")["build"]["problem"] == "build/cuda could not be built:\nwhat it said\n"
    (tmp_path / "cmake").write_text(f"#!/bin/sh\necho cmake $@ >> {log}\ntest -e {library} || echo new > {library}\n")
    for _ in range(2):
        assert build() and tree.known("verify")["build"]["passed"]
    assert len(json.loads((tree.options.out / session.ROWS).read_text())) == 2  # the second time there was nothing to build
    before = log.read_text()
    configure, make = before.splitlines()[-2:]
    assert f"-S {tmp_path} -B {library.parent}" in configure and "-DVLATTN_TARGETS=90a-real" in configure
    assert make == f"cmake --build {library.parent}"
    assert build() and log.read_text() == before  # a library of the same sources came from another machine
    tree.sources = "others"
    assert build() and log.read_text() != before


@pytest.mark.parametrize("number, target", [("80", "80"), ("90", "90a"), ("100", "100")])
def test_kernels_are_built_for_the_architecture(tree, monkeypatch, number, target):
    monkeypatch.setenv("VLATTN_PTX", number)
    made = session.Session(tree.options)
    assert made.architecture == number and made.option == f"-DVLATTN_PTX={target}"
    assert made.library == session.ROOT / "build" / f"ptx{target}" / "libvlattn_ptx.so"
    assert made.environment()["VLATTN_PTX"] == number
    tree.options.device = "cuda"
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(_configurations, "architecture", lambda device: f"sm_{number}")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    made = session.Session(tree.options)
    assert made.architecture == number and made.option == f"-DVLATTN_TARGETS={target}-real"
    assert "VLATTN_PTX" not in made.environment()
    assert made.library == session.ROOT / "build" / "cuda" / "libvlattn_cuda.so"


def test_triton_kernels_are_checked_while_nvcc_compiles(tree, monkeypatch):
    """What no device has run, before the CUDA C++ kernels; those after a failed build not at all."""
    asked, closed = [], []
    monkeypatch.setattr(tree, "run", lambda part, items, *_: asked.append([item["item"] for item in items]) or True)
    monkeypatch.setattr(tree, "close", lambda: closed.append(len(asked)))
    everything = [
        f"{check.item}/{backend}" for check in production.checks() for backend in production.backends_of(check.operator)
    ]
    triton = [name for name in everything if not name.endswith("/cuda")]
    without_kernel = {name.split("/")[0] for name in everything if name.endswith("/streaming")}
    by_table = {name for name in OPERATORS if production.backends_of(name) == ("streaming",)}
    assert without_kernel == {"recurrent_step"} == by_table
    for built in (True, False):
        tree.built = SimpleNamespace(done=lambda: False, result=lambda built=built: asked.append("built") or built)
        assert run.verify(tree, first=True) == built
        first, waited, all_of_them = asked[0], asked[1], asked[-1]
        assert {*first} < {*triton} and waited == "built" and ({*all_of_them} > {*first}) == built
        asked.clear(), closed.clear()
        tree.built = SimpleNamespace(done=lambda: False, result=lambda built=built: built)
        assert run.verify(tree) == built
        assert asked.pop() == (everything if built else triton) and closed.pop() == 0  # workers that know no library


def test_a_failed_build_fails_the_call_and_stops_no_part(tree, monkeypatch, capsys):
    monkeypatch.setattr(run, "lay_out_tree", lambda: None)
    monkeypatch.setattr(run, "Session", lambda options: tree)
    item = [{"item": "a"}]
    step = run.Step("ncu", "all", math.inf, lambda made: made.run("ncu", item, lambda: lambda *_: {"passed": True}))
    monkeypatch.setattr(run, "ORDER", (step,))
    monkeypatch.setattr(sys, "argv", ["run.py", "--device", "cpu", "--out", str(tree.options.out)])
    for built in (False, True):
        monkeypatch.setattr(run, "build", lambda made, built=built: built)
        with pytest.raises(SystemExit) as end:
            run.main()
        assert end.value.code == (0 if built else 1) and "ncu, all: passed, 1 rows" in capsys.readouterr().out


def test_tools_are_found_where_they_are_installed(tmp_path, monkeypatch):
    for folder in ("cuda/bin", "nsight/2025.3.1", "nsight/2025.1.0"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "nsight" / "readme").touch()
    monkeypatch.setenv("CUDA_HOME", f"{tmp_path}/cuda")
    scripts = sysconfig.get_path("scripts")  # where pip puts cmake and ninja
    expected = f"/bin:{scripts}:{tmp_path}/cuda/bin:{tmp_path}/nsight/2025.3.1:{tmp_path}/nsight/2025.1.0"
    assert run.with_tools("/bin", f"{tmp_path}/nsight") == expected
    monkeypatch.setenv("CUDA_HOME", f"{tmp_path}/none")
    assert run.with_tools("/bin", f"{tmp_path}/none") == f"/bin:{scripts}"


def test_the_winners_are_written_to_the_table(tree, tmp_path, monkeypatch):
    tree.options.table, tree.architecture = tmp_path / "table.json", "90"
    monkeypatch.setattr(run, "TREE", tmp_path / "tree")
    (run.TREE / "vlattn_fast" / "kernels").mkdir(parents=True)
    run.write_table(tree)
    assert not tree.options.table.exists()
    small = {"BLOCK_Q": 16}
    tree.options.table.write_text(json.dumps({"sm_80": {"x": small}, "sm_90": {"one": small, "z": small}}))
    for name, facts in (("one", {}), ("two", {"changed": False}), ("three", {"passed": False})):
        right = {"passed": True, "changed": True, **facts}
        tree.store("tiles", {"item": name, "key": name, "winner": {"BLOCK_Q": 64}, **right})
    for tokens in lengths.LENGTHS:
        times = {"ours": 100.0, "cuDNN": 90.0 if tokens >= 4096 else 110.0}
        tree.store(
            "cudnn", {"item": str(tokens), "tokens": tokens, "features": 128, "is_causal": True, "us": times, "passed": None}
        )
    run.write_table(tree)
    cudnn = {"score_attention cudnn True 128": {"FROM": 4096}}
    expected = {"sm_80": {"x": small}, "sm_90": {"one": {"BLOCK_Q": 64}, **cudnn, "z": small}}
    assert json.loads(tree.options.table.read_text()) == expected
    assert json.loads((run.TREE / "vlattn_fast" / "kernels" / "configurations.json").read_text()) == expected


def test_an_unknown_part_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["run.py", "measure"])
    with pytest.raises(SystemExit) as end:
        run.main()
    assert end.value.code == 2
    assert "PART must be one of launcher, verify, cudnn, benchmarks, tiles, tests, ncu; got measure" in capsys.readouterr().err
