"""The library itself: its instruction sets, what it says of calls that do not fit it, and its absence."""

import ctypes
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

import vlattn_fast as va
from tests.helpers import programs
from tools import building
from vlattn_fast._ground.score_kinds import KINDS, Kind
from vlattn_fast.backends import native
from vlattn_fast.backends.cpu import score_attention

ROOT = Path(__file__).parents[2]
PROGRAM = """
import json, os, sys
import torch, vlattn_fast as va
from typer.testing import CliRunner
from vlattn_fast.backends import native
from vlattn_fast.cli import app

def computed():
    query, key, value = (torch.randn(2, 3, n, 20) for n in (17, 33, 33))
    score = va.scores.General(torch.randn(20, 20), activation="tanh")
    got = va.score_attention(query, key, value, score=score, backend="cpu")
    expected = va.reference.score_attention(query, key, value, score=score)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-3)  # products of 20 features before tanh are large
    return native.instruction_set()

def said(name):
    os.environ["VLATTN_CPU_ISA"] = name
    try:
        result = computed()
    except Exception as error:
        result = f"{type(error).__name__}: {error}"
    return result, CliRunner().invoke(app, ["info"]).stdout

for name in sys.argv[1:]:  # each in a process of its own, which imports nothing again
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        print(json.dumps([name, *said(name)]), flush=True)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
"""
SETS = ("amx", "v4_bf16", "v4", "v3", "baseline")


def available() -> list[str]:
    return native._available()


def small() -> Any:
    x = torch.randn(1, 1, 3, 4)
    return va.score_attention(x, x, x, score=va.scores.General(torch.eye(4), activation="tanh"), backend="cpu")


def test_the_fastest_comes_first() -> None:
    """A library has all sets, as `make cpus` builds it, or the fastest only. Another process chooses the same."""
    order = ["amx"] * ("amx" in available()) + building.instruction_sets()
    assert available() in (order, order[:1])
    said = [programs.run("from vlattn_fast.backends import native; print(*native._available())").stdout.split() for _ in range(3)]
    assert said == [available()] * 3


def test_pairs_come_first_where_they_multiply_faster() -> None:
    """Pairs of bfloat16 before FMA in float32. Every processor has the baseline."""
    rate = native.library.function("vlattn_rate_of_pairs", ctypes.c_double)
    sets = building.instruction_sets()
    widest = list(SETS[-len(sets) :])
    if 0 < rate() < 1:
        widest[:2] = ["v4", "v4_bf16"]
    assert sets == widest


@pytest.fixture(scope="module")
def said() -> dict[str, tuple[str, str]]:
    """By VLATTN_CPU_ISA: the instruction set that computed, or why none did, and what `vlattn info` prints."""
    done = programs.run(PROGRAM, *available(), "", "v5")
    assert done.returncode == 0, done.stderr
    return {name: (result, info) for name, result, info in map(json.loads, done.stdout.splitlines())}


@pytest.mark.parametrize("name", SETS)
def test_each_instruction_set_runs(name: str, said: dict[str, tuple[str, str]]) -> None:
    if name not in available():
        pytest.skip(f"the library has no {name}, or the processor: `make cpus` runs this with all sets")
    assert said[name][0] == name


def test_the_widest_runs_where_none_is_named(said: dict[str, tuple[str, str]]) -> None:
    assert said[""][0] == available()[0]


def test_an_unknown_instruction_set_is_refused(said: dict[str, tuple[str, str]]) -> None:
    words = f"VLATTN_CPU_ISA must be one of {', '.join(available())}, which this processor runs; got 'v5'"
    assert said["v5"][0] == f"ValueError: {words}" and words in said["v5"][1]


def test_a_library_of_another_processor_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "_available", list)
    words = "this processor runs no instruction set that .* was built for: install vlattn_fast here again, .*VLATTN_BUILD_ISA"
    with pytest.raises(RuntimeError, match=words):
        native.instruction_set.__wrapped__()


def test_info_names_what_runs(said: dict[str, tuple[str, str]]) -> None:
    state = f"of {', '.join(available())} this processor runs"
    last = available()[-1]
    assert f"{state} {last} (VLATTN_CPU_ISA)\n" in said[last][1]
    assert f"{state} {available()[0]}\n" in said[""][1]


def test_a_member_that_the_library_lacks_is_named() -> None:
    words = r"does not fit this vlattn_fast: install it again \(score_attention_forward: .*gradient_lse"
    with pytest.raises(RuntimeError, match=words):
        score_attention._forward(gradient_lse=None)


