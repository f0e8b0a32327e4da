"""A small OpenAI-compatible server with planted faults, for tests that count every request.

    python tests/faulty_server.py --port 0 --latency 0.05 --p429 0.1 --rpm 6000

prints its address, then serves chat, models, files and batches until it is killed. What happens to
a request depends only on the seed, the request's content and how often it has come, so that two
runs see the same faults. `GET /stats` says what was asked; `GET /hashes` how often each content was
asked and answered. A hash is also in the `id` of the reply that it got.
"""

import argparse
import asyncio
import hashlib
import json
import math
import random
import re
import time
from collections import Counter
from typing import Any

from row_faults import MARK, refusal
from row_faults import serve as serve_fault

FAULTS = ("p429", "p500", "phang", "preset", "phalf", "pmalformed", "pduplicate")
PERMANENT = {
    "401": (401, "invalid_api_key", "Incorrect API key provided: {key}."),
    "403": (403, "unsupported_country", "Country not supported."),
    "404": (404, "model_not_found", "The model `{model}` does not exist."),
    "quota": (429, "insufficient_quota", "You exceeded your current quota, check your plan."),
    "html": (200, "", "<html><body>Welcome to nginx!</body></html>"),
}
LENGTH = ("[over-long]", 400, "context_length_exceeded", "The maximum context length is 9.")


def options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--port", type=int, default=0, help="0: any free port")
    add("--seed", type=int, default=0, help="decides which request meets which fault")
    add("--latency", type=float, default=0.0, help="seconds until a reply is sent")
    add("--jitter", type=float, default=0.0, help="seconds added, at most, to the latency")
    add("--rpm", type=float, default=0, help="requests a minute that are let in; 0: all")
    add("--tpm", type=float, default=0, help="tokens a minute that are let in; 0: all")
    add("--window", type=float, default=60, help="seconds' worth of requests that a rest saves up")
    add("--headers", type=int, default=1, help="0: say nothing of limits")
    for fault in FAULTS:
        add(f"--{fault}", type=float, default=0, help=f"share of requests that meet {fault[1:]}")
    add("--retry_after", type=float, default=0, help="seconds; sent with a planted 429")
    add("--burst_every", type=int, default=0, help="after so many requests ...")
    add("--burst_length", type=int, default=0, help="... so many are answered 429")
    add("--permanent", choices=PERMANENT, help="answer everything with this refusal")
    add("--reply", help="the text of every reply; default: one that fits the question")
    add("--thinks", type=int, default=0, help="tokens that the model thinks for: a new one")
    add("--redirect", help="an address that every chat is sent on to")
    add("--echo_key", type=int, default=0, help="1: the key that came stands in every answer")
    add("--batch_seconds", type=float, default=0, help="how long a batch takes")
    add("--batch_max", type=int, default=50_000, help="requests that a batch may have")
    add("--pexpired", type=float, default=0, help="share of a batch's requests that expire")
    return parser


class Bucket:
    """Tokens that flow in evenly; what is not used is saved up to a window's worth."""

    def __init__(self, per_minute: float, window: float):
        self.rate, self.full = per_minute / 60, per_minute / 60 * window
        self.level, self.at = self.full, time.monotonic()

    def refill(self) -> None:
        now = time.monotonic()
        self.level = min(self.full, self.level + (now - self.at) * self.rate)
        self.at = now


