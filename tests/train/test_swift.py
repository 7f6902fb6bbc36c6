"""The recipe for ms-swift, as its page has it, with the library itself: `python -m tools.environments swift`."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("swift")
image = pytest.importorskip("PIL.Image")

from tests.helpers import saved_models  # noqa: E402

PAGE = Path(__file__).parents[2] / "docs" / "guides" / "trainers.md"
OPTIONS = (
    "--model llava --model_type llava1_5_hf --template llava1_5_hf --dataset data.jsonl --tuner_type full --max_steps 2 "
    "--per_device_train_batch_size 2 --gradient_accumulation_steps 2 --logging_steps 1 --save_strategy no --report_to none "
    "--torch_dtype float32 --dataloader_num_workers 0 --add_version false --learning_rate 0"
)

pytestmark = pytest.mark.filterwarnings("default")  # ms-swift calls what others have deprecated


def test_the_loss_is_that_of_the_answers_and_the_term(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    saved_models.save_llava(Path("llava"))
    image.new("RGB", (24, 24), "red").save("red.png")
    messages = [{"role": "user", "content": "<image>a"}, {"role": "assistant", "content": "red square"}]
    Path("data.jsonl").write_text(8 * (json.dumps({"messages": messages, "images": ["red.png"]}) + "\n"))
    (code,) = re.findall(r"^```py\n(from swift.*?)^```$", PAGE.read_text(encoding="utf-8"), re.M | re.S)
    Path("congruence.py").write_text(code.replace("weight=10.0", "weight=1e8"))  # of random weights, whose loss is small
    added = "--external_plugins congruence.py --callbacks congruence --gradient_checkpointing_kwargs".split()
    logged = {}
    for name, more in (("plain", []), ("term", [*added, '{"use_reentrant": false}'])):
        command = [sys.executable, "-m", "swift.cli.main", "sft", *OPTIONS.split(), "--output_dir", name, *more]
        subprocess.run(command, check=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
        lines = [json.loads(line) for line in Path(name, "logging.jsonl").read_text().splitlines()]
        logged[name] = {key: [float(line[key]) for line in lines if key in line] for key in ("loss", "congruence_loss")}
    terms = logged["term"]["congruence_loss"]
    assert len(terms) == 2 and min(terms) > 0.01
    for plain, loss, term in zip(logged["plain"]["loss"], logged["term"]["loss"], terms, strict=True):
        assert loss - plain == pytest.approx(term, rel=1e-3, abs=1e-5)
