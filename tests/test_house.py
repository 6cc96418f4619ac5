"""certferry.py keeps its promise to a reader: no word above its definition, no effect elsewhere.

A rule is a function that takes a Source and yields (line, message) for each breach. CASES has
sources that break them, so that every rule has been seen failing. All of it runs under one Python,
3.11: an f-string is one token there and many in 3.12. `python3 tests/test_house.py` prints the
figures of certferry.py, or of the files that are named.
"""

import ast
import collections
import glob
import io
import os
import re
import shutil
import statistics
import subprocess
import symtable
import sys
import tokenize
import unittest

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

TOP_LEVEL = """
    certferry.py install.sh certferry.service certferry.timer tests README.md LICENSE .ci/run
    .gitignore""".split()

SECTIONS = (
    "Imports, limits; Types; Errors; Records; Certificates; Processes; Sources; Judge; Store;"
    " Hooks; Health; Report; Ferry; Command line"
).split("; ")
PURE = ("Types", "Errors", "Certificates", "Judge", "Health")

# What has an effect, and the sections that alone may touch it.
EFFECTS = {
    "subprocess": ("Processes", "Sources", "Hooks"),
    "os.fork os.setsid os.setuid os.setresuid": ("Processes",),
    "socket http urllib": ("Sources",),
    "ssl": ("Sources", "Store"),
    "fcntl os.rename os.replace os.link os.symlink os.unlink os.remove os.rmdir os.mkdir"
    " os.makedirs os.fsync os.utime os.truncate": ("Store",),
    "print": ("Report",),
    "argparse": ("Command line",),
    "time.time datetime.datetime.now datetime.datetime.today datetime.datetime.utcnow"
    " datetime.date.today": ("Command line",),
    "open io os select sys.stdin sys.stdout sys.stderr threading time _thread": [
        section for section in SECTIONS if section not in PURE
    ],
}
HARMLESS = re.compile(r"os(\.(sep|fspath|strerror|path(\.(join|basename|dirname|normpath))?))?$")

FUNCTION_LINES = 60
TOKENS_A_LINE = 8
CONDITIONS = 7.5  # and/or expressions for every 1,000 tokens
CHOICES = 2.5  # if-else expressions likewise
ATTRIBUTES = 8

# --------------------------------------------------------------------------------------------------
# A source, and its figures
# --------------------------------------------------------------------------------------------------

Source = collections.namedtuple("Source", "text tree banners")
Source.__doc__ = "A file's text, its syntax tree, and the (line, title) of its sections."

FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
LAYOUT = [getattr(tokenize, name) for name in "COMMENT NL NEWLINE INDENT DEDENT ENDMARKER".split()]


def read(text):
    """Return the Source of a text."""
    lines = text.splitlines()
    dashes = re.compile("# -{60,}$")
    banners = []
    for number, (above, title, below) in enumerate(zip(lines, lines[1:], lines[2:]), 2):
        if dashes.match(above) and dashes.match(below) and title.startswith("# "):
            banners.append((number, title[2:]))
    return Source(text, ast.parse(text), banners)


def section_at(source, line):
    """Return the title of the section that a line is in, the first one above all banners."""
    title = SECTIONS[0]
    for start, name in source.banners:
        if start <= line:
            title = name
    return title


def nodes(source, *kinds):
    """Return the nodes of these kinds, in the order in which they stand."""
    found = [node for node in ast.walk(source.tree) if isinstance(node, kinds)]
    return sorted(found, key=lambda node: (node.lineno, node.col_offset))


def length(node):
    """Return the lines of a function from `def` on, without its decorators."""
    return node.end_lineno - node.lineno + 1


