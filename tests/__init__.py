"""The tests of certferry: `python3 -m unittest`, in the repository's root, runs all of them.

unittest finds this package and asks its load_tests() for the tests. It gets a suite that runs them
class by class in worker processes, one more than there are processors (or as CERTFERRY_JOBS says),
and that tells of each class as it ends. Modules, classes and tests that are named on the command
line (`python3 -m unittest tests.test_ferry`) run one after another in one process, as always.
"""

import multiprocessing
import multiprocessing.connection
import os
import shutil
import sys
import tempfile
import time
import unittest

HERE = os.path.dirname(os.path.abspath(__file__))
# One more than processors, since tests wait now and then.
WORKERS = int(os.environ.get("CERTFERRY_JOBS") or (os.cpu_count() or 1) + 1)
TEST_SECONDS = 0.6  # what a test of these takes on average, as measured; for the estimate alone
FAILURES = ("addError", "addFailure", "addUnexpectedSuccess")
WITH_EXCEPTION = ("addError", "addFailure", "addExpectedFailure")

if os.environ.get("CERTFERRY_SCRIPT"):  # the tests that import certferry get that one, too
    sys.path.insert(0, os.path.dirname(os.path.abspath(os.environ["CERTFERRY_SCRIPT"])))


def load_tests(loader, _tests, pattern):
    """Return the tests of all files here, in a suite that runs them side by side."""
    found = loader.discover(HERE, pattern or "test*.py", os.path.dirname(HERE))
    return SideBySide([found])


# --------------------------------------------------------------------------------------------------
# In a worker
# --------------------------------------------------------------------------------------------------


class Shown:
    """What a result shows of a test that ran in a worker."""

    failureException = None  # unittest compares it with the exception

    def __init__(self, test):
        self.name = test.id()
        self.text = str(test)
        self.description = test.shortDescription()

    def id(self):
        """Return the dotted name."""
        return self.name

    def shortDescription(self):
        """Return the first line of the docstring."""
        return self.description

    def __str__(self):
        return self.text


class Notes(unittest.TestResult):
    """The calls that a result gets, noted so that the parent makes them again on its own result.

    A note is (method, Shown, ...). In place of an exception it has the text that is shown of it.
    """

    def __init__(self, like):
        super().__init__()
        self.buffer = like.buffer
        self.failfast = like.failfast
        self.tb_locals = like.tb_locals
        self.calls = []

    def note(self, method, test, *rest):
        """Note one call."""
        self.calls.append((method, Shown(test)) + rest)

    def startTest(self, test):
        super().startTest(test)
        self.note("startTest", test)

    def stopTest(self, test):
        super().stopTest(test)
        self.note("stopTest", test)

    def addSuccess(self, test):
        self.note("addSuccess", test)

    def addSkip(self, test, reason):
        self.note("addSkip", test, reason)

    def addError(self, test, err):
        super().addError(test, err)
        self.note("addError", test, self.errors[-1][1])

    def addFailure(self, test, err):
        super().addFailure(test, err)
        self.note("addFailure", test, self.failures[-1][1])

    def addSubTest(self, test, subtest, err):
        if err is None:
            return
        if issubclass(err[0], test.failureException):
            self.addFailure(subtest, err)
        else:
            self.addError(subtest, err)

    def addExpectedFailure(self, test, err):
        super().addExpectedFailure(test, err)
        self.note("addExpectedFailure", test, self.expectedFailures[-1][1])

    def addUnexpectedSuccess(self, test):
        super().addUnexpectedSuccess(test)
        self.note("addUnexpectedSuccess", test)

    def addDuration(self, test, elapsed):  # called from Python 3.12 on
        self.note("addDuration", test, elapsed)


def work(parent, classes, like, folder):
    """Run each class whose number comes, and answer with (seconds, calls), until None comes."""
    tempfile.tempdir = folder
    try:
        for number in iter(parent.recv, None):
            started = time.monotonic()
            notes = Notes(like)
            unittest.TestSuite(classes[number]).run(notes)
            parent.send((time.monotonic() - started, notes.calls))
    except (EOFError, KeyboardInterrupt):
        pass  # there is no parent any more, or there will be none


# --------------------------------------------------------------------------------------------------
# In the parent
# --------------------------------------------------------------------------------------------------


class Reported(Exception):
    """A failure in a worker; its text is the traceback there."""


