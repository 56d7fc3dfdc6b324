"""One engine with the bundled model, and one server before it, for all tests of this folder."""

from collections.abc import Callable, Iterator

import pytest
from live import LiveServer, serving

from hymba.inference import Engine, EngineOptions, load_model

LENGTH = 600  # tokens of a sequence


@pytest.fixture(scope="session")
def tiny() -> tuple:
    """The bundled model and its tokenizer; in float32, so that texts do not depend on what runs beside them."""
    return load_model("tiny", "float32", "cpu")


@pytest.fixture(scope="session")
def engine(tiny: tuple) -> Iterator[Engine]:
    """An engine that runs."""
    engine = Engine(*tiny, EngineOptions(max_rows=4, max_length=LENGTH, prefix_cache_bytes=64 << 20))
    engine.start()
    yield engine
    engine.stop(timeout=0)


@pytest.fixture(scope="session")
def live(engine: Engine) -> Iterator[LiveServer]:
    """A server with the default settings."""
    with serving(engine) as live:
        yield live


@pytest.fixture
def still_engine(tiny: tuple) -> Iterator[Callable[..., Engine]]:
    """Makes engines that do nothing until the test starts or steps them."""
    made = []

    def make(**options: object) -> Engine:
        made.append(
            Engine(*tiny, EngineOptions(**{"max_rows": 1, "max_length": 64, "prefix_cache_bytes": 0} | options))
        )
        return made[-1]

    yield make
    for engine in made:
        engine.stop(timeout=0)
