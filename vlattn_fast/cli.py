"""`vlattn info | explain | verify | bench | demo`."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
from torch import Tensor

try:
    import typer
except ModuleNotFoundError as missing:
    raise SystemExit(f"the vlattn command needs {missing.name}: pip install 'vlattn_fast[cli]'") from missing

from vlattn_fast import verify as checks
from vlattn_fast._extras import extra
from vlattn_fast.interpret.methods import METHODS
from vlattn_fast.ops._dispatch import BACKEND_NAMES

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__)

BACKENDS = tuple(name for name in BACKEND_NAMES if name != "auto")
DTYPES = tuple(str(dtype).removeprefix("torch.") for dtype in checks.DTYPES)


def main() -> None:
    """The `vlattn` command."""
    app()


@app.command()
def info() -> None:
    """Versions, devices, and which backend runs which operator, with the reasons for what it does not run."""
    from vlattn_fast._info import lines

    for line in lines():
        typer.echo(line)


@app.command()
def verify(
    operator: Annotated[list[str] | None, typer.Argument(help="Operators by the names that `vlattn info` shows; all.")] = None,
    backend: Annotated[list[str] | None, typer.Option(help=f"One or more of {', '.join(BACKENDS)}; all by default.")] = None,
    dtype: Annotated[list[str] | None, typer.Option(help=f"One or more of {', '.join(DTYPES)}; all by default.")] = None,
    device: Annotated[str, typer.Option(help="Where to run: cpu, cuda, cuda:1, ...")] = "cpu",
    seed: Annotated[int, typer.Option(help="Of the random inputs; with --fuzz, the number of the first call.")] = 0,
    fuzz: Annotated[int | None, typer.Option(min=1, help="So many random calls instead, of all dtypes, on the CPU.")] = None,
    out: Annotated[Path | None, typer.Option(help="With --fuzz: JSON file for the counts and the worst error.")] = None,
) -> None:
    """Run every operator on every backend and dtype and compare with its formula in float64.

    Prints the worst error as a multiple of what is allowed, and the command that repeats it. Allowed are a root mean square of
    the errors of twice the plain formula's in the same dtype, and a largest error of four times its, each plus an ulp or two.
    Ends with status 1 where a multiple is above 1. TRITON_INTERPRET=1 in the environment runs the Triton kernels without a GPU,
    in Triton's interpreter; VLATTN_CUDA_LIBRARY=build/host/libvlattn_host.so those in CUDA C++, built for the CPU.

    With --fuzz N it draws N calls: sizes, masks, memory layouts, numbers and options. Each must be right, or refused by name.
    Every failure comes with the command that repeats it.
    """
    from vlattn_fast.cuda import _shared_library

    if fuzz is not None:
        if dtype or device != "cpu":
            raise typer.BadParameter("--fuzz draws the dtype itself and runs on the CPU; leave --dtype and --device out")
        return _fuzz(fuzz, seed, operator, backend, out)
    if out is not None:
        raise typer.BadParameter("--out belongs to --fuzz")
    chosen = (("OPERATOR", operator, checks.OPERATORS), ("--backend", backend, BACKENDS), ("--dtype", dtype, DTYPES))
    for option, names, known in chosen:
        if unknown := set(names or ()) - set(known):
            raise typer.BadParameter(f"{option} must be one of {', '.join(known)}; got {', '.join(sorted(unknown))}")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise typer.BadParameter(f"--device {device}: {str(error).splitlines()[0]}") from None
    dtypes = tuple(getattr(torch, one) for one in dtype or DTYPES)
    failed, worst = 0, None
    typer.echo(f"{'operator':25}{'backend':11}{'dtype':10}{'checks':>6}  worst error, of what is allowed")
    for result in checks.verify(tuple(backend or BACKENDS), dtypes, device, seed, tuple(operator or checks.OPERATORS)):
        worst = result if result.checks and (worst is None or result.ratio > worst.ratio) else worst
        name = str(result.dtype).removeprefix("torch.")
        found = f"{result.ratio:.2f}  {result.worst}" if result.checks else f"not run: {'; '.join(result.reasons)}"
        verdict = "" if result.passed else "  FAILED"
        failed += not result.passed
        typer.echo(f"{result.operator:25}{result.backend:11}{name:10}{result.checks:6}  {found}{verdict}")
    if worst is not None:
        emulated = {"triton": "TRITON_INTERPRET=1 ", "cuda": f"VLATTN_CUDA_LIBRARY={_shared_library.library.path} "}
        prefix = emulated.get(worst.backend, "") if device == "cpu" else ""
        name = str(worst.dtype).removeprefix("torch.")
        typer.echo(
            f"the worst again: {prefix}vlattn verify {worst.operator} --backend {worst.backend} "
            f"--dtype {name} --device {device} --seed {seed}"
        )
    if failed:
        typer.echo(f"{failed} failed")
        raise typer.Exit(1)


def _fuzz(count: int, seed: int, operators: list[str] | None, backends: list[str] | None, out: Path | None) -> None:
    from tqdm import tqdm

    from vlattn_fast import _fuzz as fuzzer
    from vlattn_fast.benchmarks._rows import provenance

    for option, names, known in (("OPERATOR", operators, fuzzer.OPERATORS), ("--backend", backends, BACKEND_NAMES)):
        if unknown := set(names or ()) - set(known):
            raise typer.BadParameter(f"{option} must be one of {', '.join(known)}; got {', '.join(sorted(unknown))}")
    chosen = {"operators": tuple(operators or fuzzer.OPERATORS), "backends": tuple(backends or fuzzer.BACKENDS)}
    summary = fuzzer.Summary()
    for outcome in tqdm(fuzzer.fuzz(count, seed, **chosen), total=count, unit="call", disable=None):
        summary.add(outcome)
        if not outcome.passed:
            typer.echo(summary.failures[-1])
    for line in summary.lines():
        typer.echo(line)
    if out is not None:
        command = shlex.join(["vlattn", *sys.argv[1:]])
        out.write_text(json.dumps({**summary.record(), "first": seed, **provenance(command)}, indent=1) + "\n")
    if summary.failures:
        raise typer.Exit(1)


@app.command()
def bench(
    names: Annotated[list[str] | None, typer.Argument(help="Operators, tasks or single benchmarks; all by default.")] = None,
    device: Annotated[str, typer.Option(help="Where to run: cpu or cuda.")] = "cpu",
    quick: Annotated[bool, typer.Option("--quick", help="Small sizes and few rounds; stores rows only with --out.")] = False,
    rounds: Annotated[int | None, typer.Option(help="Calls of each variant.")] = None,
    out: Annotated[Path | None, typer.Option(help="JSON file that rows are added to, or a folder for <device>.json.")] = None,
) -> None:
    """Time operators and whole tasks beside plain SDPA, the plain formula and the published procedures.

    Prints and stores time, peak memory and the error against float64, with the progress on stderr. Ends with status 1 where
    one of our backends failed.
    """
    from vlattn_fast.benchmarks._run import run

    command = shlex.join(["vlattn", *sys.argv[1:]])
    try:
        passed = run(names or (), device=device, quick=quick, rounds=rounds, out=out, command=command)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    if not passed:
        raise typer.Exit(1)


@app.command()
def explain(
    model: Annotated[str, typer.Option(help="Directory or id of a Hugging Face model.")],
    out: Annotated[Path, typer.Option(help="File to write; .html or .png.")],
    image: Annotated[Path | None, typer.Option(exists=True, dir_okay=False, help="Picture.")] = None,
    text: Annotated[list[str] | None, typer.Option(help="Text; repeat it for several texts beside one picture.")] = None,
    method: Annotated[str, typer.Option(help=f"One of {', '.join(METHODS)}.")] = "gradient",
    target: Annotated[int | None, typer.Option(help="Index of the text, class or token; by default the model's choice.")] = None,
    start_layer: Annotated[int, typer.Option(help="First layer that counts; -1 is the last.")] = 0,
) -> None:
    """Explain which parts of a picture and a text a model's score rests on."""
    from vlattn_fast.interpret import explain as run

    if out.suffix not in (".html", ".png"):
        raise typer.BadParameter(f"--out must end in .html or .png; got {out.name!r}")
    if method not in METHODS:
        raise typer.BadParameter(f"--method must be one of {', '.join(METHODS)}; got {method}")
    if not out.parent.is_dir():
        raise typer.BadParameter(f"--out: there is no directory {out.parent}")
    if image is None and not text:
        raise typer.BadParameter("--image or --text must be given, or both, as the model takes them")
    network, processor = _load(model)
    picture = None if image is None else _open(image)
    inputs = _inputs(network, processor, picture, text or [])
    try:
        explanation = run(network, inputs, target=target, method=method, start_layer=start_layer)
    except (TypeError, ValueError) as error:
        raise typer.BadParameter(str(error)) from error
    if explanation.text is not None:
        explanation = explanation.with_tokens(processor)
    shown = _shown(processor, inputs, picture)
    if out.suffix == ".html":
        explanation.save_html(out, shown, title=" | ".join(text or [str(image)]))
    else:
        explanation.plot(shown).savefig(out, dpi=120)
    scores = [] if explanation.scores is None else explanation.scores.tolist()
    for row, score in enumerate(scores):
        aim = "" if explanation.target is None else f" (target {explanation.target[row]})"
        typer.echo(f"score {row}: {score:.6g}{aim}")
    typer.echo(f"wrote {out}")


