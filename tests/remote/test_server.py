"""What a server is, what it offers, and how its answers are read: scripted servers of each kind."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from typing import Any

import pytest

from factsmith.core.errors import InputError, ServerError
from factsmith.remote import client as client_module
from factsmith.remote.replies import completion_of
from factsmith.remote.server import Completion, Server
from scripted import Answer, Asked, Notes, scripted

Body = dict[str, Any]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_module, "_FIRST_WAIT", 0.01)


def tokens_of(text: str) -> list[str]:
    """Return words with the space before each: a tokenizer for these tests."""
    words = text.split(" ")
    return [words[0], *(f" {word}" for word in words[1:])]


def log_p(token: str) -> float:
    return -0.01 if '"' in token else -len(token) / 8


def choice(body: Body, prompt: str, index: int) -> Body:
    """Return what a server like vLLM says: the prompt in capitals, or the prompt itself."""
    said = f" {prompt.upper()}.\nAnd more"
    if body.get("echo"):
        said = prompt
    tokens = tokens_of(said)
    values: list[float | None] = [log_p(token) for token in tokens]
    if body.get("echo"):
        values[0] = None
    other = -0.55 if body.get("echo") else -9.0
    tops = [{token: log_p(token), "other": other} for token in tokens]
    fields = {"tokens": tokens, "token_logprobs": values, "top_logprobs": tops}
    logprobs = fields if body.get("logprobs") else None
    return {"index": index, "text": said, "logprobs": logprobs, "finish_reason": "length"}


def completions(body: Body) -> Answer:
    prompts = [body["prompt"]] if isinstance(body["prompt"], str) else body["prompt"]
    choices = [choice(body, prompt, at) for at, prompt in enumerate(prompts)]
    return Answer({"choices": choices[::-1]})  # the order is that of "index"


def entry(name: str, **more: object) -> Body:
    return {"id": name, "object": "model", **more}


def vllm(asked: Asked) -> Answer:
    if asked.path == "/v1/models":
        base = entry("base", root="/models/base", parent=None, max_model_len=64)
        one = entry("one", root="/adapters/one", parent="base", max_model_len=None)
        return Answer({"data": [one, base]})
    if asked.path == "/version":
        return Answer({"version": "0.32.0"})
    if asked.path == "/v1/completions":
        return completions(asked.body)
    return Answer({"detail": "Not Found"}, 404)


def llama(asked: Asked) -> Answer:
    if asked.path == "/v1/models":
        return Answer({"data": [entry("m.gguf", owned_by="llamacpp")]})
    if asked.path == "/props":
        return Answer({"model_path": "/models/m.gguf"})
    if asked.path == "/lora-adapters":
        paths = ["/a/rome.gguf", "/b/rome.gguf", "/a/paris.gguf"]
        return Answer([{"id": n, "path": path, "scale": 1.0} for n, path in enumerate(paths)])
    if asked.path == "/v1/completions":
        if asked.body.get("echo"):
            return Answer({"error": {"message": "Only no echo is supported"}}, 400)
        answer = completions(asked.body)
        for one in answer.body["choices"]:
            if fields := one["logprobs"]:
                content = [
                    {"token": t, "logprob": v, "top_logprobs": [{"token": t, "logprob": v}]}
                    for t, v in zip(fields["tokens"], fields["token_logprobs"], strict=True)
                ]
                one["logprobs"] = {"content": content}
        return answer
    return Answer({"error": {"message": "File Not Found"}}, 404)


def plain(asked: Asked) -> Answer:
    """A server that takes one prompt at a time, and knows completions alone."""
    if asked.path == "/v1/models":
        return Answer({"data": [entry("gpt")]})
    if asked.path == "/v1/completions":
        if not isinstance(asked.body["prompt"], str):
            return Answer({"error": "prompt must be a string"}, 400)
        if asked.body.get("echo"):
            return Answer({"error": "echo is not supported"}, 400)
        return completions(asked.body)
    return Answer(b"<html><title>404</title>", 404)


def echoing(asked: Asked) -> Answer:
    """A server that repeats prompts with their log-probabilities, as OpenAI's once did."""
    if asked.path == "/v1/models":
        return Answer({"data": [entry("base")]})
    return completions(asked.body) if asked.path == "/v1/completions" else plain(asked)


