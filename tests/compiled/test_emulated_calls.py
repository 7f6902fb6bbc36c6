"""Each Triton kernel as it is compiled, emulated, forward and backward, against float64 by the tolerance rule. `make test-all`
runs the whole suites of the operators so.

The kernels of this process are those of Triton's interpreter (tests/conftest.py): calls run in another one.
"""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.helpers.releases import WITHOUT_PTX

pytest.importorskip("triton")
pytest.importorskip("ptx", reason=WITHOUT_PTX)
from ptx.testing import compiling, needs_fences
from tests.helpers.emulated.triton_calls import CALLED
from tools.emulated import package

ROOT = Path(__file__).parents[2]
# what one operator's calls run together
KERNELS = {
    "score_attention": """score_attention._prepare_kernel score_attention._forward_kernel score_attention._join_kernel
        score_attention._whole_forward_kernel
        _products_backward._backward_q_kernel _products_backward._backward_kv_kernel _units_backward._units_rows_kernel
        _units_backward._units_backward_kernel score_attention._rows_kernel _group_bias._group_bias_kernel
        _products_jvp._jvp_kernel""",
    "relevancy_attention": """score_attention._forward_kernel score_attention._rows_kernel _products_backward._backward_q_kernel
        score_attention._whole_forward_kernel
        _products_backward._backward_kv_kernel relevancy_attention._step_kernel
        _group_bias._group_bias_kernel _products_jvp._jvp_kernel""",
    # maps and statistics take a sink by way of the attention's log-sum-exp
    "attention_map": """attention_map._map_kernel attention_map._rows_kernel score_attention._rows_kernel
        score_attention._forward_kernel score_attention._whole_forward_kernel
        _map_backward._map_backward_rows_kernel _map_backward._map_backward_q_kernel
        _map_backward._map_backward_kv_kernel _map_backward._map_taken_kernel _group_bias._group_bias_kernel""",
    # which is no operator: one sort of scores on sm_90, and another on sm_80
    "core_scores": """score_attention._prepare_kernel score_attention._rows_kernel relevancy_attention._step_kernel
        _units_backward._units_step_kernel attention_map._map_of_scores_kernel""",
    "attention_statistics": """_key_groups._members_kernel attention_statistics._rows_kernel attention_statistics._join_kernel
        attention_statistics._received_kernel _statistics_backward._backward_q_kernel _statistics_backward._backward_kv_kernel
        score_attention._forward_kernel score_attention._whole_forward_kernel
        _products_backward._backward_q_kernel _products_backward._backward_kv_kernel _group_bias._group_bias_kernel""",
    "attention_divergence": """attention_statistics._rows_kernel attention_divergence._terms_kernel
        attention_divergence._backward_q_kernel attention_divergence._backward_kv_kernel""",
    "indexer_divergence": """attention_statistics._rows_kernel attention_divergence._terms_kernel
        attention_divergence._backward_q_kernel attention_divergence._backward_kv_kernel
        indexer_divergence._rows_kernel indexer_divergence._backward_q_kernel indexer_divergence._backward_kv_kernel
        _chosen_keys._chosen_rows_kernel _chosen_keys._chosen_terms_kernel
        _chosen_keys._chosen_backward_q_kernel _chosen_keys._chosen_backward_k_kernel""",
    "congruence_loss": """congruence_maps.map_kernel congruence_maps.statistics_kernel congruence_maps.gradient_kernel
        congruence_maps.gradient_q_kernel congruence_loss._divergence_kernel congruence_loss._target_backward_kernel""",
    "maxsim": "maxsim._largest_kernel maxsim._query_gradient_kernel maxsim._document_gradient_kernel",
    "relevancy_residual": "relevancy_residual._weights_kernel",
    "paged_attention_statistics": """paged_attention_statistics._rows_kernel paged_attention_statistics._join_kernel
        paged_attention_statistics._received_kernel""",
    "stacked_cross_attention": """_stacked_products._matmul_kernel _stacked_weights._weights_kernel
        _stacked_cosines._attend_kernel _stacked_cosines._aggregate_kernel _stacked_gradients._maps_kernel""",
}


