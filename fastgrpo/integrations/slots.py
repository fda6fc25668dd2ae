"""Liger's classes under whose names ours are called: signatures compared, names swapped in every module, put back."""

import importlib.metadata
import inspect
import re
import sys
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import zip_longest

from fastgrpo.checks import need

TESTED = "0.8.5"


@dataclass(frozen=True)
class Slot:
    """A class of Liger's and the one that takes its place."""

    name: str  # Liger's
    home: str  # the module that defines it
    package: str  # from where it is imported
    ours: type

    def fill(self, undo):
        """Put ours there, unless it is; ``undo``, an ExitStack, gets what puts Liger's back."""
        home = need(self.home, "liger")
        original = getattr(home, self.name)
        if original is not self.ours:
            self.check_signatures(original)
            need(self.package, "liger")
            undo.callback(self.put_back, original, swap(original, self.ours))

    def check_signatures(self, original):
        """Whatever is given to Liger's class, by name or by position, must mean the same in ours."""
        for method in ("__init__", "forward"):
            theirs, mine = (positional(getattr(cls, method)) for cls in (original, self.ours))
            strange = next((have for have, known in zip_longest(theirs, mine[: len(theirs)]) if have != known), None)
            if strange:
                raise ImportError(
                    f"liger-kernel must have the {self.name}.{method} of {TESTED}, with which this was tested, or the "
                    f"beginning of it; {importlib.metadata.version('liger_kernel')} differs from {strange} on"
                )

    def put_back(self, original, places):
        """Undo, also in modules that were imported in between and got ours under Liger's name."""
        later = [(m, self.name) for m in list(sys.modules.values())]
        for module, name in places + later:
            if getattr(module, "__dict__", {}).get(name) is self.ours:
                setattr(module, name, original)


def fill(*slots):
    """-> an ``ExitStack`` whose end puts Liger's classes back. All or none are filled."""
    with ExitStack() as undo:
        need("liger_kernel", "liger")
        for slot in slots:
            slot.fill(undo)
        return undo.pop_all()


def positional(function):
    """["name" or "name=default", ...] of what can be given by position."""
    parameters = inspect.signature(function).parameters.values()
    positional = [p for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    return [p.name if p.default is p.empty else f"{p.name}={p.default!r}" for p in positional]


def swap(old, new):
    """Replace a class in every imported module; -> [(module, name)] of the places."""
    modules = [m for m in list(sys.modules.values()) if isinstance(getattr(m, "__dict__", None), dict)]
    places = [(m, name) for m in modules for name, value in list(vars(m).items()) if value is old]
    for module, name in places:
        setattr(module, name, new)
    return places


@contextmanager
def renamed(names):
    """Messages about an argument name it as the caller does. names: {ours: the caller's}."""
    try:
        yield
    except (ValueError, TypeError) as error:
        message = re.sub(rf"(?<!\.)\b({'|'.join(names)})\b", lambda match: names[match[0]], str(error))
        raise (ValueError if isinstance(error, ValueError) else TypeError)(message) from error
