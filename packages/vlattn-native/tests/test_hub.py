"""The folder loads as the kernel hub loads it, without this package, and its functions equal the formulas."""

from __future__ import annotations

import ast
import base64
import hashlib
import importlib.metadata
import importlib.util
import inspect
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import vlattn_fast
from vlattn_native import building
from vlattn_native.hub import build

# With the package `kernels` its own loader, else the same path: the module of the id in the folder.
LOAD = """
import importlib.util, json, sys
from pathlib import Path
import torch
from torch.autograd import grad

folder, chosen = Path(sys.argv[1]), Path(sys.argv[3])
if sys.argv[2] == "kernels":
    from kernels import get_local_kernel

    hub = get_local_kernel(chosen)
else:
    name = json.loads((folder / "metadata.json").read_text())["id"]
    spec = importlib.util.spec_from_file_location(name, folder / "__init__.py")
    hub = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hub)
assert Path(hub.__file__).parent == folder, hub.__file__
assert not any(name.split(".")[0] == "vlattn_fast" for name in sys.modules)
"""
WITH_TRITON = """
if sys.argv[2] == "kernels":
    from kernels._rust import Backend, Build, Metadata

    assert Build.open(folder.parents[1]).general.backends == [Backend.CUDA]
    assert Metadata.read_from_file(folder / "metadata.json").version == 1

# behind the hub's import, where a folder that is called `kernels` harms no more; a tenth of the time
sys.path.append(sys.argv[4])
import pytest
from triton.runtime import interpreter
from tests.helpers.ops.interpreter import make_faster

interpreter.interpreter_builder.options = interpreter.InterpreterOptions(sanitize_overflow=False)
make_faster(pytest.MonkeyPatch())
"""
# Notes one call of each of the CPU's operators.
WITH_LIBRARY = """
assert "triton" not in sys.modules
from torch.utils._python_dispatch import TorchDispatchMode

class Recorder(TorchDispatchMode):
    calls = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == hub.__name__:
            self.calls[func] = [x.detach() if isinstance(x, torch.Tensor) else x for x in args]
        return func(*args, **(kwargs or {}))

recorder = Recorder()
recorder.__enter__()
"""
# Each function beside the formula, forward and backward, with masks, in float32.
COMPARE = """
import vlattn_fast as va

formula = va.reference
torch.manual_seed(0)
def leaf(*shape):
    return torch.randn(shape, requires_grad=True)

def close(got, wanted, leaves=()):
    got, wanted = ([x for x in xs if x.is_floating_point()] for xs in (got, wanted))
    torch.testing.assert_close(got, wanted, rtol=2e-4, atol=2e-5)
    if leaves:
        sent = [torch.randn_like(x) for x in wanted]
        got, wanted = (grad(outputs, leaves, sent, retain_graph=True) for outputs in (got, wanted))
        torch.testing.assert_close(got, wanted, rtol=2e-3, atol=2e-4)

query, key, value = leaf(2, 4, 9, 16), leaf(2, 2, 11, 16), leaf(2, 2, 11, 8)
key_mask = torch.ones(2, 11, dtype=torch.bool)
key_mask[1, 8:] = False
masks = {"attn_mask": torch.randn(9, 11), "key_mask": key_mask}
with torch.no_grad():  # what stands in padding has no influence
    key[1, :, 8:] = value[1, :, 8:] = torch.nan
vector = leaf(4, 16)
for score, of_formula in (
    ("dot", "scaled_dot"),
    ("cosine", va.scores.Cosine(1e-8)),
    ("additive", va.scores.Additive(vector)),
    ("hadamard_tanh", va.scores.Hadamard(vector, activation="tanh")),
):
    learned = score not in ("dot", "cosine")
    options = {"vector": vector if learned else None, "parameter": 1e-8 if score == "cosine" else 0.0}
    got = hub.score_attention(query, key, value, score=score, **options, **masks)
    wanted = formula.score_attention(query, key, value, score=of_formula, enable_gqa=True, return_lse=True, **masks)
    close(got, wanted, (query, key, value, vector) if learned else (query, key, value))
    close(got[1:], wanted[1:], (query, key))  # there is no gradient of the output
    print(score)
with torch.no_grad():
    key[1, :, 8:] = value[1, :, 8:] = 0.0

keys, values = leaf(2, 2, 9, 16), leaf(2, 2, 9, 8)
carrier = torch.eye(9)[:3].expand(2, -1, -1).clone().requires_grad_()
for rule in ("gradient", "attention"):
    got = hub.relevancy_attention(query, keys, values, carrier, rule=rule, row_normalize=True, is_causal=True)
    wanted = formula.relevancy_attention(
        query, keys, values, carrier, rule=rule, row_normalize=True, is_causal=True, enable_gqa=True
    )
    close(got, wanted, (query, keys, values, carrier))
    close(got[1:], wanted[1:], (carrier,))
    # in 16 bits the backward pass reads the rows' log-sum-exp
    halves = [x.detach().bfloat16().requires_grad_() for x in (query, keys, values)]
    ours, theirs = hub.relevancy_attention(*halves, carrier, rule=rule), formula.relevancy_attention(
        *halves, carrier, rule=rule, enable_gqa=True
    )
    sent = [torch.ones_like(x) for x in theirs]
    for a, b in zip(grad(ours, (*halves, carrier), sent), grad(theirs, (*halves, carrier), sent), strict=True):
        assert (a - b).abs().max() <= 0.03 * b.abs().max()
grad_output = leaf(2, 4, 9, 8)
for rule in ("gradient", "attention"):
    inputs = (query, key, value, grad_output) if rule == "gradient" else (query, key)
    for normalize, reduction in ((False, "mean"), (True, "max")):
        options = {"rule": rule, "row_normalize": normalize, **masks}
        got = hub.relevancy_step(carrier, query, key, value, grad_output, **options)
        wanted = formula.relevancy_step(carrier, query, key, value, grad_output, enable_gqa=True, **options)
        close([got], [wanted], (carrier, *inputs))
        got = hub.attention_map(*inputs, head_reduction=reduction, **options)
        wanted = formula.attention_map(*inputs, head_reduction=reduction, enable_gqa=True, **options)
        close([got], [wanted], inputs)
# through the log-sum-exp of the attention, too
def lse_of():
    return hub.score_attention(query, key, value, **masks)[1]

got = hub.attention_map(query, key, lse=lse_of(), **masks)
close([got], [formula.attention_map(query, key, enable_gqa=True, **masks)], (query, key))
got = hub.relevancy_step(carrier, query, key, rule="attention", lse=lse_of(), **masks)
wanted = formula.relevancy_step(carrier, query, key, rule="attention", enable_gqa=True, **masks)
close([got], [wanted], (carrier, query, key))
print("relevancy")

groups, weight = torch.randint(-1, 2, (2, 11)), torch.rand(2, 9, requires_grad=True)
options = {"key_groups": groups, "num_groups": 2, "row_weight": weight}
got = hub.attention_statistics(query, key, **options, **masks)
wanted = formula.attention_statistics(query, key, enable_gqa=True, **options, **masks)
assert torch.equal(got[3], wanted.argmax)
close(got, wanted, (query, key, weight))
print("statistics")

text, image = (leaf(2, 2, 6, 16), leaf(2, 2, 6, 16)), (leaf(2, 2, 7, 16), leaf(2, 2, 7, 16))
for kind, normalize in (("cacr", "softmax"), ("cacr", "none"), ("iais_singular", "softmax"), ("iais_distributed", "softmax")):
    options = {"kind": kind, "normalize": normalize, "image_mask": key_mask[:, :7]}
    got = hub.congruence_loss(text, image, **options)
    close([got], [formula.congruence_loss(text, image, reduction="none", **options)], (*text, *image))
print("congruence")
"""
COMPILE = """
compiled = torch.compile(lambda q, k, v: hub.score_attention(q, k, v)[0], backend="aot_eager", fullgraph=True)
close([compiled(query, key, value)], [hub.score_attention(query, key, value)[0]], (query, key, value))
carried = lambda r, q, k, v, g: hub.relevancy_step(r, q, k, v, g) @ hub.attention_map(q, k, v, g, rule="gradient").mT
compiled = torch.compile(carried, backend="aot_eager", fullgraph=True)
leaves = carrier, query, key, value, grad_output
close([compiled(*leaves)], [carried(*leaves)], leaves)
names = {name.split("::")[0] for name in torch._C._dispatch_get_all_op_names() if "vlattn" in name}
assert names == {"vlattn", hub.__name__}, names
for wrong in ({"score": "dots"}, {"score": "additive"}):
    try:
        hub.score_attention(query, key, value, **wrong)
    except ValueError as error:
        assert "must be" in str(error)
    else:
        raise AssertionError(wrong)
"""
CHECK_DEVICES = """
from types import SimpleNamespace

of_hub = [one for name, one in sys.modules.items() if name.startswith(hub.__name__)]
(operators,) = [one for one in of_hub if hasattr(one, "KERNELS") and hasattr(one, "OLD_TRITON")]
operators.OLD_TRITON = SimpleNamespace(value=True)
for capability, why in (((7, 5), "8.0 or more"), ((9, 0), ""), ((10, 0), "install triton 3.9")):
    torch.cuda.get_device_capability = lambda device: capability
    said = ""
    try:
        operators.check_device(SimpleNamespace(device=torch.device("cuda")))
    except ValueError as error:
        said = str(error)
    assert why in said and bool(why) == bool(said), (capability, said)
print("end")
"""


