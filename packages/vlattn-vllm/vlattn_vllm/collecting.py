"""`collect`: the attention of an engine's or a server's answers to many prompts, in a folder that a later run resumes."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vlattn_fast._ground.checks import check_integer, describe
from vlattn_fast._ground.extras import with_progress
from vlattn_vllm.ask import KEY, plain, plain_edits
from vlattn_vllm.attention import TENSORS, Answer, Attention
from vlattn_vllm.client import Server

FORMAT = "vlattn_fast.attention.1"


class _Entry(NamedTuple):
    item: int
    id: str
    shard: str


class Answers(Sequence[Answer]):
    """A lazy sequence in the order of the prompts, which reads an answer on access. `failures`: dicts with item, id and error."""

    def __init__(self, directory: Path, settings: dict[str, Any], entries: list[_Entry], failures: list[dict[str, Any]]) -> None:
        self.directory, self.settings, self.failures = directory, settings, failures
        self._entries = entries

    @property
    def ids(self) -> list[str]:
        return [entry.id for entry in self._entries]

    def __len__(self) -> int:
        return len(self._entries)

    def __getitem__(self, index: Any) -> Any:
        """The answer at `index`; for a slice, a lazy sequence."""
        if isinstance(index, slice):
            return Answers(self.directory, self.settings, self._entries[index], self.failures)
        from safetensors import safe_open

        item, identity, shard = self._entries[index]
        with safe_open(self.directory / "shards" / f"{shard}.safetensors", framework="pt") as file:
            facts = json.loads(file.metadata()[str(item)])
            tensors = {name: file.get_tensor(f"{item}/{name}") for name in facts["tensors"]}
        return Answer(identity, facts["tokens"], facts["text"], Attention.from_dict({**facts["attention"], **tensors}))

    def __repr__(self) -> str:
        return f"Answers({str(self.directory)!r}, {len(self)} answers, {len(self.failures)} failures)"


def collect(
    engine: Any,
    prompts: Iterable[Any],
    out: str | Path,
    attention: Mapping[str, Any] | None = None,
    *,
    params: Any = None,
    ids: Sequence[str] | None = None,
    shard_size: int = 256,
    api_key: str | None = None,
    headers: Mapping[str, str] | None = None,
    timeout: float | None = None,
) -> Answers:
    """Generate an answer to each prompt and write its tokens and the statistics of its attention to the directory `out`.

    Prompts that `out` holds already are skipped. A prompt that the engine refuses is among the failures, and the next run tries
    it again. With n above 1 in `params`, a prompt has n answers in a row, "0/0", "0/1" and so on.

    Args:
        engine: a vllm.LLM, or the address of a running server, such as "http://localhost:8000".
        prompts: whatever `engine.generate` takes for one prompt: a text, or a dict with prompt_token_ids or multi_modal_data. A
            server takes a text, a list of token ids, or the messages of a chat.
        attention: what to ask for, the dict of a request, with edits if it has any.
        params: vLLM's SamplingParams, the same for all prompts. For a server: a dict of fields of its requests, such as
            max_tokens, temperature or n.
        ids: names of the prompts; by default their numbers.
        shard_size: prompts in a file. They go to the engine together, and are written together.
        api_key, headers, timeout: for a server: its key, more headers of each request, and the seconds after which an unanswered
            one ends the run. The folder has none of them.

    Returns:
        The answers, read when they are indexed. `load` returns them later.

    Raises:
        ValueError: `out` was begun with other options or prompts, or another run writes to it.
        OSError: the server cannot be reached, wants another key, or answers with an error of its own.
    """
    from vlattn_fast.interpret.dataset.store import FAILURES, ShardWriter, begin, check_settings, to_lines, write_text

    check_integer("shard_size", shard_size, low=1)
    prompts, out, ask = list(prompts), Path(out), plain(dict(attention or {}))
    names = [str(number) for number in range(len(prompts))] if ids is None else list(ids)
    if len(names) != len(prompts):
        raise ValueError(f"ids must have one name for each of the {len(prompts)} prompts; got {len(names)}")
    if "steer" in ask:
        ask["steer"] = plain_edits(ask["steer"])
    if isinstance(engine, str):
        source: Server | _Engine = Server(engine, ask, params, api_key, headers, timeout)
    elif (api_key, headers, timeout) != (None, None, None):
        raise ValueError(f"api_key, headers and timeout are for the address of a server; got them with {describe(engine)}")
    else:
        source = _Engine(engine, ask, params)
    settings = {"format": FORMAT, "model": source.model, "params": source.params, "attention": ask, "dataset": _digest(prompts)}
    settings = json.loads(json.dumps(settings))  # as a later run reads them
    check_settings(out, settings)
    with contextlib.ExitStack() as stack:
        done = begin(out, settings, stack)
        todo = [number for number in range(len(prompts)) if number * source.n not in done]
        writer, failures = ShardWriter(out, 0), []
        parts = [todo[start : start + shard_size] for start in range(0, len(todo), shard_size)]
        for numbers in with_progress(parts, "collecting"):
            for number, result in zip(numbers, source.answers([prompts[n] for n in numbers]), strict=True):
                if isinstance(result, str):
                    failures.append({"item": number * source.n, "id": names[number], "error": result})
                    writer.lines.append(failures[-1])
                    continue
                for sample, answer in enumerate(result):
                    name = names[number] if source.n == 1 else f"{names[number]}/{sample}"
                    writer.put(number * source.n + sample, name, None, *_packed(answer))
            writer.flush()
        write_text(out / FAILURES, to_lines(failures))
    return load(out)


class _Engine:
    """A vllm.LLM."""

    def __init__(self, engine: Any, ask: dict[str, Any], params: Any) -> None:
        from vllm import SamplingParams

        self.engine, self.model = engine, engine.llm_engine.model_config.model
        self.sampling = SamplingParams() if params is None else params.clone()
        self.params, self.n = repr(self.sampling), self.sampling.n
        self.sampling.extra_args = {**(self.sampling.extra_args or {}), KEY: ask}

    def answers(self, prompts: list[Any]) -> list[list[Answer] | str]:
        """The answers to each prompt, or why the engine refuses it."""
        from vllm.exceptions import VLLMClientError

        try:
            outputs = self.engine.generate(prompts, self.sampling, use_tqdm=False)
        except (VLLMClientError, ValueError, TypeError) as error:
            if len(prompts) == 1:
                return [str(error)]
            return [result for prompt in prompts for result in self.answers([prompt])]
        return [[Answer("", list(one.token_ids), one.text, one.attention) for one in output.outputs] for output in outputs]


def _packed(answer: Answer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    facts = answer.attention.written(Tensor.contiguous)
    tensors = {name: facts.pop(name) for name in TENSORS if name in facts}
    return tensors, {"attention": facts, "tensors": list(tensors), "tokens": answer.tokens, "text": answer.text}


def load(directory: str | Path) -> Answers:
    """The answers that `collect` wrote to a directory, also while it runs.

    Raises:
        ValueError: `collect` did not write it, or one of its shards is truncated, damaged or missing.
    """
    from vlattn_fast.interpret.dataset.store import read_settings, stored_items

    directory = Path(directory)
    settings = read_settings(directory, FORMAT)
    if settings is None:
        raise ValueError(f"directory must be one that vlattn_vllm.collect wrote; got {directory}")

    def broken(fault: str) -> ValueError:
        return ValueError(
            f"directory must have whole shards; got {directory}, where {fault}. The next run answers its prompts anew"
        )

    items, failures = stored_items(directory, broken)
    return Answers(directory, settings, [_Entry(line["item"], line["id"], name) for name, line in items], failures)


def _digest(prompts: list[Any]) -> str:
    digest = hashlib.sha256()
    for prompt in prompts:
        digest.update(json.dumps(prompt, default=_content, sort_keys=True).encode())
    return digest.hexdigest()


def _content(value: Any) -> str:
    """The content of a tensor, an array or a picture."""
    if isinstance(value, Tensor):
        value = value.detach().cpu().contiguous().view(torch.uint8).numpy()
    if not hasattr(value, "tobytes"):
        raise TypeError(f"prompts must hold texts, numbers, tensors, arrays and pictures; got {describe(value)}")
    return hashlib.sha256(value.tobytes()).hexdigest()
