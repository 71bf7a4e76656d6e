"""What a new token does to its request: text, stop conditions, and the update that the caller sees."""

from __future__ import annotations

from hadal.engine.request import FinishReason, Request, TokenLogprob, Update


def advance(request: Request, token: int, logprob: TokenLogprob | None, now: float) -> Update:
    """Append one sampled token and say what became of it. The request is over when `finish_reason` is set.

    In this order: an end-of-text token, a stop_token_id, a stop string, a completed grammar, max_tokens. A
    token that ends the text is counted and listed, but has no text.
    """
    request.token_ids.append(token)
    metrics = request.metrics
    metrics.completion_tokens += 1
    if metrics.first_token is None:
        metrics.first_token = now
    reason: FinishReason | None = None
    text = ""
    if token in request.eos_ids:
        reason = "stop"
    elif token in request.params.stop_token_ids:
        reason, request.stop_reason = "stop", token
    else:
        if request.detokenizer is not None:
            text = request.detokenizer.push((token,))
            if request.detokenizer.stopped is not None:
                reason, request.stop_reason = "stop", request.detokenizer.stopped
        if request.matcher is not None and reason is None:
            request.matcher.accept(token)
            if request.matcher.is_done():
                reason = "stop"
        if reason is None and metrics.completion_tokens >= request.max_tokens:
            reason = "length"
    if reason is not None and request.detokenizer is not None:
        text += request.detokenizer.finish()
    update = Update(
        text,
        [token],
        None if logprob is None else [logprob],
        reason,
        request.stop_reason,
        None,
        len(request.prompt_ids),
        request.cached_tokens,
        metrics.completion_tokens,
    )
    if not request.sent_first_update:
        request.sent_first_update = True
        if request.params.prompt_logprobs is not None:
            update.prompt_logprobs = request.prompt_logprobs
    if reason is not None:
        metrics.finished = now
        update.metrics = metrics
    return update


def ended(request: Request, reason: FinishReason, now: float, error: str | None = None) -> Update:
    """The last update of a request that ends without a new token; text that was held back comes with it."""
    text = ""
    if request.detokenizer is not None and reason != "error":
        text = request.detokenizer.finish()
    request.metrics.finished = now
    return Update(
        text=text,
        finish_reason=reason,
        error=error,
        prompt_tokens=len(request.prompt_ids),
        cached_tokens=request.cached_tokens,
        completion_tokens=request.metrics.completion_tokens,
        metrics=request.metrics,
    )
