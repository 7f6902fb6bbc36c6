"""What the Triton kernels that matter may cost at most: tests/compiled/thresholds.json, by kernel and architecture.

    python -m tools.compiled.thresholds    # the present rows of build/compiled/triton.json become the thresholds

"spills" are bytes of a thread at most, "repeated" the warps that compute the same part of a product at most, "programs" those
that an SM holds at least. The kernels are those that the file names; add one with an empty object and run the command.
"""

from __future__ import annotations

import json
from pathlib import Path

from tools.compiled.table import Row, Table, programs, read
from tools.compiled.triton import ARCHITECTURES, TABLE

THRESHOLDS = Path(__file__).parents[2] / "tests" / "compiled" / "thresholds.json"

Threshold = dict[str, int]


def thresholds() -> dict[str, dict[str, Threshold]]:
    stored: dict[str, dict[str, Threshold]] = json.loads(THRESHOLDS.read_text(encoding="utf-8"))
    return stored


def numbers(row: Row, architecture: str) -> Threshold:
    return {"spills": row["spills"], "repeated": row["repeated"], "programs": programs(row, architecture)}


def beyond(row: Row, architecture: str, threshold: Threshold) -> list[str]:
    """What is worse than the threshold."""
    now = numbers(row, architecture)
    lines = [f"{name} {now[name]}, at most {most}" for name in ("spills", "repeated") if now[name] > (most := threshold[name])]
    if now["programs"] < threshold["programs"]:
        lines.append(f"{now['programs']} programs an SM, at least {threshold['programs']}")
    if not row["tensor_cores"]:
        lines.append("no product runs on tensor cores")
    if "wgmma" in row["tensor_cores"] and row["waits"] >= row["products"]:
        lines.append(f"each of {row['products']} wgmma instructions has its own wait: ptxas serialised the kernel")
    return lines


def worst(table: Table, kernel: str, architecture: str) -> Threshold | None:
    """Of all versions of Triton that are stored, and of all launches of the kernel in the call."""
    names = [f"{kernel}{further} {architecture}" for further in ("", *(f" launch {n}" for n in range(2, 9)))]
    rows = [numbers(rows[name], architecture) for rows in table.values() for name in names if name in rows]
    if not rows:
        return None
    most = {name: max(row[name] for row in rows) for name in ("spills", "repeated")}
    return most | {"programs": min(row["programs"] for row in rows)}


def main() -> None:
    table = read(TABLE)
    lines = []
    for kernel in sorted(thresholds()):
        by_architecture = {f"sm_{n}": worst(table, kernel, f"sm_{n}") for n in ARCHITECTURES}
        known = {architecture: numbers for architecture, numbers in by_architecture.items() if numbers is not None}
        assert known, f"{TABLE} has no row of {kernel}: run python -m tools.compiled.triton"
        lines.append(f"{json.dumps(kernel)}: {json.dumps(known)}")
    THRESHOLDS.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
