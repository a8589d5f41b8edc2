"""Google Lens through Serper: it takes addresses, and its answers hold addresses that are not all to be followed."""

import base64
import hashlib
import logging
from collections.abc import Sequence

import pytest

from hdpo_jax.config import ConfigError, ImageSearchConfig, ToolsConfig, WebConfig
from hdpo_jax.tools import ToolBox
from hdpo_jax.types import Observation, Prompt, ToolCall
from tests.tools.search.conftest import KEY
from tests.tools.search.pictures import file_of, picture
from tests.tools.search.provider_server import ProviderServer, provider_server, sends

IMAGE = file_of(picture(0))
THUMBNAIL = file_of(picture(1), "JPEG")
FAILED = "The image search failed. This does not mean that there are no results."
HERE = "https://example.org/a.png"


def ask(
    server: ProviderServer, keys: Sequence[str] = (HERE,), image_url: str = "", images: Sequence[bytes] = (IMAGE,)
) -> Observation:
    web = WebConfig(timeout_seconds=20, attempts=2, pause_seconds=0.01, url=server.url)
    search = ImageSearchConfig(provider="serper", image_url=image_url)
    with (
        ToolBox(ToolsConfig(names=("image_search",), web=web, image_search=search)) as box,
        box.session(images, keys) as session,
    ):
        return session.call(ToolCall(name="image_search", arguments={}))


def lens(*thumbnails: str) -> dict[str, object]:
    entries = [
        {
            "title": f"Page {number}",
            "source": "Example",
            "link": f"https://example.org/{number}",
            "imageUrl": "https://example.org/large.jpg",
            "thumbnailUrl": url,
        }
        for number, url in enumerate(thumbnails)
    ]
    return {"searchParameters": {"url": HERE, "type": "lens"}, "organic": entries, "credits": 3}


def test_titles_and_thumbnails(server: ProviderServer):
    uri = "data:image/jpeg;base64," + base64.b64encode(THUMBNAIL).decode()
    server.replies = [sends(lens(f"{server.url}/t.jpg", uri)), sends(THUMBNAIL, Content_Type="image/jpeg")]
    observation = ask(server)
    assert observation.ok and len(observation.images) == 2
    assert (
        observation.text == "1. Page 0 [image 1]\nhttps://example.org/0\n\n2. Page 1 [image 2]\nhttps://example.org/1"
    )
    question, thumbnail = server.received
    assert (question.path, question.body) == ("/lens", {"url": HERE}) and question.headers["x-api-key"] == KEY
    assert thumbnail.path == "/t.jpg" and KEY not in str(thumbnail)


def test_addresses_of_this_network_are_not_fetched(server: ProviderServer):
    with provider_server([sends(THUMBNAIL)]) as inside:
        named = inside.url.replace("127.0.0.1", "localhost")
        ways = (
            inside.url,
            f"{named}/x",
            "http://x.gstatic.com/",
            "https://gstatic.com.evil.org/",
            "file:///etc/passwd",
        )
        server.replies = [sends(lens(*ways, "http://[", "", "nonsense"))]
        observation = ask(server)
        assert observation.ok and not observation.images and "8. Page 7" in observation.text
        assert not inside.received and len(server.received) == 1


@pytest.mark.parametrize("reply", [sends(b"", 404), sends(b"<html>"), sends(b"", 302, Location="http://127.0.0.1:1/")])
def test_a_thumbnail_that_does_not_come_costs_only_itself(server: ProviderServer, reply):
    server.replies = [sends(lens(f"{server.url}/t.jpg")), reply]
    observation = ask(server)
    assert observation == Observation(text="1. Page 0\nhttps://example.org/0")


@pytest.mark.parametrize(
    ("pattern", "address"),
    [
        ("https://images.example.org/{key}.jpg", "https://images.example.org/q%2F7.jpg"),
        ("https://images.example.org/{sha256}", f"https://images.example.org/{hashlib.sha256(IMAGE).hexdigest()}"),
    ],
)
def test_a_pattern_makes_the_address(server: ProviderServer, pattern: str, address: str):
    server.replies = [sends(lens())]
    observation = ask(server, ["q/7", "q8"], pattern)
    assert observation.text.startswith("No results") and server.received[0].body == {"url": address}


def test_a_prompt_may_know_its_address():
    extra = {"index": 7, "image_url": HERE}
    prompt = Prompt(id="p", messages=[], images=[], ground_truth="", data_source="", extra=extra)
    assert prompt.keys == ["7", HERE, "p"]


@pytest.mark.parametrize("pattern", ["", "https://images.example.org/{sha256}", "https://images.example.org/{key}"])
def test_an_image_without_an_address_is_a_failure(
    server: ProviderServer, pattern: str, caplog: pytest.LogCaptureFixture
):
    server.replies = [sends(lens())]
    with caplog.at_level(logging.WARNING):
        assert ask(server, [], pattern, images=[]) == Observation(text=FAILED, ok=False)
    assert not server.received and caplog.text.count("\n") == 1


def test_a_pattern_that_is_none_is_refused(server: ProviderServer):
    with pytest.raises(
        ConfigError, match=r"tools.image_search.image_url is 'https://x'; expected an address with {key}"
    ):
        ask(server, image_url="https://x")


@pytest.mark.parametrize("reply", [sends({"message": "Unauthorized."}, 403), sends({}, 500), sends({"odd": 1})])
def test_failures_are_said_to_be_failures(server: ProviderServer, reply, caplog: pytest.LogCaptureFixture):
    server.replies = [reply]
    assert ask(server) == Observation(text=FAILED, ok=False) and KEY not in caplog.text
