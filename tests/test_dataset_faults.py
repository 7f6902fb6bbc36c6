"""Explanations of many inputs where disks are full, files damaged, and two runs begin at once."""

import os

import pytest

safetensors = pytest.importorskip("safetensors")
safetensors_torch = pytest.importorskip("safetensors.torch")
pytest.importorskip("typer")
pytest.importorskip("transformers")

import vlattn_fast as va  # noqa: E402
from tests import test_explain_dataset as runs  # noqa: E402
from tests.helpers.commands import said, vlattn  # noqa: E402
from tests.test_explain_dataset import CAPTIONS, alone, assert_same, check_all, closing, picture, start, write_lines  # noqa: E402
from vlattn_fast.interpret.dataset import explain_all as run  # noqa: E402
from vlattn_fast.interpret.dataset import store  # noqa: E402

models, pictures, many = runs.models, runs.pictures, runs.many


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.slow
def test_of_two_runs_that_begin_at_once_one_is_refused(models, many, tmp_path):
    dataset, rows = many
    out = tmp_path / "out"
    both = start("-m", "tests.helpers.explain_twice", models["clip"], dataset, out)
    assert both.returncode == 0, both.stderr
    refused = f"out must not be written by another run; got {out}. Wait until that run ends, or pass another out"
    assert sorted(both.stdout.splitlines()) == ["explained 38", refused]
    check_all(models, out, rows)


@pytest.fixture
def four(models, pictures, tmp_path):
    """Four inputs, and the command that writes them as two shards."""
    rows = [{"image": str(picture(pictures, i)), "text": CAPTIONS[i]} for i in range(4)]
    dataset = write_lines(tmp_path / "four.jsonl", rows)
    sizes = ("--batch-size", 1, "--shard-size", 2)
    return rows, ("explain", "--model", models["clip"], "--dataset", dataset, "--out", tmp_path / "out", *sizes)


@pytest.mark.parametrize("place", ["tensors", "lines"])
@pytest.mark.slow
def test_a_full_disk_ends_a_run_in_one_line(models, four, tmp_path, monkeypatch, place):
    rows, run = four
    out, full = tmp_path / "out", "No space left on device"
    save_file, publish, shards = safetensors_torch.save_file, store._publish, []

    def save_until_full(tensors, path, metadata):
        shards.append(path)
        if place == "tensors" and len(shards) == 2:
            raise safetensors.SafetensorError(f"Error while serializing: I/O error: {full} (os error 28)")
        save_file(tensors, path, metadata)

    def publish_until_full(unfinished, path):
        if place == "lines" and len(shards) == 2 and path.suffix == ".jsonl":
            raise OSError(28, full, str(unfinished))
        publish(unfinished, path)

    with monkeypatch.context() as patch:
        patch.setattr(safetensors_torch, "save_file", save_until_full)
        patch.setattr(store, "_publish", publish_until_full)
        result = vlattn(*run)
    assert result.exit_code == 1 and isinstance(result.exception, SystemExit)
    (line,) = [line for line in result.output.splitlines() if line.startswith("explain stopped")]
    assert str(out / store.SHARDS) in line and full in line and "holds what was written before" in line
    assert not list(out.rglob("*.tmp")) and len(va.load_explanations(out)) == 2
    assert closing(vlattn(*run)) == f"done 2, failed 0, skipped 2 (done before), of 4: {out}"
    for row, explanation in zip(rows, va.load_explanations(out), strict=True):
        assert_same(explanation, alone(models["clip"], row["image"], [row["text"]]))


@pytest.mark.skipif(os.name != "posix", reason="rights of files")
@pytest.mark.parametrize("umask", [0o022, 0o027])
def test_all_files_have_the_rights_that_the_umask_leaves(four, tmp_path, umask):
    before = os.umask(umask)
    try:
        assert vlattn(*four[1]).exit_code == 0
        va.load_explanations(tmp_path / "out")[0].save(tmp_path / "out" / "one.safetensors")
    finally:
        os.umask(before)
    rights = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert len(rights) == 7 and set(rights.values()) == {0o666 & ~umask}, rights


def damaged(data: bytes, damage: str) -> bytes:
    """The bytes of a file, some of which are lost or other ones. Facts of the items are in the header, too."""
    ends = {"cut": -300, "cut within its header": 300, "lines": 20}
    if damage in ends:
        return data[: ends[damage]]
    if damage == "length":
        return bytes(7) + data[7:]
    if damage == "header":
        return data[:8] + b"\0" * 40 + data[48:]
    old, new = {
        "name": (b"/relevancy.", b"/relevancx."),
        "facts": (b'\\"method\\"', b'\\"methox\\"'),
        "shape": (b"[1,4,4]", b"[4,1,4]"),
    }[damage]
    assert old in data
    return data.replace(old, new)


DAMAGES = ["cut", "cut within its header", "no shard", "lines", "length", "header", "name", "facts", "shape"]


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.slow("cut", "no", "lines", "length", "header", "name", "shape")  # all but facts
def test_a_damaged_shard_is_named_and_explained_anew(models, four, tmp_path, damage):
    rows, run = four
    assert vlattn(*run).exit_code == 0
    out = tmp_path / "out"
    shard = sorted((out / store.SHARDS).glob("*.safetensors"))[1]
    before = va.load_explanations(out)
    if damage == "lines":
        shard = shard.with_suffix(".jsonl")
    if damage == "no shard":
        shard.unlink()
    else:
        shard.write_bytes(damaged(shard.read_bytes(), damage))
    broken = f"{shard.name} is (truncated, damaged or missing|broken)"
    with pytest.raises(ValueError, match=f"directory must have whole shards; got .*{broken}"):
        va.load_explanations(out)
    if damage not in ("lines", "shape"):
        with pytest.raises(ValueError, match=f"directory must have whole shards; got .*{shard.name} cannot be read"):
            before[3]
    with pytest.warns(UserWarning, match=f"{broken}; its inputs are explained again"):
        result = vlattn(*run)
    assert closing(result) == f"done 2, failed 0, skipped 2 (done before), of 4: {out}"
    for row, explanation in zip(rows, va.load_explanations(out), strict=True):
        assert_same(explanation, alone(models["clip"], row["image"], [row["text"]]))


def test_a_folder_that_takes_no_file_is_refused_before_the_model_is_loaded(models, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "load_model", None)
    dataset = write_lines(tmp_path / "one.jsonl", [{"text": "a"}])
    for out in [path for path in ("/proc/maps_of_one", "/proc") if os.path.isdir("/proc/self")]:
        result = vlattn("explain", "--model", models["clip"], "--dataset", dataset, "--out", out)
        assert result.exit_code == 2 and "no directory" not in result.output, result.output
        assert ("nothing can be made in /proc" if out != "/proc" else "must be a new or an empty directory") in said(result)


def test_a_lock_ends_with_its_context(tmp_path):
    """Also by an error whose traceback is kept: another run in this process may then begin."""
    with pytest.raises(ZeroDivisionError) as kept, store.locked(tmp_path):
        raise ZeroDivisionError
    with store.locked(tmp_path):
        assert kept.tb is not None
