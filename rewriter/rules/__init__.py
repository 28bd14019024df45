"""The catalogue: one file, one rule. The order is that in which a plan's steps are applied."""

from __future__ import annotations

from rewriter.rules._rule import Contract, RewriteRule, Site
from rewriter.rules.densify_depthwise import DensifyDepthwise
from rewriter.rules.fuse_expand import FuseExpand
from rewriter.rules.keep_float import KeepFloat
from rewriter.rules.merge_separable import MergeLinearSeparable, MergeSeparable
from rewriter.rules.replace_block import ReplaceBlock
from rewriter.rules.split_cat import SplitCat
from rewriter.rules.split_channels import SplitChannels
from rewriter.rules.split_head import SplitHead
from rewriter.rules.split_range import SplitRange, SplitWeights

RULES: tuple[RewriteRule, ...] = (
    MergeLinearSeparable(),
    MergeSeparable(),
    FuseExpand(),
    ReplaceBlock(),
    DensifyDepthwise(4),
    DensifyDepthwise(16),
    SplitCat(),
    SplitChannels(),
    SplitRange(2),
    SplitRange(3),
    SplitRange(4),
    SplitWeights(2),
    SplitWeights(3),
    SplitHead(2),
    SplitHead(3),
    SplitHead(4),
    KeepFloat(),
)

__all__ = ["RULES", "Contract", "RewriteRule", "Site"]
