"""Explanations of many inputs: every one exactly once, equal to `va.explain` by itself, also by several killed processes."""

import csv
import dataclasses
import functools
import json
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

typer_testing = pytest.importorskip("typer.testing")
pytest.importorskip("transformers")
image_module = pytest.importorskip("PIL.Image")
safetensors = pytest.importorskip("safetensors")

import vlattn_fast as va  # noqa: E402
from tests.helpers import saved_models  # noqa: E402
from tests.helpers.commands import said, vlattn  # noqa: E402
from vlattn_fast.interpret.dataset import pieces, store  # noqa: E402
from vlattn_fast.interpret.dataset.items import Items  # noqa: E402
from vlattn_fast.interpret.explaining import loading  # noqa: E402
from vlattn_fast.interpret.result.figures import photos  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
CAPTIONS = ["a red square", "a circle", "blue", "a red red blue square"]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return {name: getattr(saved_models, f"save_{name}")(tmp_path_factory.mktemp(name)) for name in ("clip", "vit", "llava")}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A folder of sixteen pictures in two folders."""
    folder = tmp_path_factory.mktemp("pictures")
    (folder / "more").mkdir()
    for number in range(16):
        noise = image_module.effect_noise((40 + number, 30), 80).convert("RGB")
        noise.save(folder / ("more" if number % 2 else ".") / f"{number:02}.png")
    return folder


def picture(pictures, number):
    return pictures / ("more" if number % 2 else ".") / f"{number:02}.png"


def write_lines(path, rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


load_model = functools.cache(loading.load_model)


def alone(model_folder, image, texts=(), **options):
    """What `va.explain` gives for this input by itself."""
    model, processor = load_model(str(model_folder))
    inputs = loading.build_inputs(model, processor, photos.open_image(image), list(texts))
    return va.explain(model, inputs, processor=processor, **options)


def assert_same(one, other):
    for field in dataclasses.fields(va.Explanation):
        values, expected = leaves(getattr(one, field.name)), leaves(getattr(other, field.name))
        assert list(values) == list(expected), field.name
        for place, value in expected.items():
            if isinstance(value, torch.Tensor):
                torch.testing.assert_close(values[place], value, atol=1e-6, rtol=1e-4)
            else:
                assert values[place] == value, (field.name, place)


def leaves(value, place=()):
    """Tensors and facts by their places in dicts, tuples and lists, with what these are."""
    if isinstance(value, dict):
        return {key: leaf for name, one in value.items() for key, leaf in leaves(one, (*place, name)).items()}
    if isinstance(value, (tuple, list)):
        return {key: leaf for i, one in enumerate(value) for key, leaf in leaves(one, (*place, type(value), i)).items()}
    return {place: value}


def closing(result):
    return next(line for line in result.stdout.splitlines() if line.startswith("done "))


@pytest.mark.slow
def test_json_lines_with_bad_inputs(models, pictures, tmp_path):
    rows = [
        {"image": str(picture(pictures, number)), "text": CAPTIONS[number % 4], "id": f"n{number}", "width": 3}
        for number in range(9)
    ]
    rows[1]["text"] = ["a red square", "a circle", "blue"]
    rows[2] |= {"text": ["a red square", "blue"], "target": 1}
    bad = [
        {"image": "later.png", "text": "a circle"},
        {"image": str(Path(__file__)), "text": "a"},
        {"image": str(picture(pictures, 1))},
        {"image": str(picture(pictures, 1)), "text": "a red " * 9},
        {"image": str(picture(pictures, 1)), "text": ["a"], "target": 1},
        {"image": str(picture(pictures, 1)), "text": "a", "target": "first"},
        {"image": str(picture(pictures, 1)), "text": 5},
        "{no json",
        {"image": 5, "text": "a"},
        {"image": str(picture(pictures, 1)), "text": "a \ud83d"},
    ]
    dataset = write_lines(tmp_path / "pairs.jsonl", [*rows[:5], *bad, *rows[5:]])
    run = ("explain", "--model", models["clip"], "--dataset", dataset, "--out", out := tmp_path / "out", "--batch-size", 4)
    result = vlattn(*run)
    assert result.exit_code == 1, result.output
    assert closing(result) == f"done 9, failed 10, skipped 0 (done before), of 19: {out}"
    failures = [json.loads(line) for line in (out / "failures.jsonl").read_text().splitlines()]
    reasons = (
        "which does not exist", "which PIL cannot read", "text must be given for CLIPModel", "text must have at most 8 tokens",
        "target must be from 0 to 0", "target must be an int; got 'first'", "text must be a text or a list",
        "line 13 must be a JSON", "image must be a path or an image; got 5", "text must be Unicode; got",
    )  # fmt: skip
    assert [failure["item"] for failure in failures] == list(range(5, 15))
    for failure, reason in zip(failures, reasons, strict=True):
        assert reason in failure["error"]
    explanations = va.load_explanations(out)
    assert explanations.failures == failures and explanations.ids == [row["id"] for row in rows]
    for row, explanation in zip(rows, explanations, strict=True):
        texts = row["text"] if isinstance(row["text"], list) else [row["text"]]
        assert_same(explanation, alone(models["clip"], row["image"], texts, target=row.get("target") and [row["target"]]))


def test_a_corrected_input_is_tried_again(models, pictures, tmp_path):
    rows = [{"image": "gone.png", "text": "a", "id": "first"}, {"image": str(picture(pictures, 0)), "text": "a"}]
    dataset = write_lines(tmp_path / "pairs.jsonl", rows)
    run = ("explain", "--model", models["clip"], "--dataset", dataset, "--out", out := tmp_path / "out")
    assert closing(vlattn(*run)) == f"done 1, failed 1, skipped 0 (done before), of 2: {out}"
    rows[0]["image"] = str(picture(pictures, 1))
    write_lines(dataset, [*rows, {"image": str(picture(pictures, 2)), "text": "a"}])
    result = vlattn(*run)
    assert result.exit_code == 0, result.output
    assert closing(result) == f"done 2, failed 0, skipped 1 (done before), of 3: {out}"
    assert va.load_explanations(out).ids == ["first", "1", "2"]
    write_lines(dataset, rows[1:])
    assert vlattn(*run).exit_code == 2  # what was explained is not there, or at another place


def test_csv_with_targets(models, pictures, tmp_path):
    dataset = tmp_path / "classes.csv"
    with dataset.open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["id", "image", "target", "comment"])
        table.writerows([[f"n{i}", os.path.relpath(picture(pictures, i), tmp_path), 3 if i < 4 else "", "x"] for i in range(7)])
    out = tmp_path / "out"
    result = vlattn("explain", "--model", models["vit"], "--dataset", dataset, "--out", out, "--target", 1, "--workers", 0)
    assert result.exit_code == 0, result.output
    explanations = va.load_explanations(str(out))
    assert len(explanations) == 7 and explanations.failures == []
    for number, explanation in enumerate(explanations):
        assert explanation.target == [3 if number < 4 else 1]
        assert_same(explanation, alone(models["vit"], picture(pictures, number), target=3 if number < 4 else 1))


def test_csv_with_rows_of_other_lengths(models, tmp_path):
    """A comma in a text without quotes cuts nothing off, and a quote that is never closed swallows no rows."""
    dataset = tmp_path / "texts.csv"
    dataset.write_text('id,text\none,"a, b"\ntwo,a red square, or not\nthree,a\n')
    one, two, three = Items(dataset)
    assert one.texts == ["a, b"] and three.texts == ["a"]
    assert two.id == "two" and two.problem == "line 3 must have 2 fields, as the first line; got 3"
    for text, reason in (('"a red\ntwo,a\n', "unexpected end of data"), ("a" * 200_000, "larger than field limit")):
        dataset.write_text(f"id,text\none,{text}")
        with pytest.raises(ValueError, match=f"dataset must be CSV; got .*texts.csv, line [123]: .*{reason}"):
            Items(dataset)


def test_a_folder_with_texts_for_all_and_the_lazy_sequence(models, pictures, tmp_path, monkeypatch):
    texts = ("--text", "a red square", "--text", "blue")
    out = tmp_path / "out"
    sizes = ("--shard-size", 5, "--batch-size", 5)
    result = vlattn("explain", "--model", models["clip"], "--dataset", pictures, *texts, "--out", out, *sizes)
    assert result.exit_code == 0, result.output
    explanations = va.load_explanations(out)
    names = sorted(path.relative_to(pictures).as_posix() for path in pictures.rglob("*.png"))
    assert explanations.ids == names and len(explanations) == 16 and "16 explanations" in repr(explanations)
    assert_same(explanations[-1], alone(models["clip"], pictures / names[-1], ["a red square", "blue"]))
    later = explanations[3:9:2]
    assert later.ids == names[3:9:2]
    assert_same(later[1], explanations[5])
    with pytest.raises(IndexError):
        explanations[16]

    read = []
    opened = safetensors.safe_open
    monkeypatch.setattr(safetensors, "safe_open", lambda path, **options: read.append(path) or opened(path, **options))
    fresh = va.load_explanations(out)
    assert not read
    assert fresh[0].words == [["a", "red", "square"], ["blue"]] and len(read) == 1
    assert len(list(fresh)) == 16 and len(read) <= 4


def test_answers_given_and_generated(models, pictures, tmp_path):
    rows = [
        {"image": str(picture(pictures, i)), "text": CAPTIONS[i % 2], "answer": ["a blue circle", "red"][i % 2]} for i in range(5)
    ]
    rows[4]["answer"] = ""
    dataset = write_lines(tmp_path / "asked.jsonl", rows)
    out = tmp_path / "out"
    result = vlattn("explain", "--model", models["llava"], "--dataset", dataset, "--generate", 2, "--out", out)
    assert result.exit_code == 0, result.output
    explanations = va.load_explanations(out)
    model, processor = loading.load_model(str(models["llava"]))
    for row, explanation in zip(rows, explanations, strict=True):
        answer = row["answer"]
        if not answer:
            inputs = loading.build_inputs(model, processor, photos.open_image(row["image"]), [row["text"]])
            answer = loading.generate(model, inputs, 2)
        assert_same(explanation, alone(models["llava"], row["image"], [row["text"]], answer=answer))
    assert explanations[0].scores.shape == (1, 3) and explanations[1].scores.shape == (1, 1)


def test_an_answer_that_begins_as_its_prompt_does_is_whole(tmp_path):
    model = saved_models.save_llama(tmp_path / "llama")
    dataset = write_lines(tmp_path / "asked.jsonl", [{"text": "a red", "answer": "a red square"}])
    assert vlattn("explain", "--model", model, "--dataset", dataset, "--out", tmp_path / "out").exit_code == 0
    assert len(va.load_explanations(tmp_path / "out")[0].answer[0]) == 3
    page = ("--text", "a red", "--answer", "a red square", "--out", tmp_path / "page.html")
    assert "token 2: log-probability" in vlattn("explain", "--model", model, *page).output


def test_a_page_of_what_the_model_generates(models, pictures, tmp_path):
    run = ("explain", "--model", models["llava"], "--image", picture(pictures, 0), "--text", "a red square", "--out")
    for options, count in ((("--generate", 4), 4), (("--answer", "blue circle"), 2)):
        result = vlattn(*run, out := tmp_path / "answer.html", *options)
        assert result.exit_code == 0, result.output
        assert 0 < result.output.count("log-probability") <= count and "<html" in out.read_text()
    assert "token 1: log-probability" in result.output and "'circle'" in result.output
    refused = vlattn(*run, out, "--answer", "blue", "--generate", 3)
    assert refused.exit_code == 2 and "--answer must be given without --generate" in said(refused)
    refused = vlattn("explain", "--model", models["vit"], "--image", picture(pictures, 0), "--out", out, "--generate", 3)
    assert refused.exit_code == 2 and "generate must be used with a decoder" in said(refused)


@pytest.mark.slow
def test_what_is_refused(models, pictures, tmp_path):
    dataset = write_lines(tmp_path / "one.jsonl", [{"image": str(picture(pictures, 0)), "text": "a"}])
    out = tmp_path / "out"
    run = ("explain", "--model", models["clip"], "--dataset", dataset, "--out", out)
    assert vlattn(*run).exit_code == 0

    def refused(*command):
        result = vlattn(*command)
        assert result.exit_code == 2, result.output
        return said(result)

    assert f'--method must be "gradient", as in the earlier runs in {out}; got "rollout"' in refused(*run, "--method", "rollout")
    assert "--text must be [], as in" in refused(*run, "--text", "b")
    for held, shared in ((out, False), (out / store.SETTINGS, True)):  # by the first rank of a run, by another one
        with store.locked(held, shared=shared):
            assert f"must not be written by another run; got {out}" in refused(*run)
    write_lines(dataset, [{"image": "x.png", "text": "a"}])
    assert f"--dataset must be one whose input number 0 is still '0', unchanged, since {out} explains it" in refused(*run)
    below = dataset / "out"  # nobody may write here, root included
    assert f"--out must be a directory that can be written; got {below}" in refused(*run[:-1], below)
    for other in (tmp_path, dataset):
        assert "out must be a new or an empty directory" in refused(*run[:-1], other)
    assert "--image must be given without --dataset" in refused(*run, "--image", picture(pictures, 0))
    assert "--device nowhere" in refused(*run, "--device", "nowhere")
    assert "generate must be used with a decoder" in refused(*run[:-1], tmp_path / "new", "--generate", 2)
    assert not (tmp_path / "new").exists()
    for content, reason in (
        ("", "at least one input"),
        ('{"text": "a", "id": 1}\n' * 2, "got '1' twice"),
        ("{}\n", "column image or text; got neither"),
        ("{}\n[]\n", "got line 2 must be a JSON object; got []"),
    ):
        dataset.write_text(content)
        assert reason in refused(*run)
    dataset.write_bytes('{"text": "café"}'.encode("latin-1"))
    assert "dataset must be text in UTF-8" in refused(*run)
    for name, reason in (("x.txt", "must end in .csv or .jsonl"), ("gone.csv", "which does not exist"), (".", "column")):
        (tmp_path / "x.txt").touch()
        (tmp_path / "empty").mkdir(exist_ok=True)
        with pytest.raises(ValueError, match=reason if name != "." else "at least one input"):
            Items(tmp_path / name if name != "." else tmp_path / "empty")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / store.SETTINGS).write_text("{")
    for folder in (tmp_path, tmp_path / "gone", tmp_path / "broken", dataset):
        with pytest.raises(ValueError, match="directory must be one that `vlattn explain --dataset` wrote"):
            va.load_explanations(folder)


def test_a_part_that_every_input_lacks_is_refused_once(models, pictures, tmp_path):
    out = tmp_path / "out"
    for model, options, message in (
        ("clip", (), "--text must be given for CLIPModel; got none"),
        ("vit", ("--text", "a red square"), "--text must be left out for ViTForImageClassification; got one"),
    ):
        result = vlattn("explain", "--model", models[model], "--dataset", pictures, "--out", out, *options)
        assert result.exit_code == 2 and message in said(result) and not out.exists()
    rows = [{"image": str(picture(pictures, i)), "text": "a" * (i > 0)} for i in range(3)]
    result = vlattn("explain", "--model", models["clip"], "--dataset", write_lines(tmp_path / "some.jsonl", rows), "--out", out)
    assert result.exit_code == 1 and "done 2, failed 1" in result.output


class Saved:
    """As much of `datasets.Dataset` as is used."""

    def __init__(self, columns):
        self.columns, self.column_names = columns, list(columns)

    def select_columns(self, names):
        return Saved({name: self.columns[name] for name in names})

    def __len__(self):
        return len(next(iter(self.columns.values())))

    def __getitem__(self, number):
        if number >= len(self):
            raise IndexError
        return {name: values[number] for name, values in self.columns.items()}


def test_a_hugging_face_dataset(models, pictures, tmp_path, monkeypatch):
    folder = tmp_path / "saved"
    folder.mkdir()
    (folder / "state.json").touch()
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'vlattn_fast\[datasets\]'"):
        Items(folder)
    columns = {"image": [photos.open_image(picture(pictures, i)) for i in range(3)], "target": [0, 1, None], "label": [1, 2, 3]}
    module = types.SimpleNamespace(load_from_disk=lambda path: Saved(columns))
    monkeypatch.setitem(sys.modules, "datasets", module)
    result = vlattn("explain", "--model", models["vit"], "--dataset", folder, "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    explanations = va.load_explanations(tmp_path / "out")
    assert explanations.ids == ["0", "1", "2"]
    assert_same(explanations[1], alone(models["vit"], picture(pictures, 1), target=1))
    module.load_from_disk = lambda path: {"train": 0, "test": 1}
    with pytest.raises(ValueError, match="dataset must be one split; got train, test"):
        Items(folder)


@pytest.fixture
def many(pictures, tmp_path):
    """Forty inputs, two of them bad."""
    rows = [{"image": str(picture(pictures, i % 16)), "text": CAPTIONS[i % 3]} for i in range(40)]
    rows[11]["image"] = rows[30]["image"] = "gone.png"
    return write_lines(tmp_path / "many.jsonl", rows), rows


def check_all(models, out, rows):
    items = [line["item"] for shard in store.finished(out) for line in shard.lines if "error" not in line]
    assert sorted(items) == [i for i in range(40) if i not in (11, 30)], "every item exactly once"
    explanations = va.load_explanations(out)
    assert [failure["item"] for failure in explanations.failures] == [11, 30]
    for index in range(0, 38, 6):
        row = rows[int(explanations.ids[index])]
        assert_same(explanations[index], alone(models["clip"], row["image"], [row["text"]]))


def start(*command):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.slow
def test_processes_killed_twice_and_resumed_by_others(models, many, tmp_path):
    dataset, rows = many
    out = tmp_path / "out"
    shards, done, written = out / store.SHARDS, 0, {}
    command = [sys.executable, "-m", "tests.helpers.explain_ranks", str(models["clip"]), str(dataset), str(out)]
    environment, errors = {**os.environ, "OMP_NUM_THREADS": "1"}, (tmp_path / "errors").open("w+")
    ranks = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True
    )

    def run(world: int, die: str) -> tuple[int, list[str]]:
        """The exit status, and the words that were printed."""
        ranks.stdin.write(f"{world} {die}\n")
        ranks.stdin.flush()
        words = []
        while not (line := ranks.stdout.readline().split())[:1] == ["status"]:
            assert line or ranks.poll() is None, errors.seek(0) or errors.read()
            words += line if all(word.isdigit() for word in line) else []  # torch 2.9 says whom it connects
        return int(line[1]), words

    assert run(1, "first")[0] == 1 and len(va.load_explanations(out)) == 0  # before a shard is whole
    assert [path.name for path in shards.iterdir()] == ["00000-000000.safetensors.tmp"]
    for number, (die, left) in enumerate((("lines", ".safetensors"), ("shard", ".safetensors.tmp"))):
        assert run(2, die)[0] == 1
        assert "Traceback" not in (tmp_path / "errors").read_text()
        names = {path.name for path in shards.iterdir()}
        unfinished = f"00001-{number + 1:06}"
        assert unfinished + left in names and unfinished + ".jsonl" not in names
        assert done < len(va.load_explanations(out)) < 38
        done = len(va.load_explanations(out))
        assert all(path.stat().st_mtime_ns == time for path, time in written.items())
        written = {path: path.stat().st_mtime_ns for path in shards.glob("*.jsonl")}
    assert run(4, "no") == (0, [str(38 - done), "2", str(done)]), (tmp_path / "errors").read_text()
    ranks.communicate()
    errors.close()
    assert all(path.stat().st_mtime_ns == time for path, time in written.items())
    assert not list(shards.glob("*.tmp"))
    check_all(models, out, rows)


@pytest.mark.slow
def test_torchrun(models, many, tmp_path):
    dataset, rows = many
    command = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "vlattn_fast", "explain")
    run = start(*command, "--model", models["clip"], "--dataset", dataset, "--out", out := tmp_path / "out", "--batch-size", 4)
    assert run.returncode == 1  # two inputs failed
    assert f"done 38, failed 2, skipped 0 (done before), of 40: {out}" in run.stdout, run.stderr
    assert run.stdout.count("done 38") == 1
    assert {path.name[:5] for path in (out / store.SHARDS).iterdir()} == {"00000", "00001"}
    check_all(models, out, rows)


def test_lines_hold_what_parts_lines_elsewhere(tmp_path):
    (tmp_path / store.SHARDS).mkdir()
    writer, line = store.ShardWriter(tmp_path, 0), {"item": 0, "id": "a\u2028b", "text": ["c\x85d"], "error": "e"}
    writer.lines.append(line)
    writer.flush()
    assert [shard.lines for shard in store.finished(tmp_path)] == [[line]]


def test_names_that_are_no_text_and_a_run_killed_as_it_began(models, pictures, tmp_path):
    folder, out = tmp_path / "folder", tmp_path / "out"
    folder.mkdir()
    name = os.fsdecode(b"a\xff.png")
    try:
        (folder / name).write_bytes(picture(pictures, 0).read_bytes())
    except OSError:
        pytest.skip("a file system whose names are text")
    out.mkdir()
    (out / f"{store.SETTINGS}.tmp").write_text("{")
    result = vlattn("explain", "--model", models["vit"], "--dataset", folder, "--out", out)
    assert result.exit_code == 0 and va.load_explanations(out).ids == [name]


def test_pieces_of_a_batch():
    """Fields of every form come apart as if each input had been explained alone, and survive as tensors and facts."""
    maps = tuple(torch.rand(*size) for size in ((2, 3), (3, 3), (3, 3), (4, 1)))
    whole = va.Explanation(
        {"language": torch.rand(3, 2, 7), "vision": torch.rand(3, 5)},
        maps, [0, 1, 1, 2], torch.rand(3, 2, 4), [[1, 2], [3, 4, 5, 6], [7]], scores=torch.rand(3, 2), method="rollout",
        position={"language": torch.arange(6).reshape(3, 2)}, answer=[[1, 2], [3, 4], [5, 6]],
        tower_images={"vision": torch.rand(4, 2, 2)},
    )  # fmt: skip
    first, last = pieces.split(whole, [1, 2])
    assert torch.equal(first.image, maps[0][None]) and first.image_samples == [0] and first.text.shape == (1, 2, 2)
    assert last.image_samples == [0, 0, 1] and len(last.image) == 3 and last.text.shape == (2, 2, 4)
    assert torch.equal(last.relevancy["vision"], whole.relevancy["vision"][1:])
    assert torch.equal(last.tower_images["vision"], whole.tower_images["vision"][1:])
    assert last.answer == [[3, 4], [5, 6]] and torch.equal(last.position["language"], torch.tensor([[2, 3], [4, 5]]))
    for one in (first, last, whole):
        tensors, facts = pieces.pack(one)
        assert_same(pieces.unpack(json.loads(json.dumps(facts)), tensors.__getitem__), one)
