"""What servers have sent, or could: each case with what becomes of the prompt that always gets it.

keep     the text is kept, figures that cannot be read are null
drop     dropped at once, with this reason
again    asked for again up to --retries, then dropped with this reason
end      asked for again up to --retries, or not at all; then the run ends with exit code 1, to be resumed
"""

from __future__ import annotations

import gzip
import json
from dataclasses import dataclass
from typing import Any

from chat_server import Fault, cut_short, refuse, reply, reset, text
from waiting import pause

DRIP = 0.4  # seconds: --timeout of the cases that take their time


@dataclass(frozen=True)
class Case:
    name: str
    fault: Fault
    fate: str
    reason: str = ""
    slow: bool = False


def body(content: object = "An answer.", reason: object = "stop", usage: object = None, **choice: Any) -> bytes:
    message = choice.pop("message", {"role": "assistant", "content": content})
    entry = {"index": 0, "message": message, "finish_reason": reason, **choice}
    counts = {"prompt_tokens": 3, "completion_tokens": 2} if usage is None else usage
    return json.dumps({"model": "a/model", "choices": [entry], "usage": counts}).encode()


def raw(content: bytes) -> Fault:
    """These bytes in place of a response, then the end of the connection."""

    def fault(handler, _):
        handler.wfile.write(content)
        handler.close_connection = True

    return fault


def drip(handler, _):
    """A body that never ends, a byte at a time, each long before a read would time out."""
    handler.send_response(200)
    handler.send_header("Content-Length", "4000")
    handler.end_headers()
    for _ in range(100):
        handler.wfile.write(b" ")
        handler.wfile.flush()
        pause(0.02)
    handler.close_connection = True


def redirect(place: str) -> Fault:
    return lambda handler, _: reply(handler, 307, b"", [("Location", place)])


HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
GZIP = b"Content-Encoding: gzip\r\n"

