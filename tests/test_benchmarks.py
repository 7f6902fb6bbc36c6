"""The benchmarks at tiny sizes: every variant runs, rows and report say what was measured."""

import contextlib
import importlib
import json
import math
from dataclasses import replace
from unittest import mock

import pytest
import torch

from tools.gpu import worker
from vlattn_fast.benchmarks import __main__ as command
from vlattn_fast.benchmarks import _bounds, _choice, _formula, _gpu, _measure, _rates, _records, _run, _workloads

TINY = {"B": 3, "H": 2, "N": 12, "D": 8, "L": 5, "V": 7, "images": 4, "captions": 4, "R": 6, "T": 5, "layers": 2, "C": 16}
TINY |= {"vision_layers": 1, "vocabulary": 120, "M": 40, "Hkv": 2}
CPU = torch.device("cpu")
DECLARED = _choice.declared()


def measured(benchmark, **options):
    """With rates that take no time: those of this machine are measured for each call."""
    options = {"overrides": TINY, "rounds": 2, "compiled": False, **options}
    fixed = mock.patch.object(_measure, "rates", lambda device, dtype: _rates.Rates(1e11, 1e10, 1e9))
    with fixed, mock.patch.object(_measure, "gc"):  # a collection goes through all that the tests' modules hold
        return _measure.Measurement(benchmark, CPU, **options).run()


def test_every_operator_and_task_has_a_benchmark():
    assert {benchmark.name.split("/")[0] for benchmark in DECLARED} == set(_choice.MODULES)
    names = [benchmark.name for benchmark in DECLARED]
    assert len(set(names)) == len(names)


@pytest.mark.slow("edges", "256", "577", "1025", "4097", "16384", "32768", "43152", "131072")  # lengths are those of TINY
@pytest.mark.parametrize("declaration", DECLARED, ids=lambda declaration: declaration.name)  # `benchmark` is pytest-benchmark's
def test_every_variant_of_every_benchmark_runs(declaration):
    rows = {row["variant"]: row for row in measured(declaration)}
    assert [row["is_bound"] for row in rows.values()].count(True) == 1
    for name, row in rows.items():
        assert "not_run" not in row, (name, row.get("not_run"))
        assert 0 < row["p20_us"] <= row["p50_us"] <= row["p80_us"] < math.inf
        assert row["rounds"] == 2 and row["ratio_to_bound"] > 0
        # the work of a whole model is not counted
        assert declaration.module.endswith("task_explain_models") if row["share_of_limit"] is None else row["share_of_limit"] > 0
        largest = 1e-4 if declaration.cpu_dtype == torch.float32 else 0.05
        assert row["error"] is None if row["is_bound"] else row["error"] <= largest, (name, row["error"])
    assert {"streaming", _formula.EXPLAIN, _formula.CAPTURE, _formula.EDGES} & set(rows)


@pytest.mark.slow
def test_what_the_published_procedures_compute_in_float64():
    """Written here from the papers' formulas: the same numbers as the reference, so what is timed is the same work."""
    names, compared = ("published", "maps stored, one backward"), 0
    for benchmark in (x for x in DECLARED if x.name.split("/")[0] not in ("score_attention", "attention_map")):
        for row in measured(benchmark, rounds=1, dtype=torch.float64, only=names):
            # the product is in float32 there, as the authors have it; IAIS and SCAN add their constants in other places
            assert row["error"] <= 2e-6, (benchmark.name, row["variant"], row["error"])
            compared += 1
    assert compared > 20


def test_a_backend_joins_by_itself_when_it_refuses_no_longer(monkeypatch):
    from vlattn_fast.dispatch import choice
    from vlattn_fast.ops import attention_map

    new = attention_map.BACKENDS["streaming"]
    monkeypatch.setitem(attention_map.BACKENDS, "new", new)
    monkeypatch.setattr(choice, "BACKEND_NAMES", (*choice.BACKEND_NAMES, "new"))
    (benchmark,) = _choice.choose(["attention_map/attention/clip"])
    assert {row["variant"] for row in measured(benchmark)} >= {"new", "streaming"}


