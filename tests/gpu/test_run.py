"""`make gpu` rehearsed without one: its parts run in Triton's interpreter at tiny sizes, and go on where they were killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import sysconfig
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from tools.gpu import gate, ncu, production, run, session, sweep
from vlattn_fast.benchmarks.host import without_launches
from vlattn_fast.checking import verify
from vlattn_fast.kernels import _configurations

ROOT = Path(__file__).parents[2]
SELECT = r"attention_map( (?!map gradient D128)|$|/gradient[/,](?!llava))|test_device_guard"

# racecheck ends the whole call the first time, as a machine that is taken away would
SANITIZER = """#!/bin/sh
tool="$2"
echo "$@" >> "{log}"
if [ "$tool" = racecheck ] && mkdir "{log}.killed" 2>/dev/null; then kill -9 $PPID; exit; fi
test "$tool" = synccheck && echo "1 race" && exit 9
test "$tool" = memcheck || exit 0
while [ "$1" != "{python}" ]; do shift; done
exec "$@"
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
while [ "$1" != "{python}" ]; do shift; done
"$@" || exit 1
cat "{table}"
"""


class Call:
    """A call of run.py with --device cpu."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.out, tools = folder, folder / "out", folder / "tools"
        tools.mkdir(parents=True)
        (folder / "table.csv").write_text(TABLE)
        for name, text in (("compute-sanitizer", SANITIZER), ("ncu", NCU)):
            program = tools / name
            program.write_text(text.format(log=folder / name, python=sys.executable, table=folder / "table.csv"))
            program.chmod(0o755)
        self.environment = {**os.environ, "PATH": f"{tools}:/usr/bin:/bin", "VLATTN_COMMIT": "abc123"}

    def words(self, *parts: str) -> list[str]:
        program = [sys.executable, "-m", "tools.gpu.run"]
        return [*program, *parts, "--device", "cpu", "--select", SELECT, "--workers", "1", "--out", str(self.out)]

    def __call__(self, *parts: str) -> tuple[int, str]:
        done = subprocess.run(self.words(*parts), cwd=ROOT, env=self.environment, capture_output=True, text=True)
        return done.returncode, done.stdout + done.stderr

    def kill_after_a_row(self, part: str) -> int:
        """How many rows there are."""
        null = subprocess.DEVNULL
        with subprocess.Popen(self.words(part), cwd=ROOT, env=self.environment, stdout=null, stderr=null) as process:
            while process.poll() is None and not (self.out / f"gpu-{part}.json").exists():
                time.sleep(0.005)
            process.kill()
        return len(self.rows(part))

    def rows(self, part: str) -> list[dict[str, Any]]:
        return json.loads((self.out / f"gpu-{part}.json").read_text())

    def by_item(self, part: str) -> dict[str, dict[str, Any]]:
        rows = {row["item"]: row for row in self.rows(part)}
        assert len(rows) == len(self.rows(part)), "an item ran twice"
        return rows


@pytest.fixture(scope="module")
def rehearsed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Call, list[tuple[int, str]], int]:
    """verify killed after its first row; then all five parts, killed at racecheck; then all of them again."""
    call = Call(tmp_path_factory.mktemp("gpu"))
    before = call.kill_after_a_row("verify")
    return call, [call(), call()], before


def test_verify_goes_on_where_it_was_killed(rehearsed):
    call, ((_, said), (_, again)), before = rehearsed
    rows = call.by_item("verify")
    names = ("gradient", "gradient, bool mask", "gradient, float mask")
    backends = production.BACKENDS
    assert rows.keys() == {f"attention_map/{name}/D64/bfloat16/{backend}" for name in names for backend in backends}, said
    assert 1 <= before and f"verify: passed, 6 rows ({6 - before} new)" in said and "verify: passed, 6 rows (0 new)" in again
    for item, row in rows.items():
        assert row["passed"] and row["commit"] == "abc123" and {"sources", "device", "versions", "time", "seconds"} <= row.keys()
        if item.endswith("cuda"):
            assert row["refused"]
        else:
            assert 0 <= row["ratio"] <= 1 and row["kernels"] == ["_map_kernel"] and "numbers of 1 draws" in row["says"]


def test_sweep_stores_each_configuration_and_the_winner(rehearsed):
    call, (_, (_, said)), _ = rehearsed
    *tried, won = call.by_item("sweep").values()
    assert len(tried) == run.CPU_TRIES and [row["is_default"] for row in tried] == [True, False, False], said
    assert len({sweep.label(row["config"]) for row in tried}) == 3
    assert all(row["passed"] and row["ratio"] <= 1 and row["us"] > 0 for row in tried)
    assert all(row["key"] == "attention_map map gradient torch.bfloat16 64 64 16 False" for row in (*tried, won))
    assert won["winner"] in [row["config"] for row in tried] and won["us"] <= won["us_before"]
    table = call.out / "configurations.json"
    assert table.exists() == won["changed"]


