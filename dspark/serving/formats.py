"""Response formats to masks of the engine."""

from __future__ import annotations

from functools import partial

from dspark.request import TokenMask
from dspark.serving.context import Context
from dspark.serving.faults import ApiError
from dspark.serving.fields import (
    GrammarFormat,
    JsonObjectFormat,
    JsonSchemaFormat,
    RegexFormat,
    SharedFields,
)
from dspark.serving.grammar import ANY_OBJECT

_ALWAYS_LONG = 1 << 20  # a grammar may take long to read, however short it is


async def mask_of(fields: SharedFields, context: Context) -> TokenMask | None:
    """The mask that a request's response format asks for; None for any text.

    Raises:
        RequestError: the package for it is missing, or it cannot be followed.
        ApiError: the answer could not end.
    """
    wanted, grammars = fields.response_format, context.grammars
    if isinstance(wanted, JsonObjectFormat):
        make = partial(grammars.json_schema, ANY_OBJECT)
    elif isinstance(wanted, JsonSchemaFormat):
        make = partial(grammars.json_schema, wanted.json_schema.schema_)
    elif isinstance(wanted, RegexFormat):
        make = partial(grammars.regex, wanted.pattern)
    elif isinstance(wanted, GrammarFormat):
        make = partial(grammars.lark, wanted.grammar)
    else:
        return None
    if fields.ignore_eos:
        sentence = "ignore_eos and response_format exclude each other; leave one out."
        raise ApiError(400, sentence, param="ignore_eos", code="invalid_combination")
    grammars.check_installed()
    return await context.prepare(make, _ALWAYS_LONG)