# What torch.compile believes of the CPU's operators, gradients beside the package's, and derivatives that they do not have.
CHECK_DERIVATIVES = """
recorder.__exit__(None, None, None)
print("operators", len(Recorder.calls))
for func, args in Recorder.calls.items():
    torch.library.opcheck(func, args, test_utils=("test_schema", "test_faketensor"))

gqa, groups_of_keys = {"enable_gqa": True}, {"key_groups": groups, "num_groups": 2, "row_weight": weight}
calls = {  # arguments, options, and what the package's function takes besides
    "score_attention": ((query, key, value), masks, {**gqa, "return_lse": True}),
    "relevancy_attention": ((query, keys, values, carrier), {}, gqa),
    "relevancy_step": ((carrier, query, key, value, grad_output), masks, gqa),
    "attention_map": ((query, key), masks, gqa),
    "attention_statistics": ((query, key), groups_of_keys, gqa),
    "congruence_loss": ((text, image), {}, {"reduction": "none"}),
}
for name, (arguments, options, of_package) in calls.items():
    leaves = (*text, *image) if name == "congruence_loss" else arguments
    got = getattr(hub, name)(*arguments, **options)
    wanted = getattr(va, name)(*arguments, **options, **of_package, backend="cpu")
    got, wanted = [[one for one in ([x] if torch.is_tensor(x) else x) if one.is_floating_point()] for x in (got, wanted)]
    sent = [torch.randn_like(x) for x in wanted]
    for x, y in zip(grad(got, leaves, sent, retain_graph=True), grad(wanted, leaves, sent), strict=True):
        assert torch.equal(x, y), name
    (once,) = grad(got[0].sum(), leaves[:1], create_graph=True)
    try:
        grad(once.sum(), leaves[:1])
    except RuntimeError as error:
        assert f"{name} has no second derivative; it is once differentiable" in str(error), error
    else:
        raise AssertionError(name)
print("derivatives")
"""

