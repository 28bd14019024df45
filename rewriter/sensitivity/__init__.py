"""Which layers int8 harms, how much, why, and what answers it."""

from rewriter.sensitivity.analyze import analyze as analyze
from rewriter.sensitivity.analyze import float_gains as float_gains
from rewriter.sensitivity.causes import THRESHOLDS as THRESHOLDS
from rewriter.sensitivity.causes import Cause as Cause
from rewriter.sensitivity.records import Analysis as Analysis
from rewriter.sensitivity.records import Baseline as Baseline
from rewriter.sensitivity.records import CurvePoint as CurvePoint
from rewriter.sensitivity.records import Interaction as Interaction
from rewriter.sensitivity.records import LayerDamage as LayerDamage
from rewriter.sensitivity.records import ValueDamage as ValueDamage
from rewriter.sensitivity.screen import Candidate as Candidate
from rewriter.sensitivity.screen import Screening as Screening
