"""Rounding of observations to well below their standard errors, so that last digits do not decide what is proposed."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import replace
from statistics import median_low

from autopeft.search_space.problem import Measurement, Trial

#: A quantum is at most this share of the standard error. Rounding then adds at most its square over 12, 0.13 %, to the
#: variance of an observation.
SHARE = 1 / 8


def rounded(trials: Iterable[Trial]) -> tuple[Trial, ...]:
    """Return the trials with their values rounded, metric by metric, to multiples of one quantum.

    Another CPU or number of threads sums in another order, which changes the last digits of a loss. A model that is
    fitted to them then proposes other candidates, although the difference means nothing beside the standard error.

    The quantum of a metric is the largest power of two that is at most `SHARE` of the median standard error of these
    trials: one for all of them, because pruned trials have no standard error of their own, and because one grid keeps
    the order of their values. Trials that are rounded apart, such as those of an earlier study, have a grid of their
    own. Values at rungs are rounded like final ones. A metric without standard errors stays exact:
    declared costs are, and the seconds of two measurements differ by more than their last digits.

    Rounding makes other last digits rare, not harmless: a value that changes by d is rounded to another multiple with
    probability d / quantum. With a loss of 1.5 and a standard error of 0.04 (quantum 2^-8), a relative change of 1e-6
    passes in 0.04 % of the values, and one of 1e-4 in 4 %. One more right prediction among N changes an accuracy by
    1 / N and passes far more often: it is 1.3 quanta at N = 400 and half a quantum at N = 1000.

    Standard errors are rounded to an eighth of their own octave. The result depends on these trials alone, and to round
    it again changes nothing.
    """
    given = tuple(trials)
    errors: dict[str, list[float]] = {}
    for trial in given:
        if trial.measurement is not None:
            for name, error in trial.measurement.std_err.items():
                if _is_known(error):
                    errors.setdefault(name, []).append(_rounded_error(error))
    if not errors:
        return given
    quanta = {name: quantum(median_low(found)) for name, found in errors.items()}
    return tuple(
        trial if trial.measurement is None else replace(trial, measurement=_rounded(trial.measurement, quanta))
        for trial in given
    )


def quantum(std_err: float) -> float:
    """Return the largest power of two that is at most `SHARE` of a positive, finite standard error.

    The last digits of the standard error thus hardly ever change it: with probability r / log 2 for a relative change
    of r.
    """
    _, exponent = math.frexp(std_err * SHARE)
    return math.ldexp(1.0, exponent - 1)


def _rounded(measurement: Measurement, quanta: Mapping[str, float]) -> Measurement:
    return replace(
        measurement,
        values=_on_grid(measurement.values, quanta),
        std_err={
            name: _rounded_error(error) if _is_known(error) else error for name, error in measurement.std_err.items()
        },
        rungs=tuple((share, _on_grid(values, quanta)) for share, values in measurement.rungs),
    )


def _on_grid(values: Mapping[str, float], quanta: Mapping[str, float]) -> dict[str, float]:
    return {name: _nearest(value, quanta[name]) if name in quanta else value for name, value in values.items()}


def _is_known(error: float) -> bool:
    """Return whether a standard error is positive and finite; so is then its quantum."""
    return 1e-300 < error < math.inf


def _rounded_error(error: float) -> float:
    return _nearest(error, quantum(error))


def _nearest(value: float, step: float) -> float:
    """Return the nearest multiple of a power of two, which a float holds exactly."""
    # Larger numbers are multiples already, or not finite.
    return round(value / step) * step if abs(value) < step * 2.0**52 else value
