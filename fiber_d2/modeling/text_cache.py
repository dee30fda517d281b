"""What of a caption depends on nothing else, remembered between images."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any

import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

from fiber_d2.structures import Prompt

Compute = Callable[[Sequence[Prompt]], torch.Tensor]


class TextCache:
    """Hidden states of captions, those not used for longest dropped first.

    They hold for the weights that they were computed with: when one of those has been written to
    or replaced, all are forgotten. Writing through ``parameter.data``, which torch keeps no count
    of, is the exception: it takes a :meth:`clear`.

    Copies of it, in copies of a model, are empty. Threads may share one.

    Args:
        max_bytes: of all hidden states together; 0 remembers nothing.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self._lock = threading.Lock()
        self.clear()

    def __reduce__(self) -> tuple[Any, ...]:
        return TextCache, (self.max_bytes,)

    def clear(self) -> None:
        """Forget all."""
        with self._lock:
            self._forget()

    def _forget(self) -> None:
        self._entries: OrderedDict[Hashable, torch.Tensor] = OrderedDict()
        self._bytes = 0
        self._weights: Any = None

    def __len__(self) -> int:
        return len(self._entries)

    def __call__(
        self,
        prompts: Sequence[Prompt],
        compute: Compute,
        modules: Iterable[nn.Module],
        device: torch.device,
    ) -> list[torch.Tensor]:
        """Hidden states ``(T_i, D)`` of captions, of equal ones computed once.

        Args:
            prompts: the captions.
            compute: captions to hidden states ``(captions, T, D)``, padded to the longest.
            modules: what is used for that, with all weights. Where one of them is in training
                mode, or gradients are recorded, nothing is remembered.
            device: on which to compute.
        """
        kind = _autocast_type(device)
        keys = [_key(prompt, device, kind) for prompt in prompts]
        weights = None
        if self.max_bytes and not torch.is_grad_enabled():
            weights = _state(modules)
        found = self._get(keys, weights)
        missing = {key: prompt for key, prompt in zip(keys, prompts) if key not in found}
        if missing:
            states = compute(list(missing.values()))
            for (key, prompt), state in zip(missing.items(), states):
                found[key] = state[: prompt.num_tokens]
            self._put({key: found[key] for key in missing}, weights)
        return [found[key] for key in keys]

    def _get(self, keys: Sequence[Hashable], weights: Any) -> dict[Hashable, torch.Tensor]:
        if weights is None:
            return {}
        with self._lock:
            if weights != self._weights:
                self._forget()
                self._weights = weights
            known = [key for key in dict.fromkeys(keys) if key in self._entries]
            for key in known:
                self._entries.move_to_end(key)
            return {key: self._entries[key] for key in known}

    def _put(self, states: dict[Hashable, torch.Tensor], weights: Any) -> None:
        if weights is None:
            return
        with self._lock:
            if weights != self._weights:
                return  # of weights that another thread has replaced meanwhile
            for key, state in states.items():
                if key in self._entries:
                    continue
                # A piece of the batch would keep the whole batch.
                self._entries[key] = state.clone()
                self._bytes += state.nbytes
            while self._bytes > self.max_bytes:
                self._bytes -= self._entries.popitem(last=False)[1].nbytes


def _key(prompt: Prompt, device: torch.device, kind: torch.dtype | None) -> Hashable:
    ids, mask = (x.cpu().numpy().tobytes() for x in (prompt.input_ids, prompt.attention_mask))
    return ids, mask, device, kind


def _autocast_type(device: torch.device) -> torch.dtype | None:
    if not torch.is_autocast_enabled(device.type):
        return None
    return torch.get_autocast_dtype(device.type)


def _state(modules: Iterable[nn.Module]) -> list[Any] | None:
    """What differs when a weight does; None where that cannot be said, or a module trains."""
    state: list[Any] = []
    for outer in modules:
        if any(module.training for module in outer.modules()):
            return None
        for parameter in outer.parameters():
            if parameter.is_inference():
                return None  # torch does not count what is written to these
            # The reference keeps another storage from getting this one's address.
            state.append((StorageWeakRef(parameter.untyped_storage()), parameter._version))
    return state