def _load(name: str) -> tuple[Any, Any]:
    """The model, of the class its configuration names, and its processor, tokenizer or image processor."""
    with extra("explain"):
        import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(name)
        architecture = (config.architectures or [""])[0]
        loaded = getattr(transformers, architecture, transformers.AutoModel).from_pretrained(name)
        return loaded.eval(), transformers.AutoProcessor.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise typer.BadParameter(f"--model {name}: {str(error).splitlines()[0]}") from error


def _open(image: Path) -> Any:
    with extra("viz"):
        from PIL import Image, UnidentifiedImageError

    try:
        return Image.open(image).convert("RGB")
    except UnidentifiedImageError as error:
        raise typer.BadParameter(f"--image: {image} is no picture") from error


def _inputs(model: Any, processor: Any, picture: Any, texts: Sequence[str]) -> Any:
    """What the processor makes of picture and texts, in the form that the model's kind asks for."""
    from vlattn_fast.interpret.families import find_family

    takes_image = hasattr(processor, "image_processor") or hasattr(processor, "image_mean")
    takes_text = hasattr(processor, "tokenizer") or hasattr(processor, "convert_ids_to_tokens")
    for option, present, taken in (("--image", picture is not None, takes_image), ("--text", bool(texts), takes_text)):
        if present != taken:
            raise typer.BadParameter(f"{option}: {type(model).__name__} takes {'one' if taken else 'none'}")
    if not takes_text:
        return processor(images=picture, return_tensors="pt")
    if (family := find_family(model)) is None:
        raise typer.BadParameter(
            f"--model: {type(model).__name__} is of no known family; va.explain takes it with read= and target="
        )
    decoder = family.score == "token"
    padding = "max_length" if model.config.model_type.startswith("siglip") else True  # SigLIP was trained with it
    if decoder and len(texts) > 1:
        raise typer.BadParameter(f"--text: {type(model).__name__} takes one; got {len(texts)}")
    if not takes_image:
        return processor(list(texts), padding=padding, return_tensors="pt")
    prompts = [_prompt(processor, one) for one in texts] if decoder else list(texts)
    return processor(images=picture, text=prompts, padding=padding, return_tensors="pt")


