"""Method "weighted": the residual sums are found where a model takes them, in one tower and between towers."""

import pytest
import torch
import transformers
from torch import nn

from tests.helpers.interpret.cases import lively
from tests.helpers.interpret.linked_maps import encoder_decoder_maps, gradient
from tests.helpers.interpret.stored_maps import Place, assert_rows, check, layer_sums
from tests.helpers.interpret.tower_cases import Block, first_rows, second, sequences, stack
from tests.interpret.relevancy.test_linked import LXMERT, lxmert_maps, text_encoder_decoder
from vlattn_fast.interpret import explain

pytestmark = pytest.mark.usefixtures("published")

KINDS = ["torch", "by name", "one head", "one key head", "nn.MultiheadAttention", "timm", "by hand", "keywords"]


def shares(x: torch.Tensor, o: torch.Tensor, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The weights (B, N, 1) of both terms of x + o by their contributions to the score."""
    before, after = ((gradient * term).sum(-1, keepdim=True).abs() for term in (x, o))
    share = torch.where(before + after > 0, before / (before + after), 0.5)
    return share, 1 - share


class Scaled(Block):
    """Adds half of what attention gives."""

    def forward(self, x, visible):
        x = x + 0.5 * self.attend(self.norm(x), visible)
        return x + self.mlp(x)


class Beside(Block):
    """Adds what attention gives to what an MLP gives, in place, and their sum to the stream."""

    def forward(self, x, visible):
        attended, beside = self.attend(self.norm(x), visible), self.mlp(x)
        beside += attended
        return beside.add(x)


class Replaced(Block):
    """Goes on with attention alone."""

    def forward(self, x, visible):
        return self.mlp(self.attend(self.norm(x), visible))


class Older(Block):
    """Adds attention to what entered no module in front of it."""

    def forward(self, x, visible):
        return 2 * x + self.attend(self.norm(x), visible)


def made_of(block: type[Block], kind: str = "torch") -> nn.Module:
    model = stack(*[kind] * 3)
    for layer in model.blocks:
        layer.__class__ = block
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_weights_of_residual_sums(kind):
    inputs = sequences()
    place = Place("blocks", first_rows(7), inputs["attention_mask"], layer_sums("blocks", 3, "", "mlp"))
    check(stack(*[kind] * 3), inputs, {"tower0": place}, second, ("weighted",), position="cls", target=second)


@pytest.mark.parametrize("block", [Scaled, Beside])
def test_residual_sums_of_other_forms(block):
    """They are seen where they are taken. The branch is what is added, without an MLP that stands beside attention."""
    inputs = sequences()
    sums = layer_sums("blocks", 3, "", "attend" if block is Beside else "mlp")
    place = Place("blocks", first_rows(7), inputs["attention_mask"], sums, branch=block is Beside)
    check(made_of(block), inputs, {"tower0": place}, second, ("weighted",), position="cls", target=second)


@pytest.mark.parametrize("block", [Replaced, Older])
def test_attention_that_is_added_to_no_stream(block):
    with pytest.raises(ValueError, match=r"to its residual stream for method 'weighted'; got no such sum after 'blocks\.0"):
        explain(made_of(block), sequences(), position="cls", target=second, method="weighted")


def test_a_tensor_that_the_model_goes_on_with_is_left_alone():
    """`add_` into what attention gave may be read from either name."""

    class Into(Block):
        def forward(self, x, visible):
            attended = self.attend(self.norm(x), visible)
            attended.add_(x)
            return attended + self.mlp(attended)

    with pytest.raises(ValueError, match=r"got no such sum after 'blocks\.0"):
        explain(made_of(Into), sequences(), position="cls", target=second, method="weighted")


def watched(model, modules):
    """The tensors that modules are fed with as they run: `modules` are the names of x and y = x + o, the end of a module's path,
    and the number of the argument."""
    terms, handles = {"x": [], "y": []}, []
    for path, module in model.named_modules():
        for name, ending, number in modules:
            if path.endswith(ending):
                keep = lambda m, a, into=terms[name], number=number: into.append(a[number])  # noqa: E731
                handles.append(module.register_forward_pre_hook(keep))
    return terms, handles


BART = [("x", f"{part}.q_proj", 0) for part in ("self_attn", "encoder_attn")]
BART += [("y", f"{part}_layer_norm", 0) for part in ("self_attn", "encoder_attn")]
OF_LXMERT = [("x", f"{part}.output", 1) for part in ("_att", "attention")]
OF_LXMERT += [("y", f"{part}.output.LayerNorm", 0) for part in ("_att", "attention")]


@pytest.mark.parametrize("kind", ["bart", "lxmert"])
def test_weights_between_towers(kind):
    """An addition to R becomes diag(a) R + diag(b) (what is added), with the shares of the residual sum behind the attention."""
    if kind == "bart":
        model, inputs = text_encoder_decoder(kind)
        inputs["decoder_input_ids"] = torch.randint(3, 60, (2, 5))
        score, row, arguments = (lambda o: o.logits[:, -1, 7]), 4, {"position": "last"}
        terms, handles = watched(model, BART)
        outputs = model(**inputs, output_attentions=True)
        total = score(outputs).sum()
        maps = encoder_decoder_maps(outputs, total)
    else:
        torch.manual_seed(0)
        config = transformers.LxmertConfig(**LXMERT, num_qa_labels=5)
        model = lively(transformers.LxmertForQuestionAnswering(config)).eval().double()
        inputs = {"input_ids": torch.randint(3, 60, (2, 6)), "visual_pos": torch.rand(2, 5, 4).double()}
        inputs["visual_feats"] = torch.randn(2, 5, 10, dtype=torch.float64)
        score, row, arguments = (lambda o: o.question_answering_score[:, 3]), 0, {}
        terms, handles = watched(model, OF_LXMERT)
        totals = []
        maps = lxmert_maps(model, inputs, lambda o: totals.append(score(o).sum()) or totals[0])
        total = totals[0]
    for handle in handles:
        handle.remove()
    grads = torch.autograd.grad(total, terms["y"], allow_unused=True)
    weights = [
        shares(x, y - x, torch.zeros_like(y) if grad is None else grad)
        for x, y, grad in zip(terms["x"], terms["y"], grads, strict=True)
    ]
    maps = [(name, a.detach(), torch.zeros_like(a) if grad is None else grad) for name, a, grad in maps]
    text, image = gradient(maps, shares=weights)
    want = text[:, row].index_fill(1, torch.tensor([row]), 0.0), image[:, row]
    got = explain(model, inputs, target=score, method="weighted", **arguments).relevancy
    names = ("tower1", "tower0") if kind == "bart" else ("text", "vision")
    for name, rows in zip(names, want, strict=True):
        assert_rows(got[name], rows, what=name)