def test_ncu_stores_times_stalls_and_pipes(rehearsed):
    call, ((_, said), _), _ = rehearsed
    rows = call.by_item("ncu")
    assert rows["attention_map/gradient/clip triton"]["kernels"]["_map_kernel"] > 0, said
    assert "does not take" in rows["attention_map/gradient/clip cuda"]["not_run"]
    found = rows["ncu attention_map _map_kernel triton"]
    assert found["passed"] and len(rows) == 3
    assert (found["ns"], found["registers"]) == (1234567.0, 168.0)
    assert list(found["stalls"].items()) == [("long_scoreboard", 2.25), ("wait", 0.52)]
    assert found["pipes"] == {"xu": 61.5, "tensor_cycles_active": 30.25}
    asked = (call.folder / "ncu").read_text()
    assert "--clock-control none" in asked and "--kernel-name regex:^_map_kernel$ --launch-skip 1 --launch-count 1" in asked


def test_benchmarks_store_their_rows(rehearsed):
    call, (_, (_, said)), _ = rehearsed
    assert [*call.by_item("benchmarks")] == ["attention_map/gradient/clip"], said
    rows = json.loads((call.out / "cpu.json").read_text())
    assert {row["variant"] for row in rows} >= {"streaming", "published", "SDPA"} and all(
        row["commit"] == "abc123" for row in rows
    )


def test_tests_go_on_where_they_were_killed(rehearsed):
    call, ((killed, _), (status, said)), _ = rehearsed
    assert killed == -signal.SIGKILL
    rows = call.by_item("tests")
    sanitized = [f"{tool} triton attention_map" for tool in run.TOOLS]
    assert [*rows] == ["tests/kernels/test_device_guard.py 1 of 1", *sanitized]
    assert rows["tests/kernels/test_device_guard.py 1 of 1"]["tests"] > 10
    # every tool ran once, and the one that was cut a second time
    asked = (call.folder / "compute-sanitizer").read_text().splitlines()
    assert [line.split()[1] for line in asked] == ["memcheck", "racecheck", "racecheck", "initcheck", "synccheck"]
    assert ["--report-api-errors no" in line for line in asked] == [True, False, False, False, False]
    assert [name for name, row in rows.items() if not row["passed"]] == ["synccheck triton attention_map"]
    assert status == 1 and "tests: FAILED" in said and "ended with 9: 1 race" in said and "ncu: passed, 3 rows (0 new)" in said


# --- the parts of it ---


class Known:
    """A session of which only stored rows are asked."""

    device = "cpu"

    def __init__(self, rows: list[dict[str, Any]]) -> None:
        self.rows = {row["item"]: row for row in rows}

    def known(self, part: str) -> dict[str, dict[str, Any]]:
        return self.rows


def checked(item: str, ratio: float) -> dict[str, Any]:
    return {"item": item, "passed": ratio <= 1, "ratio": ratio}


def test_a_kernel_is_timed_in_a_dtype_in_which_it_is_not_far_from_right():
    doubt = gate.Gate(
        Known(
            [
                checked("score_attention/additive, bool mask/D64/bfloat16/triton", 3.9),
                checked("score_attention/additive/D64/float32/triton", 4.1),
                checked("score_attention/additive, bool mask/D64/bfloat16/cuda", 4.1),
                {"item": "score_attention/cosine/D64/bfloat16/cuda", "passed": True, "refused": ["so it is"]},
                session.hung(90.0, "") | {"item": "attention_map/gradient/D64/bfloat16/triton"},
                {"item": "attention_map/attention/D64/bfloat16/cuda", "passed": False, "problem": "the process ended with -11"},
                {"item": "build", "passed": True},
            ]
        )
    ).doubt
    assert doubt(["score_attention"], "additive, forward", "triton") == ""
    assert "triton is wrong in score_attention/additive/D64/float32" in doubt(
        ["score_attention"], "additive", "triton", "float32"
    )
    assert "cuda is wrong in score_attention/additive, bool mask" in doubt(["score_attention"], "additive, forward", "cuda")
    assert doubt(["score_attention"], "cosine/clip", "cuda") == ""
    assert "wrong" in doubt(["score_attention"], "step alone", "cuda")  # no case of that name: all of them count
    assert "triton is wrong" in doubt(["attention_map"], "gradient", "triton")
    assert "cuda is wrong" in doubt(["attention_map"], "attention", "cuda")
    for operator, dtype in (("congruence_loss", "bfloat16"), ("attention_map", "float16")):
        assert gate.UNVERIFIED in doubt([operator], "cacr", "triton", dtype)


