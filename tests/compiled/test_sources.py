"""Which stored rows are out of date: what a launch gives Triton to compile, without compiling it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.helpers.releases import WITHOUT_PTX

pytest.importorskip("triton")
pytest.importorskip("ptx", reason=WITHOUT_PTX)
from tools.compiled import sources, triton
from tools.compiled.sources import argument_text, canonical, digest, kernel_text, launch_text
from tools.compiled.table import write

KERNELS = """
\"\"\"Of a module.\"\"\"
from vlattn_fast.kernels.beside import helper as helped
from triton import language as tl
SIZE = 64
OTHER = 1

@jit
def a_kernel(x, C):
    \"\"\"Of a kernel.\"\"\"
    return helped(x) + SIZE  # of a line

@jit
def another_kernel(x):
    return OTHER
"""
BESIDE = """
@jit
def helper(x):
    return 2 * x
"""
TTIR = """
#loc = loc("a.py":3:0)
module {
  tt.func public @a_kernel(%x: !tt.ptr<f32> loc("x"(#loc))) {
    %a = tt.load %x {b = 1} : !tt.ptr<f32> loc(#loc2)
  } loc(#loc)
} loc(#loc)
"""


@pytest.fixture
def text_of(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    def text(kernels: str = KERNELS, beside: str = BESIDE, name: str = "a_kernel") -> str:
        for function in (sources._statements, kernel_text):
            function.cache_clear()
        for module, source in (("kernels", kernels), ("beside", beside)):
            (tmp_path / f"{module}.py").write_text(source)
        monkeypatch.setattr(
            sources.importlib.util, "find_spec", lambda name: SimpleNamespace(origin=tmp_path / f"{name.rpartition('.')[2]}.py")
        )
        return kernel_text("vlattn_fast.kernels.kernels", name)

    yield text
    monkeypatch.undo()
    for function in (sources._statements, kernel_text):
        function.cache_clear()


def test_a_kernel_has_all_that_it_names(text_of: Any) -> None:
    before = text_of()
    for words in ("SIZE = 64", "return 2 * x", "helped(x) + SIZE"):
        assert words in before
    assert "OTHER" not in before
    assert text_of(KERNELS.replace("64", "32")) != before != text_of(beside=BESIDE.replace("2", "3"))


def test_words_about_a_kernel_are_no_part_of_it(text_of: Any) -> None:
    before = text_of()
    assert text_of(KERNELS.replace("Of a", "About a").replace("OTHER = 1", "OTHER = 2\n\n")) == before
    assert text_of(KERNELS.replace("of a line", "about a line")) == before
    assert (
        text_of("# above\n" + KERNELS.replace("return helped(x)", "return (\n        helped(x)").replace("+ SIZE", "+ SIZE)"))
        == before
    )


@pytest.mark.parametrize(
    ("x", "y", "alike"),
    [
        (32, 64, True),
        (32, 33, False),
        (1, 33, False),
        (32, 1 << 31, False),
        (0.5, 0.25, True),
        (None, 32, False),
        (True, False, True),
        (torch.empty(3), torch.empty(5), True),
        (torch.empty(3), torch.empty(3, dtype=torch.float16), False),
        (torch.empty(32), torch.empty(32)[1:], False),
        ((32, 0.5), (64, 0.25), True),
        ((32, 0.5), (33, 0.5), False),
    ],
)
def test_arguments_are_told_apart_as_triton_does(x: Any, y: Any, alike: bool) -> None:
    assert (argument_text(x) == argument_text(y)) is alike


def test_constants_count_by_their_values() -> None:
    import triton.language as tl

    assert argument_text(tl.constexpr(32)) != argument_text(tl.constexpr(64)) == argument_text(64, False)
    assert argument_text((tl.constexpr(32), 48)) == "(32, int32, by 16)"


def test_a_launch_has_its_arguments_and_options(text_of: Any) -> None:
    text_of()
    parameters = [SimpleNamespace(name="x", is_constexpr=False), SimpleNamespace(name="C", is_constexpr=True)]
    function = SimpleNamespace(__module__="vlattn_fast.kernels.kernels", __name__="a_kernel")
    kernel = SimpleNamespace(params=parameters, fn=function)

    def launch(**arguments: Any) -> str:
        return digest([launch_text(kernel, {"x": 32, "C": 2, "num_warps": 4, **arguments})])

    assert launch() == launch(x=64) and len({launch(), launch(x=33), launch(C=3), launch(num_warps=8)}) == 4


def test_names_and_places_are_no_part_of_a_text() -> None:
    options = SimpleNamespace(num_warps=4, num_stages=2)
    before = canonical(TTIR, options)
    assert "a.py" not in before and "%1 = tt.load %0 {b = 1} : !tt.ptr<f32>\n" in before
    assert canonical(TTIR.replace("%x", "%longer").replace(":3:", ":4:"), options) == before
    assert canonical(TTIR.replace("b = 1", "b = 2"), options) != before
    assert canonical(TTIR, SimpleNamespace(num_warps=8, num_stages=2)) != before


def test_what_is_out_of_date_is_shown(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys) -> None:
    task = ("maxsim", "bf16 128", 90)
    monkeypatch.setattr(triton, "TABLE", tmp_path / "table.json")
    write(triton.TABLE, {"3.6.0": {}})
    for kernels, status in ((["_a_kernel", "_b_kernel"], 1), ([], 0)):
        monkeypatch.setattr(triton, "out_of_date", lambda *_, found=kernels: {task: found})
        with pytest.raises(SystemExit) as end:
            triton._show_stale([task], None)
        assert end.value.code == status
        lines = [f"triton 3.6.0: maxsim bf16 128 {kernel} sm_90" for kernel in kernels]
        assert capsys.readouterr().out.splitlines() == [*lines, f"{len(kernels)} kernels are out of date in table.json"]


def test_no_stored_row_is_out_of_date() -> None:
    """Nor missing, of any version of Triton, installed or not: `make table` compiles what is."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tools.compiled.triton", "--stale", "--workers", "1"]
    done = subprocess.run(command, env=environment, cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[:3000] + done.stderr[-3000:]
