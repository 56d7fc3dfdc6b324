"""What transformers offers to models whose state is keys and values only, refused in one line each."""

from __future__ import annotations

from typing import Any, NoReturn

from transformers import GenerationConfig

from hymba.errors import HymbaError

_NO_PAGES = (
    "transformers' continuous batching keeps keys and values in pages, and has no place for Hymba's convolution and "
    "SSM states: use generate() with padded rows, or hymba.inference.Engine"
)


class ContinuousBatchingError(HymbaError, AttributeError):
    """Raised for continuous batching, which a Hymba does not support."""


def check_attention(implementation: str | None) -> None:
    """Check that an `attn_implementation` is not one of those that read pages.

    Raises:
        HymbaError: it is.
    """
    if implementation is not None and implementation.startswith("paged|"):
        raise HymbaError(f"attn_implementation={implementation!r} is not for Hymba: {_NO_PAGES}")


class UnpagedGeneration:
    """Refuses what :class:`transformers.GenerationMixin` offers and a Hymba cache cannot do; stands before it."""

    @property
    def init_continuous_batching(self) -> NoReturn:
        """Absent for `hasattr`, by which `transformers serve` decides whether to batch.

        Raises:
            ContinuousBatchingError: always.
        """
        raise ContinuousBatchingError(_NO_PAGES)

    def __getattr__(self, name: str) -> Any:
        if name == "init_continuous_batching":  # torch's own __getattr__ would lose the reason
            raise ContinuousBatchingError(_NO_PAGES)
        return super().__getattr__(name)  # type: ignore[misc]

    def generate_batch(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refuse.

        Raises:
            ContinuousBatchingError: always.
        """
        raise ContinuousBatchingError(_NO_PAGES)

    continuous_batching_context_manager = generate_batch

    def _validate_generation_mode(self, mode: Any, config: GenerationConfig, *args: Any, **kwargs: Any) -> None:
        """Refuse to draft tokens for another model; transformers itself refuses those drafted by one."""
        if config.is_assistant:
            raise HymbaError("a Hymba cannot be an assistant_model: its SSM state cannot take back rejected tokens")
        super()._validate_generation_mode(mode, config, *args, **kwargs)  # type: ignore[misc]
