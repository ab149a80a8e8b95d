"""What giantstep's own tests use and users' tests may: simulated ranks, ranks as threads, faulty stores, contract suites.

Three functions test a layout in one process: `check_coverage` says whether the state dicts of all ranks cover every tensor
once, `draw` shows who holds what, `round_trip` saves them and loads them into another layout. `run_ranks` runs any code
of several ranks as threads. `explore` crashes an operation at each of its storage operations and looks at every state that
this may leave; `giantstep.testing.killing` kills processes that save and checks what is left. Stores that fail on purpose are
in `giantstep.testing.faults`, the promises of a store in `giantstep.testing.store_contract`.
"""

from giantstep.testing.checking import RoundTripError
from giantstep.testing.crash_points import CrashPointError, CrashReport, explore
from giantstep.testing.drawing import draw
from giantstep.testing.ranks import RanksFailedError, run_ranks
from giantstep.testing.roundtrip import round_trip
from giantstep.testing.simulated import Coverage, check_coverage

__all__ = [
    "Coverage",
    "CrashPointError",
    "CrashReport",
    "RanksFailedError",
    "RoundTripError",
    "check_coverage",
    "draw",
    "explore",
    "round_trip",
    "run_ranks",
]
