"""Explain, test and change the attention of a model, and check and time the operators, from the command line."""

from __future__ import annotations

import inspect
import json
import re
import shlex
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from importlib.metadata import entry_points
from pathlib import Path
from typing import Annotated, Any

import torch

try:
    import typer
except ModuleNotFoundError as missing:
    raise SystemExit(f"the vlattn command needs {missing.name}: pip install 'vlattn_fast[cli]'") from missing

from vlattn_fast import __version__
from vlattn_fast._ground.checks import check_writable
from vlattn_fast._ground.extras import with_progress
from vlattn_fast.checking import verify as checks
from vlattn_fast.dispatch.table import BACKEND_NAMES
from vlattn_fast.interpret.dataset.batches import Options
from vlattn_fast.interpret.dataset.explain_all import explain_dataset
from vlattn_fast.interpret.dataset.explain_command import explain_one
from vlattn_fast.interpret.dataset.failures import summary_lines
from vlattn_fast.interpret.dataset.store import FAILURES
from vlattn_fast.interpret.dataset.stored import load_explanations
from vlattn_fast.interpret.evaluating.plan import TESTS as EVALUATION_TESTS
from vlattn_fast.interpret.explaining.loading import check_model, load_model, load_without_weights
from vlattn_fast.interpret.intervening.intervene_command import cut_of, intervene_one, scale_of
from vlattn_fast.interpret.probing.probe_dataset import TESTS
from vlattn_fast.interpret.relevancy.method import Method
from vlattn_fast.interpret.relevancy.methods.registry import ABLATIONS, METHODS
from vlattn_fast.ops import OPERATORS

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__)

BACKENDS = checks.BACKENDS
MODEL_DTYPES = ("float64", "float32", "bfloat16", "float16")
DTYPES = tuple(str(dtype).removeprefix("torch.") for dtype in checks.DTYPES)


def _method_options() -> Iterator[inspect.Parameter]:
    """Each option of the methods' classes as one of a command; not those that change no number."""
    having: dict[str, dict[type[Method], inspect.Parameter]] = {}
    for kind in METHODS.values():
        for name, parameter in inspect.signature(kind).parameters.items():
            if name not in kind.unlabelled:
                having.setdefault(name, {})[kind] = parameter
    for name, kinds in having.items():
        parameter = next(iter(kinds.values()))
        default, repeated = parameter.default, "Sequence" in str(parameter.annotation)
        taken: Any = list[str] if repeated else str if default is None else type(default)
        lines = [_first_sentence(name, kinds), f"Of {', '.join(kind.name for kind in kinds)}."]
        lines += [] if default is False else [f"Default: {default if default is not None else 'of the method'}."]
        option = typer.Option(_option(name), help=" ".join(lines), rich_help_panel="Options of methods")
        yield inspect.Parameter(name, parameter.KEYWORD_ONLY, default=None, annotation=Annotated[taken | None, option])


def _first_sentence(name: str, kinds: Iterable[type[Method]]) -> str:
    """What the docstrings say of an option, without references to another class."""
    entry = re.compile(rf"^    (?:\w+, )*{name}(?:, \w+)*:\s(?!see )(.+?\.)(?:\s|$)", re.M | re.S)
    places = (inspect.getdoc(vars(part).get("__init__")) or "" for kind in kinds for part in kind.__mro__)
    found = next((" ".join(match[1].split()) for match in map(entry.search, places) if match), "")
    return found[:1].upper() + found[1:]


def _with_given(names: Iterable[str], options: dict[str, Any]) -> list[Any]:
    """The methods with those of the given options that each has, and as names those that are none of `explain`'s. ValueError for
    an option that no method has."""
    given = {name: _read(value) for name, value in options.items() if value is not None}
    kinds = {**METHODS, **ABLATIONS}
    options_of = {name: kinds[name].option_names() if name in kinds else [] for name in names}
    for option in given:
        if not any(option in has for has in options_of.values()):
            have = "; ".join(f"{name} has {', '.join(has) or 'none'}" for name, has in options_of.items())
            raise ValueError(f"{option} must be an option of a chosen method: {have}; got {options[option]!r}")
    return [
        kinds[name](**{option: value for option, value in given.items() if option in has}) if name in kinds else name
        for name, has in options_of.items()
    ]


