"""Instead of a backward pass: the scores of runs on the input with some tokens replaced."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from vlattn_fast._ground.extras import with_progress
from vlattn_fast.interpret.explaining.fields import grid_of_pixels, parts, tokens_of
from vlattn_fast.interpret.explaining.forward_pass import run_traced
from vlattn_fast.interpret.explaining.question import Question, ask
from vlattn_fast.interpret.explaining.request import Prompt
from vlattn_fast.interpret.relevancy.embedding_trace import Embeddings, unchanged, without_origin
from vlattn_fast.interpret.relevancy.method import Enter
from vlattn_fast.interpret.relevancy.occluding_method import OccludingMethod
from vlattn_fast.interpret.relevancy.tower_trace import TowerTrace

_ALIKE = 0.05  # of the largest score: copies of an input in one batch have its score, but for rounding

Window = tuple[str, Tensor]  # a tower, and tokens of it
Fills = dict[str, list[tuple[Embeddings, Tensor]]]  # of each tower: its embeddings, and what may replace them


def occluded(question: Question, method: OccludingMethod) -> dict[str, Tensor]:
    """The relevancy vectors (B, N) of the towers, or (B, T, N) of an answer's tokens: the mean drop of the score over a token's
    windows."""
    run, prompt, whole = question.run, question.run.prompt, question.scores
    if whole is None:
        raise ValueError(
            f"target must be a callable(outputs) -> (B,) scores for method {method.name!r}, since the outputs have no logits"
        )
    for tower in run.towers:
        if tower.batch != len(whole):
            raise ValueError(
                f"model must embed whole inputs in tower '{tower.name}'; got a batch of {tower.batch} for {len(whole)} scores"
            )
    windows, fills = _windows(question, method)
    if question.target is not None:  # changed inputs may have another
        prompt = prompt.about(question.target)
    prompt = replace(prompt, origin=without_origin)
    copies = max(1, min(method.batch_size, max(map(len, windows))))
    if copies > 1 and not _runs_copies(prompt, whole):
        copies = 1
    dtype = torch.promote_types(whole.dtype, torch.float32)
    rows = {tower.name: torch.zeros(*whole.shape, tower.size, dtype=dtype, device=whole.device) for tower in run.towers}
    counts = {tower.name: torch.zeros(len(whole), tower.size, dtype=dtype, device=whole.device) for tower in run.towers}
    for first in with_progress(range(0, max(map(len, windows)), copies), "explaining", unit="pass"):
        part = [sample_windows[first : first + copies] for sample_windows in windows]
        count = max(map(len, part))
        masks = {tower.name: torch.zeros(count * len(whole), tower.size, dtype=torch.bool) for tower in run.towers}
        for sample, sample_windows in enumerate(part):
            for number, (name, tokens) in enumerate(sample_windows):
                masks[name][number * len(whole) + sample, tokens] = True
        drops = whole.detach() - _scores(prompt, count, len(whole), _replaced(fills, masks))
        for sample, sample_windows in enumerate(part):
            for number, (name, tokens) in enumerate(sample_windows):
                tokens = tokens.to(whole.device)
                rows[name][sample][..., tokens] += drops[number, sample, ..., None]
                counts[name][sample, tokens] += 1
    over = {name: count.clamp(min=1).view(len(whole), *[1] * (whole.ndim - 1), -1) for name, count in counts.items()}
    return {name: row / over[name] for name, row in rows.items()}


def _windows(question: Question, method: OccludingMethod) -> tuple[list[list[Window]], Fills]:
    """The windows of each sample, over maps of patches, and over the other tokens, without special tokens and padding; and what
    replaces each tower's embeddings."""
    windows: list[list[Window]] = [[] for _ in range(len(question.scores))]  # type: ignore[arg-type]
    masks = {tower: torch.zeros(2, *tower.shape, dtype=torch.bool) for tower in question.run.towers}
    for tower, sample, tokens, is_map in _groups(question):
        masks[tower][int(is_map), sample, tokens.flatten()] = True
        windows[sample] += [(tower.name, window) for window in method.windows(tokens)]
    return windows, {t.name: [(part, _fill(part, *mask.to(t.device))) for part in t.cached] for t, mask in masks.items()}


def _fill(part: Embeddings, words: Tensor, patches: Tensor) -> Tensor:
    """What may replace embeddings of `words` and of `patches` of an image, (B, N)."""
    if part.origin is None:
        return torch.zeros_like(part.values)
    changes = part.per_token(lambda x, dim: x.any(dim), part.values.detach() != part.origin)
    stands = patches | (changes & words).any()
    return torch.where(part.over_features(stands), part.origin, torch.zeros_like(part.values))