# Five classes of transformers by the folder's name, beside their own attention: a training step, and tokens from a cache.
TRANSFORMERS = """
import transformers
from transformers import CLIPConfig, CLIPModel, Gemma2Config, Gemma2ForCausalLM, GptOssConfig, GptOssForCausalLM
from transformers import BertConfig, BertForMaskedLM, LlamaConfig, LlamaForCausalLM
from transformers.utils.import_utils import is_kernels_available

name = "vlattn/vlattn-fast"  # LOCAL_KERNELS says where it is
if not (sys.argv[2] == "kernels" and is_kernels_available()):  # what transformers does with a kernel that it has loaded
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    name = "vlattn_fast"
    assert hub.supports_flash_attn
    AttentionInterface.register(name, hub.flash_attn_forward)
    AttentionMaskInterface.register(name, sdpa_mask)

sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
words = {"vocab_size": 60, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}
decoder = {**sizes, **words, "num_key_value_heads": 2, "head_dim": 16}
window = {**decoder, "sliding_window": 4}
picture = {"text_config": {**sizes, **words, "eos_token_id": 2}, "vision_config": {**sizes, "image_size": 16, "patch_size": 4}}
models = (
    (LlamaForCausalLM, LlamaConfig(**decoder), "sdpa"),
    (Gemma2ForCausalLM, Gemma2Config(**window, query_pre_attn_scalar=16, attn_logit_softcapping=1.0), "eager"),  # a softcap
    (GptOssForCausalLM, GptOssConfig(**window, num_local_experts=2, num_experts_per_tok=1), "eager"),  # sinks
    (BertForMaskedLM, BertConfig(**sizes, **words, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0), "sdpa"),
    (CLIPModel, CLIPConfig(**picture), "sdpa"),
)
for cls, config, own in models:
    torch.manual_seed(0)
    model = cls(config)
    ids, mask = torch.randint(3, 60, (2, 9)), torch.ones(2, 9, dtype=torch.long)
    mask[1, :3] = 0  # padding on the left
    ids = ids * mask
    inputs = {"input_ids": ids, "attention_mask": mask}
    if cls is CLIPModel:
        ids[:, -1] = 2
        inputs |= {"pixel_values": torch.randn(2, 3, 16, 16), "return_loss": True}
    else:  # the first label is predicted from padding, which eager attention, unlike SDPA, lets attend to other padding
        inputs |= {"labels": ids.masked_fill(mask.cumsum(-1) < (1 if own == "sdpa" else 2), -100)}
    results = []
    for implementation in (own, name):
        model.set_attn_implementation(implementation)
        assert model.config._attn_implementation == implementation
        model.train()
        loss = model(**inputs).loss
        tokens = torch.zeros(0)
        if cls.__name__.endswith("CausalLM"):
            tokens = model.eval().generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False)
            assert tokens.shape == (2, 15)
        if implementation == name:
            try:
                model(**inputs, output_attentions=True)
            except ValueError as error:
                assert "must use va.explain for attention maps" in str(error), error
            else:
                raise AssertionError(f"{cls.__name__} gives maps that were never computed")
        used = [x for x in model.parameters() if x.requires_grad]
        results.append(([loss, *grad(loss, used, allow_unused=True)], tokens))
    (ours, tokens), (wanted, of_own) = results[1], results[0]
    assert torch.equal(tokens, of_own), cls
    assert [x is None for x in ours] == [x is None for x in wanted], cls
    largest = max(x.abs().max() for x in wanted[1:] if x is not None)
    for x, y in zip(ours, wanted, strict=True):
        if x is not None:
            torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5 * float(largest), msg=cls.__name__)
x, bias = torch.randn(1, 2, 3, 8), torch.zeros(1, 2, 3, 3, requires_grad=True)
with torch.no_grad():
    hub.flash_attn_forward(torch.nn.Identity(), x, x, x, None, position_bias=bias)
try:
    hub.flash_attn_forward(torch.nn.Identity(), x, x, x, None, position_bias=bias)
except ValueError as error:
    assert "model must have a constant position bias" in str(error), error
else:
    raise AssertionError("a bias of positions would stay as it is")
print("transformers")
"""
# `kernelize` takes the forward of a layer; without the package what it does to one.
LAYERS = """
class Attention(torch.nn.Module):
    def forward(self, query, key, value, attn_mask=None, is_causal=False, scale=None):
        return torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask, 0.0, is_causal, scale=scale)

layer, calls = Attention(), []
q, k, v = leaf(2, 3, 5, 8), leaf(2, 3, 7, 8), leaf(2, 3, 7, 8)
wanted = layer(q, k, v)
if sys.argv[2] == "kernels":
    from kernels import LocalLayerRepository, Mode, kernelize, replace_kernel_forward_from_hub, use_kernel_mapping

    replace_kernel_forward_from_hub(Attention, "Attention")
    repository = LocalLayerRepository(chosen, layer_name="ScoreAttention")
    with use_kernel_mapping({"Attention": {"cpu": repository}}):
        layer = kernelize(layer, mode=Mode.TRAINING | Mode.TORCH_COMPILE, device="cpu")
else:
    layer.forward = hub.layers.ScoreAttention.forward.__get__(layer)
assert layer.forward.__func__ is hub.layers.ScoreAttention.forward
close([layer(q, k, v)], [wanted], (q, k, v))
eye = torch.eye(5)[None].expand(2, -1, -1).clone().requires_grad_()
out, carried = hub.layers.RelevancyAttention()(q, k[:, :, :5], v[:, :, :5], eye)
close([carried], [formula.relevancy_attention(q, k[:, :, :5], v[:, :, :5], eye)[1]])
print("layers")
"""