Script = Callable[[Asked], Answer]


@pytest.mark.parametrize(
    ("script", "kind"), [(vllm, "vllm"), (llama, "llama.cpp"), (plain, "openai")]
)
def test_a_server_is_known_by_what_it_answers(script: Script, kind: str) -> None:
    with scripted(script) as running, Server.open(running.url + "/v1") as server:
        assert server.kind == kind


def test_a_name_alone_makes_no_vllm() -> None:
    def named(asked: Asked) -> Answer:
        if asked.path == "/v1/models":
            return Answer({"data": [entry("vllm", owned_by="vllm")]})
        return Answer({}, 404)

    with scripted(named) as running, Server.open(running.url) as server:
        assert server.kind == "openai"


def test_the_models_of_vllm() -> None:
    with scripted(vllm) as running, Server.open(running.url) as server:
        base, one = server.models()
        assert server.base == "base"
        assert (base.name, base.parent, base.path) == ("base", None, "/models/base")
        assert (one.name, one.parent, one.path) == ("one", "base", "/adapters/one")


def test_the_adapters_of_llama_cpp_have_names_of_their_own() -> None:
    with scripted(llama) as running, Server.open(running.url) as server:
        base, *adapters = server.models()
        assert (base.name, base.path) == ("m.gguf", "/models/m.gguf")
        assert [a.name for a in adapters] == ["/a/rome.gguf", "/b/rome.gguf", "/a/paris.gguf"]
        assert [a.number for a in adapters] == [0, 1, 2]
        server.complete("/b/rome.gguf", ["x"])
        server.complete(server.base, ["x"])
        server.complete(server.base, ["x"], scales={"/a/paris.gguf": 0.5})
        with pytest.raises(InputError, match=r"no adapter 'milan'.*m\.gguf"):
            server.complete("milan", ["x"])
    sent = [asked.body for asked in running.asked if asked.path == "/v1/completions"]
    scales = [[each["scale"] for each in body["lora"]] for body in sent]
    assert scales == [[0, 1, 0], [0, 0, 0], [0, 0, 0.5]]
    assert {body["model"] for body in sent} == {"m.gguf"}


def test_answers_come_in_order_from_many_requests() -> None:
    prompts = [f"prompt {n}" for n in range(100)]
    counted: list[tuple[int, int | None]] = []
    with scripted(vllm) as running, Server.open(running.url) as server:
        said = server.complete(
            "one", [*prompts, prompts[0]], progress=lambda _, n, of: counted.append((n, of))
        )
        assert [c.text for c in said] == [f"PROMPT {n}." for n in [*range(100), 0]]
    sent = [asked.body for asked in running.asked if asked.path == "/v1/completions"]
    assert len(sent) == 7 and sum(len(body["prompt"]) for body in sent) == 100, "no prompt twice"
    assert all(body["temperature"] == 0 and body["model"] == "one" for body in sent)
    assert counted[0] == (0, 100) and counted[-1] == (100, 100)


def test_a_server_that_takes_one_prompt_at_a_time() -> None:
    with scripted(plain) as running, Server.open(running.url) as server:
        texts = [c.text for c in server.complete("gpt", ["a", "b", "c"])]
        assert texts == ["A.", "B.", "C."]
        before = len(running.asked)
        server.complete("gpt", ["d", "e"])
        assert len(running.asked) - before == 2, "it is not tried again"


