"""What a request may be: the arguments of `Engine.submit`, checked, as a `Generation`."""

from collections.abc import Callable, Sequence

from ..errors import BadInput, a_sequence, a_text, at_least, seconds, shown, token_ids
from ..options import RequestOptions
from .detokenizer import TextStream
from .output_processor import Generation
from .sampler import Chooser


def new_request(
    tokenizer, vocabulary: int, prompt: Sequence[int] | str, options: RequestOptions, **facts
) -> Generation:
    """A request; ``facts``: ``id, max_tokens, arrived_at``. `BadInput` names a bad argument."""
    strings = _stop_strings(options.stop, tokenizer)
    if isinstance(prompt, str):
        if tokenizer is None:
            raise BadInput(
                f"prompt {shown(prompt)} is text: give Engine(tokenizer=...), or token ids"
            )
        prompt = tokenizer.encode(prompt)
    stops = set(token_ids("stop_token_ids", options.stop_token_ids, vocabulary))
    if tokenizer is not None and not options.ignore_eos:
        stops |= set(tokenizer.eos_token_ids)
    a_text("request_id", facts["id"])
    facts["max_tokens"] = at_least("max_tokens", facts["max_tokens"], 1)
    facts["arrived_at"] = seconds("arrived_at", facts["arrived_at"])
    request = Generation(
        prompt=token_ids("prompt", prompt, vocabulary),
        stop_token_ids=frozenset(stops),
        priority=options.priority,
        on_token=options.on_token,
        stop_when=options.stop if callable(options.stop) else None,
        **facts,
    )
    if not request.prompt:
        raise BadInput(f"prompt of request {request.id!r} is empty: give at least one token")
    processors = a_sequence("logits_processors", options.logits_processors)
    request.chooser = Chooser(
        options.sampling, processors, options.seed, options.logprobs, vocabulary
    )
    request.stream = TextStream(tokenizer, strings) if tokenizer is not None else None
    return request


def _stop_strings(stop: str | Sequence[str] | Callable, tokenizer) -> Sequence[str]:
    if callable(stop):
        return ()
    strings = (stop,) if isinstance(stop, str) else a_sequence("stop", stop)
    if strings and tokenizer is None:
        raise BadInput(
            "stop strings need an engine with a tokenizer: give Engine(tokenizer=...), or use "
            "stop_token_ids"
        )
    if wrong := [each for each in strings if not isinstance(each, str) or not each]:
        raise BadInput(
            f"stop must be strings of at least one character, or a function, not {shown(wrong[0])}"
        )
    return strings