def test_members_lie_where_the_source_has_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Python has no list of its own: two members that the source swaps are swapped."""
    if shutil.which("c++") is None:
        pytest.skip("c++ is not installed")
    name = available()[-1]
    monkeypatch.setattr(native, "instruction_set", lambda: name)
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    header, library = tmp_path / "csrc" / "cpu" / "attention.h", tmp_path / "libvlattn_cpu.so"
    text, members = header.read_text(), "Size B, H, Hkv, N, M, D, Dv;"
    assert text.count(members) == 1
    header.write_text(text.replace(members, "Size B, H, N, Hkv, M, D, Dv;"))
    sources = [header.with_name(file) for file in ("mask_shifts.cpp", "library.cpp")]
    subprocess.run(["c++", "-std=c++17", "-shared", "-fPIC", f"-DISA={name}", "-w", "-o", library, *sources], check=True)
    here = native.part("mask_shifts", "a")()
    monkeypatch.setattr(native, "library", native.find(library))
    other = native.part("mask_shifts", "a")()
    assert (here.Hkv.offset, here.N.offset) == (other.N.offset, other.Hkv.offset) and here.M.offset == other.M.offset


def test_the_library_has_the_kinds_of_scores_of_the_table() -> None:
    lines = [line.split() for line in native.library.text(native.chosen("score_kinds")).splitlines()]
    assert {name: rest == ["vector"] for name, *rest in lines} == {
        name: kind.of == "units" for name, kind in KINDS.items() if "cpu" in kind.kernels
    }


def test_a_kind_that_the_library_lacks_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(KINDS, "dot_square", Kind("(q . k)^2", "product"))
    score_attention._numbers_of_kinds.cache_clear()
    with pytest.raises(RuntimeError, match="does not fit this vlattn_fast: install it again .it has no dot_square"):
        score_attention._numbers_of_kinds()


def test_a_kernel_that_is_not_there() -> None:
    with pytest.raises(RuntimeError, match=r"has no vlattn_\w+_transmogrify: it does not fit this vlattn_fast; install it again"):
        native.kernel("transmogrify")()


def test_a_missing_library_is_refused_by_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    small()
    monkeypatch.setattr(native, "INSTALLED", tmp_path / "libvlattn_cpu.so")
    monkeypatch.setattr(native, "library", native.find(tmp_path / "libvlattn_cpu.so"))
    with pytest.raises(ValueError, match=r"backend='cpu' cannot run .*the CPU kernels are not built \(`vlattn info` says why\)"):
        small()


NOWHERE = """
import json, os, sys
import torch

def calls():
    import vlattn_fast as va
    from typer.testing import CliRunner
    from vlattn_fast.cli import app

    x, pairs = torch.zeros(1, 1, 3, 4), torch.zeros(1, 3, 4)
    for backend in ("auto", "cpu", "cuda", "streaming"):
        for operator, *inputs in ((va.attention_map, x, x), (va.stacked_cross_attention, pairs, pairs)):
            try:
                operator(*inputs, backend=backend)
                yield f"{backend} runs"
            except ValueError as error:
                yield f"{backend} {error}"
    yield CliRunner().invoke(app, ["info"]).stdout

for variable, file in json.loads(sys.argv[1]):  # each in a process of its own, which imports torch no more
    if (child := os.fork()) == 0:
        os.environ[variable] = file
        print(json.dumps("\\n".join(calls())), flush=True)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