def test_what_is_emulated_on_a_cpu_is_not_timed(monkeypatch):
    from vlattn_fast.dispatch import call as calls
    from vlattn_fast.dispatch import limits
    from vlattn_fast.ops import congruence_loss

    monkeypatch.setattr(calls, "on_cpu", calls.OnCpu())
    cuda = congruence_loss.BACKENDS["cuda"]._replace(refusals=limits.accept)
    monkeypatch.setitem(congruence_loss.BACKENDS, "cuda", cuda)
    (benchmark,) = _choice.choose(["congruence_loss/cacr, forward+backward/uniter"])
    assert not {"triton", "cuda"} & {row["variant"] for row in measured(benchmark)}


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")  # torch's own use of it
@pytest.mark.slow
def test_compiled_variants():
    (benchmark,) = _choice.choose(["attention_map/attention/uniter"])
    (row,) = (row for row in measured(benchmark, compiled=True) if row["variant"] == "reference compiled")
    assert row["error"] <= 1e-5


def test_a_variant_that_fails_or_does_not_fit_is_a_row(monkeypatch):
    (benchmark,) = _choice.choose(["attention_map/gradient/clip"])
    monkeypatch.setattr(_measure, "_free_memory", lambda device: 1000)
    monkeypatch.setattr("vlattn_fast.backends.streaming.attention_map.forward", lambda *inputs: 1 / 0)
    rows = {row["variant"]: row for row in measured(benchmark)}
    assert "over half of the memory" in rows["reference"]["not_run"]
    assert rows["streaming"]["not_run"] == "ZeroDivisionError: division by zero"
    assert rows["SDPA"]["p50_us"] > 0


def test_a_slow_variant_sits_out_some_rounds(monkeypatch):
    monkeypatch.setitem(_measure.SECONDS_A_VARIANT, "cpu", 0.0)
    (benchmark,) = _choice.choose(["attention_map/attention/clip"])
    assert {row["rounds"] for row in measured(benchmark, rounds=30)} == {_measure.LEAST_ROUNDS}


@pytest.mark.slow
def test_rows_have_percentiles_over_calls_and_ratios_of_medians():
    (benchmark,) = _choice.choose(["attention_map/attention/uniter"])
    measurement = _measure.Measurement(benchmark, CPU, overrides=TINY, compiled=False)
    measurement.standing["streaming"].seconds = [6e-6, 1e-6, 2e-6, 4e-6, 3e-6, 5e-6]
    measurement.standing["SDPA"].seconds = [1e-6, 2e-6, 9e-6]
    rows = {row["variant"]: row for row in measurement.records()}
    assert [rows["streaming"][f"p{n}_us"] for n in (20, 50, 80)] == [2.0, 3.5, 5.0] and rows["streaming"]["rounds"] == 6
    assert rows["streaming"]["ratio_to_bound"] == pytest.approx(3.5 / 2) and rows["SDPA"]["ratio_to_bound"] == 1.0
    assert rows["reference"]["not_run"] == "no round was left for it"


def test_the_error_is_the_largest_of_any_output():
    truth = {"one": torch.tensor([4.0, -8.0]).double(), "two": torch.tensor([1.0]).double()}
    got = {"one": torch.tensor([4.0, -7.0]), "two": torch.tensor([1.01]), "more": torch.ones(1)}
    assert _formula.largest_error(got, truth) == 1 / 8
    assert _formula.largest_error({"more": torch.ones(1)}, truth) is _formula.largest_error(got, None) is None
    for wrong in (math.nan, math.inf):  # JSON has neither, and NaN is in no order with others
        for values in ([wrong, -8.0], [4.0, wrong]):
            with pytest.raises(ArithmeticError, match=f"one must be finite as the formula's is; got an error of {wrong}"):
                _formula.largest_error({"one": torch.tensor(values), "two": torch.tensor([9.0])}, truth)


def wrong_at_the_end(forward):
    """The results of `forward`, too large in the last sample."""

    def run(*inputs):
        result = forward(*inputs)
        out = result[0] if isinstance(result, tuple) else result
        out[-1] *= 1.01
        return result

    return run


