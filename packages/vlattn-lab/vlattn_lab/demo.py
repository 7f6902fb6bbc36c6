"""`vlattn demo`, or python -m vlattn_lab.demo --out demo: explains a picture of DigitScenes, checks every operator, and compares
the costs of one map."""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import vlattn_lab as lab
from vlattn_fast import explain
from vlattn_fast.backends import native
from vlattn_fast.benchmarks import _choice, _measure
from vlattn_fast.checking.verify import verify
from vlattn_fast.measuring.records import number
from vlattn_lab import pointing
from vlattn_lab.processor import DIGIT_WORDS
from vlattn_lab.questions import EXAMPLE
from vlattn_lab.uniter import log_odds

SEED = 1  # draws the scenes
SCENES = 200
LAYERS = 2  # of CLIP, whose costs are compared
ALL_LAYERS = "6.9 to 8.1 times as long in benchmarks/results/cpu.json"  # the published procedure, on 24 layers
BACKEND = "cpu" if native.library.exists else "streaming"  # of the explanations
VARIANTS = ("plain forward+backward", BACKEND, "maps stored, one backward", "published")


def run(out: Path, *, costs: bool = True) -> bool:
    """Prints the tables, writes the pictures into `out`, and returns whether every check passed."""
    out.mkdir(parents=True, exist_ok=True)
    picture(out)  # first, since the checks take longer
    passed = check()
    region_pointing()
    answers()
    if costs:
        compare()
    return passed


def check() -> bool:
    print(f"Checks: outputs and gradients of the {BACKEND} backend against the formula in float64.")
    print("Error as a multiple of what is allowed: root mean square twice that of the formula in the same dtype, plus one ulp,")
    print("and the largest error four times the formula's largest, plus two ulps.\n")
    results = list(verify((BACKEND,), (torch.float32,)))
    width = max(len(result.operator) for result in results) + 2
    print(f"{'operator':{width}}{'dtype':10}{'checks':>6}{'worst':>7}")
    for result in results:
        dtype = str(result.dtype).removeprefix("torch.")
        verdict = "passed" if result.passed else f"FAILED at {result.worst}"
        print(f"{result.operator:{width}}{dtype:10}{result.checks:6}{result.ratio:7.2f}  {verdict}")
    good = sum(result.passed for result in results)
    print(f"\n{good} of {len(results)} passed. `vlattn verify` checks other dtypes and backends, too.\n", flush=True)
    return good == len(results)


def picture(out: Path) -> None:
    """Writes the question of `example_question` and a map for each word of the model's answer, as PNG and as a page."""
    model, processor = lab.load_captioner()
    asked = lab.digit_prompts(1, seed=EXAMPLE, kind="which")
    photo, question = lab.example_question()
    inputs: dict[str, Any] = processor(images=photo, text=question)
    answer = processor.decode(model.generate(**inputs))
    explanation = explain(model, inputs, answer=answer, processor=processor)
    assert isinstance(explanation.image, Tensor) and explanation.scores is not None  # both are there for an answer
    explanation.plot(photo).savefig(out / "answer.png")
    explanation.save_html(out / "answer.html", photo, title=f"{question}?")
    words = answer[0].split()
    print(f'"{question}"? "{" ".join(words)}". What each word rests on: {out / "answer.png"}, {out / "answer.html"}\n')
    print(f"{'word':12}{'probability':>12}   strongest on the digit   share of its map there")
    shares = pointing.box_shares(explanation.image, asked.boxes)[0] / explanation.image[0].sum((1, 2))[:, None]
    for word, score, share in zip(words, explanation.scores[0].exp().tolist(), shares, strict=True):
        top = int(share.argmax())
        print(f"{word:12}{score:12.2f}   {DIGIT_WORDS[int(asked.digits[0, top])]:24}{share[top]:.1%}")
    print(flush=True)


