"""Round weights so that each layer's output is right, not each weight.

Before: Q = round(W / step)
After:  Q = argmin |(step Q) Xq - W X|^2   over integers near W / step

X are the layer's inputs in float, and Xq the same inputs as they are in int8 after all layers
before it were repaired: the rounding error of one weight is made up for by others of the same
filter, and so is part of the error of earlier layers. Closed form
(``rewriter.repair.weight_rounding``); the step is chosen too. The weights are left on their grid,
and calibration keeps their step.

Why: rounding to nearest is best for each weight, and far from best for their sum.
Exact: the float network does not change, only its int8 form.
Cost: none at run time; one least-squares problem for each layer when the file is made.
Source: Frantar et al., 2022 (arXiv:2210.17323); Nagel et al., 2020 (arXiv:2004.10568).
"""

from __future__ import annotations

from typing import ClassVar

from torch import fx, nn

from rewriter.graph.lookup import is_call, layers
from rewriter.rules._model_rule import WholeModelRule
from rewriter.rules._rule import Contract


class RoundWeights(WholeModelRule):
    """Carried out by ``assemble`` after calibration."""

    name: ClassVar[str] = "round_weights"
    version: ClassVar[int] = 2
    contract: ClassVar[Contract] = "annotation"
    repair: ClassVar[str] = "rounding"

    def problem(self, gm: fx.GraphModule) -> str:
        known = any(is_call(gm, n, nn.Conv1d, nn.Conv2d, nn.Linear) for n in layers(gm))
        return "" if known else "no convolution or linear layer"
