from dataclasses import dataclass
@dataclass(frozen=True)
class FitReport: pass
def fit(*a): return ()
