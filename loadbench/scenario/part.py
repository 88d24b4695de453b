"""What every mapping of a scenario file has in common: nothing unknown in it, nothing absent written back."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, SerializerFunctionWrapHandler, WithJsonSchema, model_serializer
from pydantic_core import PydanticCustomError


class Part(BaseModel):
    """A mapping of the scenario file: no key that is not known, nothing changed once read."""

    model_config = ConfigDict(extra="forbid", frozen=True, coerce_numbers_to_str=True)

    @model_serializer(mode="wrap")
    def _without_absent(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave out what was not given. A null that differs from the default says something and stays."""
        fields = type(self).model_fields.items()
        optional = {key for name, field in fields if field.default is None for key in (name, field.alias)}
        return {key: value for key, value in write(self).items() if value is not None or key not in optional}


def refuse(message: str) -> PydanticCustomError:
    """An error whose message is complete: what was expected and what was found."""
    return PydanticCustomError("refused", "{message}", {"message": message})


def exactly_one(**values: object) -> None:
    given = [name for name, value in values.items() if value is not None]
    if len(given) != 1:
        found = " and ".join(given) or "none"
        raise refuse(f"expected exactly one of {', '.join(values)}, got {found}")


def as_list(value: object) -> object:
    """One value is a list of one, and ``1,2,4`` a list of three, as flags write it."""
    if isinstance(value, str):
        return [part.strip() for part in value.split(",")]
    return [value] if isinstance(value, int | float | dict) else value


def one_or_more(item: dict[str, Any]) -> WithJsonSchema:
    return WithJsonSchema({"anyOf": [item, {"type": "string"}, {"type": "array", "items": item, "minItems": 1}]})
