"""What every section of the config is, and the types that several of them use."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

Fraction = Annotated[float, Field(gt=0, le=1)]
PositiveInt = Annotated[int, Field(gt=0)]
Shards = str | list[str]


class Section(BaseModel):
    """Base of all config sections: unknown keys and infinite numbers are errors, values never change after loading."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=False, allow_inf_nan=False, use_attribute_docstrings=True
    )

    @model_validator(mode="before")
    @classmethod
    def _empty_sections_keep_their_defaults(cls, given: Any) -> Any:
        """Without the keys of sections that hold nothing: YAML reads `score:` with only comments below it as null."""
        if not isinstance(given, dict):
            return given
        return {key: value for key, value in given.items() if value is not None or cls.section_at(key) is None}

    @classmethod
    def section_at(cls, key: str) -> type[Section] | None:
        """The section that `key` holds and that cannot be null; None for any other key."""
        annotation = cls.model_fields[key].annotation if key in cls.model_fields else None
        return annotation if isinstance(annotation, type) and issubclass(annotation, Section) else None
