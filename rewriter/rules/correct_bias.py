"""Set every bias so that the mean of each output channel is that of the float network.

Before: y = Wq xq + b
After:  y = Wq xq + b + E[W x + b] - E[Wq xq + b]

The means are taken over calibration inputs and positions; x is cut off where its int8 range ends.
Layers are corrected in the order in which they run, each with the inputs that it has after the
layers before it were corrected (``rewriter.repair.bias_and_rounding``).

Why: the error of a rounded filter has a mean, and the means add up over positions and layers; they
    are most of the damage of depthwise layers.
Exact: the float network does not change, only its int8 form.
Cost: none at run time; one more pass over the calibration inputs when the file is made.
Source: Nagel et al., 2019 (arXiv:1906.04721), section 4.2, empirical form.
"""

from __future__ import annotations

from typing import ClassVar

from torch import fx

from rewriter.graph.lookup import layers
from rewriter.rules._model_rule import WholeModelRule
from rewriter.rules._rule import Contract


class CorrectBias(WholeModelRule):
    """Carried out by ``assemble`` after calibration."""

    name: ClassVar[str] = "correct_bias"
    contract: ClassVar[Contract] = "annotation"
    repair: ClassVar[str] = "biases"

    def problem(self, gm: fx.GraphModule) -> str:
        return "" if layers(gm) else "no layer has weights"
