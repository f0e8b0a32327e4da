"""What may go wrong with single rows: a row that holds `[fault KIND]` gets this answer.

`status-403` is any HTTP status with OpenAI's form of an error; the tables have the rest.
"""

import asyncio
import gzip
import json
import re
from collections.abc import Callable, Mapping
from typing import Any

MARK = re.compile(r"\[fault ([\w-]+)\]")


def refusal(code: str, message: str) -> dict:
    return {"error": {"message": message, "type": "error", "param": None, "code": code}}


# --- refusals: a status, headers and a body --------------------------------------------------
BUSY = refusal("rate_limit_exceeded", "Slow down.")
REFUSALS: dict[str, tuple[int, dict[str, str], Any]] = {
    "key": (401, {}, refusal("invalid_api_key", "Incorrect API key provided.")),
    "payment": (402, {}, {"detail": "Payment required"}),
    "unknown-model": (404, {}, refusal("model_not_found", "The model `m` does not exist.")),
    "quota": (429, {}, refusal("insufficient_quota", "You exceeded your current quota.")),
    "moderated": (403, {}, refusal("", "Your input was flagged by moderation.")),
    "forbidden": (403, {}, {"error": "Forbidden"}),
    "filtered": (400, {}, refusal("content_filter", "The response was filtered.")),
    "detail": (400, {}, {"detail": "This prompt is odd."}),
    "detail-list": (
        422,
        {},
        {"detail": [{"loc": ["body", "messages"], "msg": "odd", "type": "x"}]},
    ),
    "detail-deep": (400, {}, {"detail": {"error": {"message": "odd"}}}),
    "no-words": (400, {}, {}),
    "plain-words": (400, {}, "bad request"),
    "error-list": (400, {}, [refusal("", "odd")]),
    "error-null": (400, {}, {"error": None}),
    "error-number": (413, {}, {"error": {"message": 7, "code": 7, "param": 7}}),
    "error-surrogate": (400, {}, '{"error": {"message": "odd \\ud83d"}}'),
    "page-404": (404, {}, "<html><title>Not Found</title></html>"),
    "page-502": (502, {}, "<html><h1>Bad gateway</h1></html>"),
    "a-day": (429, {"Retry-After": "86400"}, BUSY),
    "a-day-503": (503, {"Retry-After": "86400"}, BUSY),
    "before-now": (429, {"Retry-After": "-5"}, BUSY),
    "wait-nan": (429, {"Retry-After": "nan"}, BUSY),
    "wait-inf": (429, {"Retry-After": "inf"}, BUSY),
    "wait-date": (429, {"Retry-After": "Fri, 31 Dec 9999 23:59:59 GMT"}, BUSY),
    "wait-words": (429, {"Retry-After": "soon"}, BUSY),
    "moved": (301, {"Location": "http://127.0.0.1:9/v1"}, {}),
    "moved-here": (307, {"Location": "/v1/chat/completions"}, {}),
    "moved-nowhere": (308, {}, {}),
}


# --- answers: what becomes of a good completion ----------------------------------------------
def with_message(**fields: Any) -> Callable[[dict], dict]:
    return lambda good: good | {"choices": [good["choices"][0] | {"message": fields}]}


def with_choice(**fields: Any) -> Callable[[dict], dict]:
    return lambda good: good | {"choices": [good["choices"][0] | fields]}


def with_field(**fields: Any) -> Callable[[dict], dict]:
    return lambda good: good | fields


def text(of: str) -> Callable[[dict], str]:
    return lambda good: of