class Server:
    """What is counted and remembered between requests."""

    def __init__(self, args: argparse.Namespace):
        self.args, self.count, self.statuses = args, 0, Counter()
        self.all = 0  # whatever came, by any route
        self.asked, self.answered = Counter(), Counter()
        self.buckets = {
            name: Bucket(per_minute, args.window)
            for name, per_minute in (("requests", args.rpm), ("tokens", args.tpm))
            if per_minute
        }
        self.files: dict[str, bytes] = {}
        self.batches: dict[str, dict] = {}
        self.in_flight = self.most_in_flight = 0
        self.let_in = {"requests": 0.0, "tokens": 0.0}
        self.first = self.last = 0.0  # when a request came

    def stats(self) -> dict:
        return {
            "requests": self.count,
            "all": self.all,
            "statuses": dict(self.statuses),
            "contents": len(self.asked),
            "answered": len(self.answered),
            "answered_twice": sum(n > 1 for n in self.answered.values()),
            "most_in_flight": self.most_in_flight,
            "batches": len(self.batches),
            "used": max(map(self.used, self.buckets), default=None),
        }

    def used(self, kind: str) -> float:
        """Share of what a limit would have let in, from the first request to the last."""
        bucket = self.buckets[kind]
        return self.let_in[kind] / (bucket.full + bucket.rate * (self.last - self.first))

    # --- the routes ------------------------------------------------------------------------
    def route(self, http: "Http", method: str, path: str, head: bytes, body: bytes) -> None:
        path, _, query = path.partition("?")
        self.all += 1
        if path == "/v1/chat/completions":
            self.chat(http, head, body)
        elif path == "/stats":
            http.send(200, self.stats())
        elif path == "/hashes":
            http.send(200, {k: [n, self.answered[k]] for k, n in self.asked.items()})
        elif path == "/v1/models":
            http.send(200, {"object": "list", "data": [{"id": "any", "object": "model"}]})
        elif path == "/v1/files" and method == "POST":
            http.send(200, self.upload(head, body))
        elif path.startswith("/v1/files/"):
            self.read_file(http, path.split("/")[3], path.endswith("/content"))
        elif path == "/v1/batches":
            batch = self.create(json.loads(body)) if method == "POST" else self.listed(query)
            http.send(200, batch)
        elif path.startswith("/v1/batches/") and path.split("/")[3] in self.batches:
            http.send(200, self.aged(self.batches[path.split("/")[3]]))
        else:
            http.send(404, refusal("not_found", f"no route {path}"))

    def chat(self, http: "Http", head: bytes, body: bytes) -> None:
        args = self.args
        self.count += 1
        self.last = time.monotonic()
        self.first = self.first or self.last
        key = hashlib.sha256(body).hexdigest()[:24]
        self.asked[key] += 1
        request = json.loads(body)
        secret = re.search(rb"(?i)authorization: bearer (\S+)", head)
        bearer = secret[1].decode() if secret and args.echo_key else "***"
        tokens = prompt_tokens(request) + (request.get("max_tokens") or 16)
        refused, headers = self.limit(tokens)
        if args.redirect:
            http.send(307, {}, {"Location": f"{args.redirect}/v1/chat/completions"})
        elif args.permanent:
            status, code, text = PERMANENT[args.permanent]
            text = text.format(key=bearer, model=request.get("model"))
            http.send(status, text if status == 200 else refusal(code, text))
        elif self.args.thinks and request.keys() & {"temperature", "max_tokens"}:
            http.send(400, unsupported(request))
        elif fault := MARK.search(json.dumps(request["messages"])):
            serve_fault(http, fault[1], completion(key, request, bearer, args.reply))
        elif LENGTH[0] in json.dumps(request["messages"]):
            http.send(LENGTH[1], refusal(LENGTH[2], LENGTH[3]))
        elif refused:
            headers |= {"Retry-After": str(math.ceil(refused))}
            headers |= {"retry-after-ms": str(math.ceil(refused * 1000))}
            http.send(429, refusal("rate_limit_exceeded", "Rate limit reached."), headers)
        elif args.burst_every and self.count % args.burst_every < args.burst_length:
            http.send(429, refusal("rate_limit_exceeded", "Rate limit reached."), headers)
        else:
            self.answer(http, key, request, headers, bearer)

    def limit(self, tokens: int) -> tuple[float, dict[str, str]]:
        """Seconds to wait (0: let in) and the headers that say how much is left."""
        need = {"requests": 1.0, "tokens": float(tokens)}
        wait, headers = 0.0, {}
        for name, bucket in self.buckets.items():
            bucket.refill()
            wait = max(wait, (need[name] - bucket.level) / bucket.rate)
        for name, bucket in self.buckets.items():
            if wait <= 0:
                bucket.level -= need[name]
                self.let_in[name] += need[name]
            if self.args.headers:
                headers[f"x-ratelimit-limit-{name}"] = f"{bucket.rate * 60:.0f}"
                headers[f"x-ratelimit-remaining-{name}"] = f"{max(0, bucket.level):.0f}"
                reset = (bucket.full - bucket.level) / bucket.rate
                headers[f"x-ratelimit-reset-{name}"] = f"{reset:.3f}s"
        return max(0.0, wait), headers

    def answer(self, http: "Http", key: str, request: dict, headers: dict, bearer: str) -> None:
        args, dice = self.args, random.Random(f"{self.args.seed} {key} {self.asked[key]}")
        fault, at = "", dice.random()
        for name in FAULTS:
            if 0 <= at < getattr(args, name):
                fault = name[1:]
            at -= getattr(args, name)
        delay = args.latency + args.jitter * dice.random()
        if fault == "hang":
            self.statuses["hang"] += 1
        elif fault == "429":
            extra = {"Retry-After": f"{args.retry_after:g}"} if args.retry_after else {}
            http.send(429, refusal("rate_limit_exceeded", "Slow down."), headers | extra)
        elif fault == "500":
            http.send(500, refusal("server_error", f"The server had an error for {bearer}."))
        else:
            body = completion(key, request, bearer, args.reply)
            if args.thinks:
                body = after_thinking(body, args.thinks, request.get("max_completion_tokens"))
            http.after(delay, fault, body, headers, lambda: self.answered.update([key]))

    # --- files and batches -----------------------------------------------------------------
    def upload(self, head: bytes, body: bytes) -> dict:
        boundary = re.search(rb"(?i)boundary=([^\r\n;]+)", head)
        if not boundary:
            return refusal("invalid_request", "no multipart body")
        part = next(p for p in body.split(b"--" + boundary[1]) if b'name="file"' in p[:300])
        content = part.partition(b"\r\n\r\n")[2].removesuffix(b"\r\n")
        return self.store(content, "batch")

    def store(self, content: bytes, purpose: str) -> dict:
        name = f"file-{len(self.files)}"
        self.files[name] = content
        made = {"id": name, "object": "file", "bytes": len(content), "created_at": int(time.time())}
        return made | {"filename": f"{name}.jsonl", "purpose": purpose, "status": "processed"}

    def read_file(self, http: "Http", name: str, content: bool) -> None:
        if name not in self.files:
            http.send(404, refusal("not_found", f"no file {name}"))
        elif content:
            http.send(200, self.files[name].decode())
        else:
            http.send(200, {"id": name, "object": "file", "bytes": len(self.files[name])})

    def create(self, wanted: dict) -> dict:
        name = f"batch_{len(self.batches)}"
        lines = self.files[wanted["input_file_id"]].decode().splitlines()
        batch = {k: wanted.get(k) for k in ("endpoint", "input_file_id", "completion_window")}
        batch |= {"id": name, "object": "batch", "metadata": wanted.get("metadata")}
        batch |= {"status": "in_progress", "created_at": time.time(), "errors": None}
        batch |= {"request_counts": {"total": len(lines), "completed": 0, "failed": 0}}
        if len(lines) > self.args.batch_max:
            limit = {"message": f"over {self.args.batch_max} requests", "code": "too_many"}
            batch |= {"status": "failed", "errors": {"object": "list", "data": [limit]}}
        self.batches[name] = batch
        return self.aged(batch)

    def listed(self, query: str) -> dict:
        found = re.search(r"after=(\w+)", query)
        names = list(self.batches)[::-1]
        names = names[names.index(found[1]) + 1 :] if found else names
        limit = int((re.search(r"limit=(\d+)", query) or [0, 20])[1])
        data = [self.aged(self.batches[n]) for n in names[:limit]]
        ids = {"first_id": names[0], "last_id": data[-1]["id"]} if data else {}
        return {"object": "list", "data": data, "has_more": len(names) > limit} | ids

    def aged(self, batch: dict) -> dict:
        """The batch as it is now: its work is done once its time is over."""
        if batch["status"] == "in_progress" and (
            time.time() - batch["created_at"] >= self.args.batch_seconds
        ):
            self.work(batch)
        return batch | {"created_at": int(batch["created_at"])}

    def work(self, batch: dict) -> None:
        right, wrong, expired = [], [], False
        for text in self.files[batch["input_file_id"]].decode().splitlines():
            line = json.loads(text)
            body = json.dumps(line["body"])
            key = hashlib.sha256(body.encode()).hexdigest()[:24]
            self.count += 1
            self.asked[key] += 1
            at = random.Random(f"{self.args.seed} {key} {self.asked[key]}").random()
            done = {"id": f"r_{key}", "custom_id": line["custom_id"], "error": None}
            if LENGTH[0] in body:
                done["response"] = {"status_code": 400, "body": refusal(*LENGTH[2:])}
                wrong.append(done)
            elif at < self.args.p500:
                done["response"] = {"status_code": 500, "body": refusal("server_error", "No.")}
                wrong.append(done)
            elif at < self.args.p500 + self.args.pexpired:
                expired = True
                gone = {"code": "batch_expired", "message": "not executed in time"}
                wrong.append(done | {"response": None, "error": gone})
            else:
                answer = completion(key, line["body"], "***", self.args.reply)
                done["response"] = {"status_code": 200, "body": answer}
                self.answered[key] += 1
                right.append(done)
        random.Random(self.args.seed).shuffle(right)  # the order of the file is not that of asking
        counts = {"total": len(right) + len(wrong), "completed": len(right), "failed": len(wrong)}
        batch |= {"status": "expired" if expired else "completed", "request_counts": counts}
        for field, lines in (("output_file_id", right), ("error_file_id", wrong)):
            text = "".join(json.dumps(x) + "\n" for x in lines)
            batch[field] = self.store(text.encode(), "batch_output")["id"] if lines else None


