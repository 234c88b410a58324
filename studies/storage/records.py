"""Trials as records of a ledger: plain data, from which they are read again."""

from __future__ import annotations

import base64
import json
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np

from autopeft.search_space.architecture import Candidate
from autopeft.search_space.problem import Measurement, Role, Trial
from autopeft.studies.errors import ConfigurationError
from autopeft.studies.versions import newer

# Scores per example are long and read by programs alone, so they are compressed.
PACKED = ("per_example", "test_per_example")


class DamagedError(ValueError):
    """A record that cannot be read."""


@contextmanager
def reading(what: str) -> Iterator[None]:
    """Turn exceptions about data: ConfigurationError for fields of a newer version, else DamagedError."""
    try:
        yield
    except (TypeError, ValueError, KeyError, AttributeError, IndexError, zlib.error) as error:
        # Of a dataclass that lacks the field.
        if "unexpected keyword argument" in str(error):
            field = str(error).rpartition("argument ")[2].split(".")[0]
            raise ConfigurationError(newer(f"{what} has the field {field}")) from error
        raise DamagedError(f"{what} cannot be read: {type(error).__name__}: {str(error)[:200]}") from error


def declared(trial: Trial) -> dict[str, Any]:
    """Return what is known of a trial before it starts."""
    return {
        "role": str(trial.role),
        "candidate": trial.candidate.to_dict(),
        "genes": dict(trial.genes),
        "seed": trial.seed,
        "of": trial.of,
        "searcher_state": dict(trial.searcher_state),
    }


def result_of(trial: Trial) -> dict[str, Any]:
    """Return how a trial ended."""
    measurement = None
    if trial.measurement is not None:
        measurement = trial.measurement.to_dict()
        for name in PACKED:
            measurement[name] = pack(measurement[name])
    return {
        "state": trial.state,
        "error": trial.error,
        "violation": trial.violation,
        "measurement": measurement,
    }


def pack(data: Any) -> str:
    """Return data for JSON as compressed text."""
    return base64.b85encode(zlib.compress(json.dumps(data).encode())).decode()


def unpack(text: str) -> Any:
    """Return the data that `pack` wrote."""
    return json.loads(zlib.decompress(base64.b85decode(text)))


def declared_prior(trial: Trial) -> dict[str, Any]:
    """Return what a searcher reads of a trial of a prior study."""
    assert trial.measurement is not None
    return {
        "number": trial.number,
        "role": str(trial.role),
        "candidate": trial.candidate.to_dict(),
        "genes": dict(trial.genes),
        "values": dict(trial.values),
        "std_err": dict(trial.measurement.std_err),
    }


def read_prior(data: Mapping[str, Any]) -> Trial:
    """Return the trial that `declared_prior` wrote."""
    declared = dict(data)
    measurement = Measurement(values=declared.pop("values"), std_err=declared.pop("std_err"))
    declared["role"] = Role.parse(declared["role"])
    declared["candidate"] = Candidate.from_dict(declared["candidate"])
    return Trial(state="complete", measurement=measurement, **declared)


def read(number: int, declared: Mapping[str, Any], result: Mapping[str, Any]) -> Trial:
    """Return the trial of what `declared` and `result_of` wrote.

    Raises DamagedError, and ConfigurationError for fields of a newer version.
    """
    with reading("its record"):
        declared, result = dict(declared), dict(result)
        measurement = result.pop("measurement", None)
        if measurement is not None:
            measurement = dict(measurement)
            for name in PACKED:
                measurement[name] = unpack(measurement[name])
            result["measurement"] = _checked(Measurement.from_dict(measurement))
        declared["role"] = Role.parse(declared["role"])
        declared["candidate"] = Candidate.from_dict(declared["candidate"])
        return Trial(number=number, **declared, **result)


def _checked(measurement: Measurement) -> Measurement:
    """Return the measurement. Raises ValueError or TypeError for what is no number."""
    for values in (measurement.values, measurement.std_err, measurement.test, measurement.averaged):
        np.asarray(list(values.values()), dtype=float)
    for columns in (measurement.per_example, measurement.test_per_example):
        for column in columns.values():
            np.asarray(column, dtype=float)
    return measurement
