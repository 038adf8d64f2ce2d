"""Count lines of code: without blank lines, comments and docstrings.

    python benchmarks/code_lines.py minirlhf notebooks/minirlhf_course
    python benchmarks/code_lines.py minirlhf --files                        file by file

A docstring is any string that stands alone: also one below a setting.
"""

from __future__ import annotations

import argparse
import ast
import io
import tokenize
from pathlib import Path

NO_CODE = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}


def code_lines(source: str) -> int:
    """How many lines hold code.

    >>> code_lines("def f():\\n    '''Docs.'''\\n\\n    return 1  # one\\n")
    2
    """
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    lines = {n for t in tokens if t.type not in NO_CODE for n in range(t.start[0], t.end[0] + 1)}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            lines -= set(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    return len(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="Count lines of code without blanks, comments and docstrings.")
    parser.add_argument("paths", nargs="+", type=Path, help="files or folders")
    parser.add_argument("--files", action="store_true", help="print every file too")
    options = parser.parse_args()
    for path in options.paths:
        files = sorted(path.rglob("*.py")) if path.is_dir() else [path]
        counts = {file: code_lines(file.read_text(encoding="utf-8")) for file in files}
        if options.files:
            for file, count in counts.items():
                print(f"{count:7,}  {file}")
        print(f"{sum(counts.values()):7,}  {path}  ({len(files)} files)")


if __name__ == "__main__":
    main()
