"""Models that two processes share, and what `explain` gives for them: tensor parallelism, FSDP2, and both."""

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed.fsdp
import torch.distributed.tensor.parallel  # both before the fork, which then need not import them twice
import transformers
from torch import Tensor, nn
from transformers import LlamaForCausalLM, LlavaForConditionalGeneration

import vlattn_fast as va
from tests.helpers.interpret import cases, decoder_cases
from tests.helpers.releases import OLDER
from vlattn_fast.interpret import explain

METHODS = ("gradient", "weighted", "rollout", "attention", "gradcam")
COLUMNS = ("q_proj", "k_proj", "v_proj", "fc1", "gate_proj", "up_proj")
ROWS = ("o_proj", "out_proj", "fc2", "down_proj")
Made = tuple[nn.Module, dict[str, Any]]


def clip() -> Made:
    case = cases.clip()
    return case.model, case.inputs


def llama() -> Made:
    """Grouped-query attention, one head of keys in each process."""
    ids = torch.randint(5, 50, (2, 7))
    mask = torch.ones_like(ids)
    mask[1, :2] = 0
    return LlamaForCausalLM(transformers.LlamaConfig(**cases.LLAMA)), {"input_ids": ids, "attention_mask": mask}


def llava() -> Made:
    vision, text = transformers.CLIPVisionConfig(**cases.VISION), transformers.LlamaConfig(**cases.LLAMA)
    config = transformers.LlavaConfig(vision_config=vision, text_config=text, image_token_index=55)
    ids = torch.randint(5, 50, (2, 24))
    ids[:, 2:18] = 55
    return LlavaForConditionalGeneration(config), {"input_ids": ids, "pixel_values": torch.randn(2, 3, 24, 24)}


def mllama() -> Made:
    """Words attend to tiles of images in layers of cross-attention."""
    decoder = decoder_cases.mllama()
    return decoder.model, decoder.inputs("right")


MODELS: dict[str, Callable[[], Made]] = {"clip": clip, "llama": llama, "llava": llava, "mllama": mllama}


def made(name: str) -> Made:
    torch.manual_seed(0)
    model, inputs = MODELS[name]()
    model = cases.lively(model).eval().double()
    return model, {key: x.double() if x.is_floating_point() else x for key, x in inputs.items()}


def explained(name: str, model: nn.Module, inputs: dict[str, Any], methods: tuple[str, ...] = METHODS) -> dict[str, Tensor]:
    found = {}
    for method in methods:
        explanation = explain(model, inputs, method=method)
        found |= {f"{name}|{method}|{tower}": row for tower, row in explanation.relevancy.items()}
    if name in ("llama", "llava"):
        found[f"{name}|answer|language"] = explain(model, inputs, answer=[9, 8, 7]).relevancy["language"]
    if name == "llava":
        found[f"{name}|connector|vision"] = explain(model, inputs, method=va.methods.Gradient(through_connector=True)).relevancy[
            "vision"
        ]
    return found


def divided(model: nn.Module, mesh: Any, whole: tuple[str, ...] = ()) -> None:
    """The projections of attention and MLP but for those that stay `whole`, by torch's own styles."""
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    plan: dict[str, Any] = {}
    for path, module in model.named_modules():
        name = path.rpartition(".")[2]
        if isinstance(module, nn.Linear) and (name in COLUMNS or name in ROWS) and name not in whole:
            plan[path] = ColwiseParallel() if name in COLUMNS else RowwiseParallel()
        if hasattr(module, "q_proj") and type(module).__name__.startswith("Mllama"):  # it does not infer how many heads it has
            for name in ("num_heads", "num_key_value_heads"):
                if hasattr(module, name):
                    setattr(module, name, getattr(module, name) // 2)
    parallelize_module(model, mesh, plan)


def tensor_parallel() -> dict[str, Tensor]:
    from torch.distributed.device_mesh import init_device_mesh

    mesh, found = init_device_mesh("cpu", (2,)), {}
    for name, methods in WAYS[tensor_parallel].items():
        model, inputs = made(name)
        divided(model, mesh)
        found |= explained(name, model, inputs, methods)
    return found


def planned_by_transformers() -> dict[str, Tensor]:
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
    model, inputs = made("llama")
    planned(model, mesh)
    return explained("llama", model, inputs, WAYS[planned_by_transformers]["llama"])


def planned(model: Any, mesh: Any) -> None:
    """Divides a language model as from_pretrained(tp_plan="auto") does."""
    from transformers.distributed.tensor_parallel import apply_tensor_parallelism

    whole = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    styles = {f"model.{name}": style for name, style in model.config.base_model_tp_plan.items()}
    plan = {}
    for path, _ in [*model.named_modules(), *model.named_parameters()]:
        generic = ".".join("*" if part.isdigit() else part for part in path.removesuffix(".weight").split("."))
        if generic in styles:
            plan[path] = styles[generic]
    apply_tensor_parallelism(model, mesh, plan)
    from torch.distributed.tensor import distribute_tensor

    with torch.no_grad():  # from_pretrained fills the parts from files
        for name, parameter in model.named_parameters():
            if hasattr(parameter, "placements"):
                parameter.copy_(distribute_tensor(whole[name], mesh, parameter.placements))


def shard(model: nn.Module) -> None:
    """By FSDP2, layer by layer."""
    for module in list(model.modules()):
        if isinstance(module, nn.ModuleList):
            for layer in module:
                torch.distributed.fsdp.fully_shard(layer)
    torch.distributed.fsdp.fully_shard(model)


def fully_sharded() -> dict[str, Tensor]:
    found = {}
    for name, methods in WAYS[fully_sharded].items():
        model, inputs = made(name)
        shard(model)
        found |= explained(name, model, inputs, methods)
    return found


# each way with each method, and with each model
WAYS: dict[Callable[[], dict[str, Tensor]], dict[str, tuple[str, ...]]] = {
    tensor_parallel: {"llava": METHODS, "clip": ("weighted",), "llama": ("gradcam",), "mllama": ("gradient",)},
    **({} if OLDER else {planned_by_transformers: {"llama": METHODS}}),  # transformers 5.18 takes no plan of the caller's
    fully_sharded: {"llava": METHODS, "llama": ("gradient",)},
}


def divided_each_way() -> dict[str, Tensor]:
    return {f"{way.__name__}|{key}": row for way in WAYS for key, row in way().items()}


@functools.cache
def alone(name: str) -> dict[str, Tensor]:
    return explained(name, *made(name), *((("gradient",),) if name == "mllama" else ()))