NAN, INF = float("nan"), float("inf")
ANSWERS: dict[str, Callable[[dict], Any]] = {
    "empty-body": text(""), "words": text("Service ready."), "half": lambda g: json.dumps(g)[:60],
    "null": text("null"), "list": text("[]"), "number": text("7"), "string": text('"4.5"'),
    "object": text("{}"), "nul-bytes": text("\0" * 50),
    "stream": text("data: {}\n\ndata: [DONE]\n"),
    "deep": text('{"choices": ' + "[" * 200_000 + "]" * 200_000 + "}"),
    "deep-extra": lambda g: json.dumps(g)[:-1] + ', "x": ' + "[" * 5000 + "]" * 5000 + "}",
    "long-number": text('{"choices": ' + "9" * 10_000 + "}"),
    "page": text("<html><body>Welcome to nginx!</body></html>"),
    "error-in-200": with_field(error={"message": "overloaded", "code": 503}, choices=None),
    "no-choices": with_field(choices=[]), "null-choices": with_field(choices=None),
    "null-choice": with_field(choices=[None]), "text-choice": with_field(choices=["4"]),
    "no-message": with_choice(message=None), "broke-off": with_choice(finish_reason="error"),
    "odd-reason": with_choice(finish_reason=["stop"]), "cut": with_choice(finish_reason="length"),
    "null-content": with_message(content=None), "no-text": with_message(content=""),
    "blank": with_message(content=" \n "), "nan-content": with_message(content=NAN),
    "number-content": with_message(content=4.5), "parts": with_message(
        content=[{"type": "text", "text": "4"}, {"type": "text", "text": ".5"}]),
    "no-parts": with_message(content=[]), "odd-parts": with_message(content=[None, 4, {"text": 4}]),
    "declined": with_message(content=None, refusal="I cannot help with that."),
    "tool": with_message(content=None, tool_calls=[{"id": "x", "type": "function"}]),
    "surrogate": with_message(content="4.5 \ud83d"), "nul-text": with_message(content="4.5\n\0"),
    "thought": with_message(content="<think>Is it a 3?</think>4.5"),
    "cut-thought": with_choice(message={"content": "<think>Is it a 3"}, finish_reason="length"),
    "usage-nan": with_field(usage={"prompt_tokens": NAN, "completion_tokens": INF}),
    "usage-text": with_field(usage="many"), "usage-list": with_field(usage=[1, 2]),
    "usage-strings": with_field(usage={"prompt_tokens": "12", "completion_tokens": "x"}),
    "usage-below": with_field(usage={"prompt_tokens": -9, "completion_tokens": -1e30}),
    "usage-huge": with_field(usage={"prompt_tokens": 10**400, "completion_tokens": 1e300}),
    "usage-deep": with_field(usage={"prompt_tokens": {"a": []}, "completion_tokens": [1]}),
    "usage-null": with_field(usage=None), "no-model": with_field(model=None),
    "odd-model": with_field(model=["m"]), "model-surrogate": with_field(model="m\ud83d"),
    "long-model": with_field(model="m" * 100_000),
}  # fmt: skip

# --- headers beside a good completion ----------------------------------------------------------
KINDS = ("requests", "tokens")
HEADERS: dict[str, dict[str, str]] = {
    f"limit-{name}": {f"x-ratelimit-limit-{k}": limit for k in KINDS}
    | {f"x-ratelimit-remaining-{k}": left for k in KINDS}
    for name, limit, left in (
        ("below", "-60", "-1"), ("zero", "0", "0"), ("nan", "nan", "nan"), ("inf", "inf", "-inf"),
        ("tiny", "1e-9", "0"), ("debt", "60000", "-1e12"), ("words", "many", "few"),
        ("endless", "1e300", "1e300"),
    )
}  # fmt: skip
HEADERS["odd-charset"] = {"Content-Type": "application/json; charset=klingon"}
HEADERS["odd-type"] = {"Content-Type": "\x7f/\x7f"}
HEADERS["other-names"] = {"X-A": "\xff"}


# --- the wire: bytes that are no answer ------------------------------------------------------
def head(body: bytes, *lines: str, status: str = "200 OK") -> bytes:
    lines = lines or (f"Content-Length: {len(body)}",)
    return "\r\n".join(
        [f"HTTP/1.1 {status}", "Content-Type: application/json", *lines, "", ""]
    ).encode()