def prompt_tokens(request: dict) -> int:
    return sum(math.ceil(len(m["content"].encode()) / 4) for m in request["messages"])


def fitting(asked: str, n: int, bearer: str) -> str:
    """A reply that our readers can read, and that depends on the request alone."""
    if "separated by a space" in asked:
        return f"{n % 10 + 1} {n // 10 % 10 + 1}\nBoth are answers."
    if "Reply with only 1" in asked:
        return str(n % 3 + 1)
    return f"{(3, 3.5, 4, 4.5, 5)[n % 5]}\nThe response is as good as {bearer} says."


def completion(key: str, request: dict, bearer: str, text: str | None) -> dict:
    """The body of a successful answer."""
    text = text or fitting(request["messages"][-1]["content"], int(key[:6], 16), bearer)
    used = {"prompt_tokens": prompt_tokens(request), "completion_tokens": len(text) // 4 + 1}
    used["total_tokens"] = sum(used.values())
    message = {"role": "assistant", "content": text}
    return {
        "id": f"chatcmpl-{key}", "object": "chat.completion", "created": 0,
        "model": f"{request['model']}-served", "usage": used,
        "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
    }  # fmt: skip


def unsupported(request: dict) -> dict:
    """What a reasoning model says to the fields of older ones."""
    if "temperature" in request:
        text = "Unsupported value: 'temperature' does not support 0 with this model."
        return {"error": refusal("unsupported_value", text)["error"] | {"param": "temperature"}}
    text = "Unsupported parameter: 'max_tokens' is not supported with this model. Use "
    text += "'max_completion_tokens' instead."
    return {"error": refusal("unsupported_parameter", text)["error"] | {"param": "max_tokens"}}


def after_thinking(good: dict, thinks: int, limit: int | None) -> dict:
    """A completion whose thoughts are counted; without an answer where the limit is too small."""
    used, choice = dict(good["usage"]), dict(good["choices"][0])
    used["completion_tokens"] += thinks
    if limit and limit < used["completion_tokens"]:
        used["completion_tokens"] = thinks = limit
        choice |= {"finish_reason": "length", "message": {"role": "assistant", "content": ""}}
    used["completion_tokens_details"] = {"reasoning_tokens": thinks}
    used["total_tokens"] = used["prompt_tokens"] + used["completion_tokens"]
    return good | {"usage": used, "choices": [choice]}


class Http(asyncio.Protocol):
    """Just enough of HTTP/1.1 with keep-alive."""

    def __init__(self, server: Server):
        self.server, self.buffer = server, bytearray()

    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        while (end := self.buffer.find(b"\r\n\r\n")) >= 0:
            head = bytes(self.buffer[:end])
            length = re.search(rb"(?i)\r\ncontent-length: *(\d+)", head)
            stop = end + 4 + (int(length[1]) if length else 0)
            if len(self.buffer) < stop:
                return
            body = bytes(self.buffer[end + 4 : stop])
            del self.buffer[:stop]
            method, path, _ = head.split(b"\r\n", 1)[0].decode().split(" ")
            self.server.route(self, method, path, head, body)

    def send(
        self, status: int, value: Any, headers: dict | None = None, fault: str = "", kind: str = ""
    ) -> None:
        self.server.statuses[f"{status} {fault}".strip()] += 1
        if self.transport.is_closing():
            return
        kind = kind or ("text/html" if isinstance(value, str) else "application/json")
        body = (value if isinstance(value, str) else json.dumps(value)).encode()
        if fault == "malformed":
            body = body[: len(body) // 2] + b"\x00}"
        extra = "".join(f"{k}: {v}\r\n" for k, v in (headers or {}).items())
        whole = (
            f"HTTP/1.1 {status} X\r\nContent-Type: {kind}\r\n{extra}"
            f"Content-Length: {len(body)}\r\n\r\n"
        ).encode() + body
        if fault == "half":
            self.transport.write(whole[: -len(body) // 2])
            self.transport.close()
        elif fault == "reset":
            self.transport.abort()
        else:
            self.transport.write(whole * 2 if fault == "duplicate" else whole)

    def after(self, delay: float, fault: str, body: dict, headers: dict, sent: Any) -> None:
        """Send a reply later; `sent` is called only if a whole one went out."""
        server = self.server
        server.in_flight += 1
        server.most_in_flight = max(server.most_in_flight, server.in_flight)

        def now() -> None:
            server.in_flight -= 1
            if not self.transport.is_closing() and fault in ("", "duplicate"):
                sent()
            self.send(200, body, headers, fault)

        asyncio.get_running_loop().call_later(delay, now)


async def serve(args: argparse.Namespace) -> None:
    server = Server(args)
    loop = asyncio.get_running_loop()
    listening = await loop.create_server(lambda: Http(server), "127.0.0.1", args.port, backlog=1024)
    print(f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}", flush=True)
    await listening.serve_forever()


if __name__ == "__main__":
    asyncio.run(serve(options().parse_args()))
