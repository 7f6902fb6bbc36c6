"""`ptx.run` and `ptx.emulated` on kernels as others write them (tests/helpers/kernels.py): results, findings, refusals.

Kernels are compiled in a process of their own (ptx/testing.py).
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import ptx
from ptx.testing import compiling, needs_fences

pytest.importorskip("triton")
ROOT = Path(__file__).resolve().parents[1]
KERNELS = "matmul", "softmax", "attention", "causal attention", "layer norm"
TEXT = """
.version 8.0
.target sm_80
.address_size 64
.visible .entry twice(.param .u64 p0, .param .f32 p1)
{
    .reg .b32 %r<4>; .reg .b64 %rd<4>; .reg .f32 %f<4>;
    mov.u32 %r0, %tid.x; mov.u32 %r1, %ctaid.x; mov.u32 %r2, %ntid.x; mad.lo.u32 %r3, %r1, %r2, %r0;
    ld.param.u64 %rd0, [p0]; ld.param.f32 %f0, [p1];
    mad.wide.u32 %rd1, %r3, 4, %rd0;
    ld.global.f32 %f1, [%rd1];
    mul.f32 %f2, %f0, %f1;
    st.global.f32 [%rd1], %f2;
    ret;
}
"""


@needs_fences
@pytest.mark.parametrize("arch", [80, 90, 100])
@pytest.mark.parametrize("kernel", KERNELS)
def test_results_are_right_and_nothing_is_found(kernel: str, arch: int) -> None:
    ratio, findings, executed = compiling("tests.helpers.kernels.outcome", kernel, arch)
    assert 0 < ratio <= 1 and findings == [] and executed > 0


def test_these_are_all_calls() -> None:
    assert compiling("tests.helpers.kernels.names") == list(KERNELS)


def test_no_gpu_takes_what_is_compiled_here_for_its_own(tmp_path: Path) -> None:
    assert compiling("tests.helpers.kernels.kept_in", str(tmp_path)) == (["ptx"], True)


def test_an_autotuned_kernel_has_its_first_configuration() -> None:
    """Triton times none of them. Heuristics and a grid by the configuration are obeyed."""
    assert compiling("tests.helpers.kernels.tuned") == (True, (5, 1, 1), {"BLOCK": 64})


def test_an_autotuned_kernel_has_the_first_configuration_that_fits() -> None:
    """Nothing of it is remembered for a GPU."""
    assert compiling("tests.helpers.kernels.too_large") == (64, False)


def test_a_finding_has_its_lines() -> None:
    lines = (ROOT / "tests/helpers/kernels.py").read_text().splitlines()
    number = lines.index("    tl.store(out, tl.program_id(0))") + 1
    kind, text, finding = compiling("tests.helpers.kernels.race")
    source = f"kernels.py:{number}"
    assert kind == "FindingsError" and source in text and "written by block" in text
    assert finding["kind"] == "race in global memory: write after write" and finding["source"] == source
    assert "st.global" in finding["instruction"]


def test_errors_name_what_is_there_and_what_to_do() -> None:
    raised = compiling("tests.helpers.kernels.refusals")
    assert raised["outside"][0] == "EmulationError"
    assert "x has 1200 bytes, and the access ends" in raised["outside"][1] and "kernels.py:" in raised["outside"][1]
    assert raised["never written"][0] == "FindingsError" and "never written" in raised["never written"][1]
    assert raised["opcode"][0] == "PtxError" and "opcode nul.b32 is not in the table: PTX line" in raised["opcode"][1]
    assert "kernels.py:" in raised["opcode"][1]
    assert raised["device"] == ("ValueError", "x must lie on the CPU, where launches are emulated; it lies on meta: pass x.cpu()")
    words = "an architecture that is emulated is one of 80, 90, 100 (sm_90 is 90); got 75"
    assert raised["architecture"] == ("ValueError", words)
    assert raised["no kernel"][0] == "TypeError" and "a function of @triton.jit" in raised["no kernel"][1]
    assert raised["no grid"][0] == "EmulationError" and "size 0" in raised["no grid"][1]
    assert raised["options"][0] == "TypeError" and "options must be ptx.Options; got 3" in raised["options"][1]
    assert raised["interpreted"][0] == "TypeError" and "TRITON_INTERPRET=1" in raised["interpreted"][1]
    assert raised["nothing"] == ("", "")  # and the next launch is none the worse


# ---- PTX text, which needs no Triton


def test_ptx_text_runs_and_is_checked() -> None:
    x = torch.arange(64.0)
    launch = ptx.run(TEXT, 2, x, 2.0, block=32)
    assert torch.equal(x, 2 * torch.arange(64.0)) and launch.executed == 2 * 11 and launch.findings == []
    with pytest.raises(ptx.EmulationError, match=r"argument 0 has 256 bytes(.|\n)*PTX line 11.*ld"):
        ptx.run(TEXT, 3, x, 2.0, block=32)
    with pytest.raises(ptx.PtxError, match=r"opcode nul\.f32 is not in the table: PTX line 12"):
        ptx.run(TEXT.replace("mul", "nul"), 2, x, 2.0, block=32)
    with pytest.raises(TypeError, match="twice takes 2 arguments; got 1"):
        ptx.run(TEXT, 2, x, block=32)
    with pytest.raises(ValueError, match=r"must be positive numbers, three at most; got grid=\(2,\), block=0"):
        ptx.run(TEXT, 2, x, 2.0)
    with pytest.raises(ValueError, match="is one of 80, 90, 100"):
        ptx.run(TEXT, 2, x, 2.0, block=32, arch=75)


def test_findings_of_ptx_text_raise_unless_told_otherwise() -> None:
    same = TEXT.replace("mad.wide.u32 %rd1, %r3, 4, %rd0;", "mov.u64 %rd1, %rd0;")
    with pytest.raises(ptx.FindingsError, match="race in global memory"):
        ptx.run(same, 1, torch.ones(1), 2.0, block=64)
    finding = ptx.run(same, 1, torch.ones(1), 2.0, block=64, strict=False).findings[0]
    assert finding.kind.startswith("race in global memory") and finding.line in (11, 13) and finding.source == ""


def test_the_readme_runs_and_its_finding_is_that_of_its_code(tmp_path: Path) -> None:
    text = (ROOT / "README.md").read_text()
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.M | re.S)
    code, said = (next(block for kind, block in blocks if block.startswith(begin)) for begin in ("import torch", "sm_90"))
    (tmp_path / "add.py").write_text(f"{code}ptx.run(add, (3,), x, y, out, 330, BLOCK=128)\n")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "add.py"], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.stdout.endswith(" []\n"), done.stderr
    (shown, line), (raised, line_raised) = (one.strip().splitlines()[-2:] for one in (said, done.stderr))
    address = re.compile(r"address \w+")
    assert address.sub("", raised).endswith("EmulationError: " + address.sub("", shown))
    assert "add.py:8: " in line and "add.py:8: " in line_raised


WITHOUT = """
import os, sys, torch