COMPARED = ("dot", "cosine", "additive", "hadamard_tanh", "relevancy", "statistics", "congruence")


def installed() -> bool:
    """Whether the package `kernels` is. The extra `test` leaves it out: each build imports its plugin, which fails in
    this repository, whose folder has the same name. It brings 16 packages and 41 MB."""
    return any(each.metadata["Name"] == "kernels" for each in importlib.metadata.distributions())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build.write(tmp_path_factory.mktemp("hub"))


def run(code: str, folder: Path, chosen: Path) -> list[str]:
    """Words that code says in a process of its own, in which `hub` is the variant in `folder`."""
    local = {"HF_HUB_OFFLINE": "1", "LOCAL_KERNELS": f"vlattn/vlattn-fast={chosen}"}
    bare = {"PYTHONDONTWRITEBYTECODE": "1"}  # importing leaves nothing in the folder
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", **bare, **local}
    words = [sys.executable, "-c", LOAD + code, folder, "kernels" if installed() else "path", chosen, build.ROOT]
    done = subprocess.run([*map(str, words)], cwd=folder.parents[1], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.split()


def test_its_functions_equal_the_formulas(folder: Path) -> None:
    assert run(WITH_TRITON + COMPARE + COMPILE + CHECK_DEVICES, folder, folder) == [*COMPARED, "end"]


def test_those_of_the_cpu_equal_the_formulas(folder: Path) -> None:
    """The loader itself chooses the variant on a machine without a GPU."""
    out = folder.parents[1]
    try:
        kernel = build.write_portable(out) if importlib.util.find_spec("ziglang") else build.write_cpu(out)
    except building.Missing as error:
        pytest.skip(f"the kernels of the CPU are not tested: {error}")
    code = WITH_LIBRARY + COMPARE + CHECK_DERIVATIVES + COMPILE + LAYERS + TRANSFORMERS
    assert run(code, kernel, out) == [*COMPARED, "operators", "12", "derivatives", "layers", "transformers"]


def test_its_libraries_run_on_old_systems(tmp_path: Path) -> None:
    """By the hub's own checker, in `python -m tools.environments hub`."""
    try:
        from kernel_abi_check import ObjectFile

        kernel = build.write_portable(tmp_path)
    except (ImportError, building.Missing) as error:
        pytest.skip(f"the libraries are not checked: {error}")
    for library in build.LIBRARIES:
        file = ObjectFile(kernel / library)
        assert (file.check_manylinux(f"manylinux_{build.GLIBC.replace('.', '_')}"), file.check_python_abi("3.9")) == ([], [])


def test_its_files_have_the_syntax_of_the_oldest_python(folder: Path) -> None:
    """The hub asks for 3.9's, whatever torch needs."""
    for path in folder.rglob("*.py"):
        ast.parse(path.read_text(), feature_version=(3, 9))


# A score is a name here, with features and a parameter in place of a learned one; and groups have no number of their own.
DIFFERS = {"score_attention": {"score", "vector", "parameter"}, "attention_statistics": {"num_groups"}}


def test_its_functions_take_what_the_public_calls_take(folder: Path) -> None:
    """The folder cannot import this package's signatures, so it spells them again: in order, with the same defaults."""
    tree = ast.parse((folder / "functions.py").read_text())
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef) and not node.name.startswith("_")]
    assert len(functions) == 6
    for function in functions:
        scope: dict[str, Any] = {}
        exec(f"from __future__ import annotations\ndef one({ast.unparse(function.args)}): ...", scope)
        ours = {name: (x.kind, x.default) for name, x in inspect.signature(scope["one"]).parameters.items()}
        public = inspect.signature(getattr(vlattn_fast, function.name)).parameters
        same = [name for name in ours if name not in DIFFERS.get(function.name, ())]
        assert [(name, *ours[name]) for name in same] == [(n, x.kind, x.default) for n, x in public.items() if n in same]


