"""Developer tasks: ``nox --list`` shows them, ``nox -s NAME -- ARGUMENTS`` runs one.

They run in the current environment (``pip install --no-build-isolation -e '.[test,dev]'``).
``.ci/run`` creates its own environments from a fresh clone.
"""

from __future__ import annotations

import os

import nox

nox.options.default_venv_backend = "none"
nox.options.sessions = ["lint", "test_fast"]

#: two processes; a file's tests share what they compile
PARALLEL = ["-n", "2", "--dist", "loadfile"]


@nox.session
def build(session: nox.Session) -> None:
    """Compile csrc/ and install the package in place (after every change of C++)."""
    arguments = ["--no-build-isolation", "--no-deps", "-e", "."]
    session.run("python", "-m", "pip", "install", "-q", *arguments, *session.posargs)


@nox.session
def test_fast(session: nox.Session) -> None:
    """Run the fast tests, about 8 minutes on 2 cores."""
    session.run("python", "-m", "pytest", "-q", *PARALLEL, *session.posargs)


@nox.session
def test(session: nox.Session) -> None:
    """Run all tests, including the slow ones."""
    session.run(
        "python", "-m", "pytest", "-q", *PARALLEL, "-m", "slow or not slow", *session.posargs
    )


@nox.session
def docs(session: nox.Session) -> None:
    """Build the documentation site in site/ and run the examples of its pages."""
    session.run("mkdocs", "build", "--strict")
    session.run("python", "-m", "pytest", "-q", "tests/package/test_documents.py", *session.posargs)


@nox.session
def lint(session: nox.Session) -> None:
    """Check style, types, spelling and prose."""
    session.run("bash", ".ci/lint", external=True)


@nox.session
def format(session: nox.Session) -> None:
    """Format Python and C++."""
    session.run("ruff", "check", "--fix", ".")
    session.run("ruff", "format", ".")
    listing = session.run("git", "ls-files", "csrc/*", "*.c", "*.cpp", "*.h", silent=True)
    session.run("clang-format", "-i", *str(listing).split())


@nox.session
def bench(session: nox.Session) -> None:
    """Measure a few layers; arguments go to pytest (--points all, --cells, --threads)."""
    session.run("python", "-m", "pytest", "bench", *(session.posargs or ["--points", "short"]))


@nox.session
def sanitize(session: nox.Session) -> None:
    """Run the CPU kernels under the sanitizers, about 10 minutes on 2 cores."""
    jobs = {"MAX_JOBS": os.environ.get("MAX_JOBS", str(os.cpu_count()))}
    names = session.posargs or ["address", "thread"]
    session.run("python", ".ci/sanitize.py", *names, env=jobs)


@nox.session
def clangd(session: nox.Session) -> None:
    """Write compile_commands.json, which tells clangd and clang-tidy the flags of csrc/."""
    session.run("python", ".ci/compile.py", "database")