def refused(call):
    try:
        call()
    except Exception as error:
        print(f"{type(error).__name__}: {error}", flush=True)

def without_triton():
    sys.modules["triton"] = None
    import ptx, ptx.plugin
    with ptx.emulated(90):
        pass

def without_a_compiler():
    import ptx
    ptx.run(sys.argv[1], 1, torch.ones(32), 2.0, block=32)

for call in (without_triton, without_a_compiler):  # each in a process of its own, which imports torch no more
    if (child := os.fork()) == 0:
        refused(call)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
"""


def test_what_is_not_installed_is_named(tmp_path: Path) -> None:
    environment = {**os.environ, "CXX": "none", "PTX_CACHE": str(tmp_path)}
    command = [sys.executable, "-c", WITHOUT, TEXT]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    triton, compiler = done.stdout.splitlines()
    assert "ptx takes the launches of Triton, which is not installed: pip install triton" in triton
    words = "ptx compiles its emulator at the first use, and finds no none: install g++, or name a compiler in CXX"
    assert words in compiler


def test_the_plugin_imports_neither_torch_nor_triton() -> None:
    """Each process of pytest loads it where ptx is installed."""
    code = "import sys, ptx.plugin; print(sorted({'torch', 'triton', 'numpy'} & {*sys.modules}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stderr
