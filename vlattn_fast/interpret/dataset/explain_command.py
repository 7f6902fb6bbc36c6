"""One input of `vlattn explain`: a page or a figure of its explanation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from vlattn_fast.interpret.adapters.registry import find_adapter
from vlattn_fast.interpret.dataset.batches import Options
from vlattn_fast.interpret.explaining.answer import with_prompts
from vlattn_fast.interpret.explaining.explain import explain, explain_layers, find_sinks
from vlattn_fast.interpret.explaining.loading import build_inputs, generate, load_model, on_device
from vlattn_fast.interpret.relevancy.method import Method
from vlattn_fast.interpret.result.explanation import Explanation
from vlattn_fast.interpret.result.figures.photos import open_image
from vlattn_fast.interpret.result.numbers.choices import score_text
from vlattn_fast.interpret.result.numbers.sink_tokens import sinks_line


def explain_one(
    options: Options,
    methods: Sequence[Method],
    image: Path | None,
    out: Path,
    device: str | None,
    per: str | None,
    finds_sinks: bool,
) -> Iterator[str]:
    """Explains one image, texts, or both, with each method, or with the layers or heads of one, and writes `out`, .html or .png;
    yields the lines to print."""
    texts = list(options.text)
    if image is None and not texts:
        raise ValueError("image or --text must be given, or both, depending on the model; got neither")
    model, processor = load_model(options.model, None if options.dtype is None else getattr(torch, options.dtype))
    model = model if device is None else model.to(device)
    opened = None if image is None else open_image(image)
    inputs = on_device(build_inputs(model, processor, opened, texts), model)
    answer: Any = options.answer
    if options.generate is not None:
        answer = with_prompts(generate(model, inputs, options.generate), inputs, find_adapter(model))
    asked: dict[str, Any] = {"target": options.target, "answer": answer, "position": options.position, "processor": processor}
    if per is None:
        explanation, *others = (explain(model, inputs, method=method, **asked) for method in methods)
    else:
        explanation, others = explain_layers(model, inputs, per=per, method=methods[0], **asked), []
    placed = explanation.is_spatial and len(set(explanation.photos or [0])) == 1
    photo = {"image": opened, "processor": processor} if opened is not None and placed else {}
    if opened is not None and not photo:
        lies = "crops whose place in it is unknown" if explanation.is_spatial else "no tokens with a place in it"
        why = explanation.no_map or f"{type(model).__name__} has {lies}"
        yield f"{out} does not show the image: {why}"
    if out.suffix == ".html":
        title = " | ".join(texts or [str(image)])
        explanation.save_html(out, **photo, others=others, title=title if len(title) <= 80 else title[:79] + "…")
    else:
        explanation.plot(**photo).savefig(out, dpi=120)
    yield from _scores(explanation, processor, per)
    if line := sinks_line(find_sinks(model, inputs, processor=processor) if finds_sinks else explanation.sinks):
        yield line
    yield f"wrote {out}"


def _scores(explanation: Explanation, processor: Any, per: str | None) -> Iterator[str]:
    scores = [] if explanation.scores is None else explanation.scores.tolist()
    answer = explanation.answer
    if answer is not None and per is not None:
        yield f"answer: {score_text(scores[0], explanation.of)}"
    elif answer is not None:
        for number, (token, score) in enumerate(zip(answer[0], scores[0], strict=True)):
            yield f"token {number}: {score_text(score, explanation.of)} {processor.decode(token)!r}"
    for sample, score in enumerate(scores if answer is None else []):
        aim = "" if explanation.target is None else f" (target {explanation.target[sample]})"
        yield f"score {sample}: {score:.6g}{aim}"
