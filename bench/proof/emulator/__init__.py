"""An emulator of PTX in numpy: what Triton compiles for sm_80 and sm_90 runs on CPU tensors, through our launchers.

The fourth rung of the ladder of proof: reference (float64), interpreter, compile report, emulation, GPU. The
interpreter runs the Triton language; here the compiled code runs, with the compiler's layouts, buffers, barriers and
asynchronous instructions.

Modelled:

- threads of many programs in lockstep, their registers, predicates, branches and barriers; threads may part;
- global memory: an address outside of the tensors of the launch, or no multiple of the width of its access, ends the
  launch; shared memory: the same, against what the kernel asked for;
- ``cp.async`` and ``wgmma`` with their groups. A ``Schedule`` has them happen when they are issued, or when they are
  waited for: as early and as late as the architecture allows. The ladder runs copies early with products late, and the
  reverse;
- races, by a log of who touched which bytes (``races``), whatever the schedule: warps of a program without a barrier in
  between, programs of one launch, what a copy in flight fills or a product in flight reads;
- ``mma.sync``, ``wgmma`` with descriptors and swizzles, ``ldmatrix``, ``stmatrix``, shuffles, ``redux``;
- uninitialised memory: shared memory is NaN, registers too, and ``torch.empty`` under ``poisoned_outputs``;
- at worst (``Schedule.worst``): ``ex2.approx``, ``div.full``, ``sqrt.approx`` and the like err by all that the manual
  allows, up or down as a function of the operands; tensor cores cut sums off instead of rounding them.

Not modelled:

- time, caches, the memory hierarchy of several multiprocessors; the order of programs;
- ``fence.proxy.async`` (a missing one is not found), clusters, TMA, mbarriers, warp specialisation, atomics: a kernel
  that uses instructions that are not known raises ``NotImplementedError``;
- registers of a ``wgmma`` that change in flight: A is read, and D is taken over, as one piece;
- which thread of one warp wins when several store to one address at once;
- what ``ptxas`` makes of the PTX.
"""

from .faults import EmulationError, Finding
from .kernel import Kernel
from .launch import Emulation, emulated_for, poisoned_outputs
from .machine import Schedule

__all__ = ["Emulation", "EmulationError", "Finding", "Kernel", "Schedule", "emulated_for", "poisoned_outputs"]
