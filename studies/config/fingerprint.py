"""Fingerprints of settings and of contents: trials can be compared only where both are the same."""

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
    found |= {"report": dump["report"]} if dump.get("report") else {}
    found |= {"generation": study.greedy.deciding} if study.greedy.deciding else {}
    found |= {"forgetting": dump["forgetting"]} if study.forgetting else {}
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


def changes(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Return the changes of what a study reads since it was started, a sentence for each.

    Both are digests and facts by what they are about, as `evaluators/contents.py` and `open_study` compute them. What
    one of them lacks is not compared.
    """

    def changed(key: str) -> bool:
        return key in then and key in now and then[key] != now[key]

    lines = []
    if changed("rows"):
        for split, found in now["rows"].items():
            before = then["rows"].get(split, found)
            if found["rows"] != before["rows"]:
                lines.append(f"{split} rows: {found['rows']:,} now, {before['rows']:,} at the start")
            elif found != before:
                lines.append(f"{split} rows: the {found['rows']:,} rows have other contents or another order now")
    lines += [
        f"{names}: {_words(now[names])} now, {_words(then[names])} at the start"
        for names in ("labels", "domains", "device")
        if changed(names)
    ]
    if changed("device"):
        lines[-1] += f"; set device to {then['device']} to go on there"
    if changed("config"):
        lines += differences(then["config"], now["config"], "model.config")
    if changed("weights"):
        lines.append("model: it has other weights now, or another version of transformers names them otherwise")
    if changed("encoding") and not changed("rows") and not changed("labels"):
        lines.append("tokenizer: it makes other inputs of the same rows now")
    if changed("given"):
        lines.append("given: the pretrained LoRAs have other contents now")
    return lines


def _words(value: Any) -> str:
    return ", ".join(value) if isinstance(value, list) else str(value)


def _text(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
