"""Ranges of settings as types: the command line refuses a number outside of them, wherever it is given."""

import math
from typing import Annotated

from annotated_types import Ge, Interval

Positive = Annotated[float, Interval(gt=0, lt=math.inf)]
NonNegative = Annotated[float, Interval(ge=0, lt=math.inf)]
Share = Annotated[float, Interval(ge=0, le=1)]
ShareBelowOne = Annotated[float, Interval(ge=0, lt=1)]  # a share that leaves something
PositiveInt = Annotated[int, Ge(1)]
NonNegativeInt = Annotated[int, Ge(0)]  # zero means none
