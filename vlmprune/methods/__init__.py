"""The methods, one file each; importing this package registers them."""

from vlmprune.methods.base import Method
from vlmprune.methods.controls import Grid, Pool, Random
from vlmprune.methods.fastv import FastV
from vlmprune.methods.fopru import FoPru
from vlmprune.methods.vtc_cls import VtcCls

__all__ = ["FastV", "FoPru", "Grid", "Method", "Pool", "Random", "VtcCls"]
