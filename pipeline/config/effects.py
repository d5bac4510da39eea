"""The effect of each option, declared on the option itself; every list of options by effect is derived from here.

    rank: Result[int] = Field(default=16, ge=1, description="rank of each block")

Only the options that affect the result decide whether a run may continue, whether two runs differ by their seed alone
and what their digests are; the others may differ.
"""

from __future__ import annotations

from enum import Enum
from typing import Annotated, TypeVar

from pydantic import BaseModel

T = TypeVar("T")


class Effect(Enum):
    """What changes when an option changes."""

    RESULT = "the trained weights"
    MEASUREMENT = "what is measured on the trained weights"
    SPEED = "time and memory, for the same weights"
    PLACE = "where files are"
    RECORD = "what is logged, kept and sent to MLflow"
    PROMOTION = "what a run must reach to enter the registry"


Result = Annotated[T, Effect.RESULT]
Measurement = Annotated[T, Effect.MEASUREMENT]
Speed = Annotated[T, Effect.SPEED]
Place = Annotated[T, Effect.PLACE]
Record = Annotated[T, Effect.RECORD]
Promotion = Annotated[T, Effect.PROMOTION]


def effects_of(section: type[BaseModel], prefix: str = "") -> dict[str, Effect]:
    """The effect of every option of a section and of the sections inside it.

    Args:
        section: a class of options.
        prefix: dotted path of the section, with a dot at its end.

    Returns:
        {dotted key: effect}, in the order of the fields.

    Raises:
        TypeError: an option without exactly one effect; the message says how to give it one.
    """
    found: dict[str, Effect] = {}
    for name, field in section.model_fields.items():
        key = f"{prefix}{name}"
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            found |= effects_of(field.annotation, f"{key}.")
            continue
        marks = [each for each in field.metadata if isinstance(each, Effect)]
        if len(marks) != 1:
            raise TypeError(
                f"{key}: an option needs exactly one effect and has {len(marks)}; write its type in "
                f"{section.__module__} as one of Result[..], Measurement[..], Speed[..], Place[..], Record[..] or "
                "Promotion[..] (pipeline/config/effects.py says what they mean)"
            )
        found[key] = marks[0]
    return found
