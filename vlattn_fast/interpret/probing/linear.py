"""Linear probes with held-out accuracy, and the mutual information of clusters with labels. Needs scikit-learn."""

from __future__ import annotations

import contextlib
import threading
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
FOLDS = 5


@dataclass(frozen=True)
class Probed:
    """Held-out accuracy of the probe, of the largest class, and on shuffled labels; None if `note` gives the reason."""

    value: float | None
    chance: float | None
    control: float | None
    samples: int
    note: str | None = None


def linear_probe(features: Array, labels: Sequence[Any], groups: Sequence[int], seed: int, control: bool = True) -> Probed:
    """Accuracy of a logistic regression of labels (S) on features (S, F), over five folds that keep groups together."""
    classes, coded = np.unique([str(label) for label in labels], return_inverse=True)
    samples, counts = len(coded), np.bincount(coded, minlength=1)
    chance = float(counts.max() / samples) if samples else None
    if len(classes) < 2:
        return Probed(None, chance, None, samples, "only one class" if samples else "no samples")
    names, index = np.unique(np.asarray(groups), return_inverse=True)
    folds = (np.random.default_rng(seed).permutation(len(names)) % FOLDS)[index]
    if len(np.unique(folds)) < FOLDS:
        return Probed(None, chance, None, samples, f"fewer than {FOLDS} inputs")
    shuffled = coded[np.random.default_rng([seed, 1]).permutation(samples)]  # another permutation than that of the folds
    value = _held_out(features, coded, folds)
    return Probed(value, chance, _held_out(features, shuffled, folds) if control else None, samples)


def _held_out(features: Array, labels: Array, folds: Array) -> float:
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    right = 0
    for fold in np.unique(folds):
        train, test = folds != fold, folds == fold
        present = np.unique(labels[train])
        if len(present) < 2:
            right += int((labels[test] == present[0]).sum())
            continue
        probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=500))
        with _converging():
            right += int((probe.fit(features[train], labels[train]).predict(features[test]) == labels[test]).sum())
    return right / len(labels)


def fusion(states: Array, image: Array, seed: int, shuffled: Array) -> tuple[float, float]:
    """Normalised mutual information (arithmetic mean) of two clusters of states (N, C) with image (N), and with shuffled (N)."""
    from sklearn.cluster import KMeans
    from sklearn.metrics import normalized_mutual_info_score

    with _converging():  # for equal states, to one cluster
        clusters = KMeans(n_clusters=2, n_init=4, random_state=seed).fit_predict(states)
    return tuple(float(normalized_mutual_info_score(labels, clusters)) for labels in (image, shuffled))  # type: ignore[return-value]


_lock = threading.Lock()  # the filters of warnings are those of all threads, and each would put back what it found


@contextlib.contextmanager
def _converging() -> Iterator[None]:
    """A context without scikit-learn's warnings that a fit did not converge."""
    from sklearn.exceptions import ConvergenceWarning

    with _lock, warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        yield
