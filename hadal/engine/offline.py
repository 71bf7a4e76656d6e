"""The engine for a script: completions, iterators of updates, chats, embeddings, in the caller's thread.

Each call queues its requests and runs `step()` until they are done. Several iterators may be open at once:
whoever asks next runs the step, and everyone gets their own updates.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, overload

from hadal.engine.pooling import Pooling
from hadal.engine.request import (
    Completion,
    Gathered,
    PoolingParams,
    Request,
    RequestError,
    SamplingParams,
    Update,
    merge_updates,
)

if TYPE_CHECKING:
    from hadal.text.templates import Template
    from hadal.text.tokenizer import Tokenizer

Message = Mapping[str, Any]
Prompt = str | Sequence[int]


class OfflineApi:
    """What `Engine` offers beyond requests and steps. Errors in a prompt or its parameters raise
    RequestError."""

    tokenizer: Tokenizer | None
    template: Template | None
    prepare: Callable[..., Request]
    enqueue: Callable[[Request], str]
    step: Callable[[], list[tuple[str, Update]]]
    abort: Callable[[str], bool]
    _requests: dict[str, Request]
    _owner: str | None

    # --- text to token ids ---

    def encode(self, prompt: Prompt) -> list[int]:
        """Token ids of a prompt: plain text gets BOS where the model has one; ids are taken as they are."""
        if not isinstance(prompt, str):
            return list(prompt)
        tokenizer = self._need_tokenizer("a text prompt")
        bos = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
        return bos + tokenizer.encode(prompt)

    def encode_chat(
        self,
        messages: Sequence[Message],
        *,
        thinking: bool | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> list[int]:
        """Token ids of a conversation, up to where the model's answer begins."""
        template = self._need_template()
        parts = template.render(messages, tools=tools, thinking=thinking)
        return self._need_tokenizer("a chat").encode_parts(parts)

    def _need_tokenizer(self, what: str) -> Tokenizer:
        if self.tokenizer is None:
            raise RequestError(
                f"{what} needs a tokenizer, and this engine has none: give token ids", "prompt"
            )
        return self.tokenizer

    def _need_template(self) -> Template:
        if self.template is None:
            raise RequestError(
                "a chat needs a chat template, and this engine has none: use generate", "messages"
            )
        return self.template

    # --- completions ---

    @overload
    def generate(  # type: ignore[overload-overlap]
        self, prompts: str | list[int], params: SamplingParams | None = None
    ) -> Completion: ...
    @overload
    def generate(
        self, prompts: Sequence[Prompt], params: SamplingParams | Sequence[SamplingParams] | None = None
    ) -> list[Completion]: ...

    def generate(
        self, prompts: Any, params: SamplingParams | Sequence[SamplingParams] | None = None
    ) -> Completion | list[Completion]:
        """Continue one prompt (text or token ids), or a list of prompts as one batch, with one set of
        parameters for all or one for each. Nothing starts unless all are valid."""
        single = isinstance(prompts, str) or (len(prompts) > 0 and isinstance(prompts[0], int))
        many = [prompts] if single else list(prompts)
        each = [params] * len(many) if params is None or isinstance(params, SamplingParams) else list(params)
        if len(each) != len(many):
            raise RequestError(f"{len(many)} prompts, but {len(each)} sets of parameters", "params")
        requests = [self.prepare(self.encode(prompt), p) for prompt, p in zip(many, each, strict=True)]
        completions = [Completion.from_updates([update]) for update in self._run(requests)]
        return completions[0] if single else completions

    def chat(
        self,
        messages: Sequence[Message],
        params: SamplingParams | None = None,
        *,
        thinking: bool | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> Completion:
        """Answer a conversation. `text` is all that the model wrote; `reasoning` and `content` are its two
        parts."""
        from hadal.text.parsers import ReasoningParser

        completion = self.generate(self.encode_chat(messages, thinking=thinking, tools=tools), params)
        template = self._need_template()
        parser = ReasoningParser(
            template.starts_in_reasoning(thinking, messages), may_open=template.may_open_reasoning(messages)
        )
        pieces = parser.push(completion.text) + parser.finish()
        completion.reasoning = "".join(piece.text for piece in pieces if piece.kind == "reasoning")
        completion.content = "".join(piece.text for piece in pieces if piece.kind == "content")
        return completion

    def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> Generator[Update, None, None]:
        """Updates of one prompt as they come. Closing the iterator, or leaving a loop over it, aborts the
        request."""
        return self._stream(self.prepare(self.encode(prompt), params))

    def chat_stream(
        self,
        messages: Sequence[Message],
        params: SamplingParams | None = None,
        *,
        thinking: bool | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> Generator[Update, None, None]:
        """`stream` for a conversation. The text begins where `template.starts_in_reasoning` says."""
        return self._stream(self.prepare(self.encode_chat(messages, thinking=thinking, tools=tools), params))

    def embed(
        self,
        inputs: Sequence[Prompt],
        pooling: Pooling = "mean",
        layer: int = -1,
        normalize: bool = True,
        special: bool = False,
    ) -> list[list[float]]:
        """One vector for each input (text or token ids) of at most max_model_len tokens; see
        PoolingParams."""
        options = PoolingParams(pooling, layer, normalize, special)
        requests = [self.prepare(self.encode(item), pooling=options) for item in inputs]
        vectors = []
        for last in self._run(requests):
            if last.embedding is None:
                raise RuntimeError(f"an embedding failed: {last.error}")
            vectors.append(last.embedding)
        return vectors

    # --- running ---

    def _run(self, requests: Sequence[Request]) -> list[Update]:
        """What became known of each request, in one update, in the order of the requests. An exception leaves
        none of them behind."""
        self._check_owner()
        found = [Gathered() for _ in requests]
        for request, mine in zip(requests, found, strict=True):
            request.on_update = mine.add
        try:
            for request in requests:
                self.enqueue(request)
            while any(request.request_id in self._requests for request in requests):
                self.step()
        finally:
            for request in requests:
                if self._requests.get(request.request_id) is request:
                    self.abort(request.request_id)
        return [mine.whole() for mine in found]

    def _stream(self, request: Request) -> Generator[Update, None, None]:
        self._check_owner()
        ready: deque[Update] = deque()
        request.on_update = ready.append
        self.enqueue(request)
        try:
            while True:
                while not ready:
                    self.step()
                update = merge_updates(tuple(ready))  # more than one where another iterator ran the steps
                ready.clear()
                yield update
                if update.finish_reason is not None:
                    return
        finally:
            if self._requests.get(request.request_id) is request:
                self.abort(request.request_id)

    def _check_owner(self) -> None:
        if self._owner is not None:
            raise RuntimeError(f"{self._owner} runs this engine: call its methods instead")
