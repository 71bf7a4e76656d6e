"""Models for lm-eval: our engine in this process, and a server's two routes.

All three ask in the same way, so that a task's score is the same: BOS before text where the model has one;
prompts cut at their beginning to leave room for the answer; in a chat, the answer without its reasoning, and
`until` cut from that answer alone (a stop string inside the reasoning would end it).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lm_eval.api.model import LM, TemplateLM
from lm_eval.models.openai_completions import LocalChatCompletion, LocalCompletionsAPI
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from hadal.engine.request import RequestError, SamplingParams
from hadal.evals.harness import Answers
from hadal.evals.samples import EvaluationError
from hadal.text.parsers import ReasoningParser
from hadal.text.templates import text_of

if TYPE_CHECKING:
    from hadal.engine import Engine
    from hadal.text.templates import Parts

MAX_GEN_TOKS = 256  # lm-eval's, where a task says nothing
SEED = 1234  # lm-eval's, of servers
_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty",
             "repetition_penalty", "seed")  # fmt: skip
_BLOCKS = {"loglikelihood": 1024, "loglikelihood_rolling": 64, "generate_until": 256}

Progress = Callable[[int, int], None]


class Chat(str):
    """A rendered conversation: its text for eyes and logs, its parts for the tokenizer, so that no text in
    it becomes a control token."""

    parts: Parts
    messages: list[dict[str, Any]]

    @classmethod
    def of(cls, parts: Parts, messages: list[dict[str, Any]]) -> Chat:
        made = cls(text_of(parts))
        made.parts, made.messages = parts, messages
        return made


class EngineLM(TemplateLM):  # type: ignore[misc]
    """The engine in this process."""

    def __init__(self, engine: Engine, *, thinking: bool | None = None) -> None:
        """Raises EvaluationError for an engine without a tokenizer."""
        super().__init__()
        if engine.tokenizer is None:
            raise EvaluationError("the engine has no tokenizer; tasks are text")
        self.engine, self.codec, self.thinking = engine, engine.tokenizer, thinking
        self.max_length = engine.max_model_len - 1  # a prompt's log-probabilities come with one new token

    @property
    def eot_token_id(self) -> int:
        return int(self.codec.eos_ids[0])

    @property
    def prefix_token_id(self) -> int:
        return self.eot_token_id if self.codec.bos_id is None else int(self.codec.bos_id)

    @property
    def tokenizer_name(self) -> str:
        return self.engine.name

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The template's name: ours are functions, not texts."""
        return self.engine.template.name if chat_template and self.engine.template else None

    def apply_chat_template(
        self, chat_history: list[dict[str, Any]], add_generation_prompt: bool = True
    ) -> Chat:
        """The conversation, up to where the answer begins; without a generation prompt the last message is
        the answer's beginning."""
        template = self.engine.template
        if template is None:
            raise EvaluationError("the model has no chat template; --plain does without")
        messages = [{"role": one["role"], "content": one["content"]} for one in chat_history]
        if not add_generation_prompt:
            messages[-1]["prefix"] = True
        return Chat.of(template.render(messages, thinking=self.thinking), messages)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        if isinstance(string, Chat):
            return self.codec.encode_parts(string.parts)
        bos = [] if self.codec.bos_id is None or add_special_tokens is False else [self.codec.bos_id]
        return bos + self.codec.encode(string)

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """As lm-eval's own: white space at the context's end belongs to the continuation, which is what the
        whole has beyond as many tokens as the context alone."""
        if not isinstance(context, Chat):
            pair: tuple[list[int], list[int]] = super()._encode_pair(context, continuation)
            return pair
        parts = list(context.parts)
        whole = self.codec.encode_parts([*parts, continuation])
        if isinstance(parts[-1], str):
            parts[-1] = parts[-1].rstrip()
        alone = self.codec.encode_parts(parts)
        return alone, whole[len(alone) :]

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        asked = [(context + continuation)[-self.max_length :] for _, context, continuation in requests]
        params = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=1)
        found = []
        answers = self._generate(asked, [params] * len(asked))
        for ids, answer, (_, _, continuation) in zip(asked, answers, requests, strict=True):
            entries = (answer.prompt_logprobs or [])[max(1, len(ids) - len(continuation)) :]
            greedy = all(entry.logprob >= entry.top[0][1] for entry in entries)
            found.append((sum(entry.logprob for entry in entries), greedy))
        return found

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        windows = [
            (index, window)
            for index, request in enumerate(requests)
            for window in rolling(
                self.tok_encode(request.args[0], False), self.prefix_token_id, self.max_length
            )
        ]
        sums = [0.0] * len(requests)
        scored = self._loglikelihood_tokens([(None, *window) for _, window in windows])
        for (index, _), (value, _) in zip(windows, scored, strict=True):
            sums[index] += value
        return sums

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        prompts, params, untils = [], [], []
        for request in requests:
            context, options = request.args
            until, made = sampling(options, chat=isinstance(context, Chat))
            room = self.max_length - (made.max_tokens or 0)
            if room < 1:
                raise EvaluationError(
                    f"a task wants {made.max_tokens} tokens of answer, the context has {self.max_length}: "
                    "--max-tokens lowers them"
                )
            prompts.append(self.tok_encode(context)[-room:])
            params.append(made)
            untils.append(until)
        answers = self._generate(prompts, params)
        return [
            cut(self._content(request.args[0], answer.text), until)
            for request, answer, until in zip(requests, answers, untils, strict=True)
        ]

    def _content(self, context: str, text: str) -> str:
        """What a server would give as content: a chat's answer without its reasoning."""
        if not isinstance(context, Chat) or self.engine.template is None:
            return text
        template, messages = self.engine.template, context.messages
        parser = ReasoningParser(
            template.starts_in_reasoning(self.thinking, messages),
            may_open=template.may_open_reasoning(messages),
        )
        return "".join(p.text for p in parser.push(text) + parser.finish() if p.kind == "content")

    def _generate(self, prompts: list[list[int]], params: list[SamplingParams]) -> list[Any]:
        try:
            answers: list[Any] = self.engine.generate(prompts, params)
        except RequestError as error:
            raise EvaluationError(f"a request of a task cannot be served: {error}") from None
        failed = next((one for one in answers if one.finish_reason in ("error", "abort")), None)
        if failed is not None:
            raise EvaluationError(f"a request of a task failed: {failed.error}")
        return answers


