"""quantfix's rewriter: trace one network, quantize it, find what hurts, change it."""

from rewriter.cost import Cost as Cost
from rewriter.cost import cost as cost
from rewriter.errors import PlanError as PlanError
from rewriter.errors import QuantizeError as QuantizeError
from rewriter.errors import RewriteError as RewriteError
from rewriter.errors import TraceError as TraceError
from rewriter.graph import trace as trace
from rewriter.int8.scheme import TARGETS as TARGETS
from rewriter.int8.scheme import target as target
from rewriter.int8.simulate import Quantized as Quantized
from rewriter.int8.simulate import quantize as quantize
from rewriter.int8.simulate import simulate as simulate
from rewriter.plan import Plan as Plan
from rewriter.plan import Step as Step
from rewriter.plan import find_sites as find_sites
from rewriter.plan import rewrite as rewrite
from rewriter.ranges import profile as profile
from rewriter.rules import RULES as RULES
