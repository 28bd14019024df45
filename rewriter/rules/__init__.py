"""The catalogue: one file, one rule. The order is that in which a plan's steps are applied."""

from __future__ import annotations

from rewriter.rules._model_rule import WholeModelRule
from rewriter.rules._rule import Contract, RewriteRule, Site
from rewriter.rules.absorb_bias import AbsorbBias
from rewriter.rules.add_residual_weights import AddResidualWeights
from rewriter.rules.correct_bias import CorrectBias
from rewriter.rules.densify_depthwise import DensifyDepthwise
from rewriter.rules.drop_dead_channels import DropDeadChannels
from rewriter.rules.equalize import Equalize
from rewriter.rules.float_gate import FloatGate
from rewriter.rules.float_tail import FloatTail
from rewriter.rules.float_trunk import FloatTrunk
from rewriter.rules.fold_gate import FoldGate
from rewriter.rules.fuse_expand import FuseExpand
from rewriter.rules.keep_float import KeepFloat
from rewriter.rules.keep_int16 import KeepInt16
from rewriter.rules.lower_resolution import SIDES, LowerResolution
from rewriter.rules.merge_separable import MergeLinearSeparable, MergeSeparable
from rewriter.rules.phase_transpose import PhaseTranspose
from rewriter.rules.refine_ranges import RefineRanges
from rewriter.rules.replace_activation import KINDS, ReplaceActivation
from rewriter.rules.replace_block import ReplaceBlock
from rewriter.rules.replace_relu6 import ReplaceRelu6
from rewriter.rules.round_weights import RoundWeights
from rewriter.rules.scale_norm import ScaleNorm
from rewriter.rules.split_cat import SplitCat
from rewriter.rules.split_channels import SplitChannels
from rewriter.rules.split_head import AUTO, SplitHead, SplitHeadNamed
from rewriter.rules.split_precision import SplitPrecision
from rewriter.rules.split_range import SplitRange, SplitWeights
from rewriter.rules.thin_channels import AMOUNTS, ThinChannels
from rewriter.rules.unmerge_rep import UnmergeRep

RULES: tuple[RewriteRule, ...] = (
    DropDeadChannels(),
    MergeLinearSeparable(),
    MergeSeparable(),
    FuseExpand(),
    ReplaceBlock(),
    DensifyDepthwise(4),
    DensifyDepthwise(16),
    FoldGate(),
    *(ReplaceActivation(kind) for kind in KINDS),
    # what is left of the network, upstream first
    *(ThinChannels(percent) for percent in AMOUNTS),
    *(LowerResolution(percent) for percent in SIDES),
    PhaseTranspose(),
    ScaleNorm(),
    # what a split divides afterwards stays in float
    FloatTrunk(),
    FloatGate(),
    # before what divides their inputs: a layer that has become a sum is no head any more
    SplitHead(2),
    SplitHead(3),
    SplitHead(4),
    SplitHead(AUTO),
    SplitHeadNamed(),
    SplitCat(),
    SplitChannels(),
    SplitRange(2),
    SplitRange(3),
    SplitRange(4),
    SplitWeights(2),
    SplitWeights(3),
    UnmergeRep(),
    SplitPrecision(),
    AddResidualWeights(),
    ReplaceRelu6(),
    Equalize(),
    AbsorbBias(),
    RefineRanges(),
    CorrectBias(),
    RoundWeights(),
    FloatTail(),
    KeepInt16(),
    KeepFloat(),
)

__all__ = ["RULES", "Contract", "RewriteRule", "Site", "WholeModelRule"]
