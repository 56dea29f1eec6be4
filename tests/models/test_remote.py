import json
import socket
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from fiducial.core.errors import ConfigError, EndpointError, MissingExtraError, ModelError
from fiducial.core.records import Message, user
from fiducial.models.remote import FIRST, LAST, RemoteModel

GARBAGE = object()
SOON = {"retry-after-ms": "5"}


def answer(text="hello", n=1, finish="stop", **more):
    message = {"role": "assistant", "content": text}
    choices = [{"index": i, "message": message, "finish_reason": finish} | more for i in range(n)]
    return 200, {"object": "chat.completion", "choices": choices, "usage": {"prompt_tokens": 7, "completion_tokens": 3 * n}}


def error(status, message="no", code=None):
    return status, {"error": {"message": message, "code": code, "type": "x"}}


class Server:
    """A real HTTP server. `reply(body, number)` gives (status, JSON) or GARBAGE for each request."""

    def __init__(self):
        self.asked, self.keys, self.open, self.most = [], [], 0, 0
        self.reply = lambda body, number: answer(n=body.get("n", 1))
        server, lock = self, threading.Lock()

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                with lock:
                    number = len(server.asked)
                    server.asked.append(body)
                    server.keys.append(self.headers["authorization"])
                    server.open += 1
                    server.most = max(server.most, server.open)
                reply = server.reply(body, number)
                with lock:
                    server.open -= 1
                status, payload = (200, b"<html>{{{") if reply is GARBAGE else (reply[0], json.dumps(reply[1]).encode())
                self.send_response(status)
                for name, value in {"content-type": "application/json", "content-length": str(len(payload)), **SOON}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(payload)

            def log_message(self, *_):
                pass

        class Quiet(ThreadingHTTPServer):
            request_queue_size = 64  # with the usual 5 some of many connections at once are dropped

            def handle_error(self, *_):
                """A client that gave up is part of the tests."""

        self.http = Quiet(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"
        threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def close(self):
        self.http.shutdown()
        self.http.server_close()


@pytest.fixture(autouse=True)
def _alone(tmp_path, monkeypatch):
    monkeypatch.setenv("FIDUCIAL_CACHE", str(tmp_path / "cache"))
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL", "HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def server():
    server = Server()
    yield server
    server.close()


@pytest.fixture
def connect(server):
    opened = []

    def make(**options):
        opened.append(RemoteModel("m", **({"base_url": server.url} | options)))
        return opened[-1]

    yield make
    for model in opened:
        model.close()


def echo(body, _):
    return answer(body["messages"][-1]["content"])


def test_answers_come_in_the_order_of_the_questions(server, connect):
    server.reply = echo
    groups = connect().sample([user(str(i)) for i in range(20)])
    assert [group[0].text for group in groups] == [str(i) for i in range(20)]


def test_settings_and_turns_are_sent(server, connect):
    connect().sample([(Message(role="system", content="s"), *user("u"))], max_tokens=5, temperature=0.5, top_p=0.9, stop=["."])
    (body,) = server.asked
    assert body["messages"] == [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    assert (body["model"], body["max_tokens"], body["temperature"], body["top_p"], body["stop"]) == ("m", 5, 0.5, 0.9, ["."])


def test_finish_counts_and_log_probabilities_are_read(server, connect):
    server.reply = lambda *_: answer("ab", finish="length", logprobs={"content": [{"token": "a", "logprob": -0.5}, {"token": "b", "logprob": -1.5}]})
    model = connect(logprobs=True)
    ((got,),) = model.sample([user("x")])
    assert (got.finish, got.prompt_tokens, got.completion_tokens, got.logprobs) == ("length", 7, 2, (-0.5, -1.5))
    assert server.asked[0]["logprobs"] is True
    assert (model.usage.requests, model.usage.prompt_tokens, model.usage.completion_tokens) == (1, 7, 2)


def test_a_content_filter_is_filtered_and_no_content_is_empty(server, connect):
    server.reply = lambda *_: answer(None, finish="content_filter")
    ((got,),) = connect().sample([user("x")])
    assert (got.finish, got.text) == ("filtered", "")


def test_text_after_a_stop_is_cut_even_where_the_server_ignores_it(server, connect):
    server.reply = lambda *_: answer("one. two")
    assert connect().sample([user("x")], stop=["."])[0][0].text == "one"


def test_several_samples_are_one_request_where_the_server_knows_n(server, connect):
    (group,) = connect().sample([user("x")], k=3, temperature=1.0)
    assert len(group) == 3
    assert [body.get("n") for body in server.asked] == [3]


def test_where_the_server_ignores_n_the_rest_is_asked_with_other_seeds(server, connect):
    server.reply = lambda body, number: answer(str(number))
    model = connect()
    (group,) = model.sample([user("x")], k=3, temperature=1.0)
    assert sorted(c.text for c in group) == ["0", "1", "2"]
    assert len({body["seed"] for body in server.asked}) == 3
    model.sample([user("y")], k=2, temperature=1.0)
    assert all("n" not in body for body in server.asked[1:])  # it is not asked again


def test_where_the_server_refuses_n_samples_are_asked_one_by_one(server, connect):
    server.reply = lambda body, _: error(400, "only one choice") if "n" in body else answer()
    (group,) = connect().sample([user("x")], k=3, temperature=1.0)
    assert [c.finish for c in group] == ["stop"] * 3


def test_at_temperature_zero_one_request_serves_all_samples(server, connect):
    (group,) = connect().sample([user("x")], k=4)
    assert len(group) == 4
    assert len(server.asked) == 1
    assert "n" not in server.asked[0]


def test_sample_one_of_seed_zero_is_not_sample_zero_of_seed_one(server, connect):
    server.reply = lambda body, number: answer(str(body["seed"]))
    model = connect()
    first = {c.text for c in model.sample([user("x")], k=3, temperature=1.0, seed=0)[0]}
    second = {c.text for c in model.sample([user("x")], k=3, temperature=1.0, seed=1)[0]}
    assert not first & second


def test_requests_run_side_by_side_up_to_the_limit(server, connect):
    def slow(body, _):
        time.sleep(0.05)
        return answer()

    server.reply = slow
    connect(concurrency=4).sample([user(str(i)) for i in range(12)])
    assert server.most == 4


def test_too_many_requests_are_tried_again(server, connect):
    server.reply = lambda _, number: error(429) if number < 2 else answer()
    ((got,),) = connect().sample([user("x")])
    assert got.text == "hello"
    assert len(server.asked) == 3


def test_one_request_that_fails_for_good_is_a_completion_that_says_so(server, connect):
    server.reply = lambda body, _: error(500, "boom") if body["messages"][0]["content"] == "bad" else answer()
    model = connect(retries=1)
    groups = model.sample([user("good"), user("bad"), user("fine")])
    assert [g[0].finish for g in groups] == ["stop", "error", "stop"]
    assert "500" in groups[1][0].error
    assert "boom" in groups[1][0].error
    assert model.usage.failed == 1


def test_when_the_first_requests_all_fail_the_endpoint_is_at_fault(server, connect):
    server.reply = lambda *_: error(500, "boom")
    with pytest.raises(EndpointError, match="5 requests in a row failed") as failure:
        connect(retries=0, concurrency=1).sample([user(str(i)) for i in range(50)])
    assert server.url in str(failure.value)
    assert "boom" in str(failure.value)
    assert len(server.asked) == FIRST == 5


def test_when_the_endpoint_goes_away_later_it_is_noticed(server, connect):
    server.reply = lambda _, number: answer() if number < 3 else error(503)
    with pytest.raises(EndpointError, match="20 requests in a row"):
        connect(retries=0, concurrency=1).sample([user(str(i)) for i in range(50)])
    assert len(server.asked) == 23


def test_prompts_that_are_refused_say_nothing_about_the_endpoint(server, connect):
    server.reply = lambda *_: error(400, "context too long")
    groups = connect().sample([user(str(i)) for i in range(LAST - 1)])
    assert {g[0].finish for g in groups} == {"error"}
    assert "context too long" in groups[0][0].error


def test_an_endpoint_that_refuses_everything_is_asked_no_further_and_the_field_it_refuses_can_be_left_out(server, connect):
    server.reply = lambda body, _: error(400, "no 'max_tokens'") if "max_tokens" in body or "temperature" in body else answer()
    with pytest.raises(EndpointError, match=r"20 requests failed and none succeeded, the last with: .*max_tokens"):
        connect(concurrency=1).sample([user(str(i)) for i in range(50)])
    assert len(server.asked) == LAST
    body = {"max_tokens": None, "temperature": None, "max_completion_tokens": 9}
    ((found,),) = connect(body=body).sample([user("x")])
    assert found.text == "hello"
    assert server.asked[-1]["max_completion_tokens"] == 9


def test_a_prompt_that_the_providers_filter_refuses_is_filtered(server, connect):
    server.reply = lambda *_: error(400, "the prompt was filtered", "content_filter")
    model = connect()
    (group,) = model.sample([user("x")], k=2, temperature=1.0)
    assert [c.finish for c in group] == ["filtered", "filtered"]
    assert model.usage.failed == 0


@pytest.mark.parametrize(("status", "code", "advice"), [(401, None, "OPENAI_API_KEY"), (403, None, "OPENAI_API_KEY"), (404, None, "model name 'm'")])
def test_a_wrong_key_or_model_stops_at_once_and_says_what_to_do(server, connect, status, code, advice):
    server.reply = lambda *_: error(status, "nope", code)
    with pytest.raises(EndpointError, match=advice):
        connect(concurrency=1).sample([user(str(i)) for i in range(9)])
    assert len(server.asked) == 1


def test_a_model_that_is_unknown_by_code_stops_at_once(server, connect):
    server.reply = lambda *_: error(400, "nope", "model_not_found")
    with pytest.raises(EndpointError, match="model name"):
        connect().sample([user("x")])


def test_a_refused_connection_names_the_address():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
    model = RemoteModel("m", base_url=url, retries=0)
    with pytest.raises(EndpointError, match="start the server") as failure:
        model.sample([user("x")])
    assert url in str(failure.value)
    model.close()


def test_a_stalled_request_ends_after_the_timeout(server, connect):
    gate = threading.Event()
    server.reply = lambda *_: (gate.wait(5), answer())[1]
    began = time.monotonic()
    ((got,),) = connect(timeout=1, retries=0).sample([user("x")])
    assert time.monotonic() - began < 4
    assert got.finish == "error"
    assert "no answer within 1 seconds" in got.error
    gate.set()


def test_a_stalled_endpoint_is_given_up(server, connect):
    gate = threading.Event()
    server.reply = lambda *_: (gate.wait(5), answer())[1]
    with pytest.raises(EndpointError, match="no answer within 1 seconds"):
        connect(timeout=1, retries=0).sample([user(str(i)) for i in range(100)])
    gate.set()


def test_a_stalled_endpoint_is_told_of_after_the_first_timeout_and_once_for_all_requests(server, connect, caplog):
    gate = threading.Event()
    server.reply = lambda *_: (gate.wait(20), answer())[1]
    model = connect(timeout=1, retries=2)  # long enough for a busy machine to connect
    with pytest.raises(EndpointError, match="no answer within 1 seconds") as failure:
        model.sample([user(str(i)) for i in range(8)])
    gate.set()
    assert "timeout" in failure.value.hint
    assert [r.getMessage() for r in caplog.records] == [f"{server.url}: no answer within 1 seconds, trying again ({n} of 2)" for n in (1, 2)]


def test_one_slow_answer_among_others_is_not_told_of(server, connect, caplog):
    slow = []
    server.reply = lambda body, _: (time.sleep(0.6 if body["messages"][-1]["content"] == "slow" and not slow.append(1) and len(slow) < 2 else 0.05), answer())[
        1
    ]
    connect(timeout=0.4, retries=1, concurrency=2).sample([user("slow"), *(user(str(i)) for i in range(20))])
    assert len(slow) == 2  # it was tried again
    assert caplog.records == []


def test_a_host_that_takes_no_connection_is_said_so():
    from fiducial.models.remote import _waited

    class TimeoutException(Exception):  # noqa: N818 as it is called so in httpx
        pass

    class ConnectTimeout(TimeoutException):
        pass

    assert _waited(ConnectTimeout(), 60) == "no connection within 10 seconds"
    assert _waited(TimeoutException(), 60) == "no answer within 60 seconds"
    assert _waited(OSError(), 60) == ""


@pytest.mark.parametrize("reply", [GARBAGE, (200, []), (200, {"choices": []}), (200, {"choices": [{"message": {"content": 3}}]}), (200, None)])
def test_an_answer_that_makes_no_sense_is_an_error_and_not_a_crash(server, connect, reply):
    server.reply = lambda *_: reply
    ((got,),) = connect(retries=0).sample([user("x")])
    assert got.finish == "error"
    assert "not a chat completion" in got.error


def test_a_repeated_run_asks_for_nothing(server, connect):
    server.reply = lambda _, number: answer(str(number))
    first = connect().sample([user("a"), user("b")], k=2, temperature=1.0)
    asked, again = len(server.asked), connect()
    assert again.sample([user("a"), user("b")], k=2, temperature=1.0) == first
    assert len(server.asked) == asked
    assert again.usage.cached == 4
    assert again.usage.requests == 0


def test_more_samples_ask_only_for_the_missing_ones(server, connect):
    model = connect()
    model.sample([user("a")], k=2, temperature=1.0)
    model.sample([user("a")], k=5, temperature=1.0)
    assert [body["n"] for body in server.asked] == [2, 3]


@pytest.mark.parametrize("change", [{"seed": 1}, {"max_tokens": 9}, {"temperature": 0.5}, {"top_p": 0.5}, {"stop": ["x"]}])
def test_other_settings_are_asked_anew(server, connect, change):
    model = connect()
    model.sample([user("a")])
    model.sample([user("a")], **change)
    assert len(server.asked) == 2


def test_failures_are_not_kept(server, connect):
    server.reply = lambda _, number: answer() if number != 1 else error(500)
    model = connect(retries=0)
    model.sample([user("a")])
    assert model.sample([user("b")])[0][0].finish == "error"
    assert model.sample([user("b")])[0][0].finish == "stop"


def test_what_came_before_the_endpoint_failed_is_kept(server, connect):
    server.reply = lambda _, number: answer() if number < 3 else error(503)
    questions = [user(str(i)) for i in range(40)]
    with pytest.raises(EndpointError):
        connect(retries=0, concurrency=1).sample(questions)
    server.reply = lambda *_: answer()
    model = connect()
    model.sample(questions)
    assert (model.usage.cached, model.usage.requests) == (3, 37)


def test_without_cache_everything_is_asked_again(server, connect):
    model = connect(cache=False)
    model.sample([user("a")])
    model.sample([user("a")])
    assert len(server.asked) == 2


def test_answers_arrive_in_the_callers_thread(server, connect):
    threads, seen = set(), {}

    def came(index, completions):
        threads.add(threading.get_ident())
        seen[index] = completions

    groups = connect().sample([user(str(i)) for i in range(5)], arrived=came)
    assert threads == {threading.get_ident()}
    assert [seen[i] for i in range(5)] == groups


def test_an_error_in_the_callers_function_ends_the_sampling(server, connect):
    def came(index, completions):
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        connect(concurrency=1).sample([user(str(i)) for i in range(200)], arrived=came)
    time.sleep(0.1)
    before = len(server.asked)
    time.sleep(0.1)
    assert len(server.asked) == before < 200


def test_it_works_where_an_event_loop_is_running(server, connect):
    import asyncio

    async def inside():
        return connect().sample([user("x")])

    assert asyncio.run(inside())[0][0].text == "hello"


def test_a_begun_answer_is_only_sent_where_the_server_continues_it(server, connect):
    begun = (*user("x"), Message(role="assistant", content="Sure"))
    ((got,), (other,)) = connect().sample([begun, user("x")])
    assert (got.finish, other.finish) == ("error", "stop")
    assert "prefill" in got.error
    connect(prefill=True).sample([begun])
    assert server.asked[-1]["continue_final_message"] is True
    assert server.asked[-1]["add_generation_prompt"] is False


def test_text_that_is_not_unicode_is_an_error_completion(server, connect):
    ((got,),) = connect().sample([user("\ud800")])
    assert got.finish == "error"
    assert server.asked == []


def test_the_key_comes_from_the_environment_or_is_none(server, connect, monkeypatch):
    connect().sample([user("x")])
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    connect().sample([user("y")])
    assert server.keys == ["Bearer none", "Bearer secret"]


def test_the_hosted_service_needs_a_key():
    with pytest.raises(ModelError, match="OPENAI_API_KEY"):
        RemoteModel("gpt-x")


def test_the_fingerprint_names_the_endpoint_and_the_model(server, connect):
    assert connect().fingerprint == f"m@{server.url}"
    assert connect().uri == "openai:m"


@pytest.mark.parametrize("options", [{"base_url": "localhost:8000"}, {"concurrency": 0}, {"timeout": 0}, {"retries": -1}])
def test_options_out_of_range_are_config_errors(connect, options):
    with pytest.raises(ConfigError):
        connect(**options)


@pytest.mark.parametrize("options", [{"k": 0}, {"max_tokens": 0}, {"temperature": -1}, {"top_p": 0}])
def test_sampling_settings_out_of_range_are_config_errors(connect, options):
    with pytest.raises(ConfigError):
        connect().sample([user("x")], **options)


def test_without_the_package_the_command_that_installs_it_is_named(server, monkeypatch):
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(MissingExtraError, match=r'pip install -e "\.\[remote\]"'):
        RemoteModel("m", base_url=server.url)


def test_nothing_asked_is_nothing_answered(connect):
    assert connect().sample([]) == []


def test_it_can_be_closed_twice_and_used_again(connect):
    model = connect()
    model.sample([user("x")])
    model.close()
    model.close()
    assert model.sample([user("y")])[0][0].text == "hello"


def test_name_and_password_in_the_base_url_are_told_to_nobody():
    model = RemoteModel("m", base_url="http://ada:pw-1@127.0.0.1:9/v1", retries=0, cache=False)
    assert (model.fingerprint, model.address) == ("m@http://127.0.0.1:9/v1", "http://127.0.0.1:9/v1")
    with pytest.raises(EndpointError) as caught:
        model.sample([user("hi")])
    assert "pw-1" not in str(caught.value)
    model.close()
    with pytest.raises(ConfigError) as wrong:
        RemoteModel("m", base_url="ada:pw-1@host/v1")
    assert "pw-1" not in str(wrong.value)
