"""Faults planted in the core's source (tools/planted/core.py)."""

import ast
from pathlib import Path

from tools.planted.core import key_of, summary
from tools.planted.mutants import mutants

PYTHON = """\
def rows(x, attn_mask, key_mask, keep=True):
    if keep and x[0] <= 1:
        x = x.sum(-1) - x.max(dim=1, keepdim=True)
    try:
        return attend(x, attn_mask, key_mask, 2, wide=True)
    finally:
        close(-x)
"""
CPP = "for (Size n = 0; n < rows && n != 3; ++n) sum += x[n + 1];  // n < 2\n"


def test_each_fault_changes_one_place(tmp_path: Path) -> None:
    (tmp_path / "rows.py").write_text(PYTHON)
    (tmp_path / "rows.cpp").write_text(CPP)
    found = [*mutants(tmp_path, "rows.py"), *mutants(tmp_path, "rows.cpp")]
    kinds = {mutant.kind for mutant in found if mutant.file == "rows.py"}
    assert kinds == {"comparison", "condition", "sign", "axis", "mask", "off by one", "swapped", "flag", "finally"}
    for mutant in found:
        text = PYTHON if mutant.file == "rows.py" else CPP
        planted = mutant.planted(text)
        assert planted != text and text[mutant.start : mutant.end] == mutant.before
        if mutant.file == "rows.py":
            assert ast.dump(ast.parse(planted)) != ast.dump(ast.parse(text)) and mutant.function == "rows"
    in_cpp = [mutant.planted(CPP) for mutant in found if mutant.file == "rows.cpp"]
    assert CPP.replace("n < rows", "n <= rows") in in_cpp and CPP.replace("[n + 1]", "[n - 1]") in in_cpp
    assert not [text for text in in_cpp if not text.endswith("// n < 2\n")]
    assert len({key_of(mutant) for mutant in found}) > 0.8 * len(found)


def test_the_table_counts_by_folder_and_kind() -> None:
    rows = {"a/b.py:f sign: x + y -> x - y": {"state": "seen"}, "a/c.py: off by one: f(1) -> f(2)": {"state": "not seen"}}
    assert "| a | 2 | 1 | 1 | 0 | 0 |" in summary(rows) and "| off by one | 1 | 0 | 1 | 0 | 0 |" in summary(rows)
