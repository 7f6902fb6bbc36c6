"""The papers' ablations against the published rules on stored maps."""

import contextlib

import pytest
import torch
import transformers

from tests.helpers.interpret.cases import lively
from tests.helpers.interpret.evaluation_cases import made
from tests.helpers.interpret.linked_maps import ABLATIONS, published
from tests.helpers.interpret.stored_maps import assert_rows
from tests.interpret.relevancy.test_linked import LXMERT, encoder_decoder_maps, lxmert_maps, text_encoder_decoder
from vlattn_fast.interpret import explain
from vlattn_fast.interpret.relevancy.methods.registry import with_options
from vlattn_fast.interpret.relevancy.methods.rollout import Rollout

pytestmark = pytest.mark.usefixtures("published")

OF_ONE_TOWER = ("gradient:no_aggregation", "weighted:no_normalization")


@pytest.mark.parametrize("case", ["clip", "siglip", "bert", "llava", "uniter"], indirect=True)
def test_towers_by_themselves(case):
    case.check(case.inputs, OF_ONE_TOWER)
    for method in OF_ONE_TOWER:
        other, got = (explain(case.model, case.inputs, method=m) for m in (method.partition(":")[0], method))
        assert got.method == method
        for tower, row in got.relevancy.items():
            assert (other.relevancy[tower] - row).abs().max() > 1e-2 * row.abs().max()


def test_equal_weights_without_normalization_are_the_plain_rule():
    model, inputs = made("vit")
    plain = explain(model, inputs).relevancy["vision"]
    same = explain(model, inputs, method=with_options("weighted:no_normalization", weighting="equal")).relevancy["vision"]
    assert_rows(same, plain)


def lxmert():
    torch.manual_seed(0)
    model = lively(transformers.LxmertForQuestionAnswering(transformers.LxmertConfig(**LXMERT, num_qa_labels=5))).eval()
    ids, mask = torch.randint(3, 60, (2, 9)), torch.ones(2, 9, dtype=torch.long)
    mask[1, 6:] = 0
    inputs = {"input_ids": ids, "attention_mask": mask}
    return model.double(), {**inputs, "visual_feats": torch.randn(2, 7, 10).double(), "visual_pos": torch.rand(2, 7, 4).double()}


def agrees(got, plain, want):
    for row, other, wanted in zip(got, plain, want, strict=True):
        if wanted.any():
            assert_rows(row, wanted)
        else:
            assert not row.any()
        assert (row - other).abs().max() > 1e-3 * other.abs().max()


@pytest.mark.parametrize("method", ABLATIONS)
def test_towers_that_attend_to_one_another(method):
    model, inputs = lxmert()
    maps = lxmert_maps(model, inputs, lambda o: o.question_answering_score.max(-1).values.sum())
    want = published(method, maps, [0, 0])
    agrees(*(explain(model, inputs, method=m).relevancy.values() for m in (method, "gradient")), want)
    if method == "gradient:no_aggregation":  # what rule 11 puts in place of R_tt is zero in every other layer
        assert want[0].count_nonzero() == 0 and want[1].count_nonzero() > 0


@pytest.mark.parametrize("kind", ["bart", "t5"])
def test_one_hot_rollout_of_a_decoder(kind):
    """Row t of the last cross-attention for each token of an answer. The published rule takes what later tokens take from t, and
    says so."""
    model, inputs = text_encoder_decoder(kind)
    inputs["decoder_input_ids"] = torch.randint(3, 60, (2, 5))
    outputs = model(**inputs, output_attentions=True)
    maps = encoder_decoder_maps(outputs, outputs.logits.sum())
    read = {"tower1": 2}
    with pytest.warns(UserWarning, match="method='rollout:one_hot' for only the attention of t") as warned:
        other = explain(model, inputs, target=lambda o: o.logits[:, 2, 7], position=read, method="rollout").relevancy
    assert len(warned) == 1
    got = explain(model, inputs, target=lambda o: o.logits[:, 2, 7], position=read, method="rollout:one_hot").relevancy
    for method, rows_of_method in (("rollout", other), ("rollout:one_hot", got)):
        for name, want in zip(("tower1", "tower0"), published(method, maps, [2, 2]), strict=True):
            assert_rows(rows_of_method[name], want, what=(method, name))
    with torch.no_grad():  # the score cannot depend on what stands behind position 2, and nor does the map
        inputs["decoder_input_ids"][:, 3:] = torch.randint(3, 60, (2, 2))
    for method in ("rollout:one_hot", "rollout"):
        with pytest.warns(UserWarning, match="later tokens") if method == "rollout" else contextlib.nullcontext():
            again = explain(model, inputs, target=lambda o: o.logits[:, 2, 7], position=read, method=method).relevancy["tower0"]
        before = (got if method == "rollout:one_hot" else other)["tower0"]
        assert torch.allclose(again, before, rtol=1e-9, atol=0) == (method == "rollout:one_hot")
    with pytest.warns(UserWarning, match="later tokens") as warned:  # of each token of an answer, once
        explain(model, {"input_ids": inputs["input_ids"]}, answer=[[17, 30, 21]] * 2, method="rollout")
    assert len(warned) == 1


def test_one_hot_rollout_between_towers_that_see_all():
    model, inputs = lxmert()
    maps = lxmert_maps(model, inputs, lambda o: o.question_answering_score.max(-1).values.sum())
    got = explain(model, inputs, method="rollout:one_hot").relevancy.values()  # no token is hidden from another: no warning
    for row, want in zip(got, published("rollout:one_hot", maps, [0, 0]), strict=True):
        assert_rows(row, want)
    same = explain(model, inputs, method=Rollout(one_hot=True)).relevancy.values()
    assert all(map(torch.equal, same, got))