def test_a_slow_server_gets_fewer_prompts_at_once() -> None:
    gate = threading.Event()
    notes = Notes()

    def slow(asked: Asked) -> Answer:
        answer = vllm(asked)
        if asked.path == "/v1/completions" and len(asked.body["prompt"]) > 4:
            answer.wait = gate
        return answer

    with scripted(slow) as running:
        with Server.open(running.url, timeout=1.0, progress=notes) as server:
            prompts = [f"p{n}" for n in range(32)]
            said = server.complete("base", prompts)
            assert [c.text for c in said] == [f"P{n}." for n in range(32)]
        gate.set()
    assert [text for text in notes.texts if "4 prompts at once" in text] == notes.texts
    sizes = [len(a.body["prompt"]) for a in running.asked if a.path == "/v1/completions"]
    assert max(sizes) == 16 and sizes.count(4) == 8


def test_a_refusal_is_told_once_every_prompt_was_tried_alone() -> None:
    def refusing(asked: Asked) -> Answer:
        if asked.path == "/v1/completions":
            return Answer({"error": {"message": "this model is too tired"}}, 400)
        return plain(asked)

    refused = pytest.raises(ServerError, match="too tired")
    with scripted(refusing) as running, Server.open(running.url) as server, refused:
        server.complete("gpt", ["a", "b"])


@pytest.mark.parametrize("body", [{}, {"choices": []}, {"choices": [{"message": "hi"}]}, [1], None])
def test_an_answer_without_a_text_is_refused(body: object) -> None:
    def odd(asked: Asked) -> Answer:
        return Answer(body) if asked.path == "/v1/completions" else plain(asked)

    refused = pytest.raises(ServerError, match="no answer to each")
    with scripted(odd) as running, Server.open(running.url) as server, refused:
        server.complete("gpt", ["a"])


@pytest.mark.parametrize("body", [{}, {"data": []}, {"data": [{"name": "x"}]}, [], "x", None])
def test_a_server_without_models_is_refused(body: object) -> None:
    refused = pytest.raises(ServerError, match="names no model")
    with scripted(lambda _: Answer(body)) as running, refused:
        Server.open(running.url)


def test_lines_and_spaces() -> None:
    with scripted(vllm) as running, Server.open(running.url) as server:
        one, two = server.complete("base", ["a ", "a"], lines=[1, 2])
        assert one.text == "A." and two.text == "A.\nAnd more"
        assert one.whole == " A.\nAnd more" and not one.ended
    assert running.asked[-1].body["prompt"] == "a", "the space belongs to the answer"


@pytest.mark.parametrize("script", [vllm, llama])
def test_probabilities_of_both_forms(script: Script) -> None:
    with scripted(script) as running, Server.open(running.url) as server:
        (said,) = server.complete(server.base, ["a b"], top=2)
        assert said.tokens == ("", " A", " B.\nAnd", " more")
        assert said.log_probs == tuple(map(log_p, said.tokens))
        assert [top[0] for top in said.top] == list(zip(said.tokens, said.log_probs, strict=True))
        (without,) = server.complete(server.base, ["a b"])
        assert without == Completion(said.text, whole=said.whole), "only where they are asked for"


def test_the_log_probability_of_a_target() -> None:
    pairs = [("Paris is in", "France"), ("Paris is in ", "New York"), ("法国的首都是", "巴黎")]
    with scripted(echoing) as running, Server.open(running.url) as server:
        france, york, joined = server.log_prob("base", *map(list, zip(*pairs, strict=True)))
        assert france == log_p(" France") and york == log_p(" New") + log_p(" York")
        assert joined is None, "one token for both texts has no log p of its own"
        (score,) = server.scores("base", ["Paris is in"], ["New York"])
        assert score is not None and (score.n_tokens, score.right) == (2, 0.5)
        (spaced,) = server.log_prob("base", ["a b"], ["c"], gaps=["none"])
        assert spaced == log_p(" bc"), "the token that both share counts"
        assert server.gives_log_probs
    sent = [asked.body for asked in running.asked if asked.path == "/v1/completions"]
    assert all(body["echo"] and body["max_tokens"] == 0 for body in sent)
    assert math.isclose(france, -7 / 8)


