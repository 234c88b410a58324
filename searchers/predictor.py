"""A light predictor of a loss from features.

Notation: n trials or points, D features.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.stats import spearmanr
from sklearn.ensemble import ExtraTreesRegressor
from sklearn.linear_model import RidgeCV

from autopeft.searchers.bo.encoding import Rows

FOLDS = 4
#: Trees of each fold.
TREES = 16
PENALTIES = np.logspace(-2, 4, 13)
#: Losses are clipped to the median plus this number of interquartile ranges: how bad a diverged training is, is noise
#: that would dominate the fit.
FARTHEST_RANGES = 4.0


@dataclass(frozen=True, slots=True)
class Predictor:
    """Cross-validated ensemble: each of the models is fitted without one fold of the trials.

    `correlation`: Spearman's, of the losses with the predictions of the model that was fitted without them.
    """

    models: tuple[_Model, ...]
    correlation: float

    @classmethod
    def fit(cls, features: Rows, losses: Rows, seed: int) -> Predictor:
        """Fit features [n, D] to losses [n] of at least two trials."""
        low, middle, high = np.quantile(losses, [0.25, 0.5, 0.75])
        losses = np.minimum(losses, middle + FARTHEST_RANGES * max(high - low, 1e-12))
        fold = np.random.default_rng(seed).permutation(len(losses)) % min(FOLDS, len(losses))
        models, left_out = [], np.zeros(len(losses))
        for out in (fold == f for f in range(fold.max() + 1)):
            models.append(_Model.fit(features[~out], losses[~out], seed))
            left_out[out] = models[-1](features[out])
        varies = np.ptp(left_out) > 0 and np.ptp(losses) > 0
        return cls(tuple(models), float(spearmanr(left_out, losses).statistic) if varies else 0.0)

    def optimistic(self, features: Rows) -> Rows:
        """Return the mean minus the standard deviation of the models' predictions, [n], for features [n, D].

        A lower confidence bound: where the models disagree there is something to learn.
        """
        predictions = np.array([model(features) for model in self.models])
        bound: Rows = predictions.mean(axis=0) - predictions.std(axis=0)
        return bound


@dataclass(frozen=True, slots=True)
class _Model:
    """Ridge regression with a parabola per feature, and extremely randomised trees for its residuals.

    Parabolas, because sizes have diminishing returns and learning rates an optimum; trees (Geurts, Ernst and Wehenkel
    2006) for the interactions.
    """

    parabolas: RidgeCV
    trees: ExtraTreesRegressor

    @classmethod
    def fit(cls, features: Rows, losses: Rows, seed: int) -> _Model:
        features = _at_least_one(features)
        parabolas = RidgeCV(PENALTIES).fit(_squared(features), losses)
        trees = ExtraTreesRegressor(TREES, min_samples_leaf=2, max_features=0.5, random_state=seed % 2**32)
        return cls(parabolas, trees.fit(features, losses - parabolas.predict(_squared(features))))

    def __call__(self, features: Rows) -> Rows:
        if not len(features):
            return np.zeros(0)
        features = _at_least_one(features)
        # A forest's own `predict` spends most of its time on starting threads.
        inputs = features.astype(np.float32)
        leaves = [tree.tree_.predict(inputs)[:, 0] for tree in self.trees.estimators_]
        predictions: Rows = self.parabolas.predict(_squared(features)) + np.mean(leaves, axis=0)
        return predictions


def _at_least_one(features: Rows) -> Rows:
    """Return a constant feature where there are none, as in a space of one point: scikit-learn needs at least one."""
    return features if features.shape[1] else np.zeros((len(features), 1))


def _squared(features: Rows) -> Rows:
    return np.hstack([features, features**2])
