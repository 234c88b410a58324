"""What a model's layers may be like, and whether their outputs can be shared then."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from autopeft.evaluators.training.batching import short_rows
from autopeft.evaluators.training.lower_layers import SLOWER, LowerLayers
from autopeft.search_space.backbones.introspection import describe

WIDTH, DEPTH = 8, 3
LENGTHS = [5, 3]


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Any:
        return x + torch.tanh(self.up(x))


class ReturnsTuple(Layer):
    def forward(self, x: Tensor) -> Any:
        return super().forward(x), None


class ReturnsBias(Layer):
    """Like T5: the first layer makes the position bias, and hands it on."""

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Any:
        bias = self.up(x).mean(1, keepdim=True) if bias is None else bias
        return super().forward(x) + bias, bias


class LeavesState(Layer):
    """What the last layer reads does not pass through outputs, and its absence raises nothing."""

    state: dict[str, Tensor]

    def forward(self, x: Tensor) -> Any:
        y = super().forward(x)
        if "first" in self.state:
            y = y + self.state["first"]
        else:
            self.state["first"] = y
        return y


class ReadsPadding(Layer):
    """Like a convolution without a mask."""

    def forward(self, x: Tensor) -> Any:
        return super().forward(x) + x.roll(-1, 1)


class Model(nn.Module):
    def __init__(self, kind: type[Layer], passes: int = 1) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(kind() for _ in range(DEPTH))
        self.passes = passes
        self.words = nn.Embedding(20, WIDTH)

    def forward(self, ids: Tensor) -> Tensor:
        x: Any = self.words(ids)
        state: dict[str, Tensor] = {}
        rest: tuple[Any, ...] = ()
        for _ in range(self.passes):
            for layer in self.layers:
                layer.state = state
                output = layer(x, *rest) if isinstance(layer, ReturnsBias) else layer(x)
                x, rest = (output[0], output[1:]) if isinstance(output, tuple) else (output, ())
        return x


@pytest.mark.parametrize(
    ("kind", "passes", "obstacle"),
    [
        (Layer, 1, None),
        (ReturnsTuple, 1, None),
        (ReturnsBias, 1, "layer 1 reads more than the output of layer 0"),
        (LeavesState, 1, "layer 1 reads more than the output of layer 0"),
        (ReadsPadding, 1, "layer 1 reads more than the output of layer 0"),
        (Layer, 2, "layer 0 runs 2 times in a pass"),
    ],
)
def test_an_obstacle_is_found_on_one_small_batch(kind: type[Layer], passes: int, obstacle: str | None) -> None:
    model = Model(kind, passes)
    lower = LowerLayers(model, describe(model, id="toy", modules={"layers": "layers", "mlp.up": "up"}))
    lower.layers = list(model.layers)  # a layer of one linear: its path is not that of its only site
    ids = torch.tensor([[1, 2, 3, 4, 5], [6, 7, 8, 0, 0]])
    real = torch.tensor([[1.0] * 5, [1.0] * 3 + [0.0] * 2])

    def losses() -> Tensor:
        return (model(ids).sum(-1) * real).sum(-1)

    assert lower.obstacle(losses, LENGTHS) == (obstacle and f"{obstacle}: {SLOWER}")
    if obstacle is None:
        with torch.no_grad():
            expected = model(ids)
            for depth in range(1, DEPTH + 1):
                hidden = lower({"ids": ids}, depth)
                with lower.replaced(hidden, depth):
                    assert torch.equal(model(ids), expected)
    assert all("forward" not in vars(layer) and not layer._forward_hooks for layer in model.layers)


def test_a_model_that_cannot_run_shares_nothing() -> None:
    model = Model(Layer)
    lower = LowerLayers(model, describe(model, id="toy", modules={"layers": "layers", "mlp.up": "up"}))

    def losses() -> Tensor:
        raise RuntimeError("no such kernel")

    assert lower.obstacle(losses, LENGTHS) == "the model cannot run on the rows (RuntimeError: no such kernel)"


@pytest.mark.parametrize(
    ("lengths", "expected"),
    [
        ([30, 9, 2, 9, 12], [1, 4]),  # of at least eight tokens, and of different lengths
        ([3, 5, 4], [1, 2]),  # the longest, and the next shorter
        ([9, 9, 9], [0, 1]),
        ([4], [0]),
    ],
)
def test_short_rows(lengths: list[int], expected: list[int]) -> None:
    assert short_rows(lengths) == expected
