"""`vlattn info | explain | intervene | evaluate | probe | verify | bench | demo`."""

from __future__ import annotations

import inspect
import json
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
from vlattn_fast.backends.reference.relevancy_residual import WEIGHTINGS
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
from vlattn_fast.interpret.relevancy.method import EXPLAINED
from vlattn_fast.interpret.relevancy.methods.registry import ABLATIONS, METHODS, with_options
from vlattn_fast.interpret.relevancy.sink_detection import CHOICES as SINKS
from vlattn_fast.ops import OPERATORS

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__)

BACKENDS = checks.BACKENDS
MODEL_DTYPES = ("float64", "float32", "bfloat16", "float16")
DTYPES = tuple(str(dtype).removeprefix("torch.") for dtype in checks.DTYPES)

# Options of methods, which each command that explains takes.
StartLayer = Annotated[int | None, typer.Option(help="First layer that counts; -1 is the last. Default: 0.")]
Weighting = Annotated[str | None, typer.Option(help=f"Method weighted: {', '.join(WEIGHTINGS)}. Default: {WEIGHTINGS[0]}.")]
ThroughConnector = Annotated[bool, typer.Option("--through-connector", help="Go on into the vision tower.")]
SinksOption = Annotated[str | None, typer.Option(help=f"Attention without content: {', '.join(SINKS)}. Default: {SINKS[0]}.")]
Freeze = Annotated[
    list[str] | None, typer.Option(help="Constants of the backward pass: norms, attention, or none. Default: the method's.")
]
Of = Annotated[str | None, typer.Option(help=f"Number that is explained: {', '.join(EXPLAINED)}.")]


def _method_options(
    start_layer: int | None,
    weighting: str | None,
    through_connector: bool,
    sinks: str | None,
    freeze: list[str] | None,
    of: str | None,
) -> dict[str, Any]:
    """Those that were given, by the names that classes of methods have for them."""
    _check_known("--sinks", [sinks], SINKS)
    asked: dict[str, Any] = {"start_layer": start_layer, "weighting": weighting, "sinks": sinks, "of": of}
    asked |= {"through_connector": through_connector or None}
    asked |= {} if freeze is None else {"freeze": () if freeze == ["none"] else tuple(freeze)}
    return {name: value for name, value in asked.items() if value is not None}


def _command(run: Callable[..., None]) -> Callable[..., None]:
    """A command whose help the terminal alone breaks into lines; typer keeps the line breaks of all paragraphs but the first."""
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
    """The `vlattn` command."""
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
    """Refuses an unwritable file before the work, which takes long."""
    if out is not None and not out.parent.is_dir():
        raise typer.BadParameter(f"--out must be in a directory; there is no directory {out.parent}")
    with _refusing(ValueError):
        if out is not None:
            check_writable("--out", out)


def _check_outcome(model: str, endings: tuple[str, str], out: Path | None, dtype: str | None, device: str | None) -> None:
    """Refuses wrong options of a command that measures a model, before the work; the model first, and then where results go."""
    with _refusing(ImportError, ValueError, command=info):
        check_model(model)
    _check_known("--dtype", [dtype], MODEL_DTYPES)
    if out is not None and out.suffix not in endings:
        raise typer.BadParameter(f"--out must end in {' or '.join(endings)}; got {out.name}")
    _check_file(out)
    if device is not None:
        _check_device(device)


def _load(model: str, dtype: str | None, device: str | None) -> tuple[Any, Any]:
    """The model, on its device, and its processor."""
    loaded, processor = load_model(model, None if dtype is None else getattr(torch, dtype))
    return (loaded if device is None else loaded.to(device)), processor


@contextmanager
def _refusing(*errors: type[Exception], command: Callable[..., None] | None = None) -> Iterator[None]:
    """Inside, these errors are of a wrong option; an argument that they name is named as the option of `command`."""
    try:
        yield
    except errors as error:
        argument, _, rest = str(error).partition(" ")
        options = inspect.signature(command).parameters if command is not None else ()
        named = next((name for name in (argument, argument.removesuffix("s")) if name in options), None)
        message = str(error) if named is None else f"--{named.replace('_', '-')} {rest}"
        raise typer.BadParameter(message) from error


