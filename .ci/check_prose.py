"""Finds words and phrases that a reader must decode, in documents, docstrings and comments.

    check_prose.py [FILE...]     all files of the project unless some are named

Prints `file:line: "found": advice` for each finding; the exit status is then 1. RULES has only
patterns that are nearly always wrong here, no ordinary words that are wrong in one of their uses. A
line that must keep its words (a quotation) ends with the marker `prose: keep`.
"""

from __future__ import annotations

import argparse
import ast
import io
import re
import subprocess
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
KEEP = "prose: keep"

# Not written by this project, or generated.
GENERATED = ["LICENSE", "bench/results/", "docs/cuda_kernels.md"]

_UNIT = r"(?:\d|GFLOP/s|GB/s|ns|us|µs|ms|bytes?|KiB|MiB|KB|MB|values?|barriers?|tiles?|loads?)"
_WHOLE = r"(?:core|step|row|block|second|call|direction|layer|cell|thread|rank|tile|unit|gate)"
# pattern -> advice; patterns ignore case
RULES: dict[str, str] = {
    r"\blest\b": "so that ... not",
    r"\bwho(?:so)?ever\b": "name the caller, thread or user",
    r"\banew\b": "again",
    r"\bonce more\b": "again",
    r"\bdear(?:er|est)?\b": "expensive, slower",
    r"\bat best\b": "at most",
    r"\ball in all\b": "in total",
    r"\bupon one another\b": "stacked",
    r"\breckon(?:s|ed|ing)?\b": "estimate",
    r"\bas they lie\b": "unpacked",
    r"\bwritten down\b": "captured, recorded",
    r"\bbeside torch(?:\.nn)?\b": "compared with torch.nn",
    r"\bin turns\b": "interleaved",
    r"\bha(?:s|ve) but one\b": "has only one",
    r"\bsaid in one sentence\b": "reported in one sentence",
    r"\b(?:no|any|some)body\b": "name the caller, thread or user",
    r"\bits like\b": "and similar ones",
    r"\bleft alone\b": "unchanged",
    r"\btold apart\b": "distinguished",
    r"\bhad better\b": "must, should",
    r"\bin vain\b": "needlessly",
    r"\bto and fro\b": "back and forth",
    rf"\b{_UNIT} an? {_WHOLE}\b": "per, not a: '60 ns per step'",
}
_RULES = [(re.compile(pattern, re.IGNORECASE), advice) for pattern, advice in RULES.items()]
# "What ..." as a relative clause, or an attribute without its noun; a question may begin with What
_BEGINNING = re.compile(r"\s*(What|Who|Whose|Which|Of)\b(?![^.?!]*\?)")
BEGINNING_ADVICE = "begin a docstring with a verb or a noun"

Line = tuple[int, str]  # line number, prose


def python_prose(text: str) -> Iterator[Line]:
    """Yields the comments and docstrings of a Python file."""
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            yield token.start[0], token.string
    for node in docstrings(text):
        yield from enumerate(node.value.splitlines(), node.lineno)


def docstrings(text: str) -> Iterator[ast.Constant]:
    """Yields the docstrings of a Python file, as nodes of its syntax tree."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            first = node.body[0] if node.body else None
            if (
                isinstance(first, ast.Expr)
                and isinstance(first.value, ast.Constant)
                and isinstance(first.value.value, str)
            ):
                yield first.value


def cpp_prose(text: str) -> Iterator[Line]:
    """Yields the comments of a C++ or CUDA file, and text in strings that looks like one."""
    for match in re.finditer(r"//[^\n]*|/\*.*?\*/", text, re.DOTALL):
        yield from enumerate(match[0].splitlines(), text.count("\n", 0, match.start()) + 1)


def shell_prose(text: str) -> Iterator[Line]:
    for number, line in enumerate(text.splitlines(), 1):
        if match := re.search(r"(?:^|\s)#.*", line):
            yield number, match[0]


def markdown_prose(text: str) -> Iterator[Line]:
    """Yields the lines outside fenced code."""
    fenced = False
    for number, line in enumerate(text.splitlines(), 1):
        if line.lstrip().startswith("```"):
            fenced = not fenced
        elif not fenced:
            yield number, line


def changelog_prose(text: str) -> Iterator[Line]:
    """Yields the newest section: the sections of releases do not change."""
    sections = 0
    for number, line in markdown_prose(text):
        sections += line.startswith("## ")
        if sections <= 1:
            yield number, line


def prose(path: str, text: str) -> list[Line]:
    if path.endswith("CHANGELOG.md"):
        return list(changelog_prose(text))
    suffix = Path(path).suffix
    if suffix == ".md":
        return list(markdown_prose(text))
    if suffix in (".py", ".pyi"):
        return list(python_prose(text))
    if suffix in (".h", ".cpp", ".cu", ".cuh"):
        return list(cpp_prose(text))
    return list(shell_prose(text))


def check(path: str, text: str) -> list[str]:
    """Returns the findings in one file, as lines to print."""
    kept = {n for n, line in enumerate(text.splitlines(), 1) if KEEP in line}
    found: list[tuple[int, str, str]] = []
    lines = prose(path, text)
    for number, line in lines:
        found += [
            (number, match[0], advice) for rule, advice in _RULES if (match := rule.search(line))
        ]
    if path.endswith((".py", ".pyi")):
        for node in docstrings(text):
            if match := _BEGINNING.match(node.value):
                found.append((node.lineno, f"{match[1]} ...", BEGINNING_ADVICE))
    return [
        f'{path}:{number}: "{words}": {advice}'
        for number, words, advice in sorted(set(found))
        if number not in kept
    ]


def files() -> list[str]:
    """Returns the files that are checked by default."""
    tracked = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    suffixes = (".md", ".py", ".pyi", ".h", ".cpp", ".cu", ".cuh", ".ci/run")
    skipped = tuple(GENERATED)
    return [path for path in tracked if path.endswith(suffixes) and not path.startswith(skipped)]


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("files", nargs="*", help="relative to the project")
    findings = [
        finding
        for path in parser.parse_args().files or files()
        if (ROOT / path).exists()
        for finding in check(path, (ROOT / path).read_text(encoding="utf-8"))
    ]
    print("\n".join(findings), end="\n" if findings else "")
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
