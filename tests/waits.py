"""Counting what would wait for a GPU."""

from __future__ import annotations

from collections import Counter

import torch
from torch.utils._python_dispatch import TorchDispatchMode

READS = {"_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive", "bincount",
         "equal", "is_nonzero", "repeat_interleave.Tensor"}  # fmt: skip


class HostReads(TorchDispatchMode):
    """Counts what would wait for a GPU: values read, and operations whose output's size depends on values."""

    def __init__(self):
        super().__init__()
        self.seen = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in READS or str(func).split("::")[-1] in READS:
            self.seen[name] += 1
        if name in ("index", "index_put", "index_put_") and any(
            x is not None and x.dtype == torch.bool for x in args[1]
        ):
            self.seen[name] += 1
        return func(*args, **(kwargs or {}))

    @property
    def total(self):
        return sum(self.seen.values())


def reads(run, monkeypatch):
    """What `run` would read from the device; what `torch.tensor` made and `cpu` returned is on the host."""
    counter, host = HostReads(), []

    def at_home(tensor):
        return any(tensor.untyped_storage().data_ptr() == h.untyped_storage().data_ptr() for h in host)

    with monkeypatch.context() as patch:
        for name in ("tolist", "numpy", "cpu"):
            original = getattr(torch.Tensor, name)

            def noted(tensor, *args, original=original, name=name, **kwargs):
                if not at_home(tensor):
                    counter.seen[name] += 1
                if name != "cpu":
                    return original(tensor, *args, **kwargs)
                host.append(tensor.clone())
                return host[-1]

            patch.setattr(torch.Tensor, name, noted)
        make = torch.tensor

        def made(*args, **kwargs):
            out = make(*args, **kwargs)
            if kwargs.get("device") is None:
                host.append(out)
            return out

        patch.setattr(torch, "tensor", made)
        with counter, torch.no_grad():
            run()
    return counter
