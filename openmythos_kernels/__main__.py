"""`python -m openmythos_kernels info | build | verify | compile | tune`."""

from __future__ import annotations

import argparse
import sys

from openmythos_kernels.runtime import extension
from openmythos_kernels.runtime.info import describe
from openmythos_kernels.verify.ahead import command


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m openmythos_kernels", description="Fast kernels for looped transformers."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser(
        "info", help="versions, devices, the compiled extension, and which backend runs each op and why"
    )
    commands.add_parser(
        "build", help="compile the C++ extension for the PyTorch that is installed now, into a cache folder"
    )
    verify = commands.add_parser("verify", help="errors of every op on this device, next to those of eager PyTorch")
    verify.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: a GPU if there is one"
    )
    verify.add_argument(
        "--only", action="append", metavar="OP", help="an op, or a family's prefix such as mla; repeatable"
    )
    verify.add_argument("--dtypes", default="fp32,bf16,fp16", help="of fp32, bf16, fp16 (all)")
    command.add_arguments(
        commands.add_parser("compile", help="compile the Triton kernels for GPUs that this machine need not have")
    )
    tune = commands.add_parser("tune", help="measure configurations on this GPU and keep the fastest")
    tune.add_argument("--seconds", type=float, default=600, help="time limit (600)")
    args = parser.parse_args()
    if args.command == "tune":
        sys.exit(_tune(args.seconds))
    if args.command == "build":
        sys.exit(_build())
    if args.command == "compile":
        sys.exit(command.main(args))
    if args.command == "verify":
        from openmythos_kernels.verify import table

        sys.exit(table.main(args.device, args.only, args.dtypes.split(",")))
    print(describe())


def _build() -> int:
    try:
        print(f"the C++ extension is {extension.build()}")
    except RuntimeError as error:
        print(f"the C++ extension was NOT built: {error}")
        return 1
    return 0


def _tune(seconds: float) -> int:
    from openmythos_kernels.ops.mla import tune as mla
    from openmythos_kernels.runtime import tuning

    name = tuning.device()
    if not name:
        print("tune: there is no GPU; every launch keeps its table's configuration")
        return 1
    print(f"{name}: choices go to {tuning.path()}")
    tuning.tune(mla.jobs(), seconds, name=name, measure=tuning.median_seconds)
    return 0


if __name__ == "__main__":
    main()