# and what they do not launch on this architecture: on sm_90 calls of few tokens have kernels of their own
WITHOUT = {
    90: {
        "attention_map": "score_attention._forward_kernel",
        "core_scores": "relevancy_attention._step_kernel",
        "attention_statistics": "score_attention._forward_kernel _products_backward._backward_q_kernel",
    },
    80: dict.fromkeys(KERNELS, "score_attention._whole_forward_kernel") | {"core_scores": "_units_backward._units_step_kernel"},
}
# Compiling takes most of the time. So the choice has the calls that launch each kernel of sm_90 once and compile least. A kernel
# belongs to the first operator that has it, or to that of LATER. core_scores has no calls to choose from.
LATER = {"score_attention._rows_kernel": "relevancy_attention", "_group_bias._group_bias_kernel": "attention_map"}
FEWEST: dict[str, tuple[str, ...]] = {
    "score_attention": ("few queries", "scaled_dot causal, long", "additive"),
    "relevancy_attention": ("one row", "gradient, long"),
    "attention_map": ("float mask", "groups", "gradient of the largest head"),
    "core_scores": (),
    "attention_statistics": ("few queries",),
    "attention_divergence": ("kl, long",),
    "indexer_divergence": ("padding, long", "chosen keys"),
    "congruence_loss": ("cacr, long", "cacr"),
    "maxsim": ("all tokens, long",),
    "relevancy_residual": ("contribution, long",),
    "paged_attention_statistics": ("requests, long",),
    "stacked_cross_attention": ("SCAN t2i, long",),
}


def assert_right(operator: str, architecture: int, calls: tuple[str, ...]) -> set[str]:
    """The kernels that the calls launched."""
    worst, launched = compiling("tests.helpers.emulated.triton_calls.ratios", operator, architecture, calls)
    assert {name: ratio for name, ratio in worst.items() if not ratio <= 1.0} == {} != worst
    return launched


# a new clone compiles for minutes otherwise; Triton's interpreter runs all kernels in make test
@pytest.mark.slow("score_attention", "relevancy_attention", "attention_map", "congruence_loss", "stacked_cross_attention")
@pytest.mark.parametrize("operator", FEWEST)
def test_each_kernel_is_right_and_nothing_is_reported(operator: str) -> None:
    first = {kernel: name for name in reversed(KERNELS) for kernel in KERNELS[name].split()} | LATER
    assert {kernel for kernel, name in first.items() if name == operator} <= assert_right(operator, 90, FEWEST[operator])


@pytest.mark.slow
@pytest.mark.parametrize("operator", KERNELS)
@pytest.mark.parametrize("architecture", CALLED)
def test_calls_are_right_and_nothing_is_reported(operator: str, architecture: int) -> None:
    kernels = {*KERNELS[operator].split()} - {*WITHOUT[architecture].get(operator, "").split()}
    of_lse = {*KERNELS["score_attention"].split()}  # which other operators take a log-sum-exp of
    assert kernels <= assert_right(operator, architecture, ()) <= kernels | of_lse


@pytest.mark.parametrize("architecture", [90, pytest.param(100, marks=[needs_fences, pytest.mark.slow])])
def test_calls_of_many_tokens_copy_tiles_by_descriptors(architecture: int) -> None:
    outcomes = compiling("tests.helpers.emulated.triton_calls.by_descriptors", architecture)
    assert len(outcomes) == 2
    assert all(0 < ratio <= 1 and copied for ratio, copied in outcomes.values()), outcomes


@pytest.mark.slow  # nor are they in Triton's interpreter: tests/kernels/test_hidden_tiles.py
def test_hidden_tiles_are_not_read() -> None:
    got, expected = compiling("tests.helpers.emulated.triton_calls.hidden_tiles")
    torch.testing.assert_close(got, expected, rtol=0.02, atol=0.05)


def test_these_are_all_kernels() -> None:
    """Those of a file that no kernel names are launched."""
    defined, called = set(), set()
    for file in (ROOT / "kernels").glob("*.py"):
        for function in ast.parse(file.read_text()).body:
            if isinstance(function, ast.FunctionDef) and "triton.jit" in map(ast.unparse, function.decorator_list):
                defined.add(f"{file.stem}.{function.name}")
                called |= {node.id for statement in function.body for node in ast.walk(statement) if isinstance(node, ast.Name)}
    launched = {name for name in defined if name.partition(".")[2] not in called}
    named = {name for names in KERNELS.values() for name in names.split()}
    assert launched == named


def test_a_variable_that_does_not_fit_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="VLATTN_PTX must be one of 80, 90, 100; got '75'"):
        package.install("75")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(ValueError, match="VLATTN_PTX runs compiled kernels, .*: set one of the two"):
        package.install("90")


@pytest.mark.slow
def test_the_variable_is_obeyed() -> None:
    """Kernels may not read what nothing has written."""
    call = "import os, tools.emulated.package as package; package.install(os.environ['VLATTN_PTX']); "
    call += "import torch, vlattn_fast as va; x = torch.randn(1, 1, 5, 8).bfloat16()"  # compiles sooner than float32
    both = "*(va.score_attention(x, x, x, backend=name) for name in ('triton', 'reference'))"
    check = f"torch.testing.assert_close({both}, rtol=0, atol=0.02); "
    check += "from vlattn_fast._ground import tensors; assert tensors.empty_gradient(x).isnan().all()"
    environment = {**os.environ, "VLATTN_PTX": "90"}
    done = subprocess.run([sys.executable, "-c", f"{call}; {check}"], env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
