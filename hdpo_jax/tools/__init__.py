"""Tools that the policy calls: the protocol, a sandboxed Python interpreter, searches, functions, MCP servers."""

from hdpo_jax.tools.protocol import ALIASES, SCHEMAS, Subject, Tool, ToolSession, argument_error, parse_tool_call
from hdpo_jax.tools.toolbox import Session, ToolBox, open_toolbox

__all__ = [
    "ALIASES",
    "SCHEMAS",
    "Session",
    "Subject",
    "Tool",
    "ToolBox",
    "ToolSession",
    "argument_error",
    "open_toolbox",
    "parse_tool_call",
]
