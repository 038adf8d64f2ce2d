"""Write the small world: `python -m minirlhf_course.world data/small_world --seed 0`."""

from __future__ import annotations

import argparse
import sys

from minirlhf_course.world.write import DEFAULT_SIZES, write_world


def main(arguments: list[str] | None = None) -> int:
    """Read the command line and write the folder. Returns the exit status: 1 with one line of text on an error."""
    parser = argparse.ArgumentParser(
        prog="python -m minirlhf_course.world", description="Write the small world as a folder."
    )
    parser.add_argument("out", help="a folder that is absent or empty")
    parser.add_argument("--seed", type=int, default=0)
    for name, size in DEFAULT_SIZES.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=size, metavar="N", help=f"default {size}")
    options = vars(parser.parse_args(arguments))
    out, seed = options.pop("out"), options.pop("seed")
    try:
        write_world(out, seed=seed, **options)
    except (FileExistsError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"wrote {out}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
