"""`python mcp_by_hand.py TOOLS.json [HOW]`: an MCP server of the 2025 kind that lists what a file holds, true or not.

HOW it answers calls: `flood` (a line without an end), `deaf` (it stops reading), `noise` (what is no message, first),
`odd` (a result that is none), `endless` (there is always another page of tools).
"""

import json
import sys
import time
from pathlib import Path

tools = json.loads(Path(sys.argv[1]).read_text())
how = sys.argv[2] if len(sys.argv) > 2 else ""


def say(request, **answer) -> None:
    print(json.dumps({"jsonrpc": "2.0", "id": request["id"], **answer}), flush=True)


for line in sys.stdin:
    request = json.loads(line)
    match request["method"]:
        case "initialize":
            info = {"name": "by hand", "version": "0"}
            result = {"protocolVersion": "2025-06-18", "capabilities": {"tools": {}}, "serverInfo": info}
            say(request, result=result)
        case "tools/list":
            say(request, result={"tools": tools} | ({"nextCursor": "on"} if how == "endless" else {}))
        case "tools/call":
            if how == "flood":
                while True:
                    sys.stdout.write("x" * 65_536)
            if how == "deaf":
                time.sleep(600)
            if how == "noise":
                print("\x00 no message\n{}\n[1, 2]\n" + '{"jsonrpc": "2.0", "id": 999, "result": {}}', flush=True)
            answer = {"content": "odd"} if how == "odd" else {"content": [{"type": "text", "text": "called"}]}
            say(request, result=answer)
        case method if "id" in request:
            say(request, error={"code": -32601, "message": f"no {method}"})
