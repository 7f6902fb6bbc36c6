"""Which heads know what region a phrase names? `va.probe` asks a trained model, and the same model before its training.

The model is `va.models.UNITER` with the weights trained on DigitScenes, where a caption names two of four handwritten digits. A
linear probe reads the attention of one head between a phrase and a region, and tells the named region from another region of the
picture. One head alone is almost as good as all heads together; before training no head is good.
"""

import torch

import vlattn_fast as va
import vlattn_lab as lab

TESTS = ("modality", "coreference")
trained, _ = lab.load_uniter()
torch.manual_seed(0)
untrained = va.models.UNITER(trained.config).eval()

reports, best = {}, {}
for name, model in (("trained", trained), ("untrained", untrained)):
    reports[name] = va.probe(model, lab.probe_samples(100), tests=TESTS)
    heads = [record for record in reports[name].table if record["test"] == "coreference" and record["head"] is not None]
    best[name] = max(heads, key=lambda record: record["value"])

for name, record in best.items():
    alone = f"best alone {record['value']:.0%} (layer {record['layer']}, head {record['head']})"
    print(f"{name:10} all heads {reports[name].value('coreference'):.0%}, {alone}; chance 50%")
head = best["trained"]
text = reports["trained"].value("modality", layer=head["layer"], head=head["head"], kind="text")
print(f"In that head [CLS] gives {text:.0%} of its attention to the text.")
# reports["trained"].save_html("probe.html") writes heat maps of all layers and heads, and the table.
