"""What processors are asked for: prompts in the form that models were trained with."""

from pathlib import Path

import pytest

transformers = pytest.importorskip("transformers")
image_module = pytest.importorskip("PIL.Image")

from tests.helpers import saved_models  # noqa: E402
from tests.helpers.interpret.decoder_cases import OPT, Q_FORMER  # noqa: E402
from tests.helpers.interpret.encoder_cases import git  # noqa: E402
from tests.interpret.relevancy.test_linked import florence  # noqa: E402
from vlattn_fast.interpret import explain  # noqa: E402
from vlattn_fast.interpret.explaining import loading  # noqa: E402
from vlattn_fast.interpret.result.figures import photos  # noqa: E402

PICTURE = image_module.effect_noise((40, 30), 80).convert("RGB")


def read(processor, inputs) -> list[str]:
    return processor.tokenizer.convert_ids_to_tokens(inputs["input_ids"][0])


@pytest.mark.parametrize("kind", ["Blip2", "InstructBlip"])
def test_a_processor_that_puts_the_picture_in_front_by_itself(kind: str, tmp_path: Path) -> None:
    words, images = saved_models.tokenizer(), transformers.BlipImageProcessor(size={"height": 24, "width": 24})
    others = () if kind == "Blip2" else (saved_models.tokenizer(),)
    getattr(transformers, f"{kind}Processor")(images, words, *others, num_query_tokens=4).save_pretrained(tmp_path)
    config = getattr(transformers, f"{kind}Config")(
        vision_config=saved_models.VISION,
        qformer_config=Q_FORMER,
        text_config={**OPT, "vocab_size": len(words), "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2},
        num_query_tokens=4,
        image_token_index=words.convert_tokens_to_ids("<image>"),
    )
    getattr(transformers, f"{kind}ForConditionalGeneration")(config).save_pretrained(tmp_path)
    model, processor = loading.load_model(str(tmp_path))
    inputs = loading.build_inputs(model, processor, PICTURE, ["a red square"])
    assert read(processor, inputs) == [*["<image>"] * 4, "<start>", "a", "red", "square", "<end>"]
    assert explain(model, inputs, target=3).relevancy["language"].shape == (1, 9)


def test_a_template_has_the_first_token_already(tmp_path: Path) -> None:
    """As Gemma 3's and Llama 4's; transformers does not add it again either."""
    model, processor = loading.load_model(str(saved_models.save_llava(tmp_path)))
    plain = loading.build_inputs(model, processor, PICTURE, ["a red square"])
    processor.chat_template = "<start> <image> {% for part in messages[0].content %}{{ part.text }}{% endfor %} <end>"
    templated = loading.build_inputs(model, processor, PICTURE, ["a red square"])
    assert read(processor, templated) == read(processor, plain) and read(processor, plain).count("<start>") == 1


@pytest.mark.parametrize(
    ("template", "token", "text", "message"),
    [
        (True, "<image>", "<image> a red", "text must be without <image> for LlavaProcessor: the image is put in front"),
        (True, "<pad>", "<pad> a red", "text must be without <pad> for"),
        (
            False,
            "<pad>",
            "<image> a red",
            "without <image> for LlavaProcessor: whose place for the image is <pad>; got '<image> a",
        ),
        (False, None, "<image> a red", "text must be without <image> for"),
        (False, "<image>", "a <image> red", None),  # the user puts it there
    ],
)
def test_a_placeholder_of_another_model_is_no_text(
    template: bool, token: str | None, text: str, message: str | None, tmp_path: Path
) -> None:
    """As in data sets of LLaVA: a second token for the image, or words that the model was never trained with."""
    _, processor = loading.load_model(str(saved_models.save_llava(tmp_path)))
    processor.image_token = token
    processor.chat_template = saved_models.TEMPLATE if template else None
    if message is None:
        assert loading._prompt(processor, text) == text
    else:
        with pytest.raises(ValueError, match=message):
            loading._prompt(processor, text)


def test_a_prompt_of_paligemma_has_no_line_of_its_own() -> None:
    images = transformers.SiglipImageProcessor(size={"height": 24, "width": 24})
    images.image_seq_length = 16
    assert loading._prompt(transformers.PaliGemmaProcessor(images, saved_models.tokenizer()), "a red") == "<image>a red"


def test_a_prompt_of_git_stays_open() -> None:
    """As its authors ask questions; the end of a text is what it answers with at last."""
    model = git().model
    processor = transformers.GitProcessor(saved_models.image_processor(), saved_models.tokenizer())
    inputs = loading.build_inputs(model, processor, PICTURE, ["a red square"])
    assert read(processor, inputs) == ["<start>", "a", "red", "square"] and inputs["attention_mask"].shape == (1, 4)


def test_florence_takes_its_tasks() -> None:
    words, images = saved_models.tokenizer(), saved_models.image_processor()
    words.add_special_tokens({"additional_special_tokens": ["<image>"]})
    words.image_token, words.image_token_id, images.image_seq_length = "<image>", len(words) - 1, 13
    processor = transformers.Florence2Processor(images, words)
    tokens = read(processor, loading.build_inputs(florence(), processor, PICTURE, ["<CAPTION>"]))
    assert tokens.count("<image>") == 13 and tokens[12:14] == ["<image>", "<start>"]


def test_the_model_sees_more_than_a_picture_that_is_made_a_square() -> None:
    sizes = {"size": {"shortest_edge": 24}, "crop_size": {"height": 24, "width": 24}}
    processor = transformers.LlavaImageProcessor(do_pad=True, image_mean=[0.5] * 3, image_std=[0.5] * 3, **sizes)
    white = image_module.new("RGB", (40, 30), "white")
    inputs = processor(images=white, return_tensors="pt")
    assert photos.seen_part(processor, white.size) == pytest.approx((0, -1 / 6, 1, 7 / 6), abs=5e-3)
    rows = inputs["pixel_values"][0, 0, :, 12] > 0.5  # the picture's; 18 of 24
    assert rows.nonzero()[:, 0].tolist() == list(range(3, 21))


def test_grey_values_of_sixteen_bits(tmp_path: Path) -> None:
    """As of scanners and depth cameras: PIL takes all above 255 for white."""
    import numpy as np

    ramp = np.linspace(0, 0xFFFF, 7).astype(np.uint16)[None].repeat(3, 0)
    for name in ("deep.png", "deep.tif"):
        image_module.fromarray(ramp).save(tmp_path / name)
        read = photos.open_image(tmp_path / name)
        assert read.mode == "RGB" and np.asarray(read)[1, :, 2].tolist() == (ramp[0] >> 8).tolist()
    image_module.fromarray(ramp / np.float32(0xFFFF)).save(tmp_path / "float.tif")
    with pytest.raises(ValueError, match="8 or 16 bits a channel"):
        photos.open_image(tmp_path / "float.tif")


def test_a_mistyped_folder_is_refused_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub is not asked: without a network it would be asked five times, for half a minute."""
    (tmp_path / "models" / "clip-small").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", None)
    for name in ("models/clip-smal", str(tmp_path / "models" / "clip-smal"), "./models/clip-smal"):
        with pytest.raises(ValueError, match="which is not a directory; in .*models there are clip-small"):
            loading.load_model(name)
    with pytest.raises(
        ValueError, match="model must be the directory or id of a Hugging Face model; got ~/zz, which is not a directory"
    ):
        loading.load_model("~/zz")
    with pytest.raises(TypeError):  # an id
        loading.load_model("openai/clip")


def test_a_name_that_no_hub_can_tell_is_asked_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a network, as here: transformers would ask the hub six times. A cached model is read from the cache."""
    monkeypatch.setattr(loading, "getproxies", dict)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "https://no-such-host.invalid")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "clip-small").mkdir()
    monkeypatch.setattr("time.sleep", None)  # between two tries
    for call in (loading.load_model, loading.load_without_weights):
        with pytest.raises(ValueError, match="id of a Hugging Face model; got clip-smal: .*[^.]; in .* there are clip-small"):
            call("clip-smal")
    asked: list[dict[str, bool]] = []
    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", lambda name, **where: asked.append(where))
    for host in ("no-such-host.invalid", "localhost"):
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://{host}:9")
        with pytest.raises(AttributeError):  # of None
            loading.load_model("openai/clip")
    assert asked == [{"local_files_only": True}, {}]


def test_a_processor_that_lacks_a_package_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As Qwen2-VL's without torchvision, in several lines of which the first is empty."""

    def lacks(name: str, **options: bool) -> None:
        raise ImportError("\nQwen2VLVideoProcessor requires the Torchvision library but it was not found. Check the\npage.\n")

    monkeypatch.setattr(transformers.AutoProcessor, "from_pretrained", lacks)
    folder = str(saved_models.save_bert(tmp_path))
    with pytest.raises(ImportError, match="^The processor of .* cannot be loaded: Qwen2.* requires .* was not found$"):
        loading.load_model(folder)


def test_half_a_letter_is_no_text(tmp_path: Path) -> None:
    model, processor = loading.load_model(str(saved_models.save_bert(tmp_path)))
    with pytest.raises(ValueError, match=r"text must be Unicode; got 'a \\udcff'"):
        loading.build_inputs(model, processor, None, ["a", "a \udcff"])
