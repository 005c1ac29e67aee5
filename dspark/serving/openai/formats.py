"""Response formats, and what is wanted of tools, to masks of the engine."""

from __future__ import annotations

from functools import partial

from dspark.request import TokenMask
from dspark.serving.context import Context
from dspark.serving.openai.calls import Marks, call_form, calls_grammar
from dspark.serving.openai.chat_template import THINK, ChatTemplate, Rendered
from dspark.serving.openai.errors import ApiError
from dspark.serving.openai.fields import (
    GrammarFormat,
    JsonObjectFormat,
    JsonSchemaFormat,
    RegexFormat,
    SharedFields,
    TextFormat,
)
from dspark.serving.openai.grammar import ANY_OBJECT
from dspark.serving.openai.tools import ToolUse

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
    grammars.check_installed("response_format")
    return await context.prepare(make, _ALWAYS_LONG)


async def calls_mask_of(
    fields: SharedFields, use: ToolUse, rendered: Rendered, template: ChatTemplate, context: Context
) -> TokenMask | None:
    """The mask that holds calls of tools to what is wanted; None where nothing is.

    A response format leaves no room for calls: it rules alone.

    Args:
        fields: the request.
        use: what it wants of tools.
        rendered: its prompt.
        template: that wrote it.
        context: who makes masks.

    Raises:
        RequestError: the package for it is missing, a schema cannot be followed, or the template's
            calls are none that are read here.
        ApiError: the request also wants what excludes a call, or the answer could not end.
    """
    told, grammars = use.told, context.grammars
    formatted = not isinstance(fields.response_format, TextFormat | None)
    if use.forced and formatted:
        sentence = "response_format and a forced tool_choice exclude each other; leave one out."
        raise ApiError(400, sentence, param="response_format", code="invalid_combination")
    if told is None or use.because is None or formatted:
        return None
    if fields.ignore_eos:
        sentence = "ignore_eos excludes calls that are forced or checked; leave it out."
        raise ApiError(400, sentence, param="ignore_eos", code="invalid_combination")
    grammars.check_installed(use.because)

    def make() -> TokenMask:
        grammar = calls_grammar(
            call_form(template, told),
            use,
            Marks.of(template.tokenizer),
            reasons=template.mentions(THINK),
            reasoning_open=rendered.reasoning_open,
        )
        return grammars.lark(grammar, what="tools' schema")

    return await context.prepare(make, _ALWAYS_LONG)
