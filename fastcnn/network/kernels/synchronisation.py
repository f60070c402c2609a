"""Programs of one launch that wait for each other or for the launch before, or whose last one finishes the work."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def await_inputs(EARLY: tl.constexpr):
    """Wait until the launch before has ended, where this one may begin earlier; then let the next one begin."""
    if EARLY:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def meet(counters, num_programs):
    """Wait until `num_programs` programs are here; what each has written before is then seen by all.

    counters: two int32, 0 before the first launch; they may be used again by the next one.
    """
    generation = tl.atomic_add(counters + 1, 0, sem="acquire")
    tl.debug_barrier()
    if tl.atomic_add(counters, 1, sem="acq_rel") == num_programs - 1:
        tl.atomic_xchg(counters, 0, sem="relaxed")
        tl.atomic_add(counters + 1, 1, sem="release")
    else:
        while tl.atomic_add(counters + 1, 0, sem="acquire") == generation:
            pass
    tl.debug_barrier()


@triton.jit
def arrives_last(counter, num_programs):
    """Return whether this is the last of `num_programs` programs to come here; it sees what all others have written.

    counter: one int32, 0 before the first launch and again afterwards.
    """
    tl.debug_barrier()
    last = tl.atomic_add(counter, 1, sem="acq_rel") == num_programs - 1
    if last:
        tl.atomic_xchg(counter, 0, sem="relaxed")
    tl.debug_barrier()
    return last
