"""``quantfix devices``: tables of kernel times, and the kernels of a network to be measured elsewhere."""

from __future__ import annotations

import csv
from pathlib import Path

from rich.table import Table as Shown

from rewriter import quantize, target
from rewriter.int8.onnx import profiled, to_onnx
from rewriter.storage import replacing
from search.cli.console import out, progress, say
from search.config.schema import load_config
from search.job import load_network, table_of
from search.latency.price import price_of
from search.latency.table import (
    COLUMNS,
    about_of,
    cache_folder,
    read_table,
    tables,
    this_machine,
)

FEW = 2  # inputs whose ranges stand for the calibration


def devices(config: Path | None = None, out_file: Path | None = None, quiet: bool = False) -> None:
    """List this user's tables; with a config, price its plain int8 file, and write its kernels as CSV."""
    if config is None:
        _list()
        return
    cfg = load_config(config)
    network, table = load_network(cfg, progress(quiet)), table_of(cfg)
    few = network.calibration[0][:FEW]
    file = to_onnx(quantize(network.gm, target(cfg.target), [few]))
    price, kernels = price_of(file, few[:1], table), profiled(file, few[:1]).kernels
    if not quiet:
        say(
            f"plain int8: {price.milliseconds:.3g} ms on one thread by {table.path.name}; {price.operators} "
            f"operators, of which {sum(price.reorders.values())} change the layout; "
            f"{price.bytes_moved / 1e6:.1f} MB moved; {price.int8_macs / 1e6:.1f} M MACs in int8, "
            f"{price.float_macs / 1e6:.1f} M in float"
        )
    if out_file is None:
        return
    rows = {k.signature: (k.signature, table.predict([k]), k.macs, k.bytes) for k in kernels}
    with replacing(out_file) as stream:
        stream.write(f"# network: {cfg.path.name}, plain int8, target {cfg.target}\n")
        stream.write("# milliseconds: to be replaced by those of your device\n")
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(COLUMNS)
        writer.writerows(rows.values())
    if not quiet:
        say(f"written: {out_file}")


def _list() -> None:
    own = this_machine().path
    shown = Shown("processor", "runtime", "kernels", "file", title=f"Tables in {cache_folder()}")
    for path in tables():
        about = about_of(path)
        name = f"{path.name} (this machine)" if path == own else path.name
        count = str(len(dict(read_table(path))))
        shown.add_row(about.get("processor", ""), about.get("runtime", ""), count, name)
    out.print(shown)
    if not own.exists():
        say("this machine has none yet: it is made when a plan is scored")
