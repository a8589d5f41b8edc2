"""The tools of a run: which there are, what bounds their calls, where searches go."""

from dataclasses import dataclass, field
from typing import Literal

from hdpo_jax.config.checks import at_least, more_than_zero, require


@dataclass(frozen=True, kw_only=True)
class WebConfig:
    """How providers on the web are asked. Keys come from the environment, never from here."""

    timeout_seconds: float = 10.0
    """Of one attempt."""
    attempts: int = 4
    """With a pause before each but the first that doubles, and is drawn at random below that."""
    pause_seconds: float = 1.0
    """What the first of these pauses is drawn below."""
    longest_pause_seconds: float = 20.0
    """Of any pause, also one that the provider asks for (Retry-After)."""
    requests_per_second: float = 10.0
    """Of this process, to one provider; 0: no bound."""
    cache: str = ""
    """A folder for answers; failures are never kept. Empty: none."""
    url: str = ""
    """In place of the provider's own address: a proxy, or a server of the same format."""

    def __post_init__(self):
        more_than_zero(self, "tools.web", "timeout_seconds")
        at_least(self, "tools.web", 1, "attempts")
        at_least(self, "tools.web", 0, "requests_per_second", "pause_seconds", "longest_pause_seconds")


@dataclass(frozen=True, kw_only=True)
class TextSearchConfig:
    provider: Literal["index", "serper", "serpapi", "brightdata"] = "index"
    """index: documents on this machine, by BM25. The others are on the web, and want SERPER_API_KEY, SERPAPI_API_KEY
    or BRIGHTDATA_API_KEY in the environment; Bright Data also a zone in BRIGHTDATA_SERP_ZONE, if not serp_api1."""
    index: str = ""
    """The file that `hdpo data index` wrote."""
    results: int = 10

    def __post_init__(self):
        at_least(self, "tools.text_search", 1, "results")


@dataclass(frozen=True, kw_only=True)
class ImageSearchConfig:
    provider: Literal["index", "cache", "serper"] = "index"
    """index: images on this machine that look alike. cache: what a data set brings along for its own questions.
    serper: Google Lens, which wants SERPER_API_KEY in the environment."""
    path: str = ""
    """The file that `hdpo data index-images` wrote; or the cache: a JSON file, or a folder with one for each question.
    """
    image_url: str = ""
    """serper: where the prompt's image is on the web, for Google takes an address, not an image. {key} in it becomes
    the prompt's likeliest name, {sha256} the checksum of the image file. Not needed where prompts have an image_url."""
    results: int = 10
    thumbnail: int = 256
    """Longest side of a thumbnail, in pixels."""

    def __post_init__(self):
        at_least(self, "tools.image_search", 1, "results", "thumbnail")


@dataclass(frozen=True, kw_only=True)
class ToolsConfig:
    names: tuple[str, ...] = ("python",)
    """Of the built-in ones: python, text_search, image_search."""
    functions: tuple[str, ...] = ()
    """More tools: Python functions as module:function or file.py:function, with type hints and a docstring. They run in
    this process, with all its rights, and get what the policy wrote."""
    mcp: tuple[str, ...] = ()
    """More tools: those of MCP servers, each a web address or a command line that is started. Of the environment, a
    started server gets PATH, HOME, LANG and what is put before it, as in "KEY=$MY_KEY uvx some-server"; an address gets
    a bearer token, as in "TOKEN=$MY_TOKEN https://host/mcp"."""
    refuse_repeats: tuple[str, ...] = ("image_search",)
    """Tools that a trajectory may not call twice with the same arguments: the second time there is a note. "all": every
    tool."""
    servers: tuple[str, ...] = ()
    """Addresses of `hdpo serve-tools`, over which trajectories are spread; empty: tools run in this process."""
    on_lost: Literal["observe", "drop"] = "drop"
    """When a tool server dies: the policy reads of an error and goes on, or its rollout is dropped from the update."""
    lost_seconds: float = 15.0
    """A tool server that can not be reached for so long is given up, and with it what trajectories had there."""
    server_seconds: float = 100.0
    """A call to a tool server, with all that is waited and tried again; shorter than agent.call_seconds."""
    sandbox: Literal["bubblewrap", "none"] = "bubblewrap"
    """What isolates model-written code. "none" runs it with this user's rights: only for code you trust."""
    workers: int = 8
    """Tool calls that run at a time."""
    timeout_seconds: float = 20.0
    """Wall time of a call of the python tool. Of CPU time a session has four times as much from one call to the next.
    """
    memory_mb: int = 1_024
    """Of a session of the python tool, all its processes together."""
    processes: int = 32
    """And threads of a session."""
    disk_mb: int = 64
    """Files of a session, which lie in memory too."""
    output_chars: int = 65_536
    max_images: int = 8
    """Images one call may return; the rest are dropped whole, and the observation says so."""
    text_search: TextSearchConfig = field(default_factory=TextSearchConfig)
    image_search: ImageSearchConfig = field(default_factory=ImageSearchConfig)
    web: WebConfig = field(default_factory=WebConfig)

    def __post_init__(self):
        at_least(self, "tools", 1, "workers", "memory_mb", "processes", "disk_mb", "output_chars")
        at_least(self, "tools", 0, "max_images")
        more_than_zero(self, "tools", "timeout_seconds", "server_seconds")
        at_least(self, "tools", 0, "lost_seconds")
        for server in self.servers:
            sound = server.startswith(("http://", "https://"))
            require(sound, "tools.servers", server, "addresses such as http://10.0.0.5:8700")


@dataclass(frozen=True, kw_only=True)
class ToolServerConfig:
    """What `hdpo serve-tools` bears. Calls at a time are tools.workers."""

    sessions: int = 4_096
    """Trajectories open at a time; one more is refused with 429."""
    idle_seconds: float = 600.0
    """A trajectory without a call for so long is freed."""
    queue: int = 1_024
    """Calls that wait for a worker, or for the trajectory's call before; a request with more is refused with 429."""
    call_seconds: float = 90.0
    """A call that has not answered by then is given up, and its trajectory starts afresh."""
    drain_seconds: float = 60.0
    """How long running calls may take to finish after SIGTERM."""
    requests: int = 1_024
    """Requests at a time."""
    body_mb: int = 64
    """Of one request."""
    actions: int = 256
    """Of one request."""
    images: int = 16
    """Of one trajectory's prompt."""
    image_mb: int = 32
    """Of one image file."""
    answers_mb: int = 512
    """Answers kept for requests that are repeated, of all open trajectories; the oldest go first."""

    def __post_init__(self):
        at_least(self, "server", 1, "sessions", "requests", "body_mb", "actions", "image_mb")
        at_least(self, "server", 0, "queue", "images", "drain_seconds", "answers_mb")
        more_than_zero(self, "server", "idle_seconds", "call_seconds")