class Worker:
    """A process that runs one class after another; `tests` are those of the class it is at."""

    def __init__(self, classes, result, folder):
        self.tests = None
        self.connection, theirs = multiprocessing.Pipe()
        fork = multiprocessing.get_context("fork")
        self.process = fork.Process(target=work, args=(theirs, classes, result, folder))
        self.process.start()
        theirs.close()

    def answer(self):
        """Return the (seconds, calls) of its class; a process that died is one error."""
        try:
            return self.connection.recv()
        except EOFError:
            self.process.join()
            text = "the process that ran this ended with status {}".format(self.process.exitcode)
            return 0, [("addError", Shown(self.tests[0]), text)]

    def end(self):
        """Let the process end, and wait for that."""
        self.connection.send(None)
        self.process.join()


class Run:
    """All classes, each a list of tests, on their way through the workers."""

    def __init__(self, classes, result, folder):
        self.classes = classes
        self.result = result
        self.folder = folder
        self.given = 0  # how many classes a worker has been given, in their order
        self.ended = 0
        self.busy = {}  # {connection: Worker}
        self.shows = getattr(result, "dots", False) or getattr(result, "showAll", False)
        result.dots = False  # they would come late, a class at a time: a line takes their place

    def show(self, line):
        """Print a line of progress, but not with --quiet."""
        if self.shows:
            self.result.stream.writeln(line)
            self.result.stream.flush()

    def to_the_end(self):
        """Keep the workers busy until every class has run."""
        tests = sum(map(len, self.classes))
        expected = "{:,} tests in {} classes, {} at a time: about {:.0f} s"
        seconds = tests * TEST_SECONDS / WORKERS
        self.show(expected.format(tests, len(self.classes), WORKERS, seconds))
        for _ in range(WORKERS):
            self.employ(Worker(self.classes, self.result, self.folder))
        while self.busy:
            for connection in multiprocessing.connection.wait(list(self.busy)):
                worker = self.busy.pop(connection)
                self.tell(worker.tests, *worker.answer())
                if worker.process.exitcode is not None:
                    worker = Worker(self.classes, self.result, self.folder)
                self.employ(worker)

    def employ(self, worker):
        """Give a worker the next class; let it end where there is none."""
        if self.given == len(self.classes) or self.result.shouldStop:
            worker.end()
            return
        worker.tests = self.classes[self.given]
        worker.connection.send(self.given)
        self.busy[worker.connection] = worker
        self.given += 1

    def tell(self, tests, seconds, calls):
        """Make the calls that a worker noted, and show how its class ended."""
        remarks = []
        for method, test, *rest in calls:
            if method in FAILURES:
                remarks.append("FAILED")
            if method == "addSkip":
                remarks.append("skipped: " + rest[0])
            if method in WITH_EXCEPTION:
                rest = [(Reported, Reported("\n" + rest[0].rstrip()), None)]
            getattr(self.result, method)(test, *rest)
        self.ended += 1
        case = type(tests[0])
        name = "{}.{}".format(case.__module__.split(".")[-1], case.__qualname__)
        count = "1 test" if len(tests) == 1 else "{} tests".format(len(tests))
        words = [count, "{:.1f} s".format(seconds)] + sorted(set(remarks))
        line = "[{:3}/{}] {}: {}"
        self.show(line.format(self.ended, len(self.classes), name, ", ".join(words)))

    def stop(self):
        """End the workers that are still busy, where something has gone wrong here."""
        for worker in self.busy.values():
            worker.process.terminate()
            worker.process.join()


class SideBySide(unittest.TestSuite):
    """A suite whose classes run in worker processes."""

    def run(self, result, debug=False):
        """Run all tests, and have the result know of each as if it had run here."""
        if debug:
            return super().run(result, debug)
        by_class = {}
        for test in every_test(self):
            by_class.setdefault(type(test), []).append(test)
        folder = tempfile.mkdtemp(prefix="certferry-tests-")
        os.chmod(folder, 0o755)  # some of what the tests start becomes nobody
        run = Run(list(by_class.values()), result, folder)
        try:
            run.to_the_end()
        finally:
            run.stop()
            shutil.rmtree(folder, ignore_errors=True)
        return result


def every_test(suite):
    """Yield the tests of a suite, and those of the suites in it."""
    for test in suite:
        if isinstance(test, unittest.TestSuite):
            yield from every_test(test)
        else:
            yield test