def _check_known(option: str, values: Iterable[str | None] | None, known: Iterable[str]) -> None:
    if unknown := set(values or ()) - {*known, None}:
        raise typer.BadParameter(f"{option} must be one of {', '.join(known)}; got {', '.join(sorted(map(str, unknown)))}")


@_command
def info(
    model: Annotated[str | None, typer.Option(help="Directory or id of a Hugging Face model, whose config is enough.")] = None,
) -> None:
    """Versions, devices, and which backend runs which operator, with the reasons for each refusal.

    --model shows what explain knows of a model before a run: its towers, the rows that are read, kinds of tokens, grids, and
    what is refused.
    """
    if model is not None:
        from vlattn_fast.interpret.explaining.description import described

        with _refusing(ImportError, ValueError, command=info):
            lines = described(load_without_weights(model))
    else:
        from vlattn_fast.checking import info as page

        lines = page.lines()
    for line in lines:
        typer.echo(line)


@_command
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

    Prints the worst error as a multiple of the allowed one, and the command that repeats it. Errors may have twice the root mean
    square and four times the largest error of the plain formula in the same dtype, each plus an ulp or two. Ends with status 1
    where a multiple is above 1. Without a GPU, TRITON_INTERPRET=1 in the environment runs the Triton kernels in Triton's
    interpreter.

    --fuzz N draws N calls: sizes, masks, memory layouts, numbers and options. Each call must be right, or refused by name. Every
    failure comes with the command that repeats it.
    """
    if fuzz is not None:
        if dtype or device != "cpu":
            raise typer.BadParameter("--fuzz draws the dtype itself and runs on the CPU; leave --dtype and --device out")
        return _fuzz(fuzz, seed, operator, backend, out)
    if out is not None:
        raise typer.BadParameter("--out belongs to --fuzz")
    _check_known("OPERATOR", operator, OPERATORS)
    _check_known("--backend", backend, BACKENDS)
    _check_known("--dtype", dtype, DTYPES)
    if not -(2**63) <= seed < 2**64:
        raise typer.BadParameter(f"--seed must be a number of 64 bits; got {seed}")
    _check_device(device)
    dtypes = tuple(getattr(torch, one) for one in dtype or DTYPES)
    failed, worst, width = 0, None, max(map(len, OPERATORS)) + 2
    typer.echo(f"{'operator':{width}}{'backend':11}{'dtype':10}{'checks':>6}  worst error, of what is allowed")
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


def _fuzz(count: int, seed: int, operators: list[str] | None, backends: list[str] | None, out: Path | None) -> None:
    from vlattn_fast.benchmarks._records import provenance
    from vlattn_fast.checking import fuzz as fuzzer

    _check_known("OPERATOR", operators, OPERATORS)
    _check_known("--backend", backends, BACKEND_NAMES)
    _check_file(out)
    outcomes = fuzzer.fuzz(count, seed, operators=operators or None, backends=tuple(backends or fuzzer.BACKENDS))
    summary = fuzzer.Summary()
    for outcome in with_progress(outcomes, "fuzzing", total=count, unit="call"):
        summary.add(outcome)
        if not outcome.passed:
            typer.echo(summary.failures[-1])
    for line in summary.lines():
        typer.echo(line)
    if out is not None:
        command = " ".join([checks.command("triton"), shlex.join(sys.argv[1:])])
        out.write_text(json.dumps({**summary.record(), "first": seed, **provenance(command)}, indent=1) + "\n")
    if summary.failures:
        raise typer.Exit(1)


@_command
def bench(
    names: Annotated[list[str] | None, typer.Argument(help="Operators, tasks or single benchmarks; all by default.")] = None,
    device: Annotated[str, typer.Option(help="Where to run: cpu or cuda.")] = "cpu",
    quick: Annotated[bool, typer.Option("--quick", help="Small sizes and few rounds; stores records only with --out.")] = False,
    rounds: Annotated[int | None, typer.Option(help="Calls of each variant.")] = None,
    out: Annotated[Path | None, typer.Option(help="JSON file that records are added to, or a folder for <device>.json.")] = None,
) -> None:
    """Time operators and whole tasks beside plain SDPA, the plain formula and the published procedures.

    Prints and stores time, peak memory and the error against float64; progress goes to stderr. Status 1: a backend of ours
    failed.
    """
    from vlattn_fast.benchmarks._run import run

    command = shlex.join(["vlattn", *sys.argv[1:]])
    with _refusing(ValueError):
        passed = run(names or (), device=device, quick=quick, rounds=rounds, out=out, command=command)
    if not passed:
        raise typer.Exit(1)


@_command
def explain(
    model: Annotated[str, typer.Option(help="Directory or id of a Hugging Face model.")],
    out: Annotated[Path, typer.Option(help="File to write, .html or .png; with --dataset a directory.")],
    image: Annotated[Path | None, typer.Option(exists=True, dir_okay=False, help="Picture.")] = None,
    text: Annotated[list[str] | None, typer.Option(help="Text; repeat it for several texts beside one picture.")] = None,
    method: Annotated[list[str] | None, typer.Option(help=f"{', '.join(METHODS)}; repeat it for several on one page.")] = None,
    target: Annotated[str | None, typer.Option(help="Text by index, class, token, or similarity; the model's choice.")] = None,
    position: Annotated[
        str | None, typer.Option(help="Explained token: cls, last, mean or an index. Default: the model's own.")
    ] = None,
    start_layer: StartLayer = None,
    weighting: Weighting = None,
    through_connector: ThroughConnector = False,
    per: Annotated[str | None, typer.Option(help="layer or head: the map of each by itself, on one sheet.")] = None,
    sinks: SinksOption = None,
    find_sinks: Annotated[bool, typer.Option("--find-sinks", help="Name the tokens of attention without content.")] = False,
    freeze: Freeze = None,
    of: Of = None,
    answer: Annotated[str | None, typer.Option(help="Decoders: explain each token of this answer.")] = None,
    generate: Annotated[int | None, typer.Option(min=1, help="Decoders: generate so many tokens, and explain each.")] = None,
    dtype: Annotated[str | None, typer.Option(help=f"Of the model: {', '.join(MODEL_DTYPES)}; by default as stored.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, ...; by default the CPU, with --dataset a GPU if any.")] = None,
    dataset: Annotated[Path | None, typer.Option(help=".jsonl, .csv, folder of images or saved Hugging Face dataset.")] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="With --dataset: inputs explained together; 8.")] = None,
    shard_size: Annotated[int | None, typer.Option(min=1, help="With --dataset: explanations in a file; 256.")] = None,
    workers: Annotated[int | None, typer.Option(min=0, help="With --dataset: threads that read pictures ahead; 2.")] = None,
) -> None:
    """Explain which parts of a picture and a text a model's score rests on.

    --target similarity explains the cosine of two texts that an encoder embeds: the mean of its tokens' states, or what
    --position names.

    --dataset explains many inputs, whose columns are image, text, target, answer and id; --text, --target and --answer are then
    defaults. A run continues where a killed run ended, and skips inputs that fail, which failures.jsonl lists. `torchrun -m
    vlattn_fast explain --dataset ...` shares the work among processes. Ends with status 1 where an input failed.
    """
    methods = list(dict.fromkeys(method or ["gradient"]))
    _check_known("--method", methods, METHODS)
    if len(methods) > 1 and (dataset is not None or out.suffix != ".html"):
        raise typer.BadParameter(f"--method must be given once, except for one page (.html); got {', '.join(methods)}")
    if find_sinks and dataset is not None:
        raise typer.BadParameter("--find-sinks must be given without --dataset; got both")
    if per is not None and (dataset is not None or len(methods) > 1):
        raise typer.BadParameter(f"--per must be given with one --method and without --dataset; got {', '.join(methods)}")
    _check_known("--dtype", [dtype], MODEL_DTYPES)
    if answer is not None and generate is not None:
        raise typer.BadParameter("--answer must be given without --generate; got both")
    if target is not None and (answer is not None or generate is not None):
        raise typer.BadParameter("--target must be given without --answer and --generate; got both")
    if device is not None:
        _check_device(device)
    size_options = {"batch_size": batch_size, "shard_size": shard_size, "workers": workers}
    sizes = {name: size for name, size in size_options.items() if size is not None}
    if sizes and dataset is None:
        names = ", ".join("--" + name.replace("_", "-") for name in sizes)
        raise typer.BadParameter(f"--dataset must be given with {names}; got none")
    chosen, place = (int(x) if x is not None and x.lstrip("-").isdecimal() else x for x in (target, position))
    by_name: dict[str, Any] = {"text": text or (), "target": chosen, "position": place}
    by_name |= {"answer": answer, "generate": generate, "dtype": dtype}
    options = _method_options(start_layer, weighting, through_connector, sinks, freeze, of)
    try:
        with _refusing(ImportError, TypeError, ValueError, command=explain):
            check_model(model)  # before `out`: the reader mends what is named first
            objects = [with_options(name, **options) for name in methods]
            by_name["method"] = objects[0]
            if dataset is None:
                if out.suffix not in (".html", ".png"):
                    raise ValueError(f"out must end in .html or .png; got {out.name!r}")
                _check_file(out)
                for line in explain_one(Options.check(model, **by_name), objects, image, out, device, per, find_sinks):
                    typer.echo(line)
                return
            if image is not None:
                raise typer.BadParameter("--image must be given without --dataset; got both")
            outcome = explain_dataset(model, dataset, out, device=device, **sizes, **by_name)
    except KeyboardInterrupt:
        if dataset is None:
            raise
        typer.echo(f"explain was stopped. {out} keeps what was written before; the same command goes on from there", err=True)
        raise typer.Exit(130) from None
    except OSError as error:  # a full disk
        kept = "" if dataset is None else f". {out} keeps what was written before; the same command goes on from there"
        typer.echo(f"explain stopped: {error.filename or out}: {error.strerror or error}{kept}", err=True)
        raise typer.Exit(1) from None
    if outcome.first:
        inputs = outcome.done + outcome.failed + outcome.skipped
        typer.echo(f"done {outcome.done}, failed {outcome.failed}, skipped {outcome.skipped} (done before), of {inputs}: {out}")
        if outcome.failed:
            for line in summary_lines(load_explanations(out).failures):
                typer.echo(line)
            typer.echo(f"{out / FAILURES} says which inputs failed, and why")
            raise typer.Exit(1)


@_command
def intervene(
    model: Annotated[str, typer.Option(help="Directory or id of a Hugging Face model.")],
    image: Annotated[Path | None, typer.Option(exists=True, dir_okay=False, help="Picture.")] = None,
    text: Annotated[list[str] | None, typer.Option(help="Text; repeat it for several texts beside one picture.")] = None,
    cut: Annotated[list[str] | None, typer.Option(help='KEYS->QUERIES[:LAYERS[:HEADS]], as "image->last:1-5"; several.')] = None,
    scale: Annotated[list[str] | None, typer.Option(help="LAYER:HEADS:FACTOR, as 14:3,7:0 for no heads 3 and 7.")] = None,
    tower: Annotated[str | None, typer.Option(help="Whose attention, where several towers have such tokens.")] = None,
    generate: Annotated[int, typer.Option(min=1, help="Decoders: generate so many tokens.")] = 20,
    dtype: Annotated[str | None, typer.Option(help=f"Of the model: {', '.join(MODEL_DTYPES)}; by default as stored.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, ...; by default the CPU.")] = None,
) -> None:
    """Cut attention, or scale heads, and compare what the model says with what it says as it is.

    Information flows from keys to queries: "image->last" is what the last token reads of the image. The quotes keep the arrow
    from the shell. Names of tokens are image, text, question, answer, last, special and all. Layers and heads count from 0,
    negative ones from the end: -1 is the last.
    """
    _check_outcome(model, ("", ""), None, dtype, device)
    with _refusing(ImportError, TypeError, ValueError, command=intervene):
        edits: list[Any] = [cut_of(each, tower) for each in cut or ()]
        edits += [scale_of(each, tower) for each in scale or ()]
        if not edits:
            raise ValueError("cut or --scale must be given; got neither")
        for line in intervene_one(*_load(model, dtype, device), edits, image, text or (), generate):
            typer.echo(line)


@_command
def evaluate(
    model: Annotated[str, typer.Option(help="Directory or id of a Hugging Face model.")],
    dataset: Annotated[Path, typer.Option(help=".jsonl, .csv, folder of images or saved Hugging Face dataset.")],
    out: Annotated[Path | None, typer.Option(help="File to write, .json, or .png for the curves.")] = None,
    method: Annotated[list[str] | None, typer.Option(help=f"{', '.join(METHODS)}, ablations, random; gradient.")] = None,
    start_layer: StartLayer = None,
    weighting: Weighting = None,
    through_connector: ThroughConnector = False,
    sinks: SinksOption = None,
    freeze: Freeze = None,
    of: Of = None,
    test: Annotated[list[str] | None, typer.Option(help=f"One or more of {', '.join(EVALUATION_TESTS)}.")] = None,
    text: Annotated[list[str] | None, typer.Option(help="For inputs without a text; repeat it for several.")] = None,
    dtype: Annotated[str | None, typer.Option(help=f"Of the model: {', '.join(MODEL_DTYPES)}; by default as stored.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, ...; by default the CPU.")] = None,
) -> None:
    """Measure how well maps show the parts of an input that a model's answer rests on.

    The columns of the data set are image, text, target, id and boxes: [[x1, y1, x2, y2], ...] relative to the picture as the
    model sees it, or the file of a mask. Prints the table; without --test positive, negative and pointing.
    """
    from vlattn_fast.interpret.dataset.samples import samples
    from vlattn_fast.interpret.evaluating.evaluate import evaluate as run
    from vlattn_fast.measuring.provenance import commit

    _check_outcome(model, (".json", ".png"), out, dtype, device)
    options = _method_options(start_layer, weighting, through_connector, sinks, freeze, of)
    with _refusing(ImportError, TypeError, ValueError, command=evaluate):
        named = method or ["gradient"]
        known = {**METHODS, **ABLATIONS} if options else {}  # others, such as "random", have none
        if options and not known.keys() & {*named}:
            raise ValueError(f"method must be one of explain's with --{next(iter(options))}; got {', '.join(named)}")
        methods = [with_options(name, **options) if name in known else name for name in named]
        loaded, processor = _load(model, dtype, device)
        outcome = run(loaded, samples(loaded, processor, dataset, text or ()), methods=methods, tests=test)
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
    dataset: Annotated[Path, typer.Option(help=".jsonl, or a folder with one: text, image, phrases, relations, sentence.")],
    out: Annotated[Path | None, typer.Option(help="File to write, .html or .json.")] = None,
    test: Annotated[list[str] | None, typer.Option(help=f"One or more of {', '.join(TESTS)}; all by default.")] = None,
    dtype: Annotated[str | None, typer.Option(help=f"Of the model: {', '.join(MODEL_DTYPES)}; by default as stored.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, ...; by default the CPU.")] = None,
) -> None:
    """Probe a model's heads and states over a data set: modalities, phrases, relations, fusion, texts.

    Prints the table without single heads; --out holds the whole table.
    """
    from vlattn_fast.interpret.probing import probe as run
    from vlattn_fast.interpret.probing.files import samples

    _check_outcome(model, (".html", ".json"), out, dtype, device)
    with _refusing(ImportError, TypeError, ValueError, command=probe):
        loaded, processor = _load(model, dtype, device)
        report = run(loaded, samples(loaded, processor, dataset), tests=test)
    typer.echo(str(report))
    if out is not None:
        (report.save_html if out.suffix == ".html" else report.save)(out)
        typer.echo(f"wrote {out}")


@_command
def demo(
    out: Annotated[Path, typer.Option(help="Directory for the pictures.")] = Path("demo"),
    costs: Annotated[bool, typer.Option(help="Also measure what one map costs (minutes).")] = True,
) -> None:
    """Check every operator, explain pictures of DigitScenes (the embedded benchmark), and compare the costs of one map."""
    with _refusing(ValueError):
        check_writable("--out", out, folder=True)
    installed = entry_points(group="vlattn_fast.commands", name="demo")
    if not installed:
        raise SystemExit("vlattn demo needs the package vlattn_lab: pip install vlattn-lab")
    if not all(entry.load()(out, costs=costs) for entry in installed):
        raise typer.Exit(1)


if __name__ == "__main__":
    main()
