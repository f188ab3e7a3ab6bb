"""Who may ask, and what mistakes are answered."""

import asyncio
import json

import pytest
from aiohttp import WSServerHandshakeError
from server_kit import answer, echo_prompt, node, run, serving

from stable_cascade_nodes.host.server.context import MAX_UPLOAD_SIZE

EVIL = "http://evil.example"


async def statuses(client, headers, *, method="GET", path="/features"):
    """The status with and without the prefix, which must be the same."""
    found = set()
    for prefix in ("", "/api"):
        async with client.request(method, prefix + path, headers=headers) as response:
            found.add(response.status)
    assert len(found) == 1
    return found.pop()


@pytest.mark.parametrize(
    ("origin", "status"),
    [
        (None, 200),
        ("http://{own}", 200),
        ("https://{own}", 200),
        (EVIL, 403),
        ("http://127.0.0.1:1", 403),
        ("http://localhost:{port}", 403),
        ("http://127.0.0.1", 403),
        ("http://{own}.evil.example", 403),
        ("http://evil.example/{own}", 403),
        ("http://{own}@evil.example", 403),
        ("null", 403),
        ("", 403),
        ("http://[::1", 403),
        ("http://127.0.0.1:99999", 403),
    ],
)
def test_foreign_origins(tmp_path, origin, status):
    async def test():
        async with serving({}, tmp_path) as client:
            own = f"{client.server.host}:{client.server.port}"
            headers = {} if origin is None else {"Origin": origin.format(own=own, port=client.server.port)}
            assert await statuses(client, headers) == status
            assert await statuses(client, headers, method="POST", path="/interrupt") == status

    run(test())


def test_a_foreign_page_gets_no_socket_and_no_run(tmp_path):
    async def test():
        ran = []
        async with serving(
            {"Note": node(lambda text: ran.append(text), output=True, text="STRING")}, tmp_path
        ) as client:
            with pytest.raises(WSServerHandshakeError) as refused:
                await client.ws_connect("/ws?clientId=me", headers={"Origin": EVIL})
            assert refused.value.status == 403
            body = {"prompt": echo_prompt("a", "Note")}
            # As a form of another site can send it: plain text, no questions asked beforehand.
            headers = {"Origin": EVIL, "Content-Type": "text/plain"}
            async with client.post("/prompt", data=json.dumps(body), headers=headers) as response:
                assert (response.status, await response.read()) == (403, b"")
            assert client.state.host.queue_length() == 0
            assert ran == []

    run(test())


@pytest.mark.parametrize(
    ("headers", "method", "status"),
    [
        ({"Sec-Fetch-Site": "same-origin"}, "GET", 200),
        ({"Sec-Fetch-Site": "none"}, "GET", 200),
        ({"Sec-Fetch-Site": "cross-site"}, "GET", 403),
        ({"Sec-Fetch-Site": "cross-site"}, "POST", 403),
        ({"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Dest": "image"}, "GET", 403),
        ({"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Dest": "iframe"}, "GET", 403),
        # Following a link is no danger; posting a form is.
        ({"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Dest": "document"}, "GET", 200),
        ({"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Dest": "document"}, "POST", 403),
    ],
)
def test_what_browsers_say_of_a_request(tmp_path, headers, method, status):
    async def test():
        async with serving({}, tmp_path) as client:
            path = "/features" if method == "GET" else "/interrupt"
            assert await statuses(client, headers, method=method, path=path) == status

    run(test())


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost", 200),
        ("LOCALHOST:8188", 200),
        ("cascade.localhost:8188", 200),
        ("127.0.0.1", 200),
        ("127.8.9.10:1", 200),
        ("192.168.1.5:8188", 200),
        ("[::1]:8188", 200),
        ("[fe80::1]", 200),
        ("my.workstation:8188", 200),
        ("My.Workstation.", 200),
        ("evil.example", 403),
        ("evil.example:8188", 403),
        ("localhost.evil.example", 403),
        ("notlocalhost", 403),
        ("127.0.0.1.evil.example", 403),
        ("my.workstation.evil.example", 403),
        ("evil.example@localhost", 403),
        ("localhost@evil.example", 403),
        ("[::1", 403),
        ("2130706433", 403),
        ("", 403),
    ],
)
def test_names_that_are_pointed_here(tmp_path, host, status):
    async def test():
        async with serving({}, tmp_path, allowed_hosts=["My.workstation"]) as client:
            assert await statuses(client, {"Host": host}) == status
            # A page under such a name is its own origin, and so not foreign.
            assert await statuses(client, {"Host": host, "Origin": f"http://{host}"}) in (status, 403)

    run(test())


def test_the_refusal_of_a_name_says_what_to_do(tmp_path):
    async def test():
        async with (
            serving({}, tmp_path) as client,
            client.get("/features", headers={"Host": "box.lan:8188"}) as response,
        ):
            text = await response.text()
            assert "'box.lan:8188'" in text
            assert "--allow-host" in text

    run(test())


def test_no_answer_is_taken_for_another_type(tmp_path):
    async def test():
        async with serving({}, tmp_path) as client:
            for path in ("/features", "/nothing/here", "/history?max_items=x", "/object_info"):
                async with client.get(path) as response:
                    assert response.headers["X-Content-Type-Options"] == "nosniff", path
            async with client.get("/features", headers={"Origin": EVIL}) as response:
                assert response.headers["X-Content-Type-Options"] == "nosniff"
                assert "Access-Control-Allow-Origin" not in response.headers

    run(test())


DEEP = "[" * 100_000


@pytest.mark.parametrize("path", ["/prompt", "/queue", "/history", "/free", "/jobs/cancel"])
@pytest.mark.parametrize("body", ["", "no json", "[1]", "5", "null", '"text"', DEEP, "9" * 5000, "\ud800"])
def test_bodies_that_are_no_request(tmp_path, path, body):
    async def test():
        async with serving({}, tmp_path) as client:
            status, found = await answer(client, "POST", path, data=body.encode("utf-8", "surrogatepass"))
            assert status == 400
            assert found["error"]
            if path != "/jobs/cancel":
                assert set(found) == {"error", "node_errors"}
                assert set(found["error"]) == {"type", "message", "details", "extra_info"}
                assert found["error"]["message"]

    run(test())


def test_a_request_too_large_is_refused(tmp_path):
    async def test():
        async with serving({}, tmp_path) as client:

            async def endless():
                block = b" " * (1 << 20)
                for _ in range(MAX_UPLOAD_SIZE // len(block) + 2):
                    yield block

            async with client.post("/prompt", data=endless()) as response:
                assert response.status == 413
            assert (await answer(client, "GET", "/prompt"))[0] == 200

    run(test())


@pytest.mark.parametrize(
    "hello",
    [
        b"\0" * 100,
        b"GET\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"GET / HTTP/1.1\r\n\r\n",
        b"GET /ws HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n",
        b"POST /prompt HTTP/1.1\r\nHost: localhost\r\nContent-Length: -5\r\n\r\n",
        b"POST /prompt HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\nZZ\r\n",
        b"GET /%zz%00 HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"GET http://[ HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"GET / HTTP/1.1\r\n" + b"A: b\r\n" * 5000 + b"\r\n",
    ],
)
def test_bytes_that_are_no_http(tmp_path, hello):
    async def test():
        async with serving({}, tmp_path) as client:
            reader, writer = await asyncio.open_connection(client.server.host, client.server.port)
            writer.write(hello)
            writer.write_eof()
            await reader.read()
            writer.close()
            assert (await answer(client, "GET", "/prompt"))[0] == 200

    run(test())
