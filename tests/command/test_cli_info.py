"""vlattn info: what is installed, which backend runs what, and what is known of a model."""

import importlib
import importlib.metadata
import json
import re

import pytest
import torch

pytest.importorskip("typer")
pytest.importorskip("transformers")

from tests.helpers.commands import vlattn
from vlattn_fast import cli
from vlattn_fast.backends import native
from vlattn_fast.backends.cuda import _shared_library
from vlattn_fast.dispatch.table import Backend
from vlattn_fast.ops import OPERATORS


def test_info_says_what_is_known_of_a_model(vit, tmp_path):
    listed = vlattn("info", "--model", vit)
    assert listed.exit_code == 0 and "listed by its class" in listed.output and "first token" in listed.output
    transformers = pytest.importorskip("transformers")
    sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2)
    transformers.StableLmConfig(**sizes, vocab_size=60, architectures=["StableLmForCausalLM"]).save_pretrained(tmp_path)
    derived = vlattn("info", "--model", tmp_path)  # a config is enough
    assert derived.exit_code == 0, derived.output
    for words in ("derived from the model and its config", "language (model.layers, 3 layers)", "answer="):
        assert words in derived.output
    missing = vlattn("info", "--model", tmp_path / "nothing")
    assert missing.exit_code == 2 and "must be the directory or id" in missing.output


def test_info_says_that_torchvision_is_of_another_torch(monkeypatch):
    load, version = importlib.import_module, importlib.metadata.version

    def fails(name, package=None):
        if name == "torchvision":
            raise RuntimeError("operator torchvision::nms does not exist")
        return load(name, package)

    monkeypatch.setattr(importlib, "import_module", fails)
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.1" if name == "torchvision" else version(name))
    said = f"0.1, built for another torch: operator torchvision::nms does not exist. Install the one of torch {torch.__version__}"
    assert f"torchvision   {said}" in vlattn("info").output


def table_of_info():
    """Device -> operator -> backend -> cell, and the notes, from what `vlattn info` prints."""
    result = vlattn("info")
    assert result.exit_code == 0, result.output
    assert max(map(len, result.output.splitlines())) < 130
    tables, columns, cells = {}, [], {}
    for line in result.output.splitlines():
        fields = re.split(r"  +", line)
        if line.startswith("On a "):
            columns, cells = fields[1:], tables.setdefault(fields[0], {})
        elif fields[0] in OPERATORS:
            cells[fields[0]] = dict(zip(columns, fields[1:], strict=True))
    notes = re.sub(r"\n {5}", " ", result.output)
    return tables, dict(re.findall(r"^\[(\d+)\] +(.*)$", notes, re.M))


def test_info_is_a_table_of_operators_and_backends():
    tables, notes = table_of_info()
    assert list(tables) == ["On a CPU", "On a CUDA device"]
    used = set()
    for cells in tables.values():
        assert list(cells) == list(OPERATORS)
        for row in cells.values():
            assert tuple(row) == (*cli.BACKENDS, "auto")
            assert row["reference"] == row["streaming"] == "yes"
            ends = [number for cell in row.values() for number in re.findall(r"\d+(?:-\d+)?", cell.partition("[")[2])]
            for first, _, last in (end.partition("-") for end in ends):
                used.update(map(str, range(int(first), int(last or first) + 1)))
    assert used == set(notes)  # each reason has a number, and each number a reason
    assert len(set(notes.values())) == len(notes)  # said once


