"""Figures, overlays and pages of explanations, and the photos under them.

In: the numbers of explanations, photos and options.
Out: matplotlib figures, PIL images and HTML pages.
Imports: interpret.result.numbers, _ground.
"""
