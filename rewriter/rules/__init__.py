"""The catalogue: one file, one rule. The order is that in which a plan's steps are applied."""

from __future__ import annotations

from rewriter.rules._rule import Contract, RewriteRule, Site
from rewriter.rules.keep_float import KeepFloat
from rewriter.rules.merge_separable import MergeLinearSeparable, MergeSeparable
from rewriter.rules.split_head import SplitHead

RULES: tuple[RewriteRule, ...] = (
    MergeLinearSeparable(),
    MergeSeparable(),
    SplitHead(2),
    SplitHead(3),
    SplitHead(4),
    KeepFloat(),
)

__all__ = ["RULES", "Contract", "RewriteRule", "Site"]
