"""One phase in a process of its own: `python -m autopeft.benchmarks.gpu.worker MODULE DEVICE SECONDS`.

Standard output carries one JSON object per line, as soon as it is known: `row`, `left_out`, `skipped` or `error`. All
other output, by whatever library, goes to standard error.
"""

from __future__ import annotations

import faulthandler
import importlib
import json
import math
import os
import sys
import traceback
from typing import Any

from autopeft.benchmarks.gpu.phase import Measure, Run, Skipped

#: A process that hangs dumps its stack at this share of its time, shortly before it is killed.
SHARE_BEFORE_DUMP = 0.95


def main(module: str, device: str, seconds: float) -> int:
    """Run the phase in `module` and return an exit code: 0, or 1 after an exception."""
    own = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    faulthandler.enable()
    faulthandler.dump_traceback_later(SHARE_BEFORE_DUMP * seconds)

    def send(**what: Any) -> None:
        own.write(json.dumps(_plain(what), allow_nan=False) + "\n")
        own.flush()

    run = Run(device=device, seconds=seconds)
    try:
        measure: Measure = importlib.import_module(module).measure
        for row in measure(run):
            send(row=row)
    except Skipped as reason:
        send(skipped=str(reason))
    except BaseException as error:
        send(error={"type": type(error).__name__, "message": str(error), "traceback": traceback.format_exc()})
        return 1
    finally:
        if run.left_out:
            send(left_out=run.left_out)
    return 0


def _plain(value: Any) -> Any:
    """Return a value that JSON can represent: NaN and infinity become texts."""
    if isinstance(value, dict):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2], float(sys.argv[3])))
