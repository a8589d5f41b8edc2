"""Tools of MCP servers, by the protocol's official client."""

from hdpo_jax.tools.mcp.tools import McpServers

__all__ = ["McpServers"]
