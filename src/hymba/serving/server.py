"""An app on an address, from its first request to its last."""

from __future__ import annotations

import socket
from collections.abc import Callable
from types import FrameType

import uvicorn

from hymba.errors import HymbaError
from hymba.inference import Engine
from hymba.serving.app import create_app
from hymba.serving.settings import Settings
from hymba.serving.state import State

LAST_WORDS = 5  # seconds for answers that were broken off to say so


def serve(engine: Engine, settings: Settings, ready: Callable[[str], None] = lambda address: None) -> None:
    """Serve `engine` until SIGTERM or Ctrl-C; then take no more, let what runs end, and stop the engine.

    Args:
        engine: not started yet. ready: called with the address once requests are answered.

    Raises:
        HymbaError: the address is taken, or is not of this machine.
    """
    listener = _listen(settings)
    engine.start()
    try:
        server = Server(engine, settings, ready)
        server.run(sockets=[listener])
    finally:
        listener.close()
        engine.stop(timeout=0)


class Server(uvicorn.Server):
    """uvicorn, which closes its door before it has told those who still come; this one tells them first."""

    def __init__(self, engine: Engine, settings: Settings, ready: Callable[[str], None]) -> None:
        app = create_app(engine, settings)
        config = uvicorn.Config(
            app,
            lifespan="off",
            log_level="warning",
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=LAST_WORDS,
        )
        super().__init__(config)
        self.state: State = app.state.server
        self._ready = ready
        self._ticks_left = int(settings.drain_seconds * 10)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Open the door and say so."""
        await super().startup(sockets)
        if self.started and sockets:
            self._ready(_address(sockets[0]))

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Drain; at a second signal, leave at once."""
        if self.state.draining:
            super().handle_exit(sig, frame)
        self.state.draining = True

    async def on_tick(self, counter: int) -> bool:
        """Leave once nothing runs any more, or the time for it is up. Called ten times a second."""
        if self.state.draining and not self.should_exit:
            self._ticks_left -= 1
            if self._ticks_left < 0:
                self.state.engine.stop(timeout=0)
            self.should_exit = self._ticks_left < 0 or self.state.active == 0
        return await super().on_tick(counter)


def _listen(settings: Settings) -> socket.socket:
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    try:
        return socket.create_server((settings.host, settings.port), family=family, backlog=2048)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        place = f"{settings.host}, port {settings.port}"
        raise HymbaError(f"cannot listen on {place}: {reason}; choose another --host or --port") from error


def _address(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
