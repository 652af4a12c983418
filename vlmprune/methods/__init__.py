"""The methods, one file each; importing this package registers them."""

from vlmprune.methods.atp.method import Atp
from vlmprune.methods.base import Method
from vlmprune.methods.catp import Catp
from vlmprune.methods.cdpruner import CDPruner
from vlmprune.methods.controls import Grid, Pool, Random
from vlmprune.methods.dart import Dart
from vlmprune.methods.divprune import DivPrune
from vlmprune.methods.downsample import Downsample
from vlmprune.methods.evs import Evs
from vlmprune.methods.fastervlm import FasterVLM
from vlmprune.methods.fastv import FastV
from vlmprune.methods.flowcut import FlowCut
from vlmprune.methods.fopru import FoPru
from vlmprune.methods.globalcom2 import GlobalCom2
from vlmprune.methods.globalcom2_fixed import GlobalCom2Fixed
from vlmprune.methods.hiprune import HiPrune
from vlmprune.methods.holov import HoloV
from vlmprune.methods.lrs import Lrs
from vlmprune.methods.m3 import M3
from vlmprune.methods.mmtok import MMTok
from vlmprune.methods.pitome import PiToMe
from vlmprune.methods.pixelprune import PixelPrune
from vlmprune.methods.prumerge import PruMerge
from vlmprune.methods.prumerge_plus import PruMergePlus
from vlmprune.methods.prunesid import PruneSID
from vlmprune.methods.pyramiddrop import PyramidDrop
from vlmprune.methods.quota import Quota
from vlmprune.methods.scope import Scope
from vlmprune.methods.showui import ShowUI
from vlmprune.methods.sparsevlm import SparseVLM
from vlmprune.methods.tcc import Tcc
from vlmprune.methods.todre import ToDRE
from vlmprune.methods.tome import ToMe
from vlmprune.methods.transprune import TransPrune
from vlmprune.methods.v2drop import V2Drop
from vlmprune.methods.vflowopt import VFlowOpt
from vlmprune.methods.vidcom2 import VidCom2
from vlmprune.methods.visionzip import VisionZip
from vlmprune.methods.vispruner import VisPruner
from vlmprune.methods.vscan import VScan
from vlmprune.methods.vtc_cls import VtcCls
from vlmprune.methods.zero_tprune import ZeroTPrune

__all__ = [
    "M3",
    "Atp",
    "CDPruner",
    "Catp",
    "Dart",
    "DivPrune",
    "Downsample",
    "Evs",
    "FastV",
    "FasterVLM",
    "FlowCut",
    "FoPru",
    "GlobalCom2",
    "GlobalCom2Fixed",
    "Grid",
    "HiPrune",
    "HoloV",
    "Lrs",
    "MMTok",
    "Method",
    "PiToMe",
    "PixelPrune",
    "Pool",
    "PruMerge",
    "PruMergePlus",
    "PruneSID",
    "PyramidDrop",
    "Quota",
    "Random",
    "Scope",
    "ShowUI",
    "SparseVLM",
    "Tcc",
    "ToDRE",
    "ToMe",
    "TransPrune",
    "V2Drop",
    "VFlowOpt",
    "VScan",
    "VidCom2",
    "VisPruner",
    "VisionZip",
    "VtcCls",
    "ZeroTPrune",
]