@contextmanager
def _noted() -> Iterator[None]:
    """Prints what `explain` warns of below the table, once each."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always", UserWarning)
        yield
    for text in dict.fromkeys(str(warning.message) for warning in said):
        print(f"Note: {text}")
    print(flush=True)


@_noted()
def region_pointing() -> None:
    model, _ = lab.load_uniter()
    scenes = lab.digit_scenes(SCENES, seed=SEED)
    print(f"Pointing game over {SCENES} scenes of digits not trained on, each with two named digits among four:\n")
    print(f"{'method':12}{'top region is named':>22}{'top two are the named':>24}")
    for method in pointing.METHODS:
        regions = explain(model, scenes.inputs(), target=log_odds, method=method).regions
        assert regions is not None  # UNITER has regions
        hit = scenes.named.gather(1, regions.topk(2).indices).double()
        print(f"{method:12}{hit[:, 0].mean():22.1%}{hit.prod(1).mean():24.1%}")
    print(f"{'chance':12}{1 / 2:22.1%}{1 / 6:24.1%}")


@_noted()
def answers() -> None:
    print("The same of questions: how often the digit with the largest part of the map is the one that it is about.\n")
    heads = {"answer": "what is left of a six", "there": "is there a three", "is": "is a three left of a six", "word": "words"}
    print(f"{'method':12}" + "".join(f"{head:>26}" for head in heads.values()))
    for method in pointing.METHODS:
        shares = pointing.question_pointing(method, count=SCENES, seed=SEED)
        shares |= pointing.word_pointing(method, count=SCENES, seed=SEED)
        print(f"{method:12}" + "".join(f"{shares[name]:26.1%}" for name in heads))
    print(f"{'chance':12}" + "".join(f"{pointing.CHANCE[name]:26.1%}" for name in heads))


def compare() -> None:
    """Prints the costs of explaining a picture, as `vlattn bench task_explain_clip` measures them."""
    print(f"Cost of one relevancy map on {LAYERS} layers of CLIP ViT-L/14@336's vision tower, random weights, one picture.")
    print("Variants run in turns.\n", flush=True)
    (benchmark,) = _choice.choose(["task_explain_clip"])
    options: dict[str, Any] = {"overrides": {"layers": LAYERS}, "only": VARIANTS, "rounds": 3, "compiled": False}
    found = {record["variant"]: record for record in _measure.Measurement(benchmark, torch.device("cpu"), **options).run()}
    records = [found[variant] for variant in VARIANTS]
    sizes = ", ".join(f"{name} {size}" for name, size in records[0]["sizes"].items())
    print(f"{sizes}; {records[0]['dtype']}; median of {records[0]['rounds']} calls")
    print(f"{'variant':28}{'seconds':>8}{'of plain':>10}{'peak MiB':>10}{'of plain':>10}  error of the map")
    bare = records[0]
    for record in records:
        print(f"{record['variant']:28}{_cost(record, bare)}")
    seconds = {record["variant"]: record.get("p50_us", 0.0) for record in records}
    if seconds[BACKEND] and seconds["published"]:
        times = seconds["published"] / seconds[BACKEND]
        print(f"\nThe published procedure takes {times:.1f} times as long as vlattn_fast ({BACKEND}). Of all 24 layers it takes")
        print(
            f"{ALL_LAYERS}, since it takes a gradient for each layer; `vlattn bench task_explain_clip` measures it.", flush=True
        )


def _cost(record: dict[str, Any], bare: dict[str, Any]) -> str:
    if "not_run" in record:
        return f"not run: {record['not_run']}"
    memory = ""
    if record["peak_bytes"] is not None and bare.get("peak_bytes"):
        memory = f"{record['peak_bytes'] / 2**20:10.0f}{record['peak_bytes'] / bare['peak_bytes']:10.2f}"
    return f"{record['p50_us'] / 1e6:8.2f}{record['ratio_to_bound']:10.2f}{memory:20}  {number(record['error'], '.1e')}"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m vlattn_lab.demo", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("demo"), help="directory for the pictures")
    parser.add_argument("--no-costs", dest="costs", action="store_false", help="do not measure what one map costs")
    sys.exit(not run(**vars(parser.parse_args())))
