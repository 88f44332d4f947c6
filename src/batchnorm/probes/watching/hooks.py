"""The hooks on a watched model itself, and the passes in which its layers cannot be seen."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import torch

from batchnorm.ops.reference import composing

if TYPE_CHECKING:
    from batchnorm.probes.watching.handle import Watch


class RootHook:
    """A hook on the model itself. A copy of the model, or one that was pickled, has one that does nothing."""

    def __init__(self, watch: Watch, begins: bool) -> None:
        self.watch, self.begins = watch, begins

    def __call__(self, *seen: Any) -> None:
        if torch.compiler.is_compiling():
            return
        if self.begins:
            self.watch.begin_step()
        else:
            self.watch.end_step(whole=seen[-1] is not None)  # what a pass that fails returns

    def __reduce__(self) -> tuple[Callable[[], Callable[..., None]], tuple[()]]:
        return _no_hook, ()


def _no_hook() -> Callable[..., None]:
    return _nothing


def _nothing(*_: Any) -> None:
    pass


def passes_can_be_seen(until: ExitStack) -> bool:
    """Whether a pass that begins now computes with tensors that have values, in Python that calls hooks.

    Not under ``torch.func`` and tracers, nor inside of what ``torch.compile`` compiled. What is compiled inside of the
    pass runs in eager ``until`` the stack is closed.
    """
    if composing() or torch._C._get_tracing_state() is not None:
        return False
    if "torch._dynamo" in sys.modules:
        from torch._C._dynamo.eval_frame import get_eval_frame_callback

        if get_eval_frame_callback() not in (None, False):
            return False
        # Setting it takes a while. Where it cannot be known whether anything was compiled, it is set. To be kept from
        # compiling, as parts of torch are, counts as a backend that is None.
        backends = getattr(sys.modules.get("torch._dynamo.eval_frame"), "cached_backends", None)
        if isinstance(backends, dict) and not any(backend is not None for backend in backends.values()):
            return True
        until.enter_context(torch.compiler.set_stance("force_eager"))
    return True