@pytest.mark.parametrize("operator, what", [("attention_map", "gradient"), ("congruence_loss", "cacr, forward+backward")])
def test_a_variant_of_this_package_that_breaks_the_rule_has_no_time(operator, what, monkeypatch):
    """Few numbers, as of a loss, are drawn again: in the storage of the inputs, which is as it was afterwards."""
    (benchmark,) = _choice.choose([f"{operator}/{what}/{'clip' if operator == 'attention_map' else 'uniter'}"])
    right = {row["variant"]: row for row in measured(benchmark)}
    assert "p50_us" in right["streaming"] and "p50_us" in right["published"]
    backend = importlib.import_module(f"vlattn_fast.backends.streaming.{operator}")
    monkeypatch.setattr(backend, "forward", wrong_at_the_end(backend.forward))
    rows = {row["variant"]: row for row in measured(benchmark)}
    assert rows["streaming"]["not_run"].startswith(f"ArithmeticError: {_formula.WRONG}: output")
    assert rows["published"]["error"] == right["published"]["error"] and "p50_us" in rows["published"]
    assert worker.problem_of(rows["streaming"]) and not worker.problem_of(rows["published"])


def test_graphs_that_break_the_rule_fail():
    row = {"benchmark": "attention_map/gradient/clip", "error": 1e-3}
    broken = row | {"not_run": f"ArithmeticError: {_formula.WRONG}: output 0"}
    uncaptured = row | {"not_run": "RuntimeError: operation not permitted when stream is capturing"}
    failing = [
        (broken, "streaming, graph"), (uncaptured, "triton, graph"), (uncaptured, "sdpa"), (row | {"error": None}, "triton"),
    ]  # fmt: skip
    assert all(worker.problem_of(one | {"variant": name}) for one, name in failing)
    passing = [(uncaptured, "streaming, graph"), (uncaptured, "published"), (row, "triton")]
    assert not any(worker.problem_of(one | {"variant": name}) for one, name in passing)
    whole_model = row | {"benchmark": "task_explain_clip/relevancy", "error": None, "variant": _formula.EXPLAIN}
    assert not worker.problem_of(whole_model)  # its formula may need too much memory


def test_draws_leave_the_inputs_as_they_were():
    whole = torch.randn(40)
    tensors = {"x": whole[3:9], "y": torch.ones(2).expand(3, 2), "which": torch.arange(4)}
    before = {name: x.clone() for name, x in {**tensors, "whole": whole}.items()}
    seen = []

    def run(t):
        seen.append(round(float(t["x"].double().sum()), 4))
        return {"sum": t["x"].sum()[None] + t["y"].sum(), "which": t["which"]}

    formula = _formula.Formula(tensors, lambda name, x: x, run, run)
    assert formula.wrong(run, run(tensors)) == ""
    assert len(set(seen)) == _formula.ENOUGH  # one number a draw
    assert "sum: " in formula.wrong(lambda t: {"sum": 1.001 * run(t)["sum"]}, run(tensors))
    assert all(torch.equal(x, before[name]) for name, x in {**tensors, "whole": whole}.items())


def test_the_compared_part_has_both_ends():
    x = torch.arange(24).reshape(4, 3, 2)
    assert _formula.ends(x).tolist() == x[[0, 3]].tolist()
    assert _formula.ends(x, 2).tolist() == x[[0, 3]][:, [0, 2]].tolist()
    assert _formula.ends(x[:1], 2).tolist() == x[:1, [0, 2]].tolist()


def test_floors_are_those_of_the_performance_page():
    bf16 = torch.bfloat16
    sizes = {workload.key: workload.sizes(torch.device("cuda")) for workload in (_workloads.CLIP, _workloads.UNITER)}
    terms = (_bounds.SDPA_FORWARD, _bounds.SDPA_BACKWARD, (1, 2, 1))
    limits = {key: [_rates.H200.limit([x]) for x in _bounds.passes(size, bf16, *terms)] for key, size in sizes.items()}
    found = {key: [(round(seconds * 1e6), rate) for seconds, rate in limit] for key, limit in limits.items()}
    assert found == {  # SDPA forward, backward; statistics
        "clip": [(110, "products"), (276, "products"), (88, "exponentials")],
        "uniter": [(59, "memory"), (117, "memory"), (29, "memory")],
    }


