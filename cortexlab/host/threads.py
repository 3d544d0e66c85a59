"""Threads that use MLX: each has streams of its own, which must end before it does."""

import threading

import mlx.core as mx

_of_thread = threading.local()


class _Streams:
    """Ends the streams of the thread that it belongs to, when that thread ends."""

    def __del__(self):
        mx.clear_streams()


def end_streams_with_thread() -> None:
    """Call it in a thread before it uses MLX. Where a thread ends and its streams do not, the
    process ends with exit code 134 (MLX 0.32.4, CPU build).
    """
    if not hasattr(_of_thread, "streams") and (
        threading.current_thread() is not threading.main_thread()
    ):
        _of_thread.streams = _Streams()
