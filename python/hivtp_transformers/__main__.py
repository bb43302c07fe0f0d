"""`python -m hivtp_transformers demo`: prune a photo, time it and see it."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from hivtp_kernels._errors import why_not


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command; what the user can fix ends in one line and exit status 2."""
    parser = argparse.ArgumentParser(prog="python -m hivtp_transformers", description=__doc__)
    demo = parser.add_subparsers(dest="command", required=True).add_parser(
        "demo",
        help="prune a photo, print answers and the time of each stage, draw what was kept",
        description="Prune the visual tokens of a photo, time each stage beside the unpruned "
        "model, ask both, and draw the kept patches and the scores beside the answers.",
    )
    demo.add_argument("photo", nargs="?", metavar="PHOTO", help="default: a scene with letters")
    demo.add_argument(
        "--model",
        metavar="DIR_OR_ID",
        help="a LLaVA-1.5 checkpoint; default: a small one that knows letters and textures",
    )
    demo.add_argument("--device", default="cpu", help="where the model runs (default: %(default)s)")
    demo.add_argument(
        "--budget",
        type=_budget,
        metavar="K",
        help="keep exactly K patches, or a share such as 0.33; default: the paper's rule",
    )
    demo.add_argument(
        "--out",
        type=Path,
        default=Path("hivtp_out"),
        metavar="DIR",
        help="where the pictures go (default: %(default)s)",
    )
    options = parser.parse_args(arguments)

    try:
        # The plotting code too: it is needed only at the end, minutes later with a real checkpoint.
        from . import overlay  # noqa: F401
        from .demo import run
    except Exception as error:
        needs = 'the demo needs pip install "hivtp_kernels[demo]"'
        parser.exit(2, f"error: {needs}: {why_not(error)}\n")
    try:
        run(options.photo, options.model, options.device, options.budget, options.out)
    except ImportError as error:
        parser.exit(2, f"error: {why_not(error)}\n")
    except (OSError, TypeError, ValueError) as error:
        parser.exit(2, f"error: {error}\n")


def _budget(text: str) -> int | float:
    try:
        return float(text) if "." in text else int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"must be a number of patches or a share such as 0.33, got {text!r}"
        ) from None


if __name__ == "__main__":
    main()
