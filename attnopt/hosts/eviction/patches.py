"""Where a session meets transformers: three of its functions are led through the session, for as long as one is active.

    Cache.update                       a layer's cache is made to forget when it first takes tokens
    AttentionInterface.get_interface   every attention function, eager, sdpa or registered, is called with the narrowed mask
    forward of rotary modules          remembered, for policies that read queries before they are turned

A session counts in the thread and task that opened it; others go on as before.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import threading
from collections.abc import Callable, Iterator
from typing import Any, Protocol

from torch import nn
from torch.nn.modules.module import register_module_forward_hook
from transformers.cache_utils import Cache
from transformers.modeling_utils import AttentionInterface

from attnopt.errors import AttnoptError
from attnopt.hosts.eviction.session import Session
from attnopt.hosts.eviction.turning import Turning

ACTIVE: contextvars.ContextVar[Attends | None] = contextvars.ContextVar("attnopt_cache", default=None)
LOCK = threading.Lock()
OPEN: list[Callable[[], None]] = []  # how to undo each of the patches, for every session that is open


class Attends(Protocol):
    """What is led to see every attention."""

    def attend(self, function: Callable[..., Any], module: nn.Module, q: Any, k: Any, v: Any, mask: Any, **given: Any) -> Any: ...


@contextlib.contextmanager
def watched(by: Attends) -> Iterator[None]:
    """Attentions of models that run inside go through `by`, and caches too where it is a session."""
    if ACTIVE.get() is not None:
        raise AttnoptError("a cache policy is active already", next_move="Leave its `with` block first.")
    with LOCK:
        OPEN.append(patched() if not OPEN else OPEN[0])
    token = ACTIVE.set(by)
    try:
        yield
    finally:
        ACTIVE.reset(token)
        with LOCK:
            undo = OPEN.pop()
            if not OPEN:
                undo()


@contextlib.contextmanager
def active(session: Session) -> Iterator[Session]:
    """Models that run inside use the session's policy."""
    with watched(session):
        remove = register_module_forward_hook(remembering(session), with_kwargs=True).remove if session.policy.plain else None
        try:
            yield session
            session.require_attended()
        finally:
            if remove is not None:
                remove()


def patched() -> Callable[[], None]:
    """Leads transformers through the active session; returns what undoes it."""
    update, get_interface = Cache.update, AttentionInterface.get_interface

    @functools.wraps(update)
    def prepared_update(self: Cache, key_states: Any, value_states: Any, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        session = ACTIVE.get()
        if isinstance(session, Session):
            session.prepare(self, layer_idx, key_states)
        return update(self, key_states, value_states, layer_idx, *args, **kwargs)

    @functools.wraps(get_interface)
    def watched_interface(self: AttentionInterface, implementation: str, default: Callable[..., Any]) -> Callable[..., Any]:
        function = get_interface(self, implementation, default)
        session = ACTIVE.get()
        return function if session is None else functools.partial(session.attend, function)

    Cache.update, AttentionInterface.get_interface = prepared_update, watched_interface

    def undo() -> None:
        Cache.update, AttentionInterface.get_interface = update, get_interface

    return undo


def remembering(session: Session) -> Callable[..., None]:
    """A hook for all modules that remembers how rotary ones were called."""

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        if ACTIVE.get() is session and "Rotary" in type(module).__name__ and isinstance(result, tuple) and len(result) == 2:
            turning = Turning(module, args, kwargs, *result)
            session.turnings[turning.kind] = turning

    return hook