def _read(value: Any) -> Any:
    """The value of a method's option: "none" stands for None and ()."""
    if isinstance(value, list):
        return () if value == ["none"] else tuple(value)
    return None if value == "none" else _number(value)


def _number(value: Any) -> Any:
    return int(value) if isinstance(value, str) and value.lstrip("-").isdecimal() else value


def _command(run: Callable[..., None]) -> Callable[..., None]:
    """Registers a command whose help only the terminal wraps; typer keeps line breaks of all paragraphs but the first.
    Options of methods stand in place of its `**`."""
    parameters = list(inspect.signature(run, eval_str=True).parameters.values())
    if parameters and parameters[-1].kind is inspect.Parameter.VAR_KEYWORD:
        parameters[-1:] = _method_options()
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    paragraphs = (inspect.getdoc(run) or "").split("\n\n")
    return app.command(help="\n\n".join(" ".join(each.split()) for each in paragraphs))(run)


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"vlattn_fast {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True)
    ] = False,
) -> None: ...


def main() -> None:
    """Runs the `vlattn` command."""
    app()


def _check_device(device: str) -> None:
    try:
        placed = torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0].partition(". ")[0]  # advice follows
        raise typer.BadParameter(f"--device {device}: {reason}") from None
    if placed.is_meta:
        raise typer.BadParameter(f"--device {device}: its tensors have no values")


def _check_file(out: Path | None) -> None:
    """Raises for an unwritable file before the work, which takes long."""
    if out is not None and not out.parent.is_dir():
        raise typer.BadParameter(f"--out must be in a directory; there is no directory {out.parent}")
    with _as_usage_errors(ValueError):
        if out is not None:
            check_writable("--out", out)


def _check_outcome(model: str, endings: tuple[str, str], out: Path | None, dtype: str | None, device: str | None) -> None:
    """Raises for wrong options of a command that measures a model, before the work; the model first, and then the output file."""
    with _as_usage_errors(ImportError, ValueError, command=info):
        check_model(model)
    _check_known("--dtype", [dtype], MODEL_DTYPES)
    if out is not None and out.suffix not in endings:
        raise typer.BadParameter(f"--out must end in {' or '.join(endings)}; got {out.name}")
    _check_file(out)
    if device is not None:
        _check_device(device)


def _load(model: str, dtype: str | None, device: str | None) -> tuple[Any, Any]:
    """Returns the model, on its device, and its processor."""
    loaded, processor = load_model(model, None if dtype is None else getattr(torch, dtype))
    return (loaded if device is None else loaded.to(device)), processor


@contextmanager
def _as_usage_errors(*errors: type[Exception], command: Callable[..., None] | None = None) -> Iterator[None]:
    """Turns these errors into those of a wrong option, with the name of `command`'s option instead of the argument's."""
    try:
        yield
    except errors as error:
        argument, _, rest = str(error).partition(" ")
        options = inspect.signature(command).parameters if command is not None else ()
        named = next((name for name in (argument, argument.removesuffix("s")) if name in options), None)
        message = str(error) if named is None else f"{_option(named)} {rest}"
        raise typer.BadParameter(message) from error


def _option(argument: str) -> str:
    return "--" + argument.replace("_", "-")


def _check_apart(**two: Any) -> None:
    """Raises if both options are given."""
    if None not in two.values():
        first, second = map(_option, two)
        raise typer.BadParameter(f"{first} must be given without {second}; got both")


def _check_known(option: str, values: Iterable[str | None] | None, known: Iterable[str]) -> None:
    if unknown := set(values or ()) - {*known, None}:
        raise typer.BadParameter(f"{option} must be one of {', '.join(known)}; got {', '.join(sorted(map(str, unknown)))}")