def bytes_of(kind: str, good: bytes) -> bytes:
    """The bytes of an answer that is broken below its JSON."""
    packed = gzip.compress(good)
    table = {
        "no-http": b"hello\r\n\r\n", "odd-status": head(good, status="abc OK") + good,
        "short": head(good, f"Content-Length: {len(good) + 100}") + good,
        "odd-length": head(good, "Content-Length: many") + good,
        "two-lengths": head(good, "Content-Length: 3", "Content-Length: 7") + good,
        "half-chunks": head(good, "Transfer-Encoding: chunked") + b"fff\r\n" + good,
        "odd-chunks": head(good, "Transfer-Encoding: chunked") + b"zz\r\n" + good,
        "no-gzip": head(good, f"Content-Length: {len(good)}", "Content-Encoding: gzip") + good,
        "half-gzip": head(b"", f"Content-Length: {len(packed) - 9}", "Content-Encoding: gzip")
        + packed[:-9],
        "gzip": head(b"", f"Content-Length: {len(packed)}", "Content-Encoding: gzip") + packed,
        "utf-16": head(wide := good.decode().encode("utf-16")) + wide,
        "latin": head(good[:-9] + b"\xff\xfe") + good[:-9] + b"\xff\xfe",
        "bom": head(b"\xef\xbb\xbf" + good) + b"\xef\xbb\xbf" + good,
        "long-header": head(good, f"X-Long: {'x' * 200_000}", f"Content-Length: {len(good)}")
        + good,
        "empty-204": head(b"", status="204 No Content"),
        "later-202": head(b"{}", status="202 Accepted") + b"{}",
        "closed": b"", "reset": b"", "hangs": b"", "drips": b"",
        "half-head": head(good)[:40],
    }  # fmt: skip
    return table[kind]


WIRE = (
    "no-http odd-status short odd-length two-lengths half-chunks odd-chunks no-gzip half-gzip gzip "
    "utf-16 latin bom long-header empty-204 later-202 closed reset hangs drips half-head "
    "endless-body"
).split()
FATAL = ("key", "payment", "unknown-model", "quota", "status-401", "status-402", "status-407")
STATUSES = (
    "400 403 404 405 406 408 409 410 411 413 414 415 417 418 421 422 423 424 425 428 429 431 451 "
    "500 501 502 503 504 507 520 529 599 401 402 407"
).split()


def kinds() -> list[str]:
    """All of them."""
    return [*(f"status-{s}" for s in STATUSES), *REFUSALS, *ANSWERS, *HEADERS, *WIRE]


def serve(http: Any, kind: str, good: Mapping[str, Any]) -> None:
    """Answer a row as its mark demands; `good` is the completion that it would have got."""
    if kind.startswith("status-"):
        http.send(int(kind[7:]), refusal("", f"HTTP {kind[7:]} for this row."))
    elif kind in REFUSALS:
        status, headers, body = REFUSALS[kind]
        http.send(status, body, headers)
    elif kind in ANSWERS:
        value = ANSWERS[kind](dict(good))
        http.send(200, value, kind="application/json" if kind != "page" else "text/html")
    elif kind in HEADERS:
        http.send(200, good, HEADERS[kind])
    else:
        on_the_wire(http, kind, json.dumps(good).encode())


def on_the_wire(http: Any, kind: str, good: bytes) -> None:
    transport = http.transport
    if kind == "reset":
        transport.abort()
    elif kind in ("drips", "endless-body"):
        asyncio.get_running_loop().create_task(pour(transport, good, kind == "drips"))
    elif kind != "hangs":
        transport.write(bytes_of(kind, good))
        if kind not in ("gzip", "utf-16", "latin", "bom", "long-header", "empty-204", "later-202"):
            transport.close()


async def pour(transport: Any, good: bytes, slowly: bool) -> None:
    """A byte now and then, or a body without an end."""
    size = len(good) if slowly else 10**12
    transport.write(head(b"", f"Content-Length: {size}"))
    for i in range(len(good) if slowly else 4000):
        if transport.is_closing():
            return
        transport.write(good[i : i + 1] if slowly else b" " * 1_000_000)
        await asyncio.sleep(0.2 if slowly else 0.001)
