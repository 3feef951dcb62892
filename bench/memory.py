"""Peak memory of task-vector SLERP for 2B, 9B and 27B shapes; inputs are sparse files, outputs are written for real.

python bench/memory.py 2b 9b 27b --dir /a/disk/with/60/GB
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from pathlib import Path

from merge import run_job
from shapes import SIZES, layout, write_sparse


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("sizes", nargs="*", choices=[*SIZES, []], default=list(SIZES))
    parser.add_argument("--method", default="slerp")
    parser.add_argument("--dir", type=Path, default=None, help="where to work (default: the system's temporary place)")
    options = parser.parse_args()
    print(f"{'':6}{'output GB':>11}{'seconds':>9}{'anonymous MB':>14}{'resident MB':>13}")
    for size in options.sizes:
        with tempfile.TemporaryDirectory(dir=options.dir) as name:
            root = Path(name)
            for model in ("base", "rl-1", "rl-2"):
                write_sparse(root / model, layout(size))
            written = sum(file.stat().st_size for file in (root / "base").glob("*.safetensors"))
            if shutil.disk_usage(root).free < written:
                print(f"{size:6}{written / 1e9:11.1f}  not run: no room on the disk")
                continue
            found = run_job(root, {"method": options.method, "base": True})
            print(f"{size:6}{written / 1e9:11.1f}{found['merge']:9.1f}{found['anon']:14.0f}{found['rss']:13.0f}")


if __name__ == "__main__":
    main()
