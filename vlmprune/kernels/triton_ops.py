"""Triton implementations. With TRITON_INTERPRET=1 they also run on a CPU, slowly: that is how they are tested there."""

from vlmprune.kernels.triton_attention import attention_mass
from vlmprune.kernels.triton_choose import select_gather, top_k
from vlmprune.kernels.triton_greedy import greedy
from vlmprune.kernels.triton_merge import merge

__all__ = ["attention_mass", "greedy", "merge", "select_gather", "top_k"]
