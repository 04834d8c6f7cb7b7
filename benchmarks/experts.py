"""Time the experts of one layer beside peers and the machine's limits: `mixtura bench`.

python benchmarks/experts.py --shape olmoe --shape qwen3-30b-a3b --tokens 1,16,256 --weights bf16
"""

from __future__ import annotations

import sys

from mixtura.cli import app

if __name__ == "__main__":
    app(["bench", *sys.argv[1:]])