def rolling(ids: list[int], prefix: int, longest: int) -> list[tuple[list[int], list[int]]]:
    """(context, continuation) pairs that score each token of a text once, the first after `prefix`."""
    windows = get_rolling_token_windows(
        token_list=ids, prefix_token=prefix, max_seq_len=longest - 1, context_len=1
    )
    return [make_disjoint_window(window) for window in windows]


def sampling(options: Mapping[str, Any], *, chat: bool) -> tuple[list[str], SamplingParams]:
    """A task's generation options as (until, parameters). Raises EvaluationError for one that is unknown."""
    given = dict(normalize_gen_kwargs(dict(options), MAX_GEN_TOKS))
    until: list[str] = handle_stop_sequences(given.pop("until", None), eos=None)
    longest = int(given.pop("max_gen_toks"))
    given.pop("do_sample", None)
    unknown = given.keys() - set(_SAMPLING)
    if unknown:
        raise EvaluationError(f"a task sets {', '.join(sorted(unknown))}, which the engine does not have")
    stops = () if chat else tuple(stop for stop in until if stop)
    try:
        return until, SamplingParams(
            max_tokens=longest, stop=stops, **{"seed": SEED, "temperature": 0.0, **given}
        )
    except RequestError as error:
        raise EvaluationError(f"a task's generation_kwargs: {error}") from None


