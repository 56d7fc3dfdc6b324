"""What the endpoints of one app share."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hymba.inference import Engine, SamplingParams
from hymba.inference.constraint import Constraint
from hymba.model import cache_nbytes
from hymba.serving.bridge import Job, Mailbox, Run
from hymba.serving.errors import ApiError
from hymba.serving.metrics import Metrics
from hymba.serving.protocol import Generation, JsonObjectFormat, JsonSchemaFormat
from hymba.serving.settings import Settings
from hymba.serving.vocabulary import Vocabulary


@dataclass
class State:
    """The engine behind an app and what is known about it."""

    engine: Engine
    settings: Settings
    metrics: Metrics
    vocabulary: Vocabulary
    created: int
    draining: bool = False
    active: int = 0  # requests under way
    mailbox: Mailbox | None = None

    @classmethod
    def of(cls, engine: Engine, settings: Settings) -> State:
        """Return the state of a new app."""
        return cls(engine, settings, Metrics(engine), Vocabulary(engine.tokenizer), int(time.time()))

    def check_model(self, name: str | None) -> None:
        """Refuse a model that is not served here.

        Raises:
            ApiError: 404.
        """
        if name is not None and name != self.settings.model_name:
            problem = f"the model {name!r} is not served here: ask for {self.settings.model_name!r}"
            raise ApiError(404, problem, "model", "model_not_found")

    def check_tokens(self, tokens: Sequence[int], param: str) -> None:
        """Refuse ids that the model does not know.

        Raises:
            ApiError: 400.
        """
        size = self.engine.model.config.vocab_size
        if tokens and max(tokens) >= size:
            raise ApiError(
                400, f"{param} holds the token {max(tokens)}, and the model knows {size}", param, "invalid_value"
            )

    def allows(self, prompt: str) -> bool:
        """Whether the guard lets a prompt be answered."""
        return self.settings.guard is None or self.settings.guard.allows(prompt)

    def params(self, request: Generation, **more: Any) -> SamplingParams:
        """Return how the engine is to continue a prompt; `more` is what the two kinds of request say differently.

        Raises:
            HymbaError: the numbers do not fit together, or a grammar cannot be compiled.
        """
        bias = {int(token): value for token, value in request.logit_bias.items()}
        self.check_tokens(list(bias), "logit_bias")
        self.check_tokens(request.stop_token_ids, "stop_token_ids")
        wanted: dict[str, Any] = {
            "min_new_tokens": request.min_tokens,
            "temperature": request.temperature,
            "top_k": request.top_k if request.top_k > 0 else None,
            "top_p": request.top_p,
            "min_p": request.min_p,
            "repetition_penalty": request.repetition_penalty,
            "presence_penalty": request.presence_penalty,
            "frequency_penalty": request.frequency_penalty,
            "logit_bias": tuple(bias.items()),
            "seed": request.seed,
            "stop": request.stops,
            "stop_ids": tuple(request.stop_token_ids),
            "ignore_eos": request.ignore_eos,
            "constraint": self._constraint(request),
        }
        return SamplingParams(**(wanted | more))

    def _constraint(self, request: Generation) -> Constraint | None:
        tokenizer, outputs = self.engine.tokenizer, request.structured_outputs
        if outputs and outputs.regex is not None:
            return Constraint.regex(tokenizer, outputs.regex)
        if outputs and outputs.json_ is not None:
            return Constraint.json_schema(tokenizer, outputs.json_)
        if isinstance(request.response_format, JsonObjectFormat):
            return Constraint.json_object(tokenizer)
        if isinstance(request.response_format, JsonSchemaFormat):
            return Constraint.json_schema(tokenizer, request.response_format.json_schema.schema_)
        return None

    def run(self, jobs: Sequence[Job]) -> Run:
        """Give texts to the engine.

        Raises:
            ApiError: they are more than it could ever hold. HymbaError: it does not take one of them.
        """
        most = self.engine.options.max_rows + self.engine.options.max_waiting
        if len(jobs) > most:
            raise ApiError(400, f"the request asks for {len(jobs)} texts, and the server holds {most}: split it", "n")
        return Run(self.engine, jobs, self._mailbox_here(), self.metrics, self.settings.request_seconds)

    def _mailbox_here(self) -> Mailbox:
        """Return the mailbox of the running loop; an app may see several, one after another."""
        loop = asyncio.get_running_loop()
        if self.mailbox is None or self.mailbox.loop is not loop:
            self.mailbox = Mailbox(loop)
        return self.mailbox

    def card(self) -> dict[str, Any]:
        """Return what `/v1/models` says of the model.

        `cache` tells what a conversation of n tokens holds: fixed_bytes + n · bytes_per_token.
        `llama_bytes_per_token` is for a Llama of the same layers, KV heads and head size, with full attention and a
        KV in every layer, in the same dtype: 2 · layers · kv_heads · head_dim · bytes of a value.
        """
        config, options = self.engine.model.config, self.engine.options
        size = self.engine.model.dtype.itemsize
        empty, one = (cache_nbytes(config, tokens, size, options.cache_bits) for tokens in (0, 1))
        cache = {
            "fixed_bytes": empty,
            "bytes_per_token": one - empty,
            "llama_bytes_per_token": 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * size,
        }
        name = self.settings.model_name
        about = {"max_length": self.engine.max_length, "max_model_len": self.engine.max_length, "cache": cache}
        return {"id": name, "object": "model", "created": self.created, "owned_by": "hymba"} | about
