"""A server on a free port, in a thread of the test."""

import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Thread

import httpx

from hymba.inference import Engine
from hymba.serving import Settings
from hymba.serving.server import Server

PATIENCE = 60  # seconds after which a test gives up waiting


class LiveServer:
    """`url` is its address, `http` a client, `server` and `thread` what runs."""

    def __init__(self, engine: Engine, settings: Settings) -> None:
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.listener.getsockname()[1]}"
        self.http = httpx.Client(base_url=self.url, timeout=PATIENCE)
        self.server = Server(engine, settings, lambda address: None)
        self.thread = Thread(target=self.server.run, args=([self.listener],))

    def chat(self, text: str = "Who is there?", **fields: object) -> httpx.Response:
        """Post a question."""
        return self.http.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": text}]} | fields)

    def complete(self, prompt: object = "The sea", **fields: object) -> httpx.Response:
        """Post a text to continue."""
        return self.http.post("/v1/completions", json={"prompt": prompt} | fields)


DEFAULTS = Settings(model_name="tiny")


@contextmanager
def serving(engine: Engine, settings: Settings = DEFAULTS) -> Iterator[LiveServer]:
    """A server in front of `engine`, which is started or not as the test likes, until the block ends."""
    live = LiveServer(engine, settings)
    live.thread.start()
    try:
        wait_until(lambda: live.server.started)
        yield live
    finally:
        live.http.close()
        live.server.should_exit = live.server.force_exit = True
        live.thread.join(PATIENCE)
        live.listener.close()


def wait_until(condition: Callable[[], bool]) -> None:
    """Look again and again until `condition` holds; fail if it never does."""
    for _ in range(PATIENCE * 100):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError("it never came true")
