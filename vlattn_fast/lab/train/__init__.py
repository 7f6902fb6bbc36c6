"""Trains the models of DigitScenes: python -m vlattn_fast.lab.train uniter|clip|vqa|captions [options]."""