def test_the_cheapest_evidence_comes_first():
    """Each case once in bfloat16 at the smallest size, before any other size or dtype."""
    checks = production.checks("cuda")
    first = checks[: len(production.cases("cuda", "uniter"))]
    assert {(check.case.operator, check.case.name) for check in first} == {
        (check.case.operator, check.case.name) for check in checks
    }
    assert {(check.sizes, check.dtype) for check in first} == {("uniter", torch.bfloat16)}
    dtypes = [check.dtype for check in checks if check.sizes == "D64"]
    assert set(dtypes[: len(first)]) == {torch.bfloat16} and len({check.item for check in checks}) == len(checks)


def test_a_dozen_benchmarks_come_first_and_quick_leaves_out_lengths(tree, monkeypatch):
    asked = []
    monkeypatch.setattr(tree, "run", lambda part, items, *_: asked.extend(items) or True)
    monkeypatch.setattr(gate.Gate, "doubt", lambda *_: "")
    for tree.options.quick in (True, False):
        asked.clear()
        assert run.benchmarks(tree)
        names = [item["item"] for item in asked]
        assert sorted(names[:12]) == sorted(production.NAMED) and names[12] == "host" and len(set(names)) == len(names)
        assert any(name.startswith("scaling/") for name in names) != tree.options.quick
        assert {item.get("limit") for item in asked[:12]} == {None if tree.options.quick else session.LONG}


@pytest.mark.parametrize("hot", production.HOTTEST, ids=lambda hot: hot.name)
def test_what_is_timed_is_what_was_checked(hot, monkeypatch):
    """The case and the call of a hot launch, at their real sizes and without launches, ask for tiles with the same facts."""
    asked = []
    (case,) = [one for one in production.cases("cuda", hot.check[1]) if (one.operator, one.name) == (hot.operator, hot.check[0])]
    with without_launches():
        call = production.call_of(hot.benchmark, "triton", "cpu", batch=1)
    for run_it in (lambda: verify._run(case, case.in_dtype(torch.bfloat16), "triton"), call):
        recorder, launched = sweep.Recorder(hot.key, None), []
        monkeypatch.setattr(_configurations, "OVERRIDES", recorder)
        with without_launches(launched):
            run_it()
        assert set(hot.kernels) <= set(launched)
        asked.append(recorder.asked)
    assert len(asked[0]) == 1 and asked[0] == asked[1]


def test_the_sweep_goes_over_tiles_then_stages():
    default = {"BLOCK_Q": 64, "BLOCK_KV": 64, "num_warps": 4, "num_stages": 2}
    rows = [{"config": default, "us": 100.0}]
    first = sweep.candidates(default, 64, rows, (1, 2, 3, 4))
    assert len(first) == 2 * 3 * 2 - 1 and {config["BLOCK_Q"] for config in first} == {32, 64}
    rows += [{"config": config, "us": 110.0 + n} for n, config in enumerate(first[:-1])]
    assert sweep.candidates(default, 64, rows, (1, 2, 3, 4)) == first[-1:]  # cut before the last
    rows.append({"config": first[-1], "not_run": "OutOfResources"})
    second = sweep.candidates(default, 64, rows, (1, 2, 3, 4))
    assert len(second) == 3 * 3 and {config["num_stages"] for config in second} == {1, 3, 4}
    rows += [{"config": config, "us": 98.0} for config in second]
    assert sweep.candidates(default, 64, rows, (1, 2, 3, 4)) == []
    assert sweep.winner(default, rows) == default  # two percent are noise
    rows[-1]["us"] = 90.0
    assert sweep.winner(default, rows) == second[-1]
    whole = {"BLOCK_Q": 32, "num_warps": 8, "num_stages": 1}  # a tile has all keys
    assert all(config.keys() == whole.keys() for config in sweep.candidates(whole, 64, [], (1,)))


def test_what_ncu_says_without_a_table_is_no_row():
    assert ncu.table("==ERROR== ERR_NVGPUCTRPERM\n") == {} and ncu.table(TABLE.rsplit("\n", 2)[0]) == {}


