"""All kinds of inputs for `fuzz`: a function each. It takes a `random.Random` and the folder of the
results that must stay as they are, writes the files that it needs into the working folder, and
returns an `Input`.
"""

from fuzz_calls import a_call, a_method, a_workload
from fuzz_commands import (
    a_command,
    a_model,
    a_notebook,
    a_rare_option,
    a_result,
    a_step_time,
    a_sweep,
    a_trace,
)

INPUTS = {
    each.__name__: each
    for each in (
        a_command, a_call, a_method, a_trace, a_result, a_sweep, a_rare_option, a_notebook,
        a_step_time, a_model, a_workload,
    )
}  # fmt: skip
OFTEN_KINDS = (
    *["a_call"] * 6, *["a_command"] * 4, *["a_trace"] * 3, *["a_result"] * 3, *["a_sweep"] * 2,
    *["a_method"] * 2, *INPUTS,
)  # fmt: skip
