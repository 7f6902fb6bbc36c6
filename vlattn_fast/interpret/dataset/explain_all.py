"""A model's explanations of a whole dataset, in one process or many; a new run resumes a killed one."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vlattn_fast._ground.checks import check_integer, check_place
from vlattn_fast._ground.extras import progress, without_progress
from vlattn_fast.attach.session import unwrapped
from vlattn_fast.interpret.dataset.batches import Batches, Options, in_threads
from vlattn_fast.interpret.dataset.items import Items
from vlattn_fast.interpret.dataset.ranks import Ranks, joined
from vlattn_fast.interpret.dataset.store import (
    FAILURES,
    FORMAT,
    SETTINGS,
    ShardWriter,
    begin,
    check_settings,
    locked,
    to_lines,
    write_text,
)
from vlattn_fast.interpret.explaining.loading import load_model

_SECONDS = 60.0  # between two shards at the most


@dataclass(frozen=True)
class Outcome:
    """The numbers of inputs that this run explained, that failed, and that were done before; whether this is the first rank."""

    done: int
    failed: int
    skipped: int
    first: bool


def explain_dataset(
    model: str | Path | nn.Module,
    dataset: str | Path | Iterable[Mapping[str, Any]],
    out: str | Path,
    *,
    processor: Any = None,
    batch_size: int = 8,
    shard_size: int = 256,
    workers: int = 2,
    device: str | None = None,
    **options: Any,
) -> Outcome:
    """Explains each input of a data set and writes the explanations to the directory `out`, for `load_explanations`.

    `vlattn explain --dataset` does the same. Inputs are explained in batches of one shape. A new run resumes a killed one: it
    skips the inputs that `out` already holds, and tries failed inputs again. Under torchrun each process takes a share; `out`
    must then be on a file system that all processes share.

    Examples:
        >>> va.explain_dataset("openai/clip-vit-base-patch32", "photos.jsonl", "maps")  # doctest: +SKIP
        >>> va.load_explanations("maps")[0].top(3)  # doctest: +SKIP

    Args:
        model: directory or id of a Hugging Face model, which each process loads; or a model in memory, such as one with LoRA
            weights, quantised, or of a class of your own with an adapter.
        dataset: a .jsonl or .csv file with the columns image, text, target, answer and id, and paths relative to its folder; a
            folder of images, subfolders included; a folder that `datasets.Dataset.save_to_disk` wrote; or any iterable of
            mappings, which is read to its end first: with these columns (an image may be a PIL image), or with the tensors of the
            model's inputs, as a DataLoader gives them, themselves or under "inputs".
        processor: of a model in memory, for images and texts; not needed for tensors.
        out: a new or an empty directory, or one of an earlier run.
        batch_size: the number of samples in a batch, whose inputs have one shape.
        options: method (a name, or an object of `va.methods` whose options are names and numbers) and position as in `explain`;
            text (one or several), target and answer for inputs without them; generate (the most tokens of the model's own answer,
            which is then explained); dtype (the name of the model's dtype, by default as stored).
        device: the model's device. Default: a GPU for each process, or the CPU; for a model in memory, its own.
        workers: threads that read images ahead.
        shard_size: explanations in a file. A shard is also written a minute after the last one.

    Returns:
        The numbers of inputs that were explained now (`done`), that `failed`, and that were done before (`skipped`); `first`:
        whether this is the first process.

    Raises:
        TypeError, ValueError: an argument is wrong (it is named); no such model or dataset; `out` was begun with other options,
            or another run writes to it.
        OSError: a file of `out` cannot be written, e.g. on a full disk. Finished shards stay.
    """
    asked = Options.check(model, **options)
    if processor is not None and not isinstance(model, nn.Module):
        raise ValueError("processor must be None for a directory or an id, whose own is loaded; got one")
    for name, value, low in (("batch_size", batch_size, 1), ("shard_size", shard_size, 1), ("workers", workers, 0)):
        check_integer(name, value, low=low)
    out = Path(out)
    with joined() as ranks, contextlib.ExitStack() as stack:
        items = Items(dataset)
        settings = {"format": FORMAT, **asked.settings}
        if not isinstance(model, nn.Module) and Path(model).is_dir():
            settings["model"] = str(Path(model).resolve())
        _by_first(ranks, lambda: check_settings(out, settings, items.digests))
        _by_first(ranks, lambda: check_place("out", out))
        if isinstance(model, nn.Module):
            loaded = unwrapped(model if device is None else model.to(device)), processor
        else:
            loaded = _load(asked, ranks, device)
        batches = Batches(*loaded, asked)
        batches.check_parts(items)
        done = _by_first(ranks, lambda: begin(out, settings, stack, items.digests))
        if ranks.rank > 0:
            stack.enter_context(locked(out / SETTINGS, shared=True))
            stack.enter_context(without_progress())  # the first rank's bar counts all inputs
        todo = [number for number in range(len(items)) if number not in done]
        numbers = todo[ranks.rank :: ranks.world]
        stream = in_threads(lambda number: batches.prepare(number, items[number]), numbers, workers)
        writer, failures = ShardWriter(out, ranks.rank), []
        written = time.monotonic()
        with progress("explaining", total=len(items), initial=len(done), unit="input") as report, without_progress():
            for batch in batches.explained(stream, batch_size):
                for one, result in batch:
                    if isinstance(result, str):
                        item = one.item
                        image = item.image if item.image is None else str(item.image)
                        entry = {"id": item.id, "image": image, "text": item.texts, "error": result}
                        failures.append({"item": one.number, **entry})
                        writer.lines.append(failures[-1])
                    else:
                        writer.add(one.number, one.item.id, one.item.path, items.digests[one.number], result)
                if len(writer.lines) >= shard_size or time.monotonic() - written > _SECONDS:
                    writer.flush()
                    written = time.monotonic()
                report(len(done) + ranks.count(len(batch)))
            writer.flush()
            ranks.wait(len(todo), lambda count: report(len(done) + count))
        failures = sorted(ranks.gather(failures), key=lambda line: line["item"])
        if ranks.rank == 0:
            write_text(out / FAILURES, to_lines(failures))
        failed = ranks.from_first(len(failures))
        return Outcome(len(todo) - failed, failed, len(done), ranks.rank == 0)


def _by_first(ranks: Ranks, act: Callable[[], Any]) -> Any:
    """The result of the first rank's `act`, or its ValueError, on all ranks."""
    result = None
    if ranks.rank == 0:
        try:
            result = act()
        except ValueError as error:
            result = error
    result = ranks.from_first(result)
    if isinstance(result, ValueError):
        raise result
    return result


def _load(options: Options, ranks: Ranks, device: str | None) -> tuple[Any, Any]:
    if ranks.rank > 0:
        import transformers

        transformers.utils.logging.disable_progress_bar()
    model, processor = load_model(options.model, None if options.dtype is None else getattr(torch, options.dtype))
    if device is None:
        device = f"cuda:{ranks.local % torch.cuda.device_count()}" if torch.cuda.is_available() else "cpu"
    return model.to(device), processor
