"""`python -m pipeline`, the form that torchrun and deepspeed start; the same as `selora`."""

import sys

from pipeline.cli import main

if __name__ == "__main__":
    sys.exit(main())
