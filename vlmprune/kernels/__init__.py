"""The operations that pruning consists of, as `torch.ops.vlmprune.*`, each with several implementations.

`top_k`, `select_gather`, `greedy`, `attention_mass` and `merge` are custom ops, so `torch.compile` sees one node each.
On a CPU they are plain torch (`reference.py`); on a GPU they are Triton (`triton_ops.py`) or CUDA C++ that ships as PTX
(`cuda_ops.py`, `driver.py` and `csrc/`), once the device has passed a trial (`trial.py`). `use` or the environment
variable `VLMPRUNE_KERNELS` forces one of them.
"""

from vlmprune.kernels.choice import IMPLEMENTATIONS, use
from vlmprune.kernels.ops import OPS, call
from vlmprune.kernels.warm import warm_up

__all__ = ["IMPLEMENTATIONS", "OPS", "call", "use", "warm_up"]
