"""Methods of modules that torch.compile may run, as the module says."""

from __future__ import annotations

import functools
from typing import Any, Callable, TypeVar

import torch

Method = TypeVar("Method", bound=Callable[..., Any])


def compilable(method: Method) -> Method:
    """The method through :func:`torch.compile` where its module's ``compile_backend`` is a name.

    For all sizes of inputs (``dynamic=True``). The module holds nothing but the name, so copies of
    it, its state dict and pickling are what they are without.
    """

    @functools.wraps(method)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.compile_backend is None or torch.compiler.is_compiling():
            return method(self, *args, **kwargs)
        return _compiled(method, self.compile_backend)(self, *args, **kwargs)

    return call  # type: ignore[return-value]


@functools.cache
def _compiled(method: Callable[..., Any], backend: str) -> Callable[..., Any]:
    # Not ``fullgraph``: sizes that are a case of their own once too often would end a training,
    # where without it they are only not compiled. The tests see that nothing breaks a graph.
    return torch.compile(method, backend=backend, dynamic=True)