@_command
def info(
    model: Annotated[
        str | None, typer.Option(help="Directory or id of a Hugging Face model; its config is enough. Default: no model.")
    ] = None,
) -> None:
    """Show versions, devices, and which backend supports which operator, with reasons if it does not.

    --model shows what explain finds in a model before a run: its towers, explained tokens, kinds of tokens and patch grids,
    and what is not supported.
    """
    if model is not None:
        from vlattn_fast.interpret.explaining.description import described

        with _as_usage_errors(ImportError, ValueError, command=info):
            lines = described(load_without_weights(model))
    else:
        from vlattn_fast.checking import info as page

        lines = page.lines()
    for line in lines:
        typer.echo(line)


@_command
def verify(
    operator: Annotated[
        list[str] | None, typer.Argument(help="Operators to check, by the names of `vlattn info`. Default: all.")
    ] = None,
    backend: Annotated[
        list[str] | None, typer.Option(help=f"Backend to check; repeat it for several: {', '.join(BACKENDS)}. Default: all.")
    ] = None,
    dtype: Annotated[
        list[str] | None, typer.Option(help=f"Dtype to check; repeat it for several: {', '.join(DTYPES)}. Default: all.")
    ] = None,
    device: Annotated[str, typer.Option(show_default=False, help="Device: cpu, cuda, cuda:1, ... Default: cpu.")] = "cpu",
    seed: Annotated[
        int, typer.Option(show_default=False, help="Seed of the inputs; with --fuzz, number of the first call. Default: 0.")
    ] = 0,
    fuzz: Annotated[
        int | None, typer.Option(min=1, help="Number of random calls, of all dtypes, on the CPU. Default: fixed calls.")
    ] = None,
    score: Annotated[
        str | None, typer.Option(help="Score function of all calls of --fuzz, then of score_attention. Default: random.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="File for the counts and the worst error of --fuzz, .json. Default: none.")
    ] = None,
) -> None:
    """Run every operator on every backend and dtype, and compare with its formula in float64.

    Compares outputs, gradients and, in forward mode, tangents. Prints the worst error as a multiple of the allowed one, and the
    command that repeats it. The limits are twice the root mean square and four times the largest error of the plain formula in
    the same dtype, each plus an ulp or two. Ends with status 1 if a multiple is above 1. Without a GPU, TRITON_INTERPRET=1 in
    the environment runs the Triton kernels in Triton's interpreter.

    --fuzz N draws N calls: sizes, masks, memory layouts, numbers and options. Each call must be right, or raise an error that
    names the reason. Every failure comes with the command that repeats it.
    """
    if fuzz is not None:
        if dtype or device != "cpu":
            raise typer.BadParameter(
                "--dtype and --device must be left out with --fuzz, which draws dtypes and runs on the CPU; got one"
            )
        return _fuzz(fuzz, seed, operator, backend, score, out)
    if alone := [name for name, x in (("--score", score), ("--out", out)) if x is not None]:
        raise typer.BadParameter(f"{alone[0]} must be given with --fuzz; got it alone")
    _check_known("OPERATOR", operator, OPERATORS)
    _check_known("--backend", backend, BACKENDS)
    _check_known("--dtype", dtype, DTYPES)
    if not -(2**63) <= seed < 2**64:
        raise typer.BadParameter(f"--seed must be a number of 64 bits; got {seed}")
    _check_device(device)
    dtypes = tuple(getattr(torch, one) for one in dtype or DTYPES)
    failed, worst, width = 0, None, max(map(len, OPERATORS)) + 2
    typer.echo(f"{'operator':{width}}{'backend':11}{'dtype':10}{'checks':>6}  worst error / allowed error")
    chosen = tuple(backend or BACKENDS), dtypes, device, seed, tuple(operator or OPERATORS)
    total = len(chosen[0]) * len(dtypes) * len(chosen[4])
    for result in with_progress(checks.verify(*chosen), "verifying", total=total):
        worst = result if result.checks and (worst is None or result.ratio > worst.ratio) else worst
        name = str(result.dtype).removeprefix("torch.")
        outcome = f"{result.ratio:.2f}  {result.worst}" if result.checks else f"not run: {'; '.join(result.reasons)}"
        verdict = "" if result.passed else "  FAILED"
        failed += not result.passed
        typer.echo(f"{result.operator:{width}}{result.backend:11}{name:10}{result.checks:6}  {outcome}{verdict}")
    if worst is not None:
        command = checks.command(worst.backend) if device == "cpu" else "vlattn"
        name = str(worst.dtype).removeprefix("torch.")
        typer.echo(
            f"the worst again: {command} verify {worst.operator} --backend {worst.backend} "
            f"--dtype {name} --device {device} --seed {seed}"
        )
    if failed:
        typer.echo(f"{failed} failed")
        raise typer.Exit(1)


def _fuzz(
    count: int, seed: int, operators: list[str] | None, backends: list[str] | None, score: str | None, out: Path | None
) -> None:
    from vlattn_fast.benchmarks._records import provenance
    from vlattn_fast.checking import fuzz as fuzzer
    from vlattn_fast.scores import SCORES

    _check_known("OPERATOR", operators, OPERATORS)
    _check_known("--score", score and [score], SCORES)
    if score and operators not in (None, [], ["score_attention"]):
        raise typer.BadParameter(f"OPERATOR must be score_attention with --score; got {', '.join(operators or [])}")
    _check_known("--backend", backends, BACKEND_NAMES)
    _check_file(out)
    drawn_from = tuple(backends or fuzzer.BACKENDS)
    outcomes = fuzzer.fuzz(count, seed, operators=operators or None, backends=drawn_from, score=score)
    summary = fuzzer.Summary()
    for outcome in with_progress(outcomes, "fuzzing", total=count, unit="call"):
        summary.add(outcome)
        if not outcome.passed:
            typer.echo(summary.failures[-1])
    for line in summary.lines():
        typer.echo(line)
    if out is not None:
        command = " ".join([checks.command("triton"), shlex.join(sys.argv[1:])])
        out.write_text(json.dumps({**summary.record(), "first": seed, **provenance(command)}) + "\n")
    if summary.failures:
        raise typer.Exit(1)


@_command
def bench(
    names: Annotated[list[str] | None, typer.Argument(help="Operators, tasks or single benchmarks to run. Default: all.")] = None,
    device: Annotated[str, typer.Option(show_default=False, help="Device: cpu or cuda. Default: cpu.")] = "cpu",
    quick: Annotated[
        bool, typer.Option("--quick", help="Use small sizes and few rounds; store results only with --out.")
    ] = False,
    rounds: Annotated[int | None, typer.Option(help="Number of timed calls of each variant. Default: the benchmark's.")] = None,
    out: Annotated[
        Path | None, typer.Option(help="File to which results are added, .json, or a folder for <device>.json.")
    ] = None,
) -> None:
    """Time operators and whole tasks, versus plain SDPA, the plain formula and the published procedures.

    Prints and stores time, peak memory and the error against float64; progress goes to stderr. Ends with status 1 if one of this
    package's backends failed.
    """
    from vlattn_fast.benchmarks._run import run

    command = shlex.join(["vlattn", *sys.argv[1:]])
    with _as_usage_errors(ValueError):
        passed = run(names or (), device=device, quick=quick, rounds=rounds, out=out, command=command)
    if not passed:
        raise typer.Exit(1)


@_command
def explain(
    model: Annotated[str, typer.Option(help="Directory or id of a Hugging Face model.")],
    out: Annotated[Path, typer.Option(help="File to write, .html or .png; with --dataset, a directory.")],
    image: Annotated[Path | None, typer.Option(exists=True, dir_okay=False, help="Image file.")] = None,
    text: Annotated[list[str] | None, typer.Option(help="Text; repeat it for several texts with one image.")] = None,
    method: Annotated[
        list[str] | None,
        typer.Option(help=f"Method; repeat it for several on one page: {', '.join(METHODS)}. Default: gradient."),
    ] = None,
    target: Annotated[
        str | None,
        typer.Option(help="Explained output: index of a text, class, token, or similarity. Default: the model's choice."),
    ] = None,
    position: Annotated[
        str | None, typer.Option(help="Explained token: cls, last, mean or an index. Default: the model's.")
    ] = None,
    per: Annotated[
        str | None, typer.Option(help="One map per layer or per head, on one sheet: layer or head. Default: one map of all.")
    ] = None,
    find_sinks: Annotated[bool, typer.Option("--find-sinks", help="Also print the tokens that are attention sinks.")] = False,
    answer: Annotated[str | None, typer.Option(help="Answer to explain token by token. Only decoders.")] = None,
    generate: Annotated[int | None, typer.Option(min=1, help="Number of tokens to generate and explain. Only decoders.")] = None,
    dtype: Annotated[str | None, typer.Option(help=f"Dtype of the model: {', '.join(MODEL_DTYPES)}. Default: as stored.")] = None,
    device: Annotated[
        str | None, typer.Option(help="Device: cpu, cuda, ... Default: cpu, with --dataset a GPU if there is one.")
    ] = None,
    dataset: Annotated[
        Path | None, typer.Option(help="Inputs: .jsonl, .csv, folder of images or saved Hugging Face dataset.")
    ] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Inputs explained together, with --dataset. Default: 8.")] = None,
    shard_size: Annotated[int | None, typer.Option(min=1, help="Explanations per file, with --dataset. Default: 256.")] = None,
    workers: Annotated[int | None, typer.Option(min=0, help="Threads that load images, with --dataset. Default: 2.")] = None,
    **method_options: Any,
) -> None:
    """Explain which parts of an image and a text a model's output depends on.

    Writes a page (.html) or a figure (.png), and prints the explained scores. With --dataset, explains many
    inputs and stores the explanations in a directory.

    The columns of a data set are image, text, target, answer and id; --text, --target and --answer are then defaults. If a
    run was killed, the same command continues it. Inputs that fail are skipped and listed in failures.jsonl; the status is
    then 1. `torchrun -m vlattn_fast explain --dataset ...` shares the work among processes.

    --target similarity explains the cosine of two texts that an encoder embeds: the mean of its tokens' states, or the state at
    --position.

    Options of methods are those of the classes in va.methods; none stands for None and ().
    """
    methods = list(dict.fromkeys(method or ["gradient"]))
    _check_known("--method", methods, METHODS)
    if len(methods) > 1 and (dataset is not None or out.suffix != ".html"):
        raise typer.BadParameter(f"--method must be given once unless --out is one page (.html); got {', '.join(methods)}")
    if len(methods) > 1 and per is not None:
        raise typer.BadParameter(f"--per must be given with one --method; got {', '.join(methods)}")
    _check_known("--dtype", [dtype], MODEL_DTYPES)
    _check_apart(answer=answer, generate=generate)
    _check_apart(target=target, answer=answer)
    _check_apart(target=target, generate=generate)
    for name, value in {"find_sinks": find_sinks or None, "per": per, "image": image}.items():
        _check_apart(**{name: value}, dataset=dataset)
    if device is not None:
        _check_device(device)
    size_options = {"batch_size": batch_size, "shard_size": shard_size, "workers": workers}
    sizes = {name: size for name, size in size_options.items() if size is not None}
    if sizes and dataset is None:
        raise typer.BadParameter(f"--dataset must be given with {', '.join(map(_option, sizes))}; got none")
    by_name: dict[str, Any] = {"text": text or (), "target": _number(target), "position": _number(position)}
    by_name |= {"answer": answer, "generate": generate, "dtype": dtype}
    try:
        with _as_usage_errors(ImportError, TypeError, ValueError, command=explain):
            check_model(model)  # before `out`: users fix what is named first
            objects = _with_given(methods, method_options)
            by_name["method"] = objects[0]
            if dataset is not None:
                return _explain_dataset(model, dataset, out, device=device, **sizes, **by_name)
            if out.suffix not in (".html", ".png"):
                raise ValueError(f"out must end in .html or .png; got {out.name!r}")
            _check_file(out)
            for line in explain_one(Options.check(model, **by_name), objects, image, out, device, per, find_sinks):
                typer.echo(line)
    except OSError as error:  # a full disk
        raise _stopped(
            f"explain stopped: {error.filename or out}: {error.strerror or error}", None if dataset is None else out, 1
        ) from None


def _explain_dataset(model: str, dataset: Path, out: Path, **options: Any) -> None:
    try:
        outcome = explain_dataset(model, dataset, out, **options)
    except KeyboardInterrupt:
        raise _stopped("explain was stopped", out, 130) from None
    if not outcome.first:
        return
    inputs = outcome.done + outcome.failed + outcome.skipped
    typer.echo(f"done {outcome.done}, failed {outcome.failed}, skipped {outcome.skipped} (done before), of {inputs}: {out}")
    if outcome.failed:
        for line in summary_lines(load_explanations(out).failures):
            typer.echo(line)
        typer.echo(f"{out / FAILURES} lists the inputs that failed, with reasons")
        raise typer.Exit(1)


def _stopped(reason: str, stored: Path | None, status: int) -> typer.Exit:
    """Prints the reason, and where what was `stored` before goes on."""
    rest = "" if stored is None else f". {stored} holds what was written before; run the same command again to continue"
    typer.echo(reason + rest, err=True)
    return typer.Exit(status)


@_command
def intervene(
    model: Annotated[str, typer.Option(help="Directory or id of a Hugging Face model.")],
    image: Annotated[Path | None, typer.Option(exists=True, dir_okay=False, help="Image file.")] = None,
    text: Annotated[list[str] | None, typer.Option(help="Text; repeat it for several texts with one image.")] = None,
    cut: Annotated[
        list[str] | None, typer.Option(help='Edge to cut, KEYS->QUERIES[:LAYERS[:HEADS]], e.g. "image->last:1-5"; repeat it.')
    ] = None,
    scale: Annotated[
        list[str] | None,
        typer.Option(help="Heads to scale, LAYER:HEADS:FACTOR, e.g. 14:3,7:0 turns off heads 3 and 7; repeat it."),
    ] = None,
    tower: Annotated[str | None, typer.Option(help="Tower to edit, if several have such tokens. Default: the only one.")] = None,
    generate: Annotated[
        int, typer.Option(min=1, show_default=False, help="Number of tokens to generate. Only decoders. Default: 20.")
    ] = 20,
    dtype: Annotated[str | None, typer.Option(help=f"Dtype of the model: {', '.join(MODEL_DTYPES)}. Default: as stored.")] = None,
    device: Annotated[str | None, typer.Option(help="Device: cpu, cuda, ... Default: cpu.")] = None,
) -> None:
    """Cut attention edges or scale heads, and compare the model's answer with and without the edit.

    Information flows from keys to queries: "image->last" is the attention of the last token to the image. Quote it, since the
    shell treats > as a redirection. Names of tokens are image, text, question, answer, last, special and all; image[0,0,0.5,1]
    is the left half of the image, a box x1, y1, x2, y2 relative to it. Layers and heads count from 0, negative ones from the
    end: -1 is the last.
    """
    _check_outcome(model, ("", ""), None, dtype, device)
    with _as_usage_errors(ImportError, TypeError, ValueError, command=intervene):
        edits: list[Any] = [cut_of(each, tower) for each in cut or ()]
        edits += [scale_of(each, tower) for each in scale or ()]
        if not edits:
            raise ValueError("cut or --scale must be given; got neither")
        for line in intervene_one(*_load(model, dtype, device), edits, image, text or (), generate):
            typer.echo(line)


@_command
def evaluate(
    model: Annotated[str, typer.Option(help="Directory or id of a Hugging Face model.")],
    dataset: Annotated[Path, typer.Option(help="Inputs: .jsonl, .csv, folder of images or saved Hugging Face dataset.")],
    out: Annotated[Path | None, typer.Option(help="File to write: .json, or .png for the curves. Default: none.")] = None,
    method: Annotated[
        list[str] | None,
        typer.Option(help=f"Method; repeat it for several: {', '.join(METHODS)}, an ablation, random. Default: gradient."),
    ] = None,
    test: Annotated[
        list[str] | None,
        typer.Option(help=f"Test; repeat it for several: {', '.join(EVALUATION_TESTS)}. Default: positive, negative, pointing."),
    ] = None,
    text: Annotated[list[str] | None, typer.Option(help="Text for inputs without one; repeat it for several.")] = None,
    answer: Annotated[str | None, typer.Option(help="Answer of inputs without one; each of its words is judged.")] = None,
    generate: Annotated[int | None, typer.Option(min=1, help="Judge the model's own answer, of so many tokens at most.")] = None,
    dtype: Annotated[str | None, typer.Option(help=f"Dtype of the model: {', '.join(MODEL_DTYPES)}. Default: as stored.")] = None,
    device: Annotated[str | None, typer.Option(help="Device: cpu, cuda, ... Default: cpu.")] = None,
    **method_options: Any,
) -> None:
    """Evaluate how well maps show the parts of an input that a model's output depends on.

    Prints a table of the tests. The columns of the data set are image, text, target, answer, id, boxes: a list of
    boxes x1, y1, x2, y2, relative to the image as the model processes it, or the file of a mask; and text_truth: a word or a
    list of words of the text. Options of methods are as in explain.
    """
    from vlattn_fast.interpret.dataset.samples import samples
    from vlattn_fast.interpret.evaluating.evaluate import evaluate as run
    from vlattn_fast.measuring.provenance import commit

    _check_outcome(model, (".json", ".png"), out, dtype, device)
    with _as_usage_errors(ImportError, TypeError, ValueError, command=evaluate):
        methods = _with_given(dict.fromkeys(method or ["gradient"]), method_options)
        loaded, processor = _load(model, dtype, device)
        inputs = samples(loaded, processor, dataset, text or (), answer, generate)
        named = None if {*methods} <= {"random"} else processor  # which only methods of explain read
        outcome = run(loaded, inputs, methods=methods, tests=test, processor=named)
    typer.echo(str(outcome))
    if out is not None:
        if out.suffix == ".json":
            checkpoint = Path(model).resolve().name if Path(model).exists() else model
            outcome.metadata.update(checkpoint=checkpoint, dataset=dataset.name, commit=commit())
            outcome.save(out)
        else:
            outcome.plot().savefig(out, dpi=120)
        typer.echo(f"wrote {out}")


@_command
def probe(
    model: Annotated[str, typer.Option(help="Directory or id of a Hugging Face model.")],
    dataset: Annotated[Path, typer.Option(help="Inputs, .jsonl or a folder with one: text, image, and labels as in `va.probe`.")],
    out: Annotated[Path | None, typer.Option(help="File to write, .html or .json. Default: none.")] = None,
    test: Annotated[
        list[str] | None, typer.Option(help=f"Test; repeat it for several: {', '.join(TESTS)}. Default: all.")
    ] = None,
    dtype: Annotated[str | None, typer.Option(help=f"Dtype of the model: {', '.join(MODEL_DTYPES)}. Default: as stored.")] = None,
    device: Annotated[str | None, typer.Option(help="Device: cpu, cuda, ... Default: cpu.")] = None,
) -> None:
    """Probe a model's heads and states over a data set: modalities, phrases, relations, fusion, texts.

    Prints the table without single heads; --out writes the whole table.
    """
    from vlattn_fast.interpret.probing import probe as run
    from vlattn_fast.interpret.probing.files import samples

    _check_outcome(model, (".html", ".json"), out, dtype, device)
    with _as_usage_errors(ImportError, TypeError, ValueError, command=probe):
        loaded, processor = _load(model, dtype, device)
        report = run(loaded, samples(loaded, processor, dataset), tests=test)
    typer.echo(str(report))
    if out is not None:
        (report.save_html if out.suffix == ".html" else report.save)(out)
        typer.echo(f"wrote {out}")


@_command
def demo(
    out: Annotated[Path, typer.Option(show_default=False, help="Directory for the figures. Default: demo.")] = Path("demo"),
    costs: Annotated[
        bool, typer.Option(show_default=False, help="Also measure the cost of one map, in minutes. Default: --costs.")
    ] = True,
) -> None:
    """Check every operator, explain images of DigitScenes (the embedded benchmark), and compare the costs of one map."""
    with _as_usage_errors(ValueError):
        check_writable("--out", out, folder=True)
    installed = entry_points(group="vlattn_fast.commands", name="demo")
    if not installed:
        raise SystemExit("vlattn demo needs the package vlattn_lab: pip install vlattn-lab")
    if not all(entry.load()(out, costs=costs) for entry in installed):
        raise typer.Exit(1)


if __name__ == "__main__":
    main()