def _prompt(processor: Any, text: str) -> str:
    """The text behind the picture's token, as the model was trained."""
    if getattr(processor, "chat_template", None):
        content = [{"type": "image"}, {"type": "text", "text": text}]
        return str(processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True))
    token = getattr(processor, "image_token", None)
    return text if token is None or token in text else f"{token}\n{text}"


def _shown(processor: Any, inputs: Any, picture: Any) -> Any:
    """The picture as the model saw it, resized and cropped, so that the map lies over the right pixels."""
    pixels = inputs.get("pixel_values")
    if not isinstance(pixels, Tensor) or pixels.ndim != 4 or pixels.shape[1] != 3:
        return picture
    prepare = getattr(processor, "image_processor", processor)
    mean, std = (torch.tensor(x)[:, None, None] for x in (prepare.image_mean, prepare.image_std))
    return (pixels[0] * std + mean).clamp(0, 1)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Directory for the pictures.")] = Path("demo"),
    costs: Annotated[bool, typer.Option(help="Also measure what one map costs (minutes).")] = True,
) -> None:
    """Explain pictures of the embedded benchmark, check every operator, and compare what one map costs."""
    from vlattn_fast._demo import run

    if not run(out, costs=costs):
        raise typer.Exit(1)


if __name__ == "__main__":
    main()
