"""Trains the models of DigitScenes: python -m vlattn_lab.train uniter|lxmert|clip|vqa|captions|hybrid|transformer|twin [options].

In: options of a training.
Out: a file of weights.
Imports: vlattn_lab.
"""
