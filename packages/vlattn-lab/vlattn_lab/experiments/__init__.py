"""The claims of papers, repeated on DigitScenes: python -m vlattn_lab.experiments NAME.

`scores` (Cao et al., COLING 2022), `congruence` (Pandey et al., ACL 2023), `value` (Cao et al., ECCV 2020),
`weighted_relevancy` (Huang et al., 2023), `robust` (Chefer et al., NeurIPS 2022), `flow` ("Cross-modal Information Flow in
MLLMs", CVPR 2025), `pruning` by the rules of `vlattn_fast.token_scores`, `planted_circuits` by CPR and CMD of MIB (Mueller
et al., ICML 2025), `distillation` of attention, `recipes` against hallucination, and the `indexer` of sparse attention. Each
experiment takes under 30 minutes on two cores and writes its records to benchmarks/results/experiment-NAME.json and its pictures
to docs/experiments/.

In: the name of an experiment.
Out: its records, page and pictures.
Imports: vlattn_lab, vlattn_lab.train.
"""
