"""Choose the range of every int8 value by what its rounding and clipping do to the output.

Before: range = [smallest, largest] value seen in calibration
After:  the range with the least predicted damage

    damage(low, high) = 1/2 E[(sum g (x - Q(x)))^2]

g is the gradient of the output with respect to the value (``rewriter.damage.fisher``), so a value
is clipped where the output does not depend on its outliers, and not where it does; a range of
least mean square error clips both alike. The weights are not touched.

First each range is cut to what the operations that read it can tell apart: [-3, 3] before a hard
sigmoid, about [-9, 9] before a sigmoid (``rewriter.repair.useful_ranges``).

Why: one outlier makes the step of a whole tensor coarse.
Exact: the float network does not change, only its int8 form.
Cost: none at run time; backward passes over the calibration inputs when the file is made.
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
    version: ClassVar[int] = 2
    contract: ClassVar[Contract] = "annotation"
    repair: ClassVar[str] = "ranges"

    def problem(self, gm: fx.GraphModule) -> str:
        return ""