KEPT = [
    ("token counts as text", body(usage={"prompt_tokens": "3", "completion_tokens": "two"})),
    ("NaN as a token count", body(usage={"completion_tokens": float("nan")})),
    ("infinitely many tokens", body(usage={"completion_tokens": float("inf")})),
    ("a negative token count", body(usage={"completion_tokens": -7})),
    ("half a token", body(usage={"completion_tokens": 2.5})),
    ("a truth value as a token count", body(usage={"completion_tokens": True})),
    ("a token count of 400 digits", body(usage={"completion_tokens": 10**400})),
    ("usage is a list", body(usage=[3, 2])),
    ("usage is missing", body(usage={})),
    ("NaN as a log-prob", body(logprobs={"content": [{"logprob": float("nan")}]})),
    ("a log-prob of 400 digits", body(logprobs={"content": [{"logprob": -(10**400)}]})),
    ("log-probs as text", body(logprobs="none")),
    ("a model that is a number", body().replace(b'"a/model"', b"7")),
    ("text in parts", body([{"type": "text", "text": "An "}, {"type": "text", "text": "answer."}])),
    ("a second choice", body().replace(b'"choices": [', b'"choices": [' + json.dumps(
        {"message": {"content": "An answer."}, "finish_reason": "stop"}).encode() + b", ")),
]  # fmt: skip
DROPPED = [
    ("empty", "content is null", body(None)),
    ("empty", "content is missing", body(message={"role": "assistant"})),
    ("empty", "only blanks", body(" \n\t\u3000")),
    ("empty", "a refusal in another field", body(message={"content": None, "refusal": "I cannot."})),
    ("not_utf8", "half a surrogate pair", body("\ud83d")),
    ("not_utf8", "the other half", body("a\udc00b")),
    ("not_utf8", "half a pair as bytes", body("X").replace(b"X", b"\xed\xa0\x80")),
    ("tool_calls", "a call of a tool", body(None, "tool_calls", message={"content": None, "tool_calls": [CALL]})),
    ("tool_calls", "a call that says stop", body(message={"content": "Let me see.", "tool_calls": [CALL]})),
    ("tool_calls", "a call in the old form", body(message={"content": "", "function_call": {"name": "f"}})),
    ("content_filter", "taken out by a filter", body("An", "content_filter")),
    ("repetition_truncation", "a reason of its own", body("An", "repetition_truncation")),
    ("rows", "a reason that is a figure of ours", body("An", "rows")),
    ("unknown", "no reason", body("An", None)),
    ("unknown", "a reason that is a number", body("An", 7)),
    ("unknown", "a reason that is empty", body("An", "")),
    ("\\x1b[31m\\udc00", "a reason with control characters", body("An", "\x1b[31m\udc00")),
]
AGAIN = [
    ("abort", "aborted", body("An", "abort")),
    ("error", "failed in the middle", body("An", "error")),
    ("insufficient_system_resource", "no room", body("An", "insufficient_system_resource")),
    ("malformed", "nothing", b""),
    ("malformed", "a page", b"<html><body>Sign in</body></html>"),
    ("malformed", "torn", body()[:60]),
    ("malformed", "not UTF-8", body("X").replace(b"X", b"\xff")),
    ("malformed", "null", b"null"),
    ("malformed", "a number", b"7"),
    ("malformed", "a list", b"[]"),
    ("malformed", "no choices", b'{"id": "x"}'),
    ("malformed", "choices are null", b'{"choices": null}'),
    ("malformed", "choices are empty", b'{"choices": []}'),
    ("malformed", "a choice is null", b'{"choices": [null]}'),
    ("malformed", "the message is null", body(message=None)),
    ("malformed", "content is a number", body(7)),
    ("malformed", "content is a picture", body([{"type": "image_url", "image_url": "x"}])),
    ("malformed", "tool calls are text", body(message={"content": "x", "tool_calls": "f()"})),
    ("malformed", "100,000 brackets", b"[" * 100_000),
    ("malformed", "a number of 10,000 digits", b'{"choices": ' + b"7" * 10_000 + b"}"),
    ("malformed", "an event stream", b'data: {"choices": []}\n\ndata: [DONE]\n\n'),
    ("malformed", "an error with status 200", b'{"error": {"message": "overloaded"}}'),
    ("malformed", "an error as text", b'{"error": "overloaded \\ud800 \\u001b[31m"}'),
]
ENDS = [
    ("an error 502 with status 200", text(b'{"error": {"message": "upstream", "code": 502}}')),
    ("an error 401 as text with status 200", text(b'{"error": {"message": "no key", "code": "401"}}')),
    ("500 with an empty body", lambda handler, _: reply(handler, 500, b"")),
    ("500 with half a surrogate", refuse(500, "\ud800\x1b[31m")),
    ("503 with a list", lambda handler, _: reply(handler, 503, b"[[]]")),
    ("429 until a date that no calendar has", refuse(429, headers=[("Retry-After", "Mon, 99 Foo 99999 1:1:1")])),
    ("429 for less than no time", refuse(429, headers=[("Retry-After", "-inf")])),
    ("429 for NaN seconds", refuse(429, headers=[("Retry-After", "nan"), ("retry-after-ms", "NaN")])),
    ("401", refuse(401, "wrong key")),
    ("402", refuse(402, "Insufficient Balance")),
    ("404 with a page", lambda handler, _: reply(handler, 404, b"<html>\n\xff</html>")),
    ("a redirect to nowhere", lambda handler, _: reply(handler, 307, b"")),
    ("a redirect in a circle", redirect("/v1/chat/completions")),
    ("a redirect to another protocol", redirect("ftp://host/chat/completions")),
    ("a redirect to a port above 65535", redirect("http://127.0.0.1:99999/v1/chat/completions")),
    ("a redirect to a host that no name server knows", redirect("http://a..b/v1/chat/completions")),
    ("a redirect that is no address", redirect("http://[::1")),
    ("a reset", reset),
    ("a body that is cut", cut_short),
    ("no HTTP", raw(b"SSH-2.0-OpenSSH_9.6\r\n")),
    ("a status that is text", raw(b"HTTP/1.1 OK fine\r\n\r\n")),
    ("two lengths", raw(HEAD + b"Content-Length: 2\r\nContent-Length: 3\r\n\r\n{}")),
    ("a damaged chunk", raw(HEAD + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n{}\r\n")),
    ("a head of a megabyte", raw(HEAD + b"X: " + b"x" * 2**20 + b"\r\n\r\n")),
]

CASES = [
    *(Case(name, text(content), "keep") for name, content in KEPT),
    *(Case(name, text(content), "drop", reason) for reason, name, content in DROPPED),
    *(Case(name, text(content), "again", reason) for reason, name, content in AGAIN),
    Case("a bomb", raw(HEAD + GZIP + b"\r\n" + gzip.compress(body() + b" " * 2**22, 1)), "again", "malformed"),
    Case("damaged gzip", raw(HEAD + GZIP + b"Content-Length: 4\r\n\r\nabcd"), "again", "malformed"),
    Case("refused alone", refuse(400, "Invalid prompt: flagged"), "drop", "refused"),
    Case("filtered before it was asked", refuse(400, "no", code="content_filter"), "drop", "content_filter"),
    *(Case(name, fault, "end") for name, fault in ENDS),
    Case("a byte at a time", drip, "end", slow=True),
]