@pytest.mark.parametrize("status, cases, passed", [(5, "", True), (0, "", False), (2, "", False), (0, "<testcase/>", True)])
def test_a_file_may_have_no_test_for_a_device(tree, monkeypatch, status, cases, passed):
    """A shard of such a file is empty, the first one too; what pytest could not collect is a failure."""
    monkeypatch.setattr(run, "TREE", session.ROOT)

    def command(words: list[str], seconds: float, **more: str) -> tuple[int, str]:
        Path(words[-2].removeprefix("--junitxml=")).write_text(f"<testsuites><testsuite>{cases}</testsuite></testsuites>")
        return status, "what pytest says"

    monkeypatch.setattr(tree, "command", command)
    row = run._pytest(tree, {"item": "tests/ops/test_x.py 1 of 2", "file": "tests/ops/test_x.py", "shard": "0/2"}, 60.0)
    assert row is not None and row["passed"] == passed and row["tests"] == cases.count("testcase")


def test_it_builds_by_cmake_for_this_gpu_and_says_what_went_wrong(tree, tmp_path, monkeypatch, capsys):
    log = tmp_path / "log"
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    assert run.build(tree, "verify") and "nvcc not installed" in capsys.readouterr().out or "nvcc" in os.listdir("/usr/bin")
    for tool, status in (("nvcc", 0), ("ninja", 0), ("cmake", 3)):
        (tmp_path / tool).write_text(f"#!/bin/sh\necho {tool} $@ >> {log}\necho what it said\nexit {status}\n")
        (tmp_path / tool).chmod(0o755)
    tree.device, tree.architecture = "cuda", "sm_90"
    library = tmp_path / "build/cuda/libvlattn_cuda.so"
    library.parent.mkdir(parents=True)
    library.write_text("old")
    assert not run.build(tree, "verify") and not library.exists()
    assert tree.known("verify")["build"]["problem"] == "cmake -G ended with 3: what it said\n"
    (tmp_path / "cmake").write_text(f"#!/bin/sh\necho cmake $@ >> {log}\necho new > {library}\n")
    for _ in range(2):
        assert run.build(tree, "verify") and tree.known("verify")["build"]["passed"]
    *_, configure, make = log.read_text().splitlines()  # the second time there was nothing to build
    assert f"-S {tmp_path} -B {library.parent}" in configure and "-DVLATTN_TARGETS=90a-real" in configure
    assert make.startswith(f"cmake --build {library.parent} --parallel") and log.read_text().count("--build") == 1


def test_without_the_library_the_rest_runs_and_runs_again_with_it(tree, monkeypatch, capsys):
    monkeypatch.setattr(run, "lay_out_tree", lambda: None)
    monkeypatch.setattr(run, "Session", lambda options: tree)
    item = [{"item": "a"}]
    monkeypatch.setattr(run, "PARTS", {"verify": lambda made: made.run("verify", item, lambda: lambda *_: {"passed": True})})
    monkeypatch.setattr(sys, "argv", ["run.py", "--device", "cpu", "--out", str(tree.options.out)])
    for built, status, said in ((False, 1, "FAILED"), (False, 1, "FAILED"), (True, 0, "passed"), (True, 0, "passed")):
        monkeypatch.setattr(run, "build", lambda *_, built=built: built)
        with pytest.raises(SystemExit) as end:
            run.main()
        assert end.value.code == status and f"verify: {said}, 1 rows" in capsys.readouterr().out
    assert len(json.loads((tree.options.out / "gpu-verify.json").read_text())) == 2


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
    tree.options.table, tree.architecture = tmp_path / "table.json", "sm_90"
    monkeypatch.setattr(run, "TREE", tmp_path / "tree")
    (run.TREE / "vlattn_fast" / "kernels").mkdir(parents=True)
    run.write_table(tree)
    assert not tree.options.table.exists()
    small = {"BLOCK_Q": 16}
    tree.options.table.write_text(json.dumps({"sm_80": {"x": small}, "sm_90": {"one": small, "z": small}}))
    for name, changed in (("one", True), ("two", False)):
        tree.store(
            "sweep", {"item": f"{name}: winner", "passed": True, "key": name, "winner": {"BLOCK_Q": 64}, "changed": changed}
        )
    run.write_table(tree)
    expected = {"sm_80": {"x": small}, "sm_90": {"one": {"BLOCK_Q": 64}, "z": small}}
    assert json.loads(tree.options.table.read_text()) == expected
    assert json.loads((run.TREE / "vlattn_fast" / "kernels" / "configurations.json").read_text()) == expected


def test_an_unknown_part_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["run.py", "measure"])
    with pytest.raises(SystemExit) as end:
        run.main()
    assert end.value.code == 2
    assert "PART must be one of verify, ncu, tests, benchmarks, sweep; got measure" in capsys.readouterr().err
