"""Choose the range of every int8 value by what its rounding and clipping do to the output.

Before: range = [smallest, largest] seen          After: the range with the least predicted damage

    damage(low, high) = 1/2 E[(sum g (x - Q(x)))^2]      g: gradient of the answer (``rewriter.damage.fisher``)

First each range is cut to what the operations that read it can tell apart: [-3, 3] before a hard sigmoid, about [-9, 9] before a sigmoid
(``rewriter.repair.useful_ranges``). Then a value is clipped where its outliers do not carry the answer, and not where they do (a
range of least mean square error clips both alike). The weights are not touched.
Why: one outlier makes the step of a whole tensor coarse.
Source: after Nagel et al., 2021 (arXiv:2106.08295), section 3.1.
"""

from __future__ import annotations

from typing import ClassVar

from torch import fx

from rewriter.rules._model_rule import WholeModelRule
from rewriter.rules._rule import Contract


class RefineRanges(WholeModelRule):
    """Carried out by ``assemble`` after calibration."""

    name: ClassVar[str] = "refine_ranges"
    contract: ClassVar[Contract] = "annotation"
    repair: ClassVar[str] = "ranges"

    def problem(self, gm: fx.GraphModule) -> str:
        return ""