def _replaced(fills: Fills, masks: Mapping[str, Tensor]) -> Enter:
    """The embeddings with `fills` in place of the tokens of `masks`, bool (copies * B, N) by tower."""

    def enter(tower: TowerTrace, values: Tensor, origin: Tensor | None) -> Tensor:
        if tower.name not in masks:  # it has no part in the explanation
            return values * 1
        part, fill = fills[tower.name][len(tower.cached)]
        fill = torch.cat([fill] * (len(values) // len(fill)))
        return torch.where(part.over_features(masks[tower.name].to(values.device)), fill.to(values), values)

    return enter


def _groups(question: Question) -> list[tuple[TowerTrace, int, Tensor, bool]]:
    """Tokens that lie side by side: a tower, a sample, the tokens' numbers (rows, columns, of each patch), and whether that is a
    map of an image."""
    run, request, groups, plain = question.run, question.run.request, [], []
    for tower in run.towers:
        if tower.grid is None:
            plain.append(tower)
            continue
        rows, columns = grid_of_pixels(request.patches, tower)
        (height, width), pixels = tower.grid, torch.arange(tower.size)
        blocks = pixels.view(rows, height // rows, columns, width // columns).transpose(1, 2).flatten(2)
        groups += [(tower, sample, blocks, True) for sample in range(tower.batch or 0)]
    if not plain:
        return groups
    # The fields of an explanation tell what tokens are, so they are made of the tokens' numbers, from 1 on.
    index, owner, count = {}, [], 0
    for tower in plain:
        numbers = torch.arange(count + 1, count + 1 + tower.size, dtype=torch.float64)
        index[tower.name] = numbers.expand(tower.batch or 0, -1)
        owner += [tower] * tower.size
        count += tower.size
    firsts = {tower: int(index[tower.name][0, 0]) for tower in plain}
    arguments, patches = run.prompt.masked, request.patches if len(plain) == len(run.towers) else None
    fields, _ = parts(plain, arguments, index, question.answer, patches, request.special)
    real = {tower: tokens.real() for tower, tokens in tokens_of(plain, arguments, request.special).items()}
    covered: set[tuple[TowerTrace, int]] = set()

    def add(sample: int, numbers: Tensor, is_map: bool) -> None:
        numbers = numbers.long()
        if numbers.numel() and bool((numbers > 0).all()):
            tower = owner[int(numbers.flatten()[0]) - 1]
            covered.add((tower, sample))
            groups.append((tower, sample, (numbers - firsts[tower])[..., None], is_map))

    owners = fields.get("image_samples") or []
    for sample, numbers in zip(owners, fields["image"] if "image_samples" in fields else [], strict=True):
        add(sample, numbers, True)
    for name in ("text", "regions"):
        for sample, numbers in enumerate(fields.get(name, ())):
            by_tower: dict[TowerTrace, list[int]] = {}
            for number in numbers.long().tolist():
                if number and _is_real(real.get(owner[number - 1]), sample, number - firsts[owner[number - 1]]):
                    by_tower.setdefault(owner[number - 1], []).append(number)
            for numbers_of_tower in by_tower.values():
                add(sample, torch.tensor([numbers_of_tower]), False)
    for tower in plain:
        is_real = real.get(tower)
        for sample in range(tower.batch or 0):
            if (tower, sample) not in covered:
                numbers = torch.arange(tower.size) if is_real is None else is_real[sample].cpu().nonzero()[:, 0]
                add(sample, numbers[None] + firsts[tower], False)
    return groups


def _is_real(real: Tensor | None, sample: int, token: int) -> bool:
    return real is None or bool(real[sample, token])


# --- runs on several windows at once ---


def _scores(prompt: Prompt, copies: int, batch: int, enter: Enter = unchanged) -> Tensor:
    """(copies, B), or (copies, B, T): the scores of copies of the inputs, of `batch` samples."""
    if copies > 1:
        target = prompt.request.target
        prompt = prompt.repeated(copies, batch).about(target * copies if isinstance(target, list) else target)
    scores = ask(run_traced(prompt, enter)).scores
    assert scores is not None
    return scores.detach().unflatten(0, (copies, -1))


def _runs_copies(prompt: Prompt, whole: Tensor) -> bool:
    """Whether the model takes a batch of copies of the inputs, and gives each copy the score of the inputs."""
    try:
        scores = _scores(prompt, 2, len(whole))
    except (IndexError, RuntimeError, TypeError, ValueError):
        return False
    if scores.shape[1:] != whole.shape:
        return False
    return bool((scores - whole.detach()).abs().max() <= _ALIKE * whole.detach().abs().max())
