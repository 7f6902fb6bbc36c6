"""A Hugging Face model and its processor by name, and what the processor returns for images and texts."""

from __future__ import annotations

import contextlib
import difflib
import itertools
import json
import socket
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO
from urllib.parse import urlsplit
from urllib.request import getproxies

import torch
from torch import Tensor

from vlattn_fast._ground.extras import extra, progress
from vlattn_fast.interpret.adapters.registry import find_adapter
from vlattn_fast.interpret.explaining.answer import end_tokens, without_ends

_CHANGES_PROMPTS = ("BlipForConditionalGeneration",)  # it replaces the first token and drops the last
_ADDS_IMAGE_TOKENS = ("Blip2Processor", "InstructBlipProcessor", "Florence2Processor")  # they add the image's tokens themselves
_ENDS_PROMPTS = ("GitForCausalLM",)  # its tokenizer closes a text, and the model would go on after the end


def load_model(name: str, dtype: torch.dtype | None = None) -> tuple[Any, Any]:
    """The model, of the class its configuration names, and its processor, tokenizer or image processor; ValueError without."""
    with extra("explain"):
        import transformers

    with _errors_of_names(name) as where:
        _, cls = _class_of(name, where)
        loaded = cls.from_pretrained(name, **where, **({} if dtype is None else {"dtype": dtype}))
        try:
            return loaded.eval(), transformers.AutoProcessor.from_pretrained(name, **where)
        except ImportError as error:  # as of torchvision, for models that see videos
            reason = _first_line(error).partition(". ")[0]  # advice follows
            raise ImportError(f"The processor of {name} cannot be loaded: {reason}") from error


def check_model(name: str) -> None:
    """ValueError if no config tells what model this is. Reads no weights."""
    with extra("explain"), _errors_of_names(name) as where:
        _class_of(name, where)


def load_without_weights(name: str) -> Any:
    """The model, whose weights have shapes and no values; ValueError without its config."""
    with extra("explain"), _errors_of_names(name) as where:
        config, cls = _class_of(name, where)
        with torch.device("meta"):
            return cls.from_config(config) if hasattr(cls, "from_config") else cls(config)


def _class_of(name: str, where: Mapping[str, bool]) -> tuple[Any, Any]:
    """The config of a model, and the class that it names."""
    import transformers

    config = transformers.AutoConfig.from_pretrained(name, **where)
    architecture = (config.architectures or [""])[0]
    return config, getattr(transformers, architecture, transformers.AutoModel)


@contextlib.contextmanager
def _errors_of_names(name: str) -> Iterator[dict[str, bool]]:
    """A context in which errors of transformers become ValueErrors about the name. Gives the options of `from_pretrained`."""
    path = Path(name).expanduser()
    wrong = f"model must be the directory or id of a Hugging Face model; got {name}"
    local = (
        path.is_absolute()
        or name.startswith((".", "~"))
        or len(path.parts) > 2
        or (len(path.parts) == 2 and path.parent.is_dir())
    )
    if local and not path.is_dir():
        raise ValueError(f"{wrong}, which is not a directory{_alike(path)}")
    try:
        yield {} if path.is_dir() or _has_hub() else {"local_files_only": True}
    except (OSError, ValueError) as error:
        raise ValueError(f"{wrong}: {_first_line(error)}{'' if path.is_dir() else _alike(path)}") from error


def _alike(path: Path) -> str:
    """Directories with names similar to that of a missing one, in the same place."""
    around = next((parent for parent in path.parents if parent.is_dir()), Path())
    alike = difflib.get_close_matches(path.name, [each.name for each in around.iterdir() if each.is_dir()], 3)
    return f"; in {around.resolve()} there are {', '.join(alike)}" if alike else ""


def _has_hub() -> bool:
    """Whether the hub has an address here. Without one transformers would ask it again and again, for half a minute."""
    from huggingface_hub.constants import ENDPOINT

    if getproxies():  # which know the addresses
        return True
    try:
        socket.getaddrinfo(urlsplit(ENDPOINT).hostname, None)
    except OSError:
        return False
    return True


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__).rstrip(".")