def test_all_imports_are_relative_or_of_torch_and_triton(folder: Path) -> None:
    files = {path.relative_to(folder).as_posix(): ast.parse(path.read_text()) for path in folder.rglob("*.py")}
    assert {"__init__.py", "_ops.py", "kernels/score_attention.py", "_ground/tensors.py"} <= files.keys()
    for file, tree in files.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.level:
                base = folder.joinpath(file).parents[node.level - 1].joinpath(*(node.module or "").split("."))
                assert base.with_suffix(".py").exists() or base.is_dir(), (file, node.lineno)
            elif isinstance(node, (ast.Import, ast.ImportFrom)):
                names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
                assert {name.split(".")[0] for name in names} <= build.ALLOWED, (file, node.lineno)


def test_the_kernels_are_those_of_the_repository(folder: Path) -> None:
    """But for their imports; and the sources that kernel-builder takes are the same files."""
    for path in (folder / "kernels").glob("*.py"):
        source = build.ROOT / "kernels" / path.name
        if path.name != "__init__.py":
            lines = zip(path.read_text().splitlines(), source.read_text().splitlines(), strict=True)
            assert all(line == before or line.startswith("from .") for line, before in lines), path.name
    sources = folder.parents[1] / "torch-ext" / "vlattn_fast"
    files = {path.relative_to(folder) for path in folder.rglob("*.*")}
    made = files - {Path("_ops.py"), Path("metadata.json")}
    assert made == {path.relative_to(sources) for path in sources.rglob("*.*")}
    assert all((folder / path).read_bytes() == (sources / path).read_bytes() for path in made)


def test_what_it_says_of_itself(folder: Path) -> None:
    facts = json.loads((folder / "metadata.json").read_text())
    assert (facts["name"], facts["version"], facts["backend"]) == ("vlattn-fast", 1, {"type": "cuda"})
    assert facts["id"] in (folder / "_ops.py").read_text()
    sums = facts["digest"]["files"]
    assert sums.keys() == {path.relative_to(folder).as_posix() for path in folder.rglob("*.*")} - {"metadata.json"}
    kernel = (folder / "kernels" / "score_attention.py").read_bytes()
    assert sums["kernels/score_attention.py"] == base64.b64encode(hashlib.sha256(kernel).digest()).decode()


def test_another_import_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "one.py").write_text("import numpy as np\n")
    monkeypatch.setitem(build.PLACES, "vlattn_fast.kernels", tmp_path)
    with pytest.raises(ValueError, match=r"one.py:1 imports numpy; a kernel of the hub imports torch and triton alone"):
        build.rewritten("vlattn_fast.kernels.one")