"""


def test_a_variable_that_names_no_file(tmp_path: Path) -> None:
    """No call that would use the library goes on without it, and `vlattn info` still says what is there."""
    cases = [
        ("VLATTN_CPU_LIBRARY", "libvlattn_cpu.so", "CPU", ("auto", "cpu")),
        ("VLATTN_CUDA_LIBRARY", "libvlattn_cuda.so", "CUDA C++", ("cuda",)),
    ]
    done = programs.run(NOWHERE, json.dumps([(variable, str(tmp_path / name)) for variable, name, *_ in cases]))
    assert done.returncode == 0, done.stderr
    for (variable, name, title, refused), line in zip(cases, done.stdout.splitlines(), strict=True):
        said, file = json.loads(line), tmp_path / name
        error = f"{variable} must name the library of the {title} kernels; got '{file}', which is not a file"
        for backend in refused:
            assert said.splitlines().count(f"{backend} {error}") == 2, said
        assert "streaming runs\n" in said and f"{file}, named by {variable}, does not exist\n" in said
        assert ("auto runs\n" in said) == ("auto" not in refused)


def load(library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "library", native.find(library))
    for remembered in (native._library, native.instruction_set):
        monkeypatch.setattr(native, remembered.__name__, remembered.__wrapped__)


def test_a_file_that_is_no_library_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "libvlattn_cpu.so").write_text("not a library")
    load(tmp_path / "libvlattn_cpu.so", monkeypatch)
    with pytest.raises(RuntimeError, match=r"the CPU kernels cannot be loaded \(install vlattn_fast again\): "):
        native.instruction_set()


def test_another_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    load(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so", monkeypatch)
    missing = r"libtorch_cpu\.so has no vlattn_set_(threads|openmp): it does not fit this vlattn_fast"
    assert re.search(missing, native.state())


def test_products_by_tiles_are_in_it() -> None:
    """Where the compiler knows them; this processor need not have them."""
    if (
        shutil.which("objdump") is None
        or "amx" not in json.loads(native.library.path.with_name("build.json").read_text())["sets"]
    ):
        pytest.skip("objdump is not installed, or the compiler knows no tiles")
    check = ["objdump", "-d", "--no-show-raw-insn", native.library.path]
    code = subprocess.run(check, capture_output=True, text=True, check=True).stdout
    assert all(code.count(f"\t{name} ") > 0 for name in ("ldtilecfg", "tileloadd", "tdpbf16ps", "tilestored"))


@pytest.mark.parametrize("old, new, right", [("", "", True), ("first += ", "first -= ", False), ("r * bytes", "r", False)])
def test_a_product_by_tiles_that_is_wrong_takes_the_next_set(old: str, new: str, right: bool, tmp_path: Path) -> None:
    """The check that the library makes before it takes `amx`, with a stand-in for the instructions, as it is and broken."""
    if shutil.which("c++") is None:
        pytest.skip("c++ is not installed")
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    tiles, library = tmp_path / "csrc" / "cpu" / "tiles.h", tmp_path / "libcheck.so"
    assert old in tiles.read_text()
    tiles.write_text(tiles.read_text().replace(old, new) if old else tiles.read_text())
    sources = [tiles.with_name(file) for file in ("tiles_check.cpp", "library.cpp")]
    flags = ["-std=c++17", "-shared", "-fPIC", "-DISA=amx", "-DVLATTN_TILES", "-DVLATTN_AMX", "-w"]
    subprocess.run(["c++", *flags, "-o", library, *sources], check=True)
    sets = ctypes.CDLL(str(library)).vlattn_instruction_sets
    sets.restype = ctypes.c_char_p
    assert sets().decode().split() == ["amx"] * right + building.instruction_sets()


def configured(folder: Path, *options: str) -> list[str]:
    """The instruction sets of a library that CMake would build in this folder."""
    if shutil.which("c++") is None:
        pytest.skip("c++ is not installed")
    command = ["cmake", "-G", "Ninja", "-S", ROOT, "-B", folder, "-DVLATTN_CPU=ON", *options]
    subprocess.run(command, env=building.tools(), check=True, capture_output=True)
    found = re.search("^VLATTN_BUILT_SETS:INTERNAL=(.*)$", (folder / "CMakeCache.txt").read_text(), re.M)
    assert found
    return found[1].split(";")


@pytest.mark.slow
def test_an_editable_install_has_the_fastest_set(tmp_path: Path) -> None:
    assert configured(tmp_path, "-DVLATTN_ISA=native") == available()[:1]


def test_a_library_names_the_sets_that_it_has(tmp_path: Path) -> None:
    if shutil.which("c++") is None:
        pytest.skip("c++ is not installed")
    library = tmp_path / "libsets.so"
    command = ["c++", "-std=c++17", "-shared", "-fPIC", '-DVLATTN_SETS="v4_bf16 baseline"', "-o", library]
    subprocess.run([*command, ROOT / "csrc" / "cpu" / "library.cpp"], check=True)
    sets = ctypes.CDLL(str(library)).vlattn_instruction_sets
    sets.restype = ctypes.c_char_p
    assert sets().decode().split() == [name for name in building.instruction_sets() if name in ("v4_bf16", "baseline")]


@pytest.mark.slow
def test_sets_of_other_processors_compile(tmp_path: Path) -> None:
    """The library in this tree may lack them. `amx` has the code of `v4` and `v4_bf16`, too."""
    if "amx" not in configured(tmp_path):
        pytest.skip("the compiler knows no tiles")
    configured(tmp_path, "-DVLATTN_ISA=amx", "-DCMAKE_CXX_FLAGS_RELEASE=-fsyntax-only")
    command = ["cmake", "--build", tmp_path, "--target", "amx", "--", "-k", "0"]
    done = subprocess.run(command, env=building.tools(), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_no_torch_in_it() -> None:
    """It serves every version of torch, and can be built without one."""
    if shutil.which("readelf") is None:
        pytest.skip("readelf is not installed")
    said = subprocess.run(["readelf", "-d", native.library.path], capture_output=True, text=True, check=True).stdout
    needed = {line.split("[")[1].split(".so")[0] for line in said.splitlines() if "(NEEDED)" in line}
    assert needed <= {"libm", "libc", "libgcc_s", "libstdc++", "ld-linux-x86-64"} and "libc" in needed