def test_the_limit_of_several_passes_is_their_sum_and_the_rate_with_most_of_it():
    can = _rates.Rates(100.0, 10.0, 1.0)
    passes = [_measure.Pass(200.0, 10.0), _measure.Pass(100.0, 50.0, 4.0), _measure.Pass(300.0)]
    assert can.limit(passes) == (2 + 5 + 3, "products") and can.limit(passes[1:2]) == (5.0, "memory")


@pytest.mark.parametrize("slow", [False, True])
def test_a_cpu_is_measured_in_the_number_type_and_threads_of_the_call(monkeypatch, slow):
    """`slow`: torch has no fast product of 16 bits. A product of 2,048 rows then takes it half a minute."""
    results = []

    def fastest(call):
        results.append(call())
        rate = 3e8 if slow and results[-1].dtype == torch.bfloat16 else 1e9  # results a second
        return results[-1].numel() / rate

    monkeypatch.setattr(_rates, "_fastest", fastest)
    monkeypatch.setattr(_rates, "_arithmetic", _rates._arithmetic.__wrapped__)
    monkeypatch.setattr(_rates, "_peaks", lambda dtype: {"FMA": 5.0})
    monkeypatch.setattr(_rates, "SIDE", 64)
    monkeypatch.setattr(_rates, "CHANNELS", 48)
    for dtype in (torch.float32, torch.bfloat16):
        results.clear()
        *found, peaks = _rates.rates(torch.device("cpu"), dtype)
        assert found == pytest.approx([2 * 48 * 9 * 1e9, 4e9 * 2**26, 1e9]) and peaks == {"FMA": 5.0 * torch.get_num_threads()}
        taken = torch.float32 if slow else dtype
        compared = [] if dtype == torch.float32 else [dtype, torch.float32]
        assert [x.dtype for x in results if x.ndim > 1] == [*compared, taken, taken]
    monkeypatch.setattr(_rates, "device_name", lambda device: "another GPU")
    assert _rates.rates(torch.device("cuda"), torch.bfloat16) is None


