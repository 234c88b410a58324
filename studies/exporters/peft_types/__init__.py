"""The adapter types that HF peft has, by the name of our type; the exporters that configure peft read this."""

from autopeft.studies.exporters.peft_types.operators import OPERATORS
from autopeft.studies.exporters.peft_types.updates import UPDATES

PEFT_TYPES = {**UPDATES, **OPERATORS}

__all__ = ["PEFT_TYPES"]
