"""Models that hear: strips of time, their groups, figures and ground truth."""

import pytest
import torch

pytest.importorskip("matplotlib")
import transformers

import vlattn_fast as va

ANSWER = [[5, 6, 7]]
END = 30  # of the first sound, in positions of 20 ms; the second has 50


def whisper() -> torch.nn.Module:
    torch.manual_seed(0)
    layers = dict(encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2, d_model=16)
    sizes = dict(encoder_ffn_dim=24, decoder_ffn_dim=24, vocab_size=60, num_mel_bins=4, max_source_positions=50)
    ends = dict(decoder_start_token_id=50, bos_token_id=2, eos_token_id=2, pad_token_id=3)
    return transformers.WhisperForConditionalGeneration(transformers.WhisperConfig(**layers, **sizes, **ends)).eval()


def moonshine() -> torch.nn.Module:
    torch.manual_seed(0)
    heads = {f"{side}_num_{kind}_heads": 2 for side in ("encoder", "decoder") for kind in ("attention", "key_value")}
    layers = dict(hidden_size=16, intermediate_size=24, encoder_num_hidden_layers=1, decoder_num_hidden_layers=1)
    ends = dict(vocab_size=60, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1, pad_token_id=2)
    return transformers.MoonshineForConditionalGeneration(transformers.MoonshineConfig(**heads, **layers, **ends)).eval()


def sounds() -> torch.Tensor:
    torch.manual_seed(1)
    features = torch.randn(2, 4, 100)
    features[0, :, 2 * END :] = -1.0
    return features


def prompts() -> dict[str, torch.Tensor]:
    return {"input_features": sounds(), "decoder_input_ids": torch.tensor([[50, 4], [50, 5]])}


def last(outputs) -> torch.Tensor:
    return outputs.logits[:, -1, 7]


def test_the_strip_of_a_spectrogram_ends_with_the_sound(tmp_path):
    got = va.explain(whisper(), {"input_features": sounds()}, answer=ANSWER * 2)
    assert list(got.relevancy) == ["text", "sound"] and got.no_map is None and got.seconds == [0.6, 1.0]
    for strip, row, end in zip(got.image, got.relevancy["sound"], (END, 50), strict=True):
        assert torch.equal(strip, row[:, None, :end])
    assert got[1].seconds == [1.0] and va.Explanation.load(got.save(tmp_path / "one.safetensors")).seconds == got.seconds


def test_the_strip_of_a_wave():
    wave = torch.randn(1, 16000)
    wave[:, 12000:] = 0.0
    mask = (torch.arange(16000) < 8000).long()[None]
    for inputs, seconds in (({"input_values": wave}, 0.75), ({"input_values": wave, "attention_mask": mask}, 0.5)):
        got = va.explain(moonshine(), inputs, answer=ANSWER)
        count = round(seconds * got.relevancy["sound"].shape[-1])
        assert got.seconds == [pytest.approx(seconds)] and got.image.shape == (1, 3, 1, count)


def test_silence_is_shown_whole():
    got = va.explain(whisper(), {"input_features": torch.full((1, 4, 100), -1.0)}, answer=ANSWER)
    assert got.seconds == [1.0] and got.image.shape == (1, 3, 1, 50)


def test_each_layer_has_strips():
    got = va.explain_layers(whisper(), prompts(), target=last, position={"text": -1}, method="attention")
    assert got.at(0).seconds == [0.6, 1.0] and got.at(0).image[0].shape == (1, END)


def test_groups_of_a_sound():
    model, inputs, tower = whisper(), prompts(), ("text", "sound")

    def cut(keys) -> torch.Tensor:
        with va.intervene(model, inputs, va.Knockout(keys=keys, tower=tower)), torch.no_grad():
            return last(model(**inputs))

    mask = torch.zeros(50, dtype=torch.bool)
    mask[10:20] = True  # middles from 0.21 to 0.39 s
    assert torch.equal(cut(va.Seconds(0.2, 0.4)), cut(mask)) and not torch.equal(cut(mask), cut([(0, 10)]))
    assert torch.equal(cut("sound"), cut(~torch.zeros(50, dtype=torch.bool)))
    halves = {"first": va.Seconds(0, 0.5), "second": va.Seconds(0.5, 1), "words": "text"}
    table = va.attribute_edges(model, inputs, halves, tower=tower, target=last)
    assert {edge.from_ for edge in table} == {"first", "second"}


