"""Pairs of ways to compute one thing, equal to the bit under FpSan, and calls under ConSan, without a report.

`make test-all` runs all of them, for the architectures that VLATTN_EXACT names; else a tenth of them runs.
"""

import ast
import hashlib
import importlib
import inspect
import json
import os

import pytest

from tests.helpers.releases import WITHOUT_PTX

pytest.importorskip("triton")
pytest.importorskip("ptx", reason=WITHOUT_PTX)
from ptx.testing import needs_sanitizers, sanitizing
from tests.compiled.test_emulated_calls import KERNELS
from tests.helpers.emulated.pairs import ITEMS, NO_PAIR, Item
from tools.planted.exact import FAULTS, TABLE, Planted, row

ALL = os.environ.get("VLATTN_EXACT", "").split()


def digest(item: Item) -> str:
    return hashlib.blake2b(item.title.encode()).hexdigest()


# a tenth: of each architecture those with the least digests, the same ones on every machine until titles change
# these take longer than all others of a tenth
LONG = ("rows, congruence_loss iais_singular, long rows", "causal, score_attention scaled_dot causal")
TENTH = {
    n: sorted((one for one in items if one.title not in LONG), key=digest)[: -(-len(items) // 10)] for n, items in ITEMS.items()
}
CHOSEN = [(n, item) for n, items in (ITEMS if ALL else TENTH).items() for item in items if not ALL or str(n) in ALL]
SLOW = "consan, score_attention grouped heads, few queries", "consan, relevancy_step gradient"
MARKED = [
    pytest.param(n, item, id=f"sm_{n} {item.title}", marks=pytest.mark.slow if n == 80 or item.title in SLOW else ())
    for n, item in CHOSEN
]


@needs_sanitizers
@pytest.mark.parametrize(("architecture", "item"), MARKED)
def test_both_ways_are_equal_to_the_bit(architecture: int, item: Item) -> None:
    different, launched = sanitizing("tests.helpers.emulated.pairs.differing", item, architecture)
    assert different == {} and launched == item.kernels


def test_items_launch_every_kernel() -> None:
    operators = (names for operator, names in KERNELS.items() if operator != "core_scores")  # which no item calls
    every = {name for names in operators for name in names.split()}
    assert {name for item in ITEMS[90] if item.kind == "consan" for name in item.kernels} == every
    assert {name for item in ITEMS[90] if item.kind != "consan" for name in item.kernels} == every - set(NO_PAIR)


def test_the_stored_table_is_of_these_faults() -> None:
    stored = json.loads(TABLE.read_text())
    assert [{name: x for name, x in one.items() if name != "seen"} for one in stored] == [row(one) for one in FAULTS]


@pytest.mark.parametrize("planted", FAULTS, ids=lambda one: one.reason)
def test_each_fault_has_its_place_in_the_source(planted: Planted) -> None:
    module, _, name = planted.function.partition(".")
    function = getattr(importlib.import_module(f"vlattn_fast.kernels.{module}"), name).fn
    assert ast.unparse(ast.parse(inspect.getsource(function))).count(planted.expression) == 1


@pytest.mark.slow
@needs_sanitizers
def test_a_fault_within_the_tolerance_is_seen_as_stored() -> None:
    stored = json.loads(TABLE.read_text())
    assert sanitizing("tools.planted.exact.seen", FAULTS[0]) is stored[0]["seen"]