@contextlib.contextmanager
def open_lines(path: Path) -> Iterator[TextIO]:
    """The lines of a data set's file; ValueError if it is not UTF-8."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as lines:
            yield lines
    except UnicodeDecodeError as error:
        raise ValueError(f"dataset must be text in UTF-8; got {path}: {error}") from error


def json_lines(path: Path) -> Iterator[tuple[int, Any]]:
    """The number and the content of each line that is not blank; for a line that is not JSON the text of the error."""
    with open_lines(path) as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                try:
                    content = json.loads(line)
                except ValueError as error:
                    content = str(error)
                yield number, content


def check_parts(model: Any, processor: Any, image: bool, text: bool) -> tuple[bool, bool]:
    """Whether a model takes images, and texts. ValueError if an input has one too few or too many."""
    takes_image = hasattr(processor, "image_processor") or hasattr(processor, "image_mean")
    takes_text = hasattr(processor, "tokenizer") or hasattr(processor, "convert_ids_to_tokens")
    for part, present, taken in (("image", image, takes_image), ("text", text, takes_text)):
        if present != taken:
            form = "given" if taken else "left out"
            raise ValueError(f"{part} must be {form} for {type(model).__name__}; got {'one' if present else 'none'}")
    return takes_image, takes_text


def build_inputs(model: Any, processor: Any, image: Any, texts: Sequence[str]) -> dict[str, Any]:
    """One image (or None) and its texts as the processor makes them, in the form that the model's kind asks for. ValueError for
    an image or text too many or too few, too long a text, or a model without an adapter."""
    name = type(model).__name__
    takes_image, takes_text = check_parts(model, processor, image is not None, bool(texts))
    for text in texts:
        if any("\ud800" <= letter <= "\udfff" for letter in text):  # half a pair, as from a command line that is not UTF-8
            raise ValueError(f"text must be Unicode; got {text!r}")
    if not takes_text:
        return dict(processor(images=image, return_tensors="pt"))
    if (adapter := find_adapter(model)) is None:
        raise ValueError(
            f"model must be of a class with an adapter; got {name}. Use va.explain with position= and target= for it"
        )
    if name in _CHANGES_PROMPTS:
        raise ValueError(f"model must continue the prompt that its processor makes; got {name}. Use va.explain for it")
    decoder = adapter.scoring.predicts
    # SigLIP was trained with padding. Many decoders' tokenizers have none.
    padding = "max_length" if model.config.model_type.startswith("siglip") else len(texts) > 1
    if decoder and len(texts) > 1:
        raise ValueError(f"text must be one text for {name}; got {len(texts)}")
    if not takes_image:
        inputs = dict(processor(list(texts), padding=padding, return_tensors="pt"))
    else:
        prompts = [_prompt(processor, one) for one in texts] if decoder else list(texts)
        bos = getattr(processor.tokenizer, "bos_token", None)
        once = {"add_special_tokens": False} if decoder and bos and prompts[0].startswith(bos) else {}  # a template may have it
        inputs = dict(processor(images=image, text=prompts, padding=padding, return_tensors="pt", **once))
    if name in _ENDS_PROMPTS:
        inputs |= {part: inputs[part][:, :-1] for part in ("input_ids", "attention_mask", "token_type_ids") if part in inputs}
    most = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    size = inputs["input_ids"].shape[1]
    if not decoder and most is not None and size > most:  # on a GPU the model's own error ends the process
        raise ValueError(f"text must have at most {most} tokens for {name}; got {size}")
    return inputs


def _prompt(processor: Any, text: str) -> str:
    """The text after the image's token, as the model was trained. ValueError for a text with another token for the image."""
    name, templated = type(processor).__name__, bool(getattr(processor, "chat_template", None))
    token = None if templated or name in _ADDS_IMAGE_TOKENS else getattr(processor, "image_token", None)
    of_image = {"<image>", str(getattr(processor, "image_token", None) or "<image>")}
    for wrong in sorted(of_image - {token}):
        if wrong in text:
            place = "the image is put in front of it" if token is None else f"whose place for the image is {token}"
            raise ValueError(f"text must be without {wrong} for {name}: {place}; got {text!r:.80}. Leave it out")
    if templated:
        content = [{"type": "image"}, {"type": "text", "text": text}]
        return str(processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True))
    if token is None or str(token) in text:
        return text
    return f"{token}{text}" if name == "PaliGemmaProcessor" else f"{token}\n{text}"


def on_device(inputs: Mapping[str, Any], model: Any) -> dict[str, Any]:
    """The inputs on the model's device, pixels and other floats in its dtype."""
    placed = dict(inputs)
    for name, value in inputs.items():
        if isinstance(value, Tensor):
            placed[name] = value.to(model.device, model.dtype if value.is_floating_point() else None)
    return placed


def generate(model: Any, inputs: Mapping[str, Any], count: int) -> list[list[int]]:
    """At most `count` tokens after each prompt, the most likely one each time; the token that ends an answer is left out.
    ValueError if the model is not a decoder with an adapter, or an answer has no token."""
    adapter = find_adapter(model)
    if adapter is None or not adapter.scoring.predicts:
        raise ValueError(f"generate must be used with a decoder with an adapter; got {type(model).__name__}")
    images = (getattr(model.config, name, None) for name in ("image_token_id", "video_token_id"))  # no words
    never = [*(model.generation_config.suppress_tokens or []), *(token for token in images if token is not None)]
    with torch.no_grad(), progress("generating", total=count, unit="token", leave=False) as count_token:
        numbers = itertools.count(1)

        def ends(ids: Tensor, scores: Any, **options: Any) -> Tensor:
            """Never ends an answer: it counts the tokens for the progress bar."""
            count_token(next(numbers))
            return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)

        greedy = {"max_new_tokens": count, "do_sample": False, "num_beams": 1, "suppress_tokens": never or None}
        generated = model.generate(**inputs, **greedy, stopping_criteria=[ends])
    prompt = inputs.get(adapter.answers)  # without one a decoder after an encoder begins with its start token
    return without_ends(generated[:, 1 if prompt is None else prompt.shape[1] :].tolist(), end_tokens(model))
