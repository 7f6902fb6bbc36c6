"""Classes that records name by a word."""

from __future__ import annotations

from typing import Any, ClassVar


class Named:
    """A base whose subclasses have names: `class Patches(Tokens, name="patches")`. The last class of a name counts."""

    name: ClassVar[str]
    named: ClassVar[dict[str, type[Any]]]

    def __init_subclass__(cls, name: str | None = None, **options: Any) -> None:
        super().__init_subclass__(**options)
        if name is not None:
            cls.name = name
            cls.named[name] = cls

    @classmethod
    def called(cls, name: str, argument: str) -> type[Any]:
        """The subclass of this name; ValueError, in which the caller's argument stands, if there is none."""
        if name not in tuple(cls.named):
            raise ValueError(f"{argument} must be one of {tuple(cls.named)}; got {name!r}")
        return cls.named[name]
