"""What a recipe says of the target's features: computed in the step, read from disk, or both."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator
from typing_extensions import Self

from dspark.data.features.manifest import Coding
from dspark.training.settings import Settings


class FeatureSettings(Settings):
    """Where a step's features come from."""

    source: Literal["online", "cache", "hybrid"] = Field(
        "online",
        description="online runs the target in the step; cache reads everything from `path` and "
        "loads the target's embedding and head only; hybrid reads what the cache holds and "
        "computes the rest",
    )
    path: str | None = Field(None, description="directory of the cache")
    add: bool = Field(True, description="hybrid: what was computed is added to the cache")
    codec: Literal["coded", "bfloat16"] = Field(
        "coded", description="of a new cache: few bits a number, or bf16 as it is"
    )
    feature_error: float = Field(
        0.1, gt=0, le=0.5, description="coded: relative error of features in a new cache"
    )
    teacher_error: float = Field(
        0.02, gt=0, le=0.5, description="coded: relative error of the teacher's states"
    )
    max_bytes: int | None = Field(
        None, ge=1, description="what the cache may measure; what fits is kept"
    )
    tokens_per_forward: int = Field(
        8192, ge=1, description="that the target runs over at once when a cache is built"
    )

    @model_validator(mode="after")
    def _every_key_acts(self) -> Self:
        given = self.model_fields_set - {"source"}
        if self.source == "online" and given:
            raise ValueError(f"{sorted(given)[0]} says nothing when source is online; remove it")
        if self.source != "online" and self.path is None:
            raise ValueError(f"source is {self.source}, so path must name the cache's directory")
        if self.source == "cache" and "add" in given:
            raise ValueError("add says nothing when source is cache; remove it, or use hybrid")
        errors = given & {"feature_error", "teacher_error"}
        if self.codec == "bfloat16" and errors:
            raise ValueError(f"{sorted(errors)[0]} says nothing with codec bfloat16; remove it")
        return self

    @property
    def coding(self) -> Coding:
        """How a new cache codes its rows."""
        if self.codec == "bfloat16":
            return Coding("bfloat16", 0.0, 0.0)
        return Coding("coded", self.feature_error, self.teacher_error)
