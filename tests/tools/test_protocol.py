import pytest

from hdpo_jax.tools import SCHEMAS, argument_error, parse_tool_call


def test_a_turn_without_a_call():
    assert parse_tool_call("<reason>easy</reason><answer>4</answer>") is None


@pytest.mark.parametrize("end", ["</tool_call>", ""])
def test_the_closing_tag_may_be_missing(end: str):
    call = parse_tool_call('<reason>r</reason><tool_call>{"name": "python", "arguments": {"code": "1"}}' + end)
    assert call is not None
    assert (call.name, call.arguments, call.error) == ("python", {"code": "1"}, None)


def test_the_last_call_counts():
    one, two = (f'<tool_call>{{"name": "t", "arguments": {{"q": "{i}"}}}}</tool_call>' for i in "12")
    call = parse_tool_call(one + " and " + two)
    assert call is not None and call.arguments == {"q": "2"}


def test_tags_inside_of_code_are_code():
    text = '<tool_call>{"name": "python", "arguments": {"code": "print(\'<tool_call>\')"}}</tool_call>'
    call = parse_tool_call(text)
    assert call is not None and call.arguments == {"code": "print('<tool_call>')"}


def test_bare_line_breaks_in_code():
    call = parse_tool_call('<tool_call>{"name": "python", "arguments": {"code": "a = 1\nb = 2"}}</tool_call>')
    assert call is not None and call.arguments == {"code": "a = 1\nb = 2"}


def test_aliases_and_absent_arguments():
    call = parse_tool_call('<tool_call>{"name": "search", "arguments": {"query": "x"}}</tool_call>')
    assert call is not None and call.name == "text_search"
    call = parse_tool_call('<tool_call>{"name": "image_search"}</tool_call>')
    assert call is not None and call.arguments == {} and call.error is None


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("", "empty"),
        ("python(1)", "not valid JSON: Expecting value at line 1, column 1"),
        ('{"name": "python", "arguments": {"code": "1"}', "not valid JSON"),
        ('{"name": "python"} trailing', "Extra data"),
        ('{"name": "python", "arguments": {"n": ' + "9" * 5_000 + "}}", "too large"),
        ("[" * 100_000, "not valid JSON"),
        ("[1]", "an array, not an object"),
        ('{"arguments": {}}', "`name` is missing"),
        ('{"name": 3, "arguments": {}}', "`name` is a number"),
        ('{"name": "python", "arguments": "1 + 1"}', "`arguments` is a string, not an object"),
    ],
)
def test_malformed_calls_say_what_is_wrong(body: str, words: str):
    call = parse_tool_call(f"<tool_call>{body}</tool_call>")
    assert call is not None and call.error is not None
    assert words in call.error
    assert "\n" not in call.error


def test_arguments_against_schemas():
    assert argument_error(SCHEMAS["python"], {"code": "1"}) is None
    assert argument_error(SCHEMAS["image_search"], {}) is None
    assert argument_error(SCHEMAS["python"], {}) == "python: argument `code` is missing; expected `code` (string)."
    assert "`code` is a number" in str(argument_error(SCHEMAS["python"], {"code": 1}))
    assert "unknown argument `url`; expected no arguments" in str(argument_error(SCHEMAS["image_search"], {"url": ""}))


def test_nested_arguments_are_named_by_their_place():
    lines = {"type": "array", "items": {"type": "object", "properties": {"x": {"type": "number"}}}}
    parameters = {"type": "object", "properties": {"lines": lines}, "required": ["lines"]}
    schema = {"type": "function", "function": {"name": "draw", "parameters": parameters}}
    assert argument_error(schema, {"lines": [{"x": 1.5}]}) is None
    said = argument_error(schema, {"lines": [{"x": 1.5}, {"x": "far"}]})
    assert said == "draw: argument `lines[1].x` is a string; expected a number."
    assert argument_error(schema, {}) == "draw: argument `lines` is missing; expected `lines` (array)."


def test_arguments_that_fit_no_alternative_are_told_so():
    """What is missing is missing of an alternative, not of the whole."""
    either = [{"required": ["a"]}, {"required": ["b"]}, {"properties": {"c": {}}, "additionalProperties": False}]
    parameters = {"type": "object", "properties": {"a": {}, "b": {}, "d": {}}, "anyOf": either}
    schema = {"type": "function", "function": {"name": "pick", "parameters": parameters}}
    assert argument_error(schema, {"b": 1}) is None
    assert str(argument_error(schema, {"d": 1})).startswith("pick: ")
    parameters["anyOf"] = either[:1]
    said = argument_error(schema, {"d": 1})
    assert said == "pick: argument `a` is missing; expected `a` (any), `b` (any), `d` (any)."
    parameters["anyOf"] = either[2:]
    assert "('d' was unexpected)" in str(argument_error(schema, {"d": 1}))