def test_groups_of_a_sound_that_have_no_meaning():
    with pytest.raises(ValueError, match=r"end must be after begin; got Seconds\(begin=1, end=0.5\)"):
        va.Seconds(1, 0.5)
    for keys, why in ((va.Seconds(5, 6), "got Seconds.*, which is empty in tower 'sound'"), ("image", "'image' has no meaning")):
        edit = va.Knockout(keys=keys, tower="sound")
        with pytest.raises(ValueError, match=why), va.intervene(whisper(), prompts(), edit):
            pass


def test_figures_and_tables_of_a_sound_count_seconds():
    got = va.explain(whisper(), {"input_features": sounds()[:1]}, answer=ANSWER)
    (axis,) = [axis for axis in got.plot().axes if axis.get_xlabel().startswith("seconds")]
    assert [label.get_text() for label in axis.get_xticklabels()] == ["0", "0.1", "0.2", "0.3", "0.4", "0.5"]  # of 0.6
    (entry, *_) = [one for one in got.top(1) if one.tower == "sound"]
    strongest = int(got.image[0, 0, 0].argmax())
    assert (entry.part, entry.position, entry.word) == ("sound", strongest, f"{0.02 * strongest + 0.01:.2f} s")
    assert '"seconds": 0.6' in got.to_html()
    whole = va.explain(whisper(), prompts(), target=last, position={"text": -1})
    assert {"seconds"} <= {axis.get_xlabel() for axis in whole.plot().axes}
    with pytest.raises(ValueError, match="image must be None for a sound, whose maps are strips of time"):
        whole.plot(torch.rand(3, 8, 8))


def test_a_map_points_at_the_seconds_of_a_word():
    model, inputs = whisper(), {"input_features": sounds()[:1]}
    strips = va.explain(model, inputs, answer=ANSWER, method="attention").image[0, :, 0].double()
    truth = {0: va.Seconds(0.1, 0.3), 1: [va.Seconds(0.2, 0.3), va.Seconds(0.4, 0.5)]}
    item = {"inputs": inputs, "answer": ANSWER[0], "boxes": truth}
    found = va.evaluate(model, [item], methods=["attention"], tests=["pointing", "mass"])
    middles = (torch.arange(END) + 0.5) / 50
    inside = torch.stack(
        [(0.1 < middles) & (middles < 0.3), ((0.2 < middles) & (middles < 0.3)) | ((0.4 < middles) & (middles < 0.5))]
    )
    assert found.value("attention", "mass") == pytest.approx(float(((strips[:2] * inside).sum(1) / strips[:2].sum(1)).mean()))
    pointed = inside.gather(1, strips[:2].argmax(1)[:, None]).double().mean()
    assert found.value("attention", "pointing") == pytest.approx(float(pointed))
    with pytest.raises(ValueError, match="boxes must be va.Seconds of a sound"):
        va.evaluate(model, [{**item, "boxes": [[0, 0, 0.5, 1]]}], methods=["attention"], tests=["pointing"])


def test_deletion_silences_stretches_of_a_sound():
    model, inputs = whisper(), {"input_features": sounds()[:1]}
    found = va.evaluate(model, [{"inputs": inputs, "answer": [5]}], methods=["attention"], tests=["deletion"], steps=[0, 0.5, 1])
    order = va.explain(model, inputs, answer=[[5]], method="attention").image[0, 0, 0].argsort(descending=True, stable=True)
    values = []
    for count in (0, END // 2, END):
        features = inputs["input_features"].clone()
        for place in order[:count].tolist():
            features[:, :, 2 * place : 2 * place + 2] = inputs["input_features"].min()
        with torch.no_grad():
            values.append(
                float(model(input_features=features, decoder_input_ids=torch.tensor([[50]])).logits[0, -1].softmax(-1)[5])
            )
    area = (values[0] / 2 + values[1] + values[2] / 2) / 2
    assert found.value("attention", "deletion") == pytest.approx(area, rel=1e-4)
