"""Is the answer of a planted circuit grounded? The numbers of `va.token_grounding` where it is known what an answer rests on.

What a circuit looks at are the regions of its scene (lookup) or the words before the last one (induction). Each right answer is
compared with a wrong one to the same question.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

import torch
from torch import Tensor

import vlattn_fast as va
from vlattn_fast.interpret.evaluating.token_grounding import map_numbers
from vlattn_lab.experiments.planted_circuits.models import WORDS, Circuit, Samples, planted

Case = tuple[list[va.TokenGrounding], list[list[bool]]]  # a table for each sample, and whether each of its answers is grounded
Inputs = dict[str, Tensor]
ATTENTION, SEEDS = (0.8, 0.999), 5  # of a planted head to the token that it looks for; models of each kind


def is_scene(samples: Samples) -> bool:
    return "visual_embeds" in samples.inputs


def looked_at(samples: Samples) -> Tensor:
    """bool (B, N), the tokens that a circuit looks at."""
    groups = samples.groups
    return groups["region"] | groups["regions"] if is_scene(samples) else ~groups["last"]


def logs(circuit: Circuit, inputs: Inputs) -> Tensor:
    """(B, answers), the log-probabilities."""
    with torch.no_grad():
        logits = circuit.model(**inputs).logits.double()
    return (logits if logits.ndim == 2 else logits[:, -1]).log_softmax(-1)


def nothing(samples: Samples) -> Inputs:
    """The inputs with empty regions, or with [BOS] in place of the words before the last."""
    if is_scene(samples):
        return {**samples.inputs, "visual_embeds": torch.zeros_like(samples.inputs["visual_embeds"])}
    return {"input_ids": samples.inputs["input_ids"].masked_fill(~samples.groups["last"], WORDS)}


def noise(samples: Samples, generator: torch.Generator) -> Inputs:
    """Random features of the scene's mean and deviation, or random words other than the last."""
    if is_scene(samples):
        features = samples.inputs["visual_embeds"]
        drawn = torch.randn(features.shape, generator=generator) * features.std() + features.mean()
        return {**samples.inputs, "visual_embeds": drawn}
    ids = samples.inputs["input_ids"]
    drawn = (ids[:, -1:] + torch.randint(1, WORDS, ids.shape, generator=generator)) % WORDS
    return {"input_ids": torch.where(samples.groups["last"] | (ids == WORDS), ids, drawn)}


def of_another(samples: Samples) -> Inputs:
    """The question of each sample to the scene, or the words, of the one before."""
    if is_scene(samples):
        return {**samples.inputs, "visual_embeds": samples.inputs["visual_embeds"].roll(1, 0)}
    ids = samples.inputs["input_ids"]
    return {"input_ids": torch.cat([ids[:, :-1].roll(1, 0), ids[:, -1:]], 1)}


def without_cause(samples: Samples) -> Inputs:
    """What answers the question is left out: an empty region, or a word that the text lacks in place of the one that is found."""
    groups = samples.groups
    if is_scene(samples):
        region = groups["region"][:, -samples.inputs["visual_embeds"].shape[1] :, None]
        return {**samples.inputs, "visual_embeds": samples.inputs["visual_embeds"].masked_fill(region, 0.0)}
    ids = samples.inputs["input_ids"]
    free = torch.stack([next(x for x in torch.arange(WORDS) if not bool((row == x).any())) for row in ids])
    return {"input_ids": torch.where(groups["matched"], free[:, None], ids)}


def numbers(circuit: Circuit, samples: Samples, inputs: Inputs, answers: Tensor) -> dict[str, Tensor]:
    """Of an answer for each sample, (B,)."""
    known, alone = logs(circuit, inputs), logs(circuit, nothing(samples))
    chosen, there = answers[:, None], looked_at(samples)

    def rows(method: str) -> Tensor:
        (relevancy,) = va.explain(circuit.model, inputs, target=answers.tolist(), method=method).relevancy.values()
        return relevancy.detach().double()

    attention, maps = rows("attention"), rows("gradient")
    probability = known.gather(1, chosen)[:, 0]
    return {
        **{"log_probability": probability, "gain": probability - alone.gather(1, chosen)[:, 0]},
        **{"entropy": torch.special.entr(known.exp()).sum(1), "attention share": (attention * there).sum(1) / attention.sum(1)},
        "compactness": torch.tensor([map_numbers([row[seen][None]])[0] for row, seen in zip(maps, there, strict=True)]),
    }


def cases(circuit: Circuit, samples: Samples, seed: int) -> Iterator[tuple[str, Case]]:
    """Each right answer with its inputs beside a wrong one; a sample whose answer is right in both ways is left out."""
    right, absent = numbers(circuit, samples, samples.inputs, samples.answers), without_cause(samples)
    others = logs(circuit, samples.inputs).scatter(1, samples.answers[:, None], -torch.inf).argmax(1)
    wrong: dict[str, tuple[Inputs, Tensor]] = {
        "noise": (noise(samples, torch.Generator().manual_seed(seed)), samples.answers),
        "another": (of_another(samples), samples.answers),
        "one wrong": (samples.inputs, others),
        "its own without the cause": (absent, logs(circuit, absent).argmax(1)),
    }
    for name, (inputs, answers) in wrong.items():
        found = numbers(circuit, samples, inputs, answers)
        same = (logs(circuit, inputs).argmax(1) == answers) & (name == "another")
        pairs = [
            va.TokenGrounding([[0, 1]], {key: torch.stack([right[key][n], found[key][n]])[None] for key in right}, {})
            for n in (~same).nonzero()[:, 0].tolist()
        ]
        yield name, (pairs, [[True, False]] * len(pairs))


def all_cases(name: str, count: int) -> dict[str, Case]:
    """Of SEEDS circuits of a kind with each attention of ATTENTION, `count` samples each."""
    every: dict[str, Case] = {}
    for share, seed in product(ATTENTION, range(SEEDS)):
        circuit = planted(name, share, seed)
        for case, (tables, labels) in cases(circuit, circuit.draw(count, seed), seed):
            listed = every.setdefault(f"{case}, {share}", ([], []))
            listed[0].extend(tables)
            listed[1].extend(labels)
    return every
