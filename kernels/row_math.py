"""``fastgrpo.row_math`` in Triton's language."""

from fastgrpo import row_math as source
from fastgrpo.kernels.common import log1p_unit
from fastgrpo.kernels.rebind import rebind

_functions = rebind(source, log1p=log1p_unit)
move_sums = _functions["move_sums"]
rescale = _functions["rescale"]
row_stats = _functions["row_stats"]
gradient_at_label = _functions["gradient_at_label"]
direction_factors = _functions["direction_factors"]
