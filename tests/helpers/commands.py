"""Commands run in this process, and what a user sees of them."""

from typer.testing import CliRunner

from fastreduce.cli.app import app


def run(*arguments):
    """Run ``fastreduce`` with these arguments."""
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def words(done):
    """Return the standard output with single spaces."""
    return " ".join(done.stdout.split())


def assert_one_line(done, message):
    """Assert that a command ended with one line about an error of the user's."""
    assert done.exit_code == 2, (done.output, done.exception)
    assert done.stderr.startswith("error: "), done.stderr
    assert done.stderr.count("\n") == 1
    assert message in done.stderr, done.stderr
    assert done.stdout == ""