@pytest.mark.parametrize("script", [llama, plain, vllm])
def test_a_server_that_gives_no_log_probabilities(script: Script) -> None:
    with scripted(script) as running, Server.open(running.url) as server:
        assert server.log_prob(server.base, ["a", "b"], ["c", "d"]) == [None, None]
        before = len(running.asked)
        assert server.log_prob(server.base, ["a"], ["c"]) == [None]
        assert len(running.asked) == before and server.gives_log_probs is False


def test_the_likelier_form_decides_about_the_gap() -> None:
    with scripted(echoing) as running, Server.open(running.url) as server:
        asked = len(running.asked)
        assert server.gaps("base", ["a b"], ["c"]) == ["space"]
        assert len(running.asked) == asked, "the texts show it"
        assert server.gaps("base", ['say "'], ["c"]) == ["none"]
        assert server.gaps("base", ["x 19"], ["45"]) == ["space"]
        assert server.gaps("base", ['"x" 19'], ["45" * 20]) == ["space"], "neither is likely"
        assert len(running.asked) > asked
    with scripted(llama) as running, Server.open(running.url) as server:
        assert server.gaps(server.base, ['say "'], ["c"]) == ["none"], "it gives no log p"


@pytest.mark.parametrize(("script", "field"), [(vllm, "prompt"), (llama, "content")])
def test_the_number_of_tokens(script: Script, field: str) -> None:
    def counting(asked: Asked) -> Answer:
        if asked.path == "/tokenize":
            return Answer({"tokens": list(range(len(asked.body[field].split())))})
        return script(asked)

    with scripted(counting) as running, Server.open(running.url) as server:
        assert server.n_tokens(["a b", "c"]) == [2, 1]
    for without in (script, plain):
        with scripted(without) as running, Server.open(running.url) as server:
            assert server.n_tokens(["a b"]) is None


def test_a_server_that_says_more_than_the_text_gives_none() -> None:
    """Some take max_tokens=0 for the default, and go on."""

    def talking(asked: Asked) -> Answer:
        answer = echoing(asked)
        if asked.path == "/v1/completions":
            for one in answer.body["choices"]:
                one["text"] += " and so on"
        return answer

    with scripted(talking) as running, Server.open(running.url) as server:
        assert server.log_prob("base", ["a"], ["c"]) == [None]


def test_half_a_character_at_the_end_is_left_out() -> None:
    def half(asked: Asked) -> Answer:
        if asked.path != "/v1/completions":
            return plain(asked)
        reason = "stop" if asked.body["prompt"] == "b" else "length"
        return Answer({"choices": [{"text": " \u6771\ufffd", "finish_reason": reason}]})

    with scripted(half) as running, Server.open(running.url) as server:
        assert [c.text for c in server.complete("gpt", ["a"])] == ["\u6771"]
        (ended,) = server.complete("gpt", ["b"])
        assert ended.text == "\u6771\ufffd" and ended.ended, "control: the model said it"


def test_the_notes_of_retries_reach_the_caller() -> None:
    answers = [Answer({"error": {"message": "Loading model"}}, 503)]
    notes = Notes()

    with scripted(lambda asked: answers.pop() if answers else vllm(asked)) as running:
        Server.open(running.url, progress=notes).client.close()
    assert len(notes.texts) == 1 and "Loading model" in notes.texts[0]


@pytest.mark.parametrize("number", [10**400, float("nan"), float("inf"), "1", None, True])
def test_what_is_no_number_counts_as_not_given(number: object) -> None:
    logs = {"tokens": [" a"], "token_logprobs": [number], "top_logprobs": [{" a": number}]}
    completion = completion_of({"text": " a", "logprobs": logs}, 1)
    assert completion.text == "a" and completion.log_probs == ()
    logs["token_logprobs"] = [-0.5]
    completion = completion_of({"text": " a", "logprobs": logs}, 1)
    assert completion.log_probs == (-0.5,) and completion.top == ((),), "control"
