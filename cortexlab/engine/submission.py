"""What a request may be: the arguments of `Engine.submit`, checked, as a `Generation`."""

from collections.abc import Callable, Container, Mapping, Sequence

from ..errors import (
    BadInput,
    CortexLabError,
    a_sequence,
    a_text,
    at_least,
    is_own,
    named,
    seconds,
    shown,
    token_ids,
)
from ..options import RequestOptions
from ..scheduler.block_manager import BlockManager
from .detokenizer import TextStream
from .output_processor import Generation
from .sampler import Chooser


def new_request(tokenizer, vocabulary: int, prompt, options: RequestOptions, **facts) -> Generation:
    """A request; ``facts``: ``id, max_tokens, arrived_at``. `BadInput` names a bad argument."""
    strings = _stop_strings(options.stop, tokenizer)
    if (prompt is None) == (options.messages is None):
        raise BadInput("give either a prompt or messages")
    if options.messages is not None or isinstance(prompt, str):
        prompt = _encoded(tokenizer, prompt, options.messages)
    elif isinstance(prompt, Mapping) and "input_ids" in prompt:  # as a tokenizer returns it
        prompt = _only_row(prompt["input_ids"])
    elif getattr(prompt, "ndim", 1) == 2:
        prompt = _only_row(prompt)
    elif hasattr(prompt, "ids"):  # of the library `tokenizers`
        prompt = prompt.ids
    stops = set(token_ids("stop_token_ids", options.stop_token_ids, vocabulary, in_any_order=True))
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
        timeout_s=options.timeout_s,
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


def _encoded(tokenizer, prompt: str | None, messages: Sequence[Mapping] | None) -> Sequence[int]:
    """Tokens of a text, or of messages under the chat template, as `mlx_lm.stream_generate` and
    `mlx_lm.server` have them: no second BOS token where the text begins with one.
    """
    what = f"prompt {shown(prompt)} is text" if messages is None else "messages are text"
    if tokenizer is None:
        raise BadInput(f"{what}: give Engine(tokenizer=...), or token ids")
    try:
        if messages is not None:
            return tokenizer.apply_chat_template(list(messages), add_generation_prompt=True)
        bos = tokenizer.bos_token
        add_special_tokens = bos is None or not prompt.startswith(bos)
        return tokenizer.encode(prompt, add_special_tokens=add_special_tokens)
    except BaseException as error:
        if not is_own(error):
            raise
        raise BadInput(f"{what} that its tokenizer cannot encode: {named(error)}") from error


def _only_row(ids: object) -> object:
    """Token ids out of a batch of one."""
    rows = ids.tolist() if hasattr(ids, "tolist") else ids
    if not (isinstance(rows, list) and rows and isinstance(rows[0], list)):
        return rows
    if len(rows) > 1:
        raise BadInput(f"prompt holds the token ids of {len(rows)} texts: submit one at a time")
    return rows[0]


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


def refusal(
    request: Generation, live: Container[str], max_seq_len: int, blocks: BlockManager
) -> str | None:
    """Why a request cannot be taken: its id is one of the ``live`` ones, or it could never fit."""
    if request.id in live:
        return f"request id {request.id!r} is already in use: choose another"
    try:
        reason = misfit(len(request.prompt) + request.max_tokens, max_seq_len, blocks)
    except CortexLabError as error:
        return str(error)
    return reason and f"request {request.id!r} {reason}"


def misfit(num_tokens: int, max_seq_len: int, blocks: BlockManager | None) -> str | None:
    """Why a request of ``num_tokens``, prompt and output, can never be served; None if it can.
    ``blocks`` None: no pool limits it. The last token is sampled, but takes no slot.
    """
    if num_tokens > max_seq_len:
        return f"wants {num_tokens} tokens (prompt + output), but max_seq_len is {max_seq_len}"
    if blocks is not None and not blocks.could_ever_hold(num_tokens - 1):
        if len(blocks.layer_shares) > 1:
            most, pool = blocks.most_blocks(num_tokens - 1), blocks.num_blocks
            return f"wants {most} blocks, which can never fit the pool of {pool} blocks"
        pool = blocks.num_slots
        return f"wants {num_tokens - 1} slots, which can never fit the pool of {pool} slots"
    return None