def plainly(options: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """A task's generation options as `sampling` reads them, for a server. Raises EvaluationError."""
    if options is None:
        return None
    sampling(options, chat=True)
    return {"temperature": 0.0, **normalize_gen_kwargs(dict(options), MAX_GEN_TOKS)}


def cut(text: str, until: list[str]) -> str:
    """The text up to the first of the strings."""
    return str(postprocess_generated_text(text, stop=until, think_end_token=None))


class ServerText(LocalCompletionsAPI):  # type: ignore[misc]
    """lm-eval's `local-completions` with the server's own tokenizer, and BOS where the model has one."""

    def __init__(self, url: str, model: str, *, key: str | None, max_length: int, concurrent: int) -> None:
        super().__init__(
            model=model, base_url=f"{url}/v1/completions", tokenizer_backend="remote", max_length=max_length,
            num_concurrent=concurrent, auth_token=key, header=_header(key), add_bos_token=True, timeout=3600,
        )  # fmt: skip
        bos = self.tokenizer.tokenizer_info.get("bos_token_id")
        self._bos = self.tokenizer.bos_token_id if bos is None else bos

    @property
    def prefix_token_id(self) -> int | None:
        if self._bos is not None:
            return int(self._bos)
        ids = self.tokenizer.tokenizer_info.get("eos_token_ids") or [self.tokenizer.eos_token_id]
        return None if ids[0] is None else int(ids[0])

    def tok_encode(self, string: Any, add_special_tokens: bool | None = None, **kwargs: Any) -> Any:
        if not isinstance(string, str):
            return [self.tok_encode(one, add_special_tokens) for one in string]
        bos = [] if self._bos is None or add_special_tokens is False else [int(self._bos)]
        return bos + self.tokenizer.encode(string)

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        prefix = self.prefix_token_id
        if prefix is None:
            raise EvaluationError("the server names neither BOS nor EOS, after which a text could begin")
        sums = []
        for request in requests:
            windows = rolling(self.tok_encode(request.args[0], False), prefix, self.max_length)
            sums.append(sum(one for one, _ in self._loglikelihood_tokens([(None, *w) for w in windows])))
        return sums

    @property
    def eos_string(self) -> None:
        """No stop string for the end: the model's end token ends it."""

    def _create_payload(self, *args: Any, gen_kwargs: Any = None, **kwargs: Any) -> dict[str, Any]:
        payload: dict[str, Any] = super()._create_payload(*args, gen_kwargs=plainly(gen_kwargs), **kwargs)
        return payload


class ServerChat(LocalChatCompletion):  # type: ignore[misc]
    """lm-eval's `local-chat-completions`: the server's template; `until` cuts the answer, not the
    reasoning."""

    def __init__(self, url: str, model: str, *, key: str | None, max_length: int, concurrent: int) -> None:
        super().__init__(
            model=model, base_url=f"{url}/v1/chat/completions", max_length=max_length,
            num_concurrent=concurrent, header=_header(key), eos_string="unused", timeout=3600,
        )  # fmt: skip

    def _create_payload(self, *args: Any, gen_kwargs: Any = None, **kwargs: Any) -> dict[str, Any]:
        payload: dict[str, Any] = super()._create_payload(*args, gen_kwargs=plainly(gen_kwargs), **kwargs)
        payload.pop("stop", None)
        return payload

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        said = super().generate_until(requests, disable_tqdm)
        untils = [handle_stop_sequences(dict(r.args[1]).get("until"), eos=None) for r in requests]
        return [cut(text, until) for text, until in zip(said, untils, strict=True)]


def _header(key: str | None) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"} if key else {"Accept": "application/json"}


class Kept(LM):  # type: ignore[misc]
    """Another model, whose answers are kept."""

    def __init__(self, model: Any, answers: Answers, progress: Progress | None = None) -> None:
        super().__init__()
        self.model, self.answers, self.progress = model, answers, progress

    def loglikelihood(self, requests: Sequence[Any], **kwargs: Any) -> list[tuple[float, bool]]:
        return [(value, greedy) for value, greedy in self._ask("loglikelihood", requests)]

    def loglikelihood_rolling(self, requests: Sequence[Any], **kwargs: Any) -> list[float]:
        return self._ask("loglikelihood_rolling", requests)

    def generate_until(self, requests: Sequence[Any], **kwargs: Any) -> list[str]:
        return self._ask("generate_until", requests)

    def _ask(self, kind: str, requests: Sequence[Any]) -> list[Any]:
        ask = getattr(self.model, kind)
        return self.answers.through(
            kind, requests, lambda part: ask(part, disable_tqdm=True), _BLOCKS[kind], self.progress
        )

    def apply_chat_template(self, *args: Any, **kwargs: Any) -> Any:
        return self.model.apply_chat_template(*args, **kwargs)

    def chat_template(self, *args: Any, **kwargs: Any) -> Any:
        return self.model.chat_template(*args, **kwargs)

    @property
    def tokenizer_name(self) -> str:
        return str(self.model.tokenizer_name)
