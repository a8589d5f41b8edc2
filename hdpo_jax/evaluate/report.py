"""`hdpo report`: a run as one HTML file that needs nothing else, no network, no server.

Whatever a policy or a tool wrote is hostile until shown: it reaches the page as JSON that can not leave its
script element, the script puts it into text nodes only, and the page's policy forbids every request and every
script or style but its own two, named by their hashes.
"""

import base64
import hashlib
import html
import json
import re
from importlib import resources
from pathlib import Path
from typing import Any

from hdpo_jax.evaluate.report_data import collect
from hdpo_jax.files import write_text_atomically


def write_report(run_dir: Path | str) -> Path:
    """Writes run_dir/report.html and returns its path.

    `run_dir` is the output of `hdpo quickstart` (summary.json, sft/, hdpo/, evaluation/) or of one run of `hdpo
    train` or `hdpo sft` (metrics.jsonl, rollouts/); a run that is still going works too. ValueError where it is
    neither.
    """
    path = Path(run_dir) / "report.html"
    write_text_atomically(path, render(collect(Path(run_dir))))
    return path


def render(data: dict[str, Any]) -> str:
    """The page that shows `data`, the JSON object that report_page/page.js describes."""
    page = resources.files("hdpo_jax.evaluate").joinpath("report_page")
    style, script = (page.joinpath(name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    policy = (
        "default-src 'none'; img-src data:; base-uri 'none'; form-action 'none'; "
        f"style-src '{_hash(style)}'; script-src '{_hash(script)}'"
    )
    parts = {
        "policy": html.escape(policy),
        "title": html.escape(data["title"]),
        "style": style,
        "data": script_safe_json(data),
        "script": script,
    }
    template = page.joinpath("page.html").read_text(encoding="utf-8")
    # One pass: what is put in is never searched for marks again.
    return re.sub(r"\{\{(\w+)\}\}", lambda mark: parts[mark[1]], template)


def script_safe_json(data: Any) -> str:
    """JSON that can stand in a script element: it holds no `<`, so no `</script>` or `<!--` can end it."""
    text = json.dumps(data, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
