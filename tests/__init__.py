"""Processes of tests share cores: a thread of OpenMP's that waits there must sleep, since it spins in another's time."""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # read when torch is first imported