def test_a_gpu_is_timed_by_events_behind_a_backlog(monkeypatch):
    """With stand-ins for the GPU: a call of 2 ms that the host prepares in less."""
    asked = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            asked.append("record")

        def synchronize(self):
            asked.append("synchronize")

        def elapsed_time(self, end):
            return 2.0

    fakes = {
        "Event": Event,
        "_sleep": asked.append,
        "synchronize": lambda: None,
        "reset_peak_memory_stats": lambda: None,
        "max_memory_allocated": lambda: 700,
        "memory_allocated": lambda: 500,
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(_measure, "_clock", lambda device: 1e9)
    monkeypatch.setattr(_rates, "device_name", lambda device: "NVIDIA H200")
    monkeypatch.setattr(_rates, "_product_on_gpu", lambda: 7e14)
    monkeypatch.setattr(_records, "device_name", lambda device: "NVIDIA H200")
    (benchmark,) = _choice.choose(["attention_map/attention/clip"])
    measurement = _measure.Measurement(benchmark, CPU, overrides=TINY, compiled=False)
    measurement.device = torch.device("cuda")
    measurement._warm_up("streaming")
    measurement.round()
    assert asked[0] > 5e4 and asked[1:4] == ["record", "record", "synchronize"]  # 50 us and more of backlog
    (row,) = (row for row in measurement.records() if row["variant"] == "streaming")
    assert (row["variant"], row["p50_us"], row["peak_bytes"], row["ratio_to_bound"]) == ("streaming", 2000.0, 200, 1.0)
    assert row["host_p50_us"] > 0 and 0 < row["share_of_limit"] < 1 and _records.slug(torch.device("cuda")) == "h200"


def test_peak_memory_is_what_the_call_holds():
    size = 64 * 2**20
    peak, spent, _ = _measure._peak_of(lambda: torch.ones(size // 4).sum(), CPU)
    if peak is None:
        pytest.skip("this system does not tell")
    assert 0.9 * size <= peak < 1.1 * size and spent > 0


@pytest.mark.slow
def test_a_quick_run_is_smaller_and_stores_nothing_unless_told(only_congruence, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(_run, "RESULTS", tmp_path)
    assert _run.run(["congruence_loss"], quick=True, rounds=1)
    assert list(tmp_path.iterdir()) == [] and "records are not stored" in capsys.readouterr().out
    assert _run.run(["congruence_loss"], rounds=1, compiled=False)
    assert [path.name for path in tmp_path.iterdir()] == ["cpu.json"]
    for workload in {benchmark.workload.key: benchmark.workload for benchmark in DECLARED}.values():
        full, quick = workload.sizes(CPU), workload.sizes(CPU, quick=True)
        assert math.prod(quick.values()) < math.prod(full.values())
        assert workload.sizes(torch.device("cuda"), quick=True) == dict(workload.full)


def test_a_run_of_some_variants(only_congruence, tmp_path, capsys):
    out = tmp_path / "rows.json"
    assert _run.run(["congruence_loss"], quick=True, rounds=1, variants=["SDPA", "streaming"], out=out)
    assert {row["variant"] for row in json.loads(out.read_text())} == {"SDPA", "streaming"}
    assert not _run.run(["congruence_loss"], quick=True, rounds=1, variants=["SDPA", "FlashAttention"])
    assert "variants must be of a benchmark; none of these has FlashAttention" in capsys.readouterr().err


def test_a_run_that_is_stopped_says_how_it_goes_on(only_congruence, tmp_path, monkeypatch, capsys):
    (chosen,) = _run.choose([])
    monkeypatch.setattr(_run, "choose", lambda *_: [chosen] * 3)
    whole, runs = _run.Measurement.run, iter((True, False))

    def stopped(measurement):
        if next(runs):
            return whole(measurement)
        raise KeyboardInterrupt

    monkeypatch.setattr(_run.Measurement, "run", stopped)
    with pytest.raises(KeyboardInterrupt):
        _run.run(quick=True, rounds=1, out=tmp_path)
    path, name = tmp_path / "cpu.json", chosen.name
    assert {row["benchmark"] for row in json.loads(path.read_text())} == {name}
    expected = f"stopped in {name}; {path} keeps the others' records. To go on, name what is left: {name} {name}"
    assert capsys.readouterr().err.splitlines()[-1] == expected


@pytest.mark.slow
def test_a_run_says_how_far_it_is_and_what_its_columns_are(only_congruence, tmp_path, monkeypatch, capsys):
    chosen = _run.choose([])
    monkeypatch.setattr(_run, "choose", lambda *_: chosen * 3)
    assert _run.run(quick=True, rounds=1, out=tmp_path)
    said = capsys.readouterr()
    steps = [line for line in said.err.splitlines() if line.startswith("[")]
    assert [line.split(";")[0] for line in steps] == ["[1 of 3", "[2 of 3", "[3 of 3"]
    assert "left" not in steps[0] and all("elapsed, about" in line and "left" in line for line in steps[1:])
    assert said.err.rstrip().splitlines()[-1].startswith("3 benchmarks in 0:")
    assert "of bound: p50 over that of the bound, marked *" in said.out and "of limit: the least time that" in said.out
    assert sum(line.startswith("  SDPA *") for line in said.out.splitlines()) == 3
    assert _run._progress(2, 10, 75.4, "x") == "\n[3 of 10; 1:15 elapsed, about 5:01 left] x"


@pytest.fixture
def only_congruence(monkeypatch):
    """The runs of a test have one tiny benchmark."""
    (found,) = _choice.choose(["congruence_loss/cacr, forward+backward/uniter"])
    tiny = replace(found, workload=found.workload._replace(cpu=TINY, quick={}))
    monkeypatch.setattr(_run, "choose", lambda *_: [tiny])
    return tiny.name


@pytest.mark.slow
def test_rows_are_added_and_say_where_they_come_from(only_congruence, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("VLATTN_COMMIT", "abc")
    out = tmp_path / "rows.json"
    for _ in range(2):
        assert command.main([only_congruence, "--quick", "--rounds", "1", "--out", str(out)]) == 0
    rows = json.loads(out.read_text())
    assert len(rows) == 2 * len({row["variant"] for row in rows}) and list(tmp_path.iterdir()) == [out]
    assert rows[0]["command"].startswith("python -m vlattn_fast.benchmarks 'congruence_loss/cacr, ")
    assert rows[0]["commit"] == "abc" and rows[0]["versions"]["torch"] == torch.__version__
    assert rows[0]["device"].startswith("CPU: ") and rows[0]["threads"] == torch.get_num_threads()
    assert "streaming" in capsys.readouterr().out


@pytest.mark.slow
def test_vlattn_bench(only_congruence, tmp_path, monkeypatch):
    testing = pytest.importorskip("typer.testing")
    from vlattn_fast import cli

    def vlattn(*arguments):
        options = ["--quick", "--rounds", "1", "--out", str(tmp_path / "rows")]
        return testing.CliRunner().invoke(cli.app, ["bench", *arguments, *options])

    result = vlattn(only_congruence)
    assert result.exit_code == 0, result.output
    assert json.loads((tmp_path / "rows" / "cpu.json").read_text())[0]["command"].split()[0] == "vlattn"
    assert "streaming" in result.output and vlattn("--device", "tpu").exit_code == 2
    monkeypatch.setattr("vlattn_fast.backends.streaming.congruence_loss.forward", lambda *inputs: 1 / 0)
    assert vlattn().exit_code == 1


def test_wrong_options_are_refused(capsys):
    with pytest.raises(ValueError, match="names must be of benchmarks; got 'flash'. There are\n  score_attention"):
        _run.run(["flash"])
    with pytest.raises(ValueError, match="rounds must be at least 1; got 0"):
        _run.run(["congruence_loss"], rounds=0)
    with pytest.raises(ValueError, match="device must be cpu or cuda; got 'tpu'"):
        _run.run(["congruence_loss"], device="tpu")
    with pytest.raises(SystemExit) as end:
        command.main(["flash"])
    assert end.value.code == 2 and "attention_map/attention/clip" in capsys.readouterr().err


def test_a_gpu_runs_more_variants(monkeypatch):
    """SDPA by each of its kernels; it and our backends as CUDA graphs, captured once and replayed. With stand-ins for the GPU."""
    names = "triton", "streaming", "reference", "published", "SDPA"
    runs = {name: (lambda t: {"output": t["x"] + 1}) for name in names}
    made = _gpu.more(runs)
    kernels = {"SDPA cuDNN", "SDPA flash", "SDPA efficient"}
    assert made.keys() == kernels | {f"{name}, graph" for name in ("triton", "streaming", "SDPA", *kernels)}
    asked = []

    class Stream:
        def wait_stream(self, other):
            asked.append("wait")

    class Graph:
        def replay(self):
            asked.append("replay")

    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, stream: contextlib.nullcontext(asked.append("capture")))
    modes = [0]
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: modes[-1])
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)

    def waits(t):
        if modes[-1] == "error":
            raise RuntimeError("called a synchronizing CUDA operation")

    with pytest.raises(RuntimeError, match="synchronizing"):
        _gpu.graphed(waits)({})
    assert asked == ["wait"] and modes == [0, "error", 0]  # it is not captured
    asked.clear()
    x = {"x": torch.zeros(1)}
    outputs = [made["triton, graph"](x)["output"] for _ in range(3)]
    assert asked == ["wait", "wait", "capture", "replay", "replay", "replay"]
    assert outputs[0] is outputs[1] is outputs[2] and float(outputs[0]) == 1
    query = torch.randn(1, 1, 4, 8)
    seen = []
    run = _gpu.by_kernel(lambda t: seen.append(torch.backends.cuda.flash_sdp_enabled()), torch.nn.attention.SDPBackend.MATH)
    run({"query": query})
    assert seen == [False] and torch.backends.cuda.flash_sdp_enabled()
