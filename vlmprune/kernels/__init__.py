"""The operations that pruning consists of, as `torch.ops.vlmprune.*`, each with several implementations.

`top_k`, `select_gather`, `greedy`, `attention_mass` and `merge` are custom ops, so `torch.compile` sees one node each.
On a CPU they are plain torch (`reference.py`); on a GPU they are Triton (`triton_ops.py`) or CUDA C++ compiled at run
time (`cuda_ops.py` and `csrc/`). `use` or the environment variable `VLMPRUNE_KERNELS` forces one of them.
"""

from vlmprune.kernels.choice import IMPLEMENTATIONS, use
from vlmprune.kernels.ops import OPS

__all__ = ["IMPLEMENTATIONS", "OPS", "use"]
