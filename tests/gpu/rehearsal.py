"""Where the code of this folder runs: on a GPU or, as a rehearsal, on the CPU with stand-ins.

`HIVTP_REHEARSE=1` rehearses. Import this before Triton: it settles how its kernels run.
"""

import os

REHEARSE = bool(os.environ.get("HIVTP_REHEARSE"))
DEVICE = "cpu" if REHEARSE else "cuda"

if REHEARSE:
    os.environ.setdefault("TRITON_INTERPRET", "1")
    from bench import stand_in

    stand_in.install()


def pick(real, tiny):
    """The first on a GPU, the second in a rehearsal."""
    return tiny if REHEARSE else real
