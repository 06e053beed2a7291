"""``dittfast report``: an evaluation as one HTML page, Markdown and JSON."""

from __future__ import annotations

import argparse
from pathlib import Path

from dittfast.files import check_output, write_json, write_text

from .options import add_json_argument, check_json, write_json_result
from .values import whole

EXAMPLE = """\
example:
  dittfast evaluate fidelity -m local/sample-flux --config evaluations/sample-flux -o work/eval
  dittfast report work/eval
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``dittfast report``."""
    parser.epilog = EXAMPLE
    parser.add_argument(
        "folder",
        metavar="FOLDER",
        help="of dittfast evaluate fidelity; a latency.json and a fid.json in it are used, too",
    )
    parser.add_argument(
        "-o",
        "--output",
        metavar="FILE",
        help="the page, ending in .html; .md and .json go beside it (default: FOLDER/report.html)",
    )
    parser.add_argument(
        "--pictures",
        type=whole(1, 10_000),
        default=4,
        metavar="N",
        help="prompts shown (default: 4)",
    )
    parser.add_argument(
        "--size",
        type=whole(1, 4096),
        default=256,
        metavar="PX",
        help="width of a picture (default: 256)",
    )
    parser.add_argument(
        "--plots",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="draw plots, for which matplotlib is needed (default: yes)",
    )
    parser.add_argument(
        "--no-verify", action="store_true", help="read results whose SHA-256 differs, too"
    )
    add_json_argument(parser)


def run(args) -> int:
    """Read the results, and only when all is made write the three files."""
    output = Path(args.output) if args.output else Path(args.folder) / "report.html"

    from dittfast.measure.report import (
        html_report,
        json_report,
        markdown_report,
        read_results,
        report_paths,
        understanding,
    )

    results = read_results(args.folder, not args.no_verify)
    check_output(output, (".html", ".htm"))
    html, markdown, data = report_paths(output)
    written = {"-o": html, "-o, as .md,": markdown, "-o, as .json,": data}
    check_json(args, written, [("FOLDER", Path(args.folder) / f"{name}.json") for name in results])
    with understanding(args.folder):
        page = html_report(
            args.folder, results, pictures=args.pictures, size=args.size, plots=args.plots
        )
        text = markdown_report(results)
    write_text(html, page)
    write_text(markdown, text)
    write_json(data, json_report(results))
    written = [str(p) for p in (html, markdown, data)]
    print("wrote " + ", ".join(written))
    write_json_result(args, {"task": "report", "files": written, "bytes": html.stat().st_size})
    return 0