def docstring_lines(source):
    """Return the numbers of the lines of all docstrings."""
    lines = set()
    for node in [source.tree] + nodes(source, ast.ClassDef, *FUNCTIONS):
        if ast.get_docstring(node) is not None:
            lines.update(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    return lines


def attributes(node):
    """Return the names that a class sets on `self`."""
    names = set()
    for inner in ast.walk(node):
        if isinstance(inner, ast.Attribute) and isinstance(inner.ctx, ast.Store):
            if isinstance(inner.value, ast.Name) and inner.value.id == "self":
                names.add(inner.attr)
    return names


def figures(source):
    """Return how much there is in a source and how dense it is, as {name: number}."""
    docstrings = docstring_lines(source)
    tokens, code, comments = 0, set(), set()
    for token in tokenize.generate_tokens(io.StringIO(source.text).readline):
        if token.type == tokenize.COMMENT:
            comments.add(token.start[0])
        if token.type not in LAYOUT and token.start[0] not in docstrings:
            tokens += 1
            code.update(range(token.start[0], token.end[0] + 1))
    lines = source.text.count("\n")
    sizes = [length(node) for node in nodes(source, *FUNCTIONS)] or [0]
    found = collections.OrderedDict({"lines": lines, "code lines": len(code), "tokens": tokens})
    found["tokens a line"] = tokens / max(1, len(code))
    found["and/or"] = 1000 * len(nodes(source, ast.BoolOp)) / max(1, tokens)
    found["if-else"] = 1000 * len(nodes(source, ast.IfExp)) / max(1, tokens)
    found["% comments"] = 100 * len(comments | docstrings) / max(1, lines)
    found["functions"] = len(sizes)
    found["median"] = statistics.median(sizes)
    found["longest"] = max(sizes)
    return found


# --------------------------------------------------------------------------------------------------
# The rules
# --------------------------------------------------------------------------------------------------


def used_above_definition(source):
    """Reading down, one never meets an unknown word: Python itself sees to it but in functions."""
    defined = {}
    for node in reversed(source.tree.body):
        for name in names_defined(node):
            defined[name] = node.lineno
    for scope in scopes(symtable.symtable(source.text, "certferry.py", "exec")):
        for symbol in scope.get_symbols():
            line = defined.get(symbol.get_name(), 0)
            if symbol.is_global() and line > scope.get_lineno():
                yield (
                    scope.get_lineno(),
                    f"{scope.get_name()} uses {symbol.get_name()}, defined in line {line}",
                )


def scopes(table):
    """Yield the functions and classes in a table of symbols, and those in them."""
    for inner in table.get_children():
        yield inner
        yield from scopes(inner)


def names_defined(node):
    """Return the names that a statement of the module defines."""
    if isinstance(node, FUNCTIONS + (ast.ClassDef,)):
        return [node.name]
    found = [inner for inner in ast.walk(node) if isinstance(inner, ast.Name)]
    return [name.id for name in found if isinstance(name.ctx, ast.Store)]


def private_across_banner(source):
    """A `_name` of the module, or a `._name` of a class, is used in its own section only."""
    homes = collections.defaultdict(set)
    uses = []
    for node in nodes(source, ast.Name, ast.Attribute, *FUNCTIONS):
        here = section_at(source, node.lineno)
        if isinstance(node, FUNCTIONS):
            name = "." + node.name if node.col_offset else node.name
        else:
            name = node.id if isinstance(node, ast.Name) else "." + node.attr
        if isinstance(getattr(node, "ctx", None), ast.Load):
            uses.append((node.lineno, name, here))
        elif re.match(r"\.?_[a-zA-Z]", name):
            homes[name].add(here)
    for line, name, here in uses:
        if here not in homes.get(name, [here]):
            yield line, f"{name} is private to {', '.join(homes[name])}"


def dotted(node):
    """Return `os.path.join` of a name or a chain of attributes, else ''."""
    if isinstance(node, ast.Attribute):
        base = dotted(node.value)
        return base and base + "." + node.attr
    return node.id if isinstance(node, ast.Name) else ""


def effect_elsewhere(source):
    """Each effect has its section, and what decides has none: neither disk nor clock."""
    mentions = [(node.lineno, dotted(node)) for node in nodes(source, ast.Name, ast.Attribute)]
    for node in nodes(source, ast.Import):
        if node not in source.tree.body:
            mentions += [(node.lineno, alias.name) for alias in node.names]
    for line, name in mentions:
        here = section_at(source, line)
        for effects, allowed in EFFECTS.items():
            for effect in effects.split():
                if here not in allowed and (name + ".").startswith(effect + "."):
                    if not HARMLESS.match(name):
                        yield line, f"{name} in {here}; only in {', '.join(allowed)}"


def unknown_section(source):
    """The banners are the house's, in its order."""
    last = -1
    for line, title in source.banners:
        place = SECTIONS.index(title) if title in SECTIONS else -1
        if place <= last:
            yield line, f"{title} is no section, or not in its place"
        last = max(place, last)


def function_shape(source):
    """A function says what it returns or makes true, and has an end in sight."""
    for node in nodes(source, *FUNCTIONS):
        if length(node) > FUNCTION_LINES:
            yield node.lineno, f"{node.name}: {length(node)} lines, over {FUNCTION_LINES}"
        if not ast.get_docstring(node):
            yield node.lineno, f"{node.name} has no docstring"


def foreign(source):
    """The standard library alone, as `import module`, in what Python 3.6 can read."""
    for node in nodes(source, ast.ImportFrom):
        yield node.lineno, f"write 'import {node.module}'"
    for node in nodes(source, ast.Import):
        for alias in node.names:
            if alias.asname or alias.name.split(".")[0] not in sys.stdlib_module_names:
                yield node.lineno, f"{alias.name}: under another name, or not standard library"
    try:
        ast.parse(source.text, feature_version=(3, 6))
    except SyntaxError as error:
        yield error.lineno, f"newer than Python 3.6: {error.msg}"


def dense(source):
    """A line holds little, and few branches."""
    found = figures(source)
    wanted = {"tokens a line": TOKENS_A_LINE, "and/or": CONDITIONS, "if-else": CHOICES}
    for name, most in wanted.items():
        if found[name] > most:
            yield 1, f"{name}: {found[name]:.2f}, at most {most}"
    for node in nodes(source, ast.ClassDef):
        if len(attributes(node)) > ATTRIBUTES:
            yield node.lineno, f"{node.name} has over {ATTRIBUTES} attributes"


RULES = (
    used_above_definition,
    private_across_banner,
    effect_elsewhere,
    unknown_section,
    function_shape,
    foreign,
    dense,
)

# --------------------------------------------------------------------------------------------------
# Sources that break the rules
# --------------------------------------------------------------------------------------------------

# A rule's name, then a source; the lines that it must flag end with #!, `## Title` is a banner.
CASES = """
== used_above_definition
def f():  #!
    return g()
def g():
    return f() + g() + len("")
== used_above_definition
def f(limit):
    def inner():  #!
        return [x for x in LIMITS if x < limit]
    return inner
class A:
    def g(self):  #!
        return B
    h = LIMITS = 1
class B(A):
    pass
LIMITS = 1
== private_across_banner
## Types
def _f():
    return _f()
class A:
    def __init__(self):
        self._x = 1
    def _g(self):
        return self._x
## Errors
def g(a):
    return _f() #!
def h(a):
    return a._x + a._g() + a._replace() #!
== effect_elsewhere
import subprocess
## Hooks
x = subprocess.run([])
## Ferry
def f():
    import socket #!
    return os.rename(a, b) #!
x = time.monotonic() + config.socket
y = time.time() #!
z = datetime.datetime(1970, 1, 1)
z = datetime.datetime.now() #!
== effect_elsewhere
## Types
x = os.path.exists(a) #!
## Certificates
x = open(a) #!
## Judge
x = os.stat(a) #!
y = os.path.join(a, b)
## Store
x = os.stat(a)
## Health
x = time.monotonic() #!
== function_shape
class A:
    @mark
    def f(self):  #!
        pass
    def g(self):
        "Word."
        def inner():  #!
            pass
        return inner
== foreign
import os.path, requests #!
def f():
    from os import rename #!
    import os as o #!
== foreign
if (n := 1):  #!
    pass
== foreign
def f(a, /):  #!
    pass
== dense
x = [1, 2, 3] #!
== dense
x = a and b #!
== dense
x = a if b else c #!
== dense
class A: #!
    def f(self):
        self.a = self.b = self.c
        self.d = self.e = self.f
        self.g = self.h = self.i
        self.c = self.f = self.i
"""

LONG = "def f():\n    'Word.'\n" + "    pass\n" * 58


def with_banners(text):
    """Return a text in which each `## Title` has become a banner."""
    dashes = "# " + "-" * 98
    return re.sub("## (.*)", rf"{dashes}\n# \1\n{dashes}", text)


def cases():
    """Yield (rule's name, source, the lines that it must flag) of each case."""
    for case in CASES.split("== ")[1:]:
        rule, _, text = case.partition("\n")
        lines = with_banners(text).splitlines()
        flagged = [number for number, line in enumerate(lines, 1) if line.endswith("#!")]
        yield rule, "\n".join(lines) + "\n", flagged
    yield "unknown_section", with_banners("## Types\n## Helpers\n## Judge\n## Store\n"), [5]
    yield "unknown_section", with_banners("## Errors\n## Types\n## Judge\n"), [5]
    yield "function_shape", LONG, []
    yield "function_shape", LONG + "    pass\n", [1]


# --------------------------------------------------------------------------------------------------
# The tests
# --------------------------------------------------------------------------------------------------


def right_python():
    """Return the path of a Python 3.11, or None."""
    pyenv = os.environ.get("PYENV_ROOT", os.path.expanduser("~/.pyenv"))
    found = glob.glob(pyenv + "/versions/3.11*/bin/python")
    return found[0] if found else shutil.which("python3.11")


def read_file(path):
    """Return the Source of a file."""
    with open(path, encoding="utf-8") as file:
        return read(file.read())


def load_tests(loader, tests, _pattern):
    """Under Python 3.11 all tests, else the one that runs them there; none with CERTFERRY_QUICK."""
    case = House if sys.version_info[:2] == (3, 11) else HouseElsewhere
    if os.environ.get("CERTFERRY_QUICK"):
        return unittest.TestSuite()
    return loader.loadTestsFromTestCase(case)


class House(unittest.TestCase):
    """certferry.py against the rules, and the rules against sources that break them."""

    maxDiff = None

    def test_certferry(self):
        """Every rule holds."""
        path = os.environ.get("CERTFERRY_SCRIPT") or os.path.join(ROOT, "certferry.py")
        source = read_file(path)
        for rule in RULES:
            with self.subTest(rule=rule.__name__):
                found = [f"certferry.py:{line}: {message}" for line, message in rule(source)]
                self.assertEqual("", "\n".join(found))

    def test_rules(self):
        """Each rule flags the marked lines of its cases and no others, and has marked ones."""
        rules = {rule.__name__: rule for rule in RULES}
        self.assertEqual({rule for rule, _, marked in cases() if marked}, set(rules))
        for rule, text, marked in cases():
            with self.subTest(rule=rule, source=text[-200:]):
                flagged = {line for line, _ in rules[rule](read(text))}
                self.assertEqual(sorted(flagged), marked)

    def test_figures(self):
        """Comments and docstrings are no tokens, an f-string is one; per 1,000 tokens."""
        text = '"""Word."""\n\n\ndef f(a):\n    # why\n    return f"{a} {1}" if a or 2 else None\n'
        found = figures(read(text))
        names = ("lines", "code lines", "tokens", "tokens a line", "longest", "and/or", "if-else")
        self.assertEqual([found[name] for name in names], [6, 2, 14, 7, 3, 1000 / 14, 1000 / 14])

    def test_top_level(self):
        """The top of the repository holds what the house lists and nothing else."""
        listing = subprocess.run(["git", "-C", ROOT, "ls-files"], stdout=subprocess.PIPE)
        names = listing.stdout.decode().split()
        found = {name if name.startswith(".ci/") else name.split("/")[0] for name in names}
        self.assertEqual(sorted(found - set(TOP_LEVEL)), [])


class HouseElsewhere(unittest.TestCase):
    """The same, for another Python than 3.11."""

    @unittest.skipUnless(right_python(), "needs Python 3.11")
    def test_house(self):
        """It passes under the right Python."""
        command = [right_python(), "-m", "unittest", "tests.test_house"]
        done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        self.assertEqual(done.returncode, 0, done.stdout.decode())


def main(paths):
    """Print the figures of these files."""
    if sys.version_info[:2] != (3, 11):
        sys.exit("test_house.py: needs Python 3.11, where an f-string is one token")
    for path in paths:
        found = figures(read_file(path))
        print(path + ": " + ", ".join(f"{name} {number:.5g}" for name, number in found.items()))


if __name__ == "__main__":
    main(sys.argv[1:] or [os.path.join(ROOT, "certferry.py")])
