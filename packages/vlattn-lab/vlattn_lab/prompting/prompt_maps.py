"""`prompt_maps`: the parts of a generated image that attended to each word of the prompt."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vlattn_fast._ground.checks import check_callable, check_choice, describe
from vlattn_fast.attach.session import uncompiled, unwrapped
from vlattn_fast.interpret import Explanation, PatchGrid
from vlattn_fast.interpret.result.numbers.words import join_tokens
from vlattn_lab.prompting.diffusion_trace import Grid, TextAttention

GUIDANCE = (None, "none", "batch", "calls")
MODES = ("bicubic", "bilinear")
_KINDS = ("", "Img2Img", "Inpaint", "ControlNet")
_IN_BATCH = {f"StableDiffusion{version}{kind}Pipeline" for version in ("", "XL", "3") for kind in _KINDS} | {"SanaPipeline"}


@contextlib.contextmanager
def prompt_maps(
    model: Any,
    *,
    guidance: str | None = None,
    text_first: bool | None = None,
    patches: PatchGrid | None = None,
    layers: Callable[[str], bool] | None = None,
) -> Iterator[PromptMaps]:
    """Adds up heat maps of a prompt's words while a diffusion model runs: every forward pass in the context counts.

    Yields a `PromptMaps`. A call's map is streamed into a head mean, and memory holds one sum per grid of the layers. The model
    computes as usual, with its own attention processors.

    The maps are those of Tang et al., "What the DAAM: Interpreting Stable Diffusion Using Cross Attention", ACL 2023: the
    attention of each position of the image to each text token, enlarged to one size and averaged over heads, layers and denoising
    steps.

    Examples:
        >>> import torch
        >>> class Attends(torch.nn.Module):
        ...     def forward(self, hidden_states, encoder_hidden_states):
        ...         query, key = hidden_states.flatten(2).mT[:, None], encoder_hidden_states[:, None]
        ...         return torch.nn.functional.scaled_dot_product_attention(query, key, key)
        >>> network = Attends()
        >>> with prompt_maps(network, guidance="none") as maps:
        ...     for step in range(3):
        ...         attended = network(torch.randn(1, 8, 4, 6), torch.randn(1, 5, 8))
        >>> maps.steps, maps.token_maps().shape
        (3, torch.Size([1, 5, 4, 6]))

    Args:
        model: a diffusers pipeline, or its network (`pipe.unet`, `pipe.transformer`): UNets and transformers with
            cross-attention, and transformers with joint attention over text and image.
        guidance: the kind of classifier-free guidance, whose unconditional part does not count. "batch": the first half of each
            batch is unconditional (Stable Diffusion, SDXL, SD3, PixArt). "calls": every second forward pass is unconditional
            (Flux with a negative prompt, Qwen-Image). "none": no guidance, or all prompts of the batch count. None: that of the
            pipeline, which suffices for Stable Diffusion and without guidance.
        layers: a function of a module's path in the network that returns whether its attention counts; None = all. DAAM's code
            leaves out the middle block: `lambda path: "mid_block" not in path`.
        text_first: whether text tokens come before image tokens in joint attention; None = as the model concatenates them.
        patches: `va.PatchGrid(rows, columns)` of the image tokens, if the model gets neither latents (B, C, H, W) nor `img_ids`.

    Only calls of torch's scaled_dot_product_attention count, in the thread that entered the context. A module that attends to the
    text with another function (sliced, xformers, flash) raises an error.

    Raises:
        ValueError, TypeError: an argument is wrong; a forward pass attends to no text, with other functions, or to several
            lengths.
    """
    check_choice("guidance", guidance, GUIDANCE)
    if text_first is not None and not isinstance(text_first, bool):
        raise TypeError(f"text_first must be True, False or None; got {text_first!r}")
    check_callable(layers=layers)
    if patches is not None and (not isinstance(patches, PatchGrid) or patches.shape is None or patches.prefix):
        raise TypeError(f"patches must be a va.PatchGrid(rows, columns) without prefix=; got {describe(patches)}")
    network = _network(model)
    grid = None if patches is None else patches.shape
    trace = TextAttention(network, _guidance(model, guidance), text_first, grid, layers)
    with uncompiled(network), trace.observer():
        yield PromptMaps(trace)


class PromptMaps:
    """The result of `prompt_maps`: a map per word or token. All values are raw mean attention, so the tokens at a position of the
    image add up to at most 1."""

    def __init__(self, trace: TextAttention) -> None:
        self._trace = trace

    @property
    def steps(self) -> int:
        """The number of counted forward passes."""
        return self._trace.steps

    @property
    def grids(self) -> list[Grid]:
        """(h, w) of the counted layers, the largest first."""
        return sorted(self._trace.sums, key=lambda grid: -grid[0] * grid[1])

    def token_maps(
        self, columns: int | Sequence[int] | None = None, *, size: Grid | None = None, mode: str = "bicubic"
    ) -> Tensor:
        """Returns heat maps (B, C, h, w) of text tokens; B counts only conditional samples.

        Args:
            columns: positions of tokens in the network's text; an int gives (B, h, w); None = all.
            size: (h, w); default: the largest grid that attends.
            mode: "bicubic" enlarges smaller maps as in the paper; "bilinear" never falls below 0.

        Raises:
            ValueError: no forward pass ran in the context; a column is out of range; an argument is wrong.
        """
        check_choice("mode", mode, MODES)
        if not self._trace.sums:
            raise ValueError("prompt_maps needs a forward pass; got none. Run the pipeline or the network inside of `with`")
        size = self.grids[0] if size is None else _checked_size("size", size)
        batch, _, length = next(iter(self._trace.sums.values())).shape
        chosen = list(range(length)) if columns is None else [columns] if isinstance(columns, int) else list(columns)
        for column in chosen:
            if not 0 <= column < length:
                raise ValueError(f"columns must be from 0 to {length - 1}, the text tokens of the network; got {column}")
        total: Tensor | None = None
        for grid, added in self._trace.sums.items():
            part = added[:, :, chosen].mT.unflatten(-1, grid)
            if grid != size and part.numel():
                part = nn.functional.interpolate(part, size, mode=mode, align_corners=False)
            elif grid != size:
                part = part.new_zeros(batch, len(chosen), *size)
            total = part if total is None else total + part.to(total)
        assert total is not None
        total = total / self._trace.maps
        return total[:, 0] if isinstance(columns, int) else total

    def word_map(
        self,
        word: str,
        prompt: str | Sequence[str],
        processor: Any,
        *,
        first: int = 0,
        size: Grid | None = None,
        mode: str = "bicubic",
    ) -> Tensor:
        """Returns the heat map (B, h, w) of a word: the sum of its tokens' maps, over all its positions in the prompt.

        Args:
            word: as in the prompt; case does not matter.
            prompt, processor, first: see `explanation`.
            size, mode: see `token_maps`.

        Raises:
            ValueError: a prompt without the word.
        """
        maps = []
        convert = getattr(processor, "tokenizer", processor).convert_ids_to_tokens
        for number, (ids, columns) in enumerate(self._tokens(prompt, processor, first)):
            words = join_tokens([str(token) for token in convert(ids)])
            chosen = [columns[i] for part in words if part.text.lower() == word.lower() for i in part.tokens]
            if not chosen:
                names = ", ".join(part.text for part in words)
                raise ValueError(f"word must be a word of each prompt; got {word!r} for {names!r}")
            maps.append(self.token_maps(chosen, size=size, mode=mode)[number].sum(0))
        return torch.stack(maps)

    def explanation(
        self, prompt: str | Sequence[str], processor: Any, *, first: int = 0, size: Grid | None = None, mode: str = "bicubic"
    ) -> Explanation:
        """Returns the maps of a prompt's words as an `Explanation`, for figures (`plot`, `save_html`) and tables.

        Its `image` is (B, T, h, w), a map per token without special tokens, and its `answer` has the tokens. Padding has no map.

        Args:
            prompt: the pipeline's prompt; one for all samples, or a list, each for an equal number of images.
            processor: the pipeline's tokenizer for the text encoder whose output the network attends to.
            first: the column of the prompt's first token. SD3's network gets 77 columns of CLIP, and then those of T5.
            size, mode: see `token_maps`.

        Raises:
            ValueError: more tokens than the network has columns; not one prompt per image.
        """
        tokens = self._tokens(prompt, processor, first)
        columns = sorted({column for _, row in tokens for column in row})
        maps = self.token_maps(columns, size=size, mode=mode)
        image = maps.new_zeros(len(tokens), max((len(ids) for ids, _ in tokens), default=0), *maps.shape[2:])
        for row, (ids, positions) in enumerate(tokens):
            image[row, : len(ids)] = maps[row, [columns.index(position) for position in positions]]
        prompts = [ids for ids, _ in tokens]
        relevancy = {"image": image.flatten(2)}
        return Explanation(relevancy, image, token_ids=prompts, answer=prompts, method="prompt_maps").with_tokens(processor)

    def _tokens(self, prompt: str | Sequence[str], processor: Any, first: int) -> list[tuple[list[int], list[int]]]:
        """For each sample, the ids of its prompt without special tokens, and their columns."""
        shape = self.token_maps(()).shape[0], next(iter(self._trace.sums.values())).shape[2]
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        if not prompts or not all(isinstance(each, str) for each in prompts) or shape[0] % len(prompts):
            raise ValueError(f"prompt must be a text, or texts whose number divides {shape[0]} images; got {prompt!r}")
        tokenizer = getattr(processor, "tokenizer", processor)
        special, tokens = set(tokenizer.all_special_ids), []
        for text in prompts:
            ids = list(tokenizer(text)["input_ids"])
            if first < 0 or first + len(ids) > shape[1]:
                raise ValueError(
                    f"prompt must have its tokens within the network's {shape[1]} text tokens; got {len(ids)} from column "
                    f"{first} of {text!r}"
                )
            kept = [i for i, token in enumerate(ids) if token not in special]
            tokens += [([ids[i] for i in kept], [first + i for i in kept])] * (shape[0] // len(prompts))
        return tokens

    def __repr__(self) -> str:
        return f"PromptMaps(steps={self.steps}, grids={self.grids})"


def _network(model: Any) -> nn.Module:
    """The denoising network of a pipeline, or the model itself."""
    if isinstance(model, nn.Module):
        return unwrapped(model)
    parts = [part for name in ("unet", "transformer", "transformer_2") if (part := getattr(model, name, None)) is not None]
    if len(parts) > 1:
        raise ValueError(f"model must have one network; got {type(model).__name__} with {len(parts)}: pass one of them")
    if not parts:
        raise TypeError(f"model must be a torch.nn.Module, or a pipeline with a unet or transformer; got {type(model).__name__}")
    return unwrapped(parts[0])


def _guidance(model: Any, guidance: str | None) -> Callable[[], str]:
    """A function that returns the guidance of the next forward pass: a pipeline may stop guidance before its last step."""
    if guidance is not None:
        return lambda: guidance
    name = type(model).__name__
    has_flag, is_listed = (
        hasattr(type(model), "do_classifier_free_guidance"),
        any(k.__name__ in _IN_BATCH for k in type(model).__mro__),
    )
    message = f"guidance must be 'none', 'batch' or 'calls' if the model does not show its guidance; got None and {name}"
    if isinstance(model, nn.Module) or not has_flag:
        raise ValueError(message)

    def asked() -> str:
        if not model.do_classifier_free_guidance:
            return "none"
        if not is_listed:
            raise ValueError(message)
        return "batch"

    return asked


def _checked_size(name: str, size: Any) -> Grid:
    fits = isinstance(size, (tuple, list)) and len(size) == 2
    if not fits or not all(isinstance(side, int) and not isinstance(side, bool) and side > 0 for side in size):
        raise ValueError(f"{name} must be (h, w), two integers above 0; got {size!r}")
    return size[0], size[1]
