"""A reward of one's own: a function named in the recipe, called in a worker process."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from hadal.data.strict import require
from hadal.post.rewards.protocol import Completion, RewardError, Score


@dataclass(frozen=True)
class Custom:
    """function: "package.module:name", called as name(completion, **arguments) -> value, or (value, verdict),
    the verdict a mapping. It must be importable from where the trainer runs. fields: needed of a record."""

    function: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    range: tuple[float, float] = (0.0, 1.0)
    fields: tuple[str, ...] = ()
    is_accuracy: bool = False

    kind: ClassVar[str] = "custom"
    where: ClassVar[str] = "worker"

    def __post_init__(self) -> None:
        module, colon, name = self.function.partition(":")
        good = bool(colon) and name.isidentifier() and all(map(str.isidentifier, module.split(".")))
        require(good, "function", self.function, 'of the form "package.module:name"')
        require(self.range[0] < self.range[1], "range", self.range, "two numbers in order")

    @property
    def needs(self) -> tuple[str, ...]:
        return self.fields

    @property
    def accuracy(self) -> bool:
        return self.is_accuracy

    @property
    def low(self) -> float:
        return self.range[0]

    @property
    def high(self) -> float:
        return self.range[1]

    def prepare(self) -> None:
        """Find the function. Raises RewardError."""
        self.found()

    def found(self) -> Callable[..., Any]:
        """The function itself."""
        module, _, name = self.function.partition(":")
        try:
            function = getattr(importlib.import_module(module), name)
        except AttributeError as error:
            raise RewardError(f"function {self.function!r} cannot be had: {error}") from None
        except ImportError as error:
            raise RewardError(
                f"function {self.function!r} cannot be had: {error}; modules are looked for in the folder "
                "that the trainer was started in, and in those of PYTHONPATH"
            ) from None
        if not callable(function):
            raise RewardError(f"{self.function!r} is no function")
        return function

    def __call__(self, completion: Completion, others: Mapping[str, Score]) -> Score:
        got = self.found()(completion, **self.arguments)
        if isinstance(got, Score):
            return got
        value, verdict = got if isinstance(got, tuple) and len(got) == 2 else (got, {})
        if not isinstance(verdict, Mapping):
            raise RewardError(f"the verdict is {verdict!r}; a dict is wanted")
        return Score(value, dict(verdict))
