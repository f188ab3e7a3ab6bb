"""Requests and messages of any kind: none of them breaks the server, and none is answered as if it had."""

import json

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from server_kit import Listener, answer, echo, echo_prompt, finished, node, run, serving, submit


def words(text):
    return st.sampled_from(text.split())


# Values that a hostile or broken client may put anywhere.
NAMES = words(
    "prompt client_id prompt_id number front extra_data partial_execution_targets delete clear job_ids class_type "
    "inputs text 1 2 __value__ extra_pnginfo workflow id type data"
)
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=8),
    st.sampled_from(["Echo", "1", "2", 10**400, "../..", "\0", "a" * 5000, "00000000-0000-0000-0000-000000000000"]),
)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES | st.text(max_size=4), inner, max_size=4)
)
NODES = st.fixed_dictionaries(
    {"class_type": st.sampled_from(["Echo", "Pass"]) | VALUES},
    optional={"inputs": st.dictionaries(st.sampled_from(["text", "other"]), VALUES, max_size=2), "_meta": VALUES},
)
PROMPTS = st.fixed_dictionaries(
    {"prompt": st.dictionaries(st.sampled_from("123"), NODES | VALUES, max_size=3) | VALUES},
    optional={
        "client_id": VALUES,
        "prompt_id": VALUES,
        "number": VALUES,
        "front": VALUES,
        "extra_data": VALUES | st.fixed_dictionaries({"extra_pnginfo": VALUES}),
        "partial_execution_targets": VALUES,
    },
)
# Graphs that run, with anything beside them.
GOOD = PROMPTS.map(lambda body: {**body, "prompt": {"1": {"class_type": "Echo", "inputs": {"text": "a"}}}})
BODIES = st.one_of(PROMPTS.map(json.dumps), VALUES.map(json.dumps), st.text(max_size=50), st.binary(max_size=50))
QUERIES = st.lists(
    st.tuples(
        st.sampled_from(["status", "limit", "offset", "sort_by", "sort_order", "max_items", "workflow_id", "clientId"]),
        st.sampled_from(["", "-1", "0", "x", "1e9", "9" * 30, "completed", "pending,failed", "%00", "desc"])
        | st.text(max_size=5),
    ),
    max_size=3,
)
REQUESTS = st.tuples(
    st.sampled_from(["GET", "POST", "PUT", "DELETE", "HEAD", "OPTIONS", "PATCH"]),
    st.sampled_from(["", "/api"]),
    words(
        "/prompt /queue /history /history/a /jobs /jobs/a /jobs/a/cancel /jobs/cancel /free /interrupt /object_info "
        "/object_info/Echo /object_info/%00 /features /ws /nothing"
    ),
    QUERIES,
    BODIES,
)


def examples(strategy, count):
    """`count` values of a strategy, the same ones at every run."""
    found = []

    @settings(
        max_examples=count, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
    )
    @given(strategy)
    def collect(value):
        found.append(value)

    collect()
    return found


FUZZED_NODES = {"Echo": echo(), "Pass": node(lambda text: (text,), text="*")}


def test_no_request_breaks_the_server(tmp_path):
    requests = examples(REQUESTS, 400) + [
        ("POST", "", "/prompt", [], json.dumps(prompt)) for prompt in examples(PROMPTS, 300) + examples(GOOD, 100)
    ]

    async def test():
        async with serving(FUZZED_NODES, tmp_path) as client:
            accepted = 0
            for method, prefix, path, query, body in requests:
                try:
                    data = body if isinstance(body, bytes) else body.encode("utf-8", "surrogatepass")
                    async with client.request(method, prefix + path, params=query, data=data) as response:
                        await response.read()
                except ValueError:
                    continue  # a query that the client itself does not send
                assert response.status < 500, (method, path, query, body)
                accepted += path == "/prompt" and method == "POST" and response.status == 200
            assert accepted > 0
            assert (await answer(client, "GET", "/prompt"))[0] == 200
            assert (await finished(client, await submit(client, echo_prompt("alive"))))["status"]["completed"]
            for path in ("/history", "/jobs", "/queue"):
                status, _ = await answer(client, "GET", path)
                assert status == 200

    run(test())


def test_no_socket_message_breaks_the_server(tmp_path):
    messages = examples(VALUES.map(json.dumps) | st.text(max_size=100) | st.binary(max_size=100), 300)
    messages += [json.dumps({"type": "feature_flags", "data": data}) for data in examples(VALUES, 100)]

    async def test():
        async with serving({"Echo": echo()}, tmp_path) as client:
            listener = await Listener.open(client, "me")
            for message in messages:
                if isinstance(message, bytes):
                    await listener.socket.send_bytes(message)
                else:
                    await listener.socket.send_str(message.encode("utf-8", "replace").decode())
            await listener.end_of(await submit(client, echo_prompt("alive"), client_id="me"))
            assert "executed" in listener.types()

    run(test())
