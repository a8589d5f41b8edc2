"""`python mcp_server.py`: an MCP server by the official package, on standard input and output."""

import base64
import io
import os
import sys
import time
from typing import Annotated

import anyio
from mcp.server import MCPServer
from mcp.server.mcpserver import Image
from mcp.server.mcpserver.exceptions import ToolError
from mcp.types import (
    AudioContent,
    BlobResourceContents,
    CallToolResult,
    ContentBlock,
    EmbeddedResource,
    ImageContent,
    TextContent,
    TextResourceContents,
)
from PIL import Image as Pillow
from pydantic import Field

server = MCPServer("test", log_level="WARNING")
cancelled: list[str] = []


@server.tool()
def add(a: Annotated[int, Field(description="The first.")], b: int) -> int:
    """Adds two numbers."""
    return a + b


@server.tool()
async def slow(seconds: float) -> str:
    """Waits."""
    try:
        await anyio.sleep(seconds)
    except anyio.get_cancelled_exc_class():
        cancelled.append(f"{seconds:g}")
        raise
    return "waited"


@server.tool()
def were_cancelled() -> list[str]:
    """Says which calls of `slow` were."""
    return cancelled


@server.tool()
def die(status: int) -> str:
    """Ends the server."""
    print("I can not go on", file=sys.stderr, flush=True)
    os._exit(status)


@server.tool()
def huge(characters: int) -> str:
    """Says much."""
    return "x" * characters


@server.tool()
def broken(word: str) -> str:
    """Fails."""
    raise ToolError(f"no such word: {word}")


@server.tool()
def picture(width: int, height: int, count: int = 1) -> list[Image]:
    """Draws; what is large, in black and white."""
    file = io.BytesIO()
    image = Pillow.new("RGB", (width, height), (10, 20, 30)) if width < 4_096 else Pillow.new("1", (width, height))
    image.save(file, "PNG")
    return [Image(data=file.getvalue(), format="png")] * count


@server.tool()
def mixture() -> CallToolResult:
    """Says it in many ways."""
    blocks: list[ContentBlock] = [
        TextContent(text="first"),
        ImageContent(data="no base64!", mime_type="image/png"),
        ImageContent(data=base64.b64encode(b"%!PS-Adobe-3.0 EPSF-3.0").decode(), mime_type="image/png"),
        AudioContent(data="", mime_type="audio/wav"),
        EmbeddedResource(resource=TextResourceContents(uri="note://1", text="a note")),
        EmbeddedResource(resource=BlobResourceContents(uri="file:///x.zip", blob="AAAA", mime_type="application/zip")),
    ]
    return CallToolResult(content=blocks)


@server.tool()
def structured() -> CallToolResult:
    """Has no words."""
    return CallToolResult(content=[], structured_content={"a": [1, 2]})


@server.tool()
def environment() -> dict[str, str]:
    """Says what it knows of its process."""
    return {**os.environ, "pid": str(os.getpid()), "parent": str(os.getppid()), "session": str(os.getsid(0))}


@server.tool()
def daemon() -> int:
    """Starts a process that outlives it."""
    pid = os.fork()
    if pid == 0:
        for number in range(3):
            os.close(number)
        time.sleep(600)
        os._exit(0)
    return pid


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print("this is no message")
    server.run()
