"""Types of settings with a range or a choice: the command line rejects values outside of it."""

import math
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Le, Lt

Positive = Annotated[float, Gt(0), Lt(math.inf)]
NonNegative = Annotated[float, Ge(0), Lt(math.inf)]
Share = Annotated[float, Ge(0), Le(1)]
ShareBelowOne = Annotated[float, Ge(0), Lt(1)]  # e.g. dropout rates
PositiveInt = Annotated[int, Ge(1)]
NonNegativeInt = Annotated[int, Ge(0)]  # zero for none
Mirroring = Literal["none", "flip", "flips"]  # test-time augmentation, see `modules.views`
