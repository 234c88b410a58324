"""Fingerprints of settings: trials can be compared only under the same fingerprint."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from autopeft.search_space.architecture import digest
from autopeft.studies.config.study_file import StudyFile

_LASTING = ("seed", "task", "model", "data", "space", "training", "objectives", "constraints")


def fingerprint(study: StudyFile) -> dict[str, Any]:
    """Return the settings on which trials depend; they must not change between `run` and `run --resume`."""
    from autopeft.searchers import SEARCHERS, FromScores

    dump = study.model_dump(mode="json")
    search = {key: dump["search"][key] for key in ("searcher", "share", "rungs", "keep", "batch")}
    # Later additions are left out if they are not set, so that older studies can be resumed.
    later = ("goal", "initial", "surrogate", "start", "prior")
    search |= {key: dump["search"][key] for key in later if dump["search"][key]}
    scores = study.proxy.model_dump(mode="json", exclude_defaults=True)
    starts_from_scores = issubclass(SEARCHERS[study.search.searcher], FromScores)
    found = {key: dump[key] for key in _LASTING} | {"search": search}
    found |= {"metrics": dump["metrics"]} if dump["metrics"] else {}
    return found | {"proxy": scores} if scores and starts_from_scores else found


def key_of(study: StudyFile, *fields: str) -> str:
    """Return a key of the non-default values of these fields; results with one key have the same settings."""
    return digest(study.model_dump(mode="json", include=set(fields), exclude_defaults=True))


def differences(old: Any, new: Any, key: str = "") -> list[str]:
    """Return the differences between two fingerprints, one readable line for each setting."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        lines = []
        for name in dict.fromkeys((*old, *new)):
            path = f"{key}.{name}" if key else name
            if name not in new:
                lines.append(f"{path}: {_text(old[name])} was removed")
            elif name not in old:
                lines.append(f"{path}: {_text(new[name])} was added")
            else:
                lines += differences(old[name], new[name], path)
        return lines
    return [] if old == new else [f"{key}: was {_text(old)}, is {_text(new)}"]


def _text(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
