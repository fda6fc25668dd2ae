"""Settings checked against their annotations: type, range and choices stand once, beside the field's default."""

import difflib
import functools
import importlib
import math
import sys
import types
import typing
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from importlib.util import find_spec
from numbers import Real
from typing import Annotated, Any, Literal

Finite = Annotated[float, ("a finite number", lambda x: True)]
Positive = Annotated[float, ("> 0", lambda x: x > 0)]
NonNegative = Annotated[float, (">= 0", lambda x: x >= 0)]
Above1 = Annotated[float, ("> 1", lambda x: x > 1)]
From1 = Annotated[float, (">= 1", lambda x: x >= 1)]
Fraction = Annotated[float, ("in [0, 1]", lambda x: 0 <= x <= 1)]
# of two models; nearer to 0 or 1 the smaller part has too few digits: at 1e-5 fp32 gradients are off by 0.3 %
Mixture = Annotated[float, ("0, 1 or in [1e-5, 1 - 1e-5]", lambda x: x in (0, 1) or 1e-5 <= x <= 1 - 1e-5)]
Below1 = Annotated[float, ("in [0, 1)", lambda x: 0 <= x < 1)]
Share = Annotated[float, ("in (0, 1]", lambda x: 0 < x <= 1)]
Count = Annotated[int, (">= 1", lambda x: x >= 1)]
CountOr0 = Annotated[int, (">= 0", lambda x: x >= 0)]
Seed = Annotated[int, ("in [0, 2**31)", lambda x: 0 <= x < 2**31)]  # NumPy's end at 2**32; ranks add their number
GroupSize = Annotated[int, (">= 2", lambda x: x >= 2)]


class UserError(ValueError):
    """What the user can put right once a run has begun: the command line shows its message without a traceback."""


class Mistakes(ValueError):
    """Several at once, one a line."""

    def __init__(self, found: list[Exception]) -> None:
        self.found = found
        super().__init__(f"{len(found)} mistakes:" + "".join(f"\n- {error}" for error in found))


MISTAKES = (ValueError, TypeError, ImportError, OSError)  # OSError: a file, or transformers finds no such model
NOTED: ContextVar[list[Exception] | None] = ContextVar("NOTED", default=None)


@contextmanager
def together() -> Iterator[Callable]:
    """Inside, a failed :func:`require` is noted, and so is what a function raises that is called through the yielded
    ``attempt(function, *arguments)``, which then returns None. The end raises a single mistake as it came, several as
    one ValueError that lists them."""
    found: list[Exception] = []
    token = NOTED.set(found)

    def attempt(function, *arguments, **options):
        outer = NOTED.set(None)
        try:
            return function(*arguments, **options)
        except MISTAKES as error:
            found.append(error)
        finally:
            NOTED.reset(outer)

    try:
        yield attempt
    except MISTAKES as error:
        found.append(error)
    finally:
        NOTED.reset(token)
    found = [mistake for error in found for mistake in getattr(error, "found", [error])]
    if found:
        raise found[0] if len(found) == 1 else Mistakes(found)


class Checked:
    """Base of frozen dataclasses: names are checked, every value against its annotation, then their combinations. All
    wrong names and values are named at once, and so are all combinations that do not go together."""

    also = ()  # names that may be meant besides the fields'
    advice = types.MappingProxyType({})  # {a name, or "name=value", from elsewhere: what to say instead}

    def __new__(cls, *positional, **settings):
        if positional:
            first = next(iter(annotations(cls)))
            raise TypeError(f"settings are given by name, as in {cls.__name__}({first}=...), got {positional[0]!r}")
        hints = annotations(cls)
        with together():
            for name, value in settings.items():
                if name in hints:
                    check_field(name, value, hints[name], cls.advice.get(f"{name}={value}", ""))
                else:
                    mistake(f"{name} is not a setting{cls.suggest(name)}")
        return super().__new__(cls)

    @classmethod
    def suggest(cls, name: str) -> str:
        """What may be meant by a name that is no setting."""
        close = difflib.get_close_matches(name, [*annotations(cls), *cls.also], n=1)
        said = cls.advice.get(name) or "".join(f"did you mean {c}?" for c in close)
        return f": {said}" if said else ""

    def __post_init__(self):
        for name in annotations(type(self)):  # numpy's numbers are Python's: a log and a checkpoint take no others
            value = getattr(self, name)
            if isinstance(value, Real) and type(value) not in (bool, int, float):
                object.__setattr__(self, name, float(value))
        with together():
            self.check_combinations()

    def check_combinations(self) -> None:
        """Where settings that depend on each other, or on this machine, do not go together: :func:`require`."""


@functools.cache
def annotations(cls: type) -> dict[str, Any]:
    """{field: annotation}, inherited ones too."""
    return typing.get_type_hints(cls, include_extras=True)


def check_field(name: str, value: object, hint: Any, advice: str = "") -> None:
    if not fits(value, hint):
        mistake(f"{name} must be {describe(value, hint)}, got {value!r}" + (f": {advice}" if advice else ""))


def fits(value: Any, hint: Any) -> bool:
    """Whether a value is as annotated; whole numbers are floats too, booleans are no numbers, a range is finite."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        kind, (_, holds) = arguments
        return fits(value, kind) and is_finite(value) and holds(value)
    if origin is Literal:
        return any(value == choice and type(value) is type(choice) for choice in arguments)
    if origin in (typing.Union, types.UnionType):
        return any(fits(value, argument) for argument in arguments)
    if origin is list:
        return isinstance(value, list) and all(fits(x, arguments[0]) for x in value)
    if hint in (int, float):
        return isinstance(value, int if hint is int else Real) and not isinstance(value, bool)
    return isinstance(value, hint)


def is_finite(value: Any) -> bool:
    """Whether it is a finite number; torch.compile, which may leave it open, does not trace math.isfinite."""
    limit = sys.float_info.max if isinstance(value, int) else math.inf
    return fits(value, float) and -limit < value < limit


def describe(value: Any, hint: Any) -> str:
    """What an annotation asks for, in words."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        if arguments[0] is int and not fits(value, int):
            return "int"
        return f"a number {arguments[1][0]}" if isinstance(value, str) else str(arguments[1][0])
    if origin is Literal:
        return f"one of {', '.join(map(repr, arguments))}"
    if origin in (typing.Union, types.UnionType):
        return " or ".join(describe(value, argument) for argument in arguments)
    if origin is list:
        return f"a list, each {describe(value, arguments[0])}"
    words: dict[Any, str] = {bool: "True or False", types.NoneType: "None"}
    return str(words.get(hint, hint.__name__))


def require(condition: bool, message: str) -> None:
    if not condition:
        mistake(message)


def mistake(message: str) -> None:
    """Raises ValueError; inside :func:`together` its end does."""
    error, noted = ValueError(message), NOTED.get()
    if noted is None:
        raise error
    noted.append(error)


def require_installed(package: str, install: str) -> None:
    require(find_spec(package) is not None, f"this config needs {package}: pip install {install}")


def need(package: str, extra: str = "train") -> Any:
    """Import an optional package, or say which extra brings it."""
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ImportError(f"{package} is needed here: pip install 'fastgrpo[{extra}]'") from error
