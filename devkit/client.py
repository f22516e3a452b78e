"""Talks to a running engine over HTTP as a user's program would; standard library only."""

from __future__ import annotations

import base64
import http.client
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

# Where an image goes in a prompt for the native API.
IMAGE_SLOT = "<|vision_start|><|image_pad|><|vision_end|>"


@dataclass(frozen=True)
class Reply:
    """An answer. Status 0: the connection broke before one came, as when the engine dies."""

    status: int
    body: Any
    texts: tuple[str, ...] = ()


def data_url(image: bytes) -> str:
    return f"data:image/jpeg;base64,{base64.b64encode(image).decode()}"


class Client:
    """The requests that the tests and the demo make."""

    def __init__(self, url: str, timeout_s: float = 180.0) -> None:
        self.url = url
        self.timeout_s = timeout_s

    def chat(self, images: Sequence[bytes], text: str, **sampling: Any) -> Reply:
        """/v1/chat/completions: the images, then the text; `sampling` as in the OpenAI API (n, ...)."""
        parts: list[dict[str, Any]] = [
            {"type": "image_url", "image_url": {"url": data_url(image)}} for image in images
        ]
        content = [*parts, {"type": "text", "text": text}]
        request = {"model": "default", "messages": [{"role": "user", "content": content}]}
        reply = self.post("/v1/chat/completions", {**request, "temperature": 0, "max_tokens": 8, **sampling})
        if reply.status != 200:
            return reply
        texts = tuple(choice["message"]["content"] for choice in reply.body["choices"])
        return Reply(reply.status, reply.body, texts)

    def generate(self, images: Sequence[bytes], text: str, **sampling: Any) -> Reply:
        """/generate: the native API; one image slot a picture is put before the text."""
        reply = self.post("/generate", _native_request(images, text, sampling))
        if reply.status != 200:
            return reply
        answers = reply.body if isinstance(reply.body, list) else [reply.body]
        return Reply(reply.status, reply.body, tuple(answer["text"] for answer in answers))

    def stream(self, images: Sequence[bytes], text: str, **sampling: Any) -> Iterator[Any]:
        """/generate, streamed: each event as it comes. Closing the iterator hangs up, as a user may."""
        request = {**_native_request(images, text, sampling), "stream": True}
        connection = self._connection()
        try:
            response = self._send(connection, "POST", "/generate", request)
            if response.status != 200:
                raise RuntimeError(f"{response.status}: {response.read().decode(errors='replace')}")
            for line in response:
                data = line.removeprefix(b"data:").strip()
                if line.startswith(b"data:") and data != b"[DONE]":
                    yield json.loads(data)
        finally:
            connection.close()

    def get(self, path: str) -> Reply:
        return self._request("GET", path, None)

    def post(self, path: str, content: Any) -> Reply:
        return self._request("POST", path, content)

    def _request(self, method: str, path: str, content: Any) -> Reply:
        connection = self._connection()
        try:
            response = self._send(connection, method, path, content)
            raw = response.read()
        except (ConnectionError, http.client.HTTPException) as broken:
            return Reply(0, {"error": repr(broken)})
        finally:
            connection.close()
        try:
            return Reply(response.status, json.loads(raw))
        except ValueError:
            return Reply(response.status, raw.decode(errors="replace"))

    def _connection(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection(urlsplit(self.url).netloc, timeout=self.timeout_s)

    @staticmethod
    def _send(
        connection: http.client.HTTPConnection, method: str, path: str, content: Any
    ) -> http.client.HTTPResponse:
        body = None if content is None else json.dumps(content)
        connection.request(method, path, body, {"Content-Type": "application/json"} if body else {})
        return connection.getresponse()


def _native_request(images: Sequence[bytes], text: str, sampling: dict[str, Any]) -> dict[str, Any]:
    request: dict[str, Any] = {
        "text": IMAGE_SLOT * len(images) + text,
        "sampling_params": {"temperature": 0, "max_new_tokens": 8, **sampling},
    }
    if images:
        request["image_data"] = [data_url(image) for image in images]
    return request
