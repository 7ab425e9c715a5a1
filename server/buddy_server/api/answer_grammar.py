"""The grammar that keeps the answers of a job to what it asks for: the form of their text, and valid calls."""

from dataclasses import replace
from functools import partial

from buddy_server.api.job import Job
from buddy_server.api.response_format import KEYWORDS, GrammarCompiler, grammar_of, json_grammar
from buddy_server.errors import InvalidRequest
from buddy_server.tools.call_grammar import call_grammar
from buddy_server.tools.tool_format import ToolFormat


async def answer_grammar(job: Job, tool_format: ToolFormat | None, compiler: GrammarCompiler) -> str | None:
    """In llguidance's format; None if nothing needs one. Raises InvalidRequest for what cannot be enforced or is too
    large."""
    choice = job.tool_choice
    text_grammar = None
    if job.form is not None:
        text_grammar = await grammar_of(job.form, compiler)
    if tool_format is None or choice is None:
        return text_grammar
    grammar = tool_format.grammar(choice, text_grammar)
    if grammar is None or grammar == text_grammar:
        return grammar
    for function in choice.functions:
        if function.parameters is not None:
            checked = partial(json_grammar, function.parameters, function.field)
            if function.is_strict:
                await compiler.make(checked, function.field, f"the keywords {KEYWORDS}")
            else:
                checked()
    try:
        return await compiler.make(lambda: grammar, "tools", "smaller schemas, or fewer tools")
    except InvalidRequest:
        # Each alone, so that the error names the function.
        for function in choice.functions:
            of_one = replace(choice, functions=(function,))
            alone = partial(call_grammar, tool_format.syntax, of_one, tool_format.marker_ids, None)
            await compiler.make(alone, function.field, f"the keywords {KEYWORDS}")
        raise
