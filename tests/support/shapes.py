"""Executes the shapes that docstrings declare: jaxtyping and beartype check them at every call of a test.

A docstring says `x: [K, T, D_in]` of an argument and `Returns [K, T, D_out]` of the result; of several results it says
`returns losses and correct, each [M]` or `Returns [K, M] and [M]`. A letter stands for one size throughout a call. The
letters of a sum (`S + E`) leave that size open unless each of them is also an axis by itself.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable, Iterator
from functools import wraps
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

from autopeft.search_space.adapters import ADAPTERS
from autopeft.search_space.adapters.base import AdapterSpec
from autopeft.search_space.adapters.head import Head
from autopeft.search_space.adapters.mixture import Mixture
from autopeft.search_space.routers import ROUTERS, Router

SHAPE = r"\[([A-Za-z0-9_.,+* ()]+)\]"
ROOT = Path(__file__).resolve().parents[2]
#: Classes whose docstrings declare the shapes of their subclasses' methods, and these subclasses.
DECLARED_BY: dict[type, list[type]] = {
    AdapterSpec: [Mixture, Head, *ADAPTERS.values()],
    Router: [type(router) for router in ROUTERS.values()],
}


def argument_shapes(function: Callable[..., Any], doc: str) -> dict[str, str]:
    """Shapes that a docstring declares, by argument; of those that `function` annotates as tensors."""
    tensors = tensor_arguments(function)
    return {name: shape for name, shape in re.findall(rf"(\w+):? {SHAPE}", doc) if name in tensors}


def result_shapes(doc: str) -> tuple[list[str], bool]:
    """Return the declared shapes of the results, and whether there is one for each of several tensors."""
    found = re.search(rf"[Rr]eturns?(?: [^.\[\]:;]*?(each))? ?{SHAPE}(?: and {SHAPE})?", doc)
    return ([], False) if found is None else ([shape for shape in found.groups()[1:] if shape], bool(found[1]))


def tensor_arguments(function: Callable[..., Any]) -> list[str]:
    """Names of the arguments that are annotated as a tensor, or as a tensor or None."""
    parameters = inspect.signature(function).parameters.values()
    return [p.name for p in parameters if p.annotation in ("Tensor", "Tensor | None") and p.kind != p.VAR_POSITIONAL]


def hints_of(function: Callable[..., Any], doc: str) -> dict[str, Any]:
    """What jaxtyping is to check of the arguments and the result ("return") of `function`."""
    from jaxtyping import Shaped
    from torch import Tensor

    shapes = argument_shapes(function, doc)
    alone = {axis.strip() for shape in shapes.values() for axis in shape.split(",")}

    def checkable(axis: str) -> str:
        letters = set(re.findall(r"[A-Za-z_]\w*", axis))
        return axis.replace(" ", "") if axis == "..." or len(letters) < 2 or letters <= alone else "_"

    def typed(shape: str) -> Any:
        return Shaped[Tensor, " ".join(checkable(axis.strip()) for axis in shape.split(","))]

    hints: dict[str, Any] = {name: typed(shape) | None for name, shape in shapes.items()}
    results, several = result_shapes(doc)
    if several:
        hints["return"] = tuple[typed(results[0]), ...]
    elif len(results) > 1:
        hints["return"] = tuple[tuple(typed(shape) | None for shape in results)]
    elif results:
        hints["return"] = typed(results[0]) | None
    return hints


def checked(function: Callable[..., Any], hints: dict[str, Any]) -> Callable[..., Any]:
    """`function` with its shapes checked at every call; what `hints` does not name is left alone.

    The verdict depends on shapes alone, so jaxtyping is asked once for each combination: it takes longer than a step.
    """
    arguments = [hint for hint in hints if hint != "return"]
    positions = {name: place for place, name in enumerate(inspect.signature(function).parameters)}
    accepted, fulfilled = set[Any](), set[Any]()
    result: Any = None

    @wraps(function)
    def replayed(*args: Any, **kwargs: Any) -> Any:
        return result

    accept = _typed(replayed, {name: hints[name] for name in arguments})
    fulfil = _typed(replayed, hints)

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        nonlocal result
        values = [args[positions[n]] if positions[n] < len(args) else kwargs.get(n) for n in arguments]
        given = tuple(map(_form, values))
        if given not in accepted:
            accept(*args, **kwargs)
            accepted.add(given)
        found = function(*args, **kwargs)
        if "return" in hints and (given, _form(found)) not in fulfilled:
            result = found
            fulfil(*args, **kwargs)
            result = None
            fulfilled.add((given, _form(found)))
        return found

    return call


def _form(value: Any) -> Any:
    """What a verdict depends on: the shape of a tensor, or the type of another value."""
    if isinstance(value, tuple):
        return tuple(map(_form, value))
    return getattr(value, "shape", type(value))


def _typed(function: Callable[..., Any], hints: dict[str, Any]) -> Callable[..., Any]:
    """`function` with the annotations of `hints`, as jaxtyping and beartype check them."""
    from beartype import beartype
    from jaxtyping import jaxtyped

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    signature = inspect.signature(function)
    parameters = [p.replace(annotation=hints.get(p.name, p.empty)) for p in signature.parameters.values()]
    call.__annotations__ = hints
    call.__signature__ = signature.replace(  # type: ignore[attr-defined]
        parameters=parameters, return_annotation=hints.get("return", signature.empty)
    )
    return jaxtyped(typechecker=beartype)(call)


def kernel_functions() -> Iterator[tuple[ModuleType, str, Callable[..., Any], str]]:
    """Public functions of `kernels/` that take tensors: module, name, function and the docstring with its shapes.

    Without shapes of their own, `shrink_reference` and `triton_shrink` have those of `shrink`.
    """
    for path in sorted((ROOT / "kernels").glob("*.py")):
        module = import_module(f"autopeft.kernels.{path.stem}")
        for name, value in list(vars(module).items()):
            value = inspect.unwrap(value) if inspect.isfunction(value) else value
            own = inspect.isfunction(value) and value.__module__ == module.__name__
            if own and not name.startswith("_") and tensor_arguments(value):
                public = vars(module).get(name.removesuffix("_reference").removeprefix("triton_"), value)
                docs = [inspect.getdoc(declared) or "" for declared in (value, public)]
                yield module, name, value, next((doc for doc in docs if argument_shapes(value, doc)), "")


def tensor_methods(owner: type) -> dict[str, Callable[..., Any]]:
    """Return the methods of a class that take or return tensors, by name."""
    methods = {name: inspect.unwrap(value) for name, value in vars(owner).items() if inspect.isfunction(value)}
    return {name: value for name, value in methods.items() if tensor_arguments(value) or returns_tensors(value)}


def returns_tensors(function: Callable[..., Any]) -> bool:
    """Return whether the annotation of the result names tensors."""
    return "Tensor" in str(inspect.signature(function).return_annotation)


def install() -> None:
    """Check shapes at every later call. Overriding methods have the shapes of the methods that they override."""
    for module, name, function, doc in list(kernel_functions()):
        replacement = checked(function, hints_of(function, doc))
        setattr(module, name, replacement)
        for other in [value for known_as, value in sys.modules.items() if known_as.startswith("autopeft.")]:
            for known_as in [known_as for known_as, value in vars(other).items() if value is function]:
                setattr(other, known_as, replacement)
    for owner, kinds in DECLARED_BY.items():
        for name, declared in tensor_methods(owner).items():
            hints = hints_of(declared, inspect.getdoc(declared) or "")
            for kind in (owner, *kinds):
                if name in vars(kind):
                    setattr(kind, name, checked(vars(kind)[name], hints))