def test_info_prints_the_reasons_of_the_table(monkeypatch):
    def refusals(call):
        wide = call.dtype == torch.float64
        return (["no float64"] if wide else []) + (["a CUDA device is needed"] if call.device_type != "cuda" else [])

    def dtypes(call):
        return [] if call.dtype == torch.float32 else ["float32 alone"]

    def kinds(call):
        return ["no CACR, a reason of many words that goes over the end of the line " * 3] if call.flags["kind"] == "cacr" else []

    table = OPERATORS["congruence_loss"].backends
    for name, function in (("triton", refusals), ("cuda", dtypes), ("streaming", kinds)):
        table = {**table, name: Backend(function, native)}
    monkeypatch.setitem(OPERATORS, "congruence_loss", OPERATORS["congruence_loss"]._replace(backends=table))
    result = vlattn("info")
    assert all(len(line) < 120 for line in result.output.splitlines() if line.startswith(("[", " ")))
    rows = [re.split(r"  +", line) for line in result.output.splitlines() if line.startswith("congruence_loss")]
    columns = ["operator", *cli.BACKENDS, "auto"]
    on_cpu, on_cuda = (dict(zip(columns, row, strict=True)) for row in rows)
    notes = {text: number for number, text in re.findall(r"^\[(\d+)\] +(.*)$", result.output, re.M)}
    assert on_cpu["triton"] == f"no [{notes['a CUDA device is needed']}]"
    assert on_cuda["triton"] == f"not float64 [{notes['no float64']}]"
    assert on_cpu["cuda"] == on_cuda["cuda"] == f"float32 only [{notes['float32 alone']}]"
    assert re.fullmatch(r"some \[\d+\]", on_cpu["streaming"])
    assert "(congruence_loss: cacr, cacr, rows as they are)" in " ".join(result.output.split())


BUILT = {"targets": ["80-real", "90a-real", "100-virtual"], "nvcc": "13.0", "seconds": 61}


@pytest.mark.parametrize(
    ("library", "record", "words"),
    [
        (True, BUILT, "built for sm_80, sm_90a, PTX of compute_100, with nvcc 13.0"),
        (True, None, "built by hand"),
        (False, {"reason": "nvcc was not found (...)"}, "not built: nvcc was not found (...)"),
        (False, None, "not built: no `pip install` of this copy has tried"),
        (False, BUILT, "not built: it was, but libvlattn_cuda.so is gone"),
    ],
)
def test_info_says_how_the_cuda_library_was_built(library, record, words, tmp_path, monkeypatch):
    file = tmp_path / "libvlattn_cuda.so"
    if library:
        file.touch()
    if record:
        (tmp_path / "build.json").write_text(json.dumps(record))
    monkeypatch.setattr(_shared_library, "INSTALLED", file)
    monkeypatch.setattr(_shared_library, "library", _shared_library.find(file))
    result = vlattn("info")
    assert f"\nCUDA C++      {words}\n" in result.output
    assert ("the CUDA C++ kernels are not built (`vlattn info` says why)" in result.output) == (not library)


def test_info_names_a_library_of_ones_own(tmp_path, monkeypatch):
    file = tmp_path / "libvlattn_own.so"
    monkeypatch.setattr(_shared_library, "library", _shared_library.find(file))
    assert f"\nCUDA C++      {file}, named by VLATTN_CUDA_LIBRARY, does not exist\n" in vlattn("info").output
    file.touch()
    monkeypatch.setattr(_shared_library, "library", _shared_library.find(file))
    assert f"\nCUDA C++      {file}, named by VLATTN_CUDA_LIBRARY\n" in vlattn("info").output


CPU_BUILT = {"sets": ["baseline", "v3"], "compiler": "GNU 12.2.0", "seconds": 16}


@pytest.mark.parametrize(
    ("library", "record", "words"),
    [
        ("not a library", CPU_BUILT, "built with GNU 12.2.0; the CPU kernels cannot be loaded (install vlattn_fast again): "),
        ("not a library", None, "built by hand; the CPU kernels cannot be loaded"),
        (None, None, "not built: no `pip install` of this copy has tried\n"),
    ],
)
def test_info_says_how_the_library_for_the_cpu_was_built(library, record, words, tmp_path, monkeypatch):
    file = tmp_path / "libvlattn_cpu.so"
    if library:
        file.write_text(library)
    if record:
        (tmp_path / "build.json").write_text(json.dumps(record))
    monkeypatch.setattr(native, "INSTALLED", file)
    monkeypatch.setattr(native, "library", native.find(file))
    for remembered in (native._library, native.instruction_set):
        monkeypatch.setattr(native, remembered.__name__, remembered.__wrapped__)
    assert f"\nCPU C++       {words}" in vlattn("info").output
