"""Training settings of a candidate. Every field can be searched: rank and learning rate are confounded."""

from __future__ import annotations

from dataclasses import dataclass

from autopeft.search_space.adapters.base import check_at_least, check_one_of, check_probability

SCHEDULES = ("linear", "cosine", "constant")


@dataclass(frozen=True, slots=True, kw_only=True)
class Training:
    """AdamW with a warm-up and a schedule. Raises ValueError for values out of range.

    `warmup`: share of the steps in which the learning rate rises. `max_grad_norm`: bound of the global gradient norm,
    0 for no clipping.
    """

    learning_rate: float = 2e-3
    weight_decay: float = 0.0
    epochs: float = 2.0
    batch_size: int = 32
    warmup: float = 0.06
    schedule: str = "linear"
    max_grad_norm: float = 1.0

    def __post_init__(self) -> None:
        check_one_of("schedule", self.schedule, SCHEDULES)
        check_probability("warmup", self.warmup)
        check_at_least("batch_size", self.batch_size, 1)
        check_at_least("weight_decay", self.weight_decay, 0)
        check_at_least("max_grad_norm", self.max_grad_norm, 0)
        for name, value in (("learning_rate", self.learning_rate), ("epochs", self.epochs)):
            if not value > 0:
                raise ValueError(f"{name} must be positive, got {value}")
        check_at_least("epochs", self.epochs, 0)
