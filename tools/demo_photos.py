"""Choose the photographs of ten kinds of clothes that come with vlprompt.

    python tools/demo_photos.py DATA/clothing --out src/vlprompt/data/known/clothing

Reads class folders in train, val and test (Alexey Grigorev's clothing-dataset-small, CC0 1.0, shorter side 112 px).
Of each class the first 16, 4 and 20 by the SHA-256 of their content, so that nothing but chance chooses.
"""

from __future__ import annotations

import argparse
import hashlib
import shutil
from pathlib import Path

WANTED = {"train": 16, "val": 4, "test": 20}


def main() -> None:
    """Choose and copy."""
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n")[0])
    parser.add_argument("data", type=Path, help="folder with train, val, test and LICENSE")
    parser.add_argument("--out", type=Path, required=True, help="folder that is made anew")
    options = parser.parse_args()
    shutil.rmtree(options.out, ignore_errors=True)
    total = 0
    for part, n in WANTED.items():
        for folder in sorted((options.data / part).iterdir()):
            files = sorted(folder.iterdir(), key=lambda file: hashlib.sha256(file.read_bytes()).hexdigest())[:n]
            (options.out / part / folder.name).mkdir(parents=True)
            for file in files:
                shutil.copyfile(file, options.out / part / folder.name / file.name)
                total += file.stat().st_size
    shutil.copyfile(options.data / "LICENSE", options.out / "LICENSE")
    print(f"{total / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
