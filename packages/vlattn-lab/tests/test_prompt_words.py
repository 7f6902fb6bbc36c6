"""`prompt_maps` of pipelines, the words of their prompts, pictures of them, and bad input."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import vlattn_fast as va
import vlattn_lab as lab
from tests.helpers.diffusion_cases import CASES, HEIGHT, LENGTH, WIDTH, Words, stable_diffusion
from tests.helpers.stored_prompts import traced


def test_a_pipeline():
    """With guidance, two prompts and two pictures of each: what the pipeline says is what counts."""
    pipeline = stable_diffusion().to(torch.float64)  # below, a batch of four is compared with a half of eight
    embeds = {name: torch.randn(2, LENGTH, 16, dtype=torch.float64) for name in ("prompt_embeds", "negative_prompt_embeds")}
    options = {"height": 32, "width": 48, "num_inference_steps": 2, "output_type": "latent", "num_images_per_prompt": 2}

    def run(guidance_scale: float) -> Tensor:
        return pipeline(**embeds, **options, guidance_scale=guidance_scale, generator=torch.Generator().manual_seed(0)).images

    plain = run(5.0)
    passes = []
    handle = pipeline.unet.register_forward_pre_hook(lambda _, args, kwargs: passes.append((args, kwargs)), with_kwargs=True)
    with lab.prompt_maps(pipeline) as maps:
        torch.testing.assert_close(run(5.0), plain, rtol=0, atol=0)
    handle.remove()
    assert [args[0].shape[0] for args, _ in passes] == [8] * maps.steps and maps.steps == 2
    assert maps.token_maps().shape == (4, LENGTH, HEIGHT, WIDTH)
    with torch.no_grad(), lab.prompt_maps(pipeline.unet, guidance="none") as conditional:
        for args, kwargs in passes:
            pipeline.unet(args[0][4:], args[1], **{**kwargs, "encoder_hidden_states": kwargs["encoder_hidden_states"][4:]})
    torch.testing.assert_close(maps.token_maps(), conditional.token_maps())
    with lab.prompt_maps(pipeline) as unguided:
        run(1.0)
    assert unguided.token_maps().shape[0] == 4

    explanation = maps.explanation(["a cat", "two small dogs"], Words())
    assert explanation.image.shape == (4, 3, HEIGHT, WIDTH) and explanation.tokens[1:3] == [
        ["a", "cat"],
        ["two", "small", "dogs"],
    ]
    torch.testing.assert_close(explanation.image[2], maps.token_maps([1, 2, 3])[2])
    torch.testing.assert_close(explanation.image[0, :2], maps.token_maps([1, 2])[0])
    assert (explanation.image[0, 2] == 0).all()


def test_words(monkeypatch):
    case = CASES["unet"]()
    maps = traced(case, [case.inputs(batch=2)])
    prompts = ["A giraffe by a tree", "tree"]  # "giraffe" has two tokens
    tokens = maps.token_maps()
    torch.testing.assert_close(maps.word_map("giraffe", prompts[0], Words())[1], tokens[1, 2] + tokens[1, 3])
    both = maps.word_map("Tree", prompts, Words())
    torch.testing.assert_close(both, torch.stack([tokens[0, 6], tokens[1, 1]]))
    torch.testing.assert_close(maps.word_map("a", prompts[0], Words())[0], tokens[0, 1] + tokens[0, 5])
    torch.testing.assert_close(maps.word_map("tree", "tree", Words(), first=2)[0], tokens[0, 3])
    with pytest.raises(ValueError, match=r"word must be a word of each prompt; got 'giraffe' for 'tree'"):
        maps.word_map("giraffe", prompts, Words())


def test_pictures_and_pages(tmp_path):
    case = CASES["unet"]()
    maps = traced(case, [case.inputs(batch=2)])
    explanation = maps.explanation(["a giraffe", "by a tree"], Words())
    figure = explanation.plot(torch.rand(3, 32, 48))
    titles = [part.get_suptitle() for part in figure.subfigs]
    assert titles == ["a giraffe", "by a tree"]
    assert [axis.get_title() for axis in figure.axes if axis.get_title()] == ["a", "giraffe", "by", "a", "tree"]
    page = explanation.to_html(torch.rand(3, 32, 48), title="Prompt")
    assert "<h2>Prompt</h2>" in page and "where the image attended to it" in page and ">giraffe</span>" in page
    assert "Answer" not in page
    saved = va.Explanation.load(explanation.save(tmp_path / "maps"))
    torch.testing.assert_close(saved.image, explanation.image)
    assert saved.tokens == explanation.tokens and repr(saved) == repr(explanation)
    best = explanation.top(1)[0]
    assert (best.sample, best.answer, best.part, best.tower) == (0, 0, "patch", "image")
    torch.testing.assert_close(torch.tensor(best.value), explanation.image[0, 0].max())


BAD: list[tuple[Callable[[], Any], type[Exception], str]] = [
    (lambda: lab.prompt_maps(object()), TypeError, "model must be a torch.nn.Module, or a pipeline .*got object"),
    (lambda: lab.prompt_maps(nn.Linear(1, 1)), ValueError, "guidance must be 'none'.*got None and Linear"),
    (lambda: lab.prompt_maps(nn.Linear(1, 1), guidance="both"), ValueError, "guidance must be one of .*got 'both'"),
    (lambda: lab.prompt_maps(nn.Linear(1, 1), guidance="none", text_first=1), TypeError, "text_first must be True, .*got 1"),
    (
        lambda: lab.prompt_maps(nn.Linear(1, 1), guidance="none", layers="mid"),
        TypeError,
        "layers must be a callable or None; got",
    ),
    (
        lambda: lab.prompt_maps(nn.Linear(1, 1), guidance="none", patches=va.PatchGrid(0, 3)),
        ValueError,
        "rows must be at least 1; got 0",
    ),
]


@pytest.mark.parametrize("call, error, message", BAD)
def test_bad_arguments(call, error, message):
    with pytest.raises(error, match=message), call():
        pass


def test_bad_reading():
    case = CASES["unet"]()
    with lab.prompt_maps(case.model, guidance="none") as maps:
        with pytest.raises(ValueError, match="prompt_maps needs a forward pass; got none. Run the pipeline"):
            maps.token_maps()
        case.model(**case.inputs(batch=2))
    with pytest.raises(ValueError, match=f"columns must be from 0 to {LENGTH - 1}.*got {LENGTH}"):
        maps.token_maps(LENGTH)
    with pytest.raises(ValueError, match="mode must be one of .*got 'area'"):
        maps.token_maps(mode="area")
    with pytest.raises(ValueError, match=r"size must be \(h, w\).*got 64"):
        maps.token_maps(size=64)
    with pytest.raises(ValueError, match="prompt must be a text, or texts whose number divides 2 images; got "):
        maps.explanation(["a", "b", "c"], Words())
    with pytest.raises(ValueError, match=f"within the network's {LENGTH} text tokens; got 4 from column 8"):
        maps.explanation("a tree", Words(), first=8)


def test_an_unknown_guided_pipeline_must_be_told():
    """That it is guided does not say whether in one batch or in two calls; unguided it needs no telling."""

    class Pipeline:
        do_classifier_free_guidance = True

        def __init__(self) -> None:
            self.unet = CASES["unet"]().model

    pipeline, inputs = Pipeline(), CASES["unet"]().inputs(batch=2)
    with pytest.raises(ValueError, match="guidance must be 'none', 'batch' or 'calls' .*got None and Pipeline"):
        with lab.prompt_maps(pipeline):
            pipeline.unet(**inputs)
    with lab.prompt_maps(pipeline, guidance="batch") as guided:
        pipeline.unet(**inputs)
    pipeline.do_classifier_free_guidance = False
    with lab.prompt_maps(pipeline) as unguided:
        pipeline.unet(**inputs)
    assert (guided.token_maps().shape[0], unguided.token_maps().shape[0]) == (1, 2)


def test_an_odd_batch_is_not_guided():
    case = CASES["unet"]()
    with pytest.raises(ValueError, match="guidance must be 'batch' only if .*got a batch of 3"):
        traced(case, [case.inputs(batch=3)], guidance="batch")


def test_texts_of_one_length():
    case = CASES["unet"]()
    with pytest.raises(ValueError, match="texts of one length .*got 5 tokens and a batch of 1 after 9 and 1"):
        traced(case, [case.inputs(batch=1), case.inputs(batch=1, length=5)])


class Attends(nn.Module):
    def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        query, key = hidden_states.flatten(2).mT[:, None], encoder_hidden_states[:, None]
        return torch.nn.functional.scaled_dot_product_attention(query, key, key)


@pytest.fixture
def compiling() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def test_a_compiled_caller(compiling: None) -> None:
    """It added some calls twice. Also after a call that fails, the network is as it was."""
    network, latents, words = Attends().train(), torch.randn(1, 8, 4, 6), torch.randn(1, 5, 8)
    before = {name: repr(value) for name, value in vars(network).items()}

    def mapped(x: Tensor) -> Any:
        with lab.prompt_maps(network, guidance="none") as maps:
            for _ in range(3):
                network(latents, words)
        return maps.steps, maps.token_maps() * (x + 1)

    compiled = torch.compile(mapped, backend=lambda graph, _: graph.forward)
    torch.testing.assert_close(compiled(torch.zeros(())), mapped(torch.zeros(())))
    with network.register_forward_hook(lambda *_: 1 / 0), pytest.raises(ZeroDivisionError):
        mapped(torch.zeros(()))
    assert {name: repr(value) for name, value in vars(network).items()} == before
